"""Overhead of megatron-core: our training step against plain PyTorch for the same model, inputs and optimizer.

    OMP_NUM_THREADS=1 python benchmarks/overhead.py [--repeats 7]

Both sides take the same optimizer step in one process and float32: vision tower, projector, decoder and loss on the
same packed sequences, forward and backward, clipping by the global norm, AdamW. Plain: the reference implementation of
check_parallel (checks/plain.py) with autograd and torch's AdamW, no process group. Ours: training/step.py
(megatron-core's layers, schedule, DistributedDataParallel and distributed optimizer). Each packed sequence is one
document, so both sides compute the same attention. Runs are interleaved; the minimum CPU time is reported.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence

import torch

from megatron_vita.checks.batches import step_batches
from megatron_vita.checks.options import make_stage
from megatron_vita.checks.plain import token_losses
from megatron_vita.checks.tiny import Pack, draw_weights, tiny_model
from megatron_vita.config import ModelConfig, ParallelConfig, StageConfig, VisionConfig
from megatron_vita.parallel.groups import destroy_groups, init_distributed
from megatron_vita.training.setup import build_model_and_optimizer
from megatron_vita.training.step import train_step

SMALL = ModelConfig(
    num_layers=4,
    hidden_size=256,
    ffn_hidden_size=688,
    num_attention_heads=8,
    num_query_groups=4,
    vocab_size=4096,
    vision=VisionConfig(
        num_layers=3, hidden_size=128, ffn_hidden_size=512, num_attention_heads=4, image_size=32, patch_size=4
    ),
)


def make_packs(model: ModelConfig, tokens: int, tiles: int) -> list[Pack]:
    """Two packed sequences of one document each, a quarter of whose tokens are labelled."""
    assert model.vision is not None
    source = torch.Generator().manual_seed(3)
    size, out = model.vision.image_size, []
    for _ in range(2):
        labels = torch.randint(0, model.vocab_size, (tokens,), generator=source)
        labels[: 3 * tokens // 4] = -100
        first_token = tuple(1 + index * model.vision.tokens_per_tile for index in range(tiles))
        drawn = torch.randint(0, 256, (tiles, 3, size, size), generator=source, dtype=torch.uint8)
        ids = torch.randint(0, model.vocab_size, (tokens,), generator=source)
        out.append(Pack((tokens,), ids, labels, drawn, first_token))
    return out


def our_side(stage: StageConfig, packs: Sequence[Pack]) -> Callable[[], object]:
    """training/step.py's train_step, with world size 1."""
    setup = build_model_and_optimizer(stage)
    step = step_batches(stage, setup.groups, packs)
    return lambda: train_step(stage, setup.groups, setup.wrapped, setup.optimizer, setup.scheduler, step, 1)


def plain_side(stage: StageConfig, packs: Sequence[Pack]) -> Callable[[], object]:
    """The same step in plain PyTorch."""
    model, settings = stage.model, stage.optimizer
    weights = {name: weight.requires_grad_() for name, weight in draw_weights(model).items()}
    optimizer = torch.optim.AdamW(weights.values(), lr=settings.lr, weight_decay=settings.weight_decay)
    count = sum(int((pack.labels >= 0).sum()) for pack in packs)

    def step() -> None:
        optimizer.zero_grad()
        for pack in packs:
            losses = token_losses(
                weights,
                model,
                tokens=pack.tokens,
                labels=pack.labels,
                documents=pack.documents,
                tiles=pack.tiles,
                first_token=pack.first_token,
            )
            (losses.sum() / count).backward()
        torch.nn.utils.clip_grad_norm_(weights.values(), settings.clip_grad)
        optimizer.step()

    return step


def least_seconds(sides: Sequence[Callable[[], object]], repeats: int, steps: int) -> list[float]:
    """Least CPU seconds of one step of each side, over interleaved repeats after one that warms up."""
    best = [float("inf")] * len(sides)
    for repeat in range(repeats + 1):
        for index, side in enumerate(sides):
            began = time.process_time()
            for _ in range(steps):
                side()
            if repeat:
                best[index] = min(best[index], (time.process_time() - began) / steps)
    return best


def main() -> int:
    """Measure the grid's tiny model and a small one."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    init_distributed()
    sizes = (("tiny", tiny_model(), 64, 4, 10), ("small", SMALL, 256, 3, 2), ("small", SMALL, 1024, 12, 1))
    for name, model, tokens, tiles, steps in sizes:
        packs = make_packs(model, tokens, tiles)
        stage = make_stage(ParallelConfig(), model, len(packs), 1, False, seq_length=tokens)
        ours, plain = least_seconds([our_side(stage, packs), plain_side(stage, packs)], arguments.repeats, steps)
        print(
            f"{name} model (width {model.hidden_size}), 2 packed sequences of {tokens} tokens, {tiles} tiles: ours "
            f"{1000 * ours:.1f} ms, plain {1000 * plain:.1f} ms of CPU a step: {ours / plain:.2f} times, "
            f"{1000 * (ours - plain):+.1f} ms"
        )
        destroy_groups()
    return 0


if __name__ == "__main__":
    sys.exit(main())
