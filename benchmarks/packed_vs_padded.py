"""Our packed training step against stock transformers on the same samples, padded.

    OMP_NUM_THREADS=1 python benchmarks/packed_vs_padded.py [--repeats 5] [--profile]

Both sides train the same architecture (tower 3 x 128, decoder 4 x 256, 8 heads, 4 KV groups, vocabulary 4,096, float32,
one thread) with AdamW and gradient clipping on the same token ids, labels and tiles. Stock: transformers'
InternVLForConditionalGeneration, eager attention, samples padded to the longest of their batch, with an attention mask.
Ours: the stage-2 step (DDP, distributed optimizer, packs of 2,048 tokens, document masking) through megatron-core. A
batch of the stock side holds the samples of one of our packs. Runs are interleaved; the minimum of each is reported.
Prints samples per CPU-second of both and their ratio, for a realistic mix of lengths and for samples of one length.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import InternVLConfig, InternVLForConditionalGeneration

from megatron_vita.config import (
    IMAGE_NORMS,
    CheckpointConfig,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    StageConfig,
    TrainConfig,
    VisionConfig,
)
from megatron_vita.data.loading.batch import Batch
from megatron_vita.data.loading.loader import StepBatches
from megatron_vita.data.shards.writer.packing import pack
from megatron_vita.layout import SequenceLayout, TileRoutes
from megatron_vita.parallel.groups import destroy_groups, init_distributed
from megatron_vita.training.setup import build_model_and_optimizer
from megatron_vita.training.step import train_step

PACK, VOCAB, CONTEXT_ID = 2048, 4096, 4095
VISION = VisionConfig(
    num_layers=3, hidden_size=128, ffn_hidden_size=512, num_attention_heads=4, image_size=32, patch_size=4
)
MODEL = ModelConfig(
    num_layers=4,
    hidden_size=256,
    ffn_hidden_size=688,
    num_attention_heads=8,
    num_query_groups=4,
    vocab_size=VOCAB,
    vision=VISION,
)


@dataclass(frozen=True)
class Sample:
    """One conversation: pictures first, then a question, then the labelled answer."""

    tokens: np.ndarray
    """int64 `[n]`."""
    labels: np.ndarray
    """int64 `[n]`, aligned with tokens (not shifted), -100 outside the answer."""
    tiles: np.ndarray
    """uint8 `[tiles, 3, 32, 32]`."""


def make_samples(lengths: Sequence[int], rng: np.random.Generator) -> list[Sample]:
    """Random samples of given lengths: about half of each is picture, a quarter question, a quarter answer."""
    samples = []
    per_tile = VISION.tokens_per_tile
    for length in lengths:
        tiles = max(1, length // 2 // per_tile)
        tokens = rng.integers(0, CONTEXT_ID, length)
        tokens[1 : 1 + tiles * per_tile] = CONTEXT_ID
        labels = np.full(length, -100)
        answer = length - length // 4
        labels[answer:] = tokens[answer:]
        samples.append(Sample(tokens, labels, rng.integers(0, 256, (tiles, 3, 32, 32), dtype=np.uint8)))
    return samples


def our_batch(samples: Sequence[Sample]) -> Batch:
    """The samples as one packed sequence of PACK tokens; padding is a document of its own."""
    lengths = [len(sample.tokens) for sample in samples]
    rest = PACK - sum(lengths)
    layout = SequenceLayout(tuple(lengths + [rest] * (rest > 0)))
    tokens = np.concatenate([sample.tokens for sample in samples] + [np.zeros(rest, dtype=np.int64)])
    shifted = [np.append(sample.labels[1:], -100) for sample in samples]
    labels = np.concatenate([*shifted, np.full(rest, -100)])
    starts = np.cumsum([0, *lengths])
    first = [
        start + 1 + tile * VISION.tokens_per_tile
        for start, sample in zip(starts, samples, strict=False)
        for tile in range(len(sample.tiles))
    ]
    routes = TileRoutes(layout, np.asarray(first, dtype=np.int64), VISION.tokens_per_tile)
    return Batch(
        tokens=torch.from_numpy(tokens)[None],
        labels=torch.from_numpy(labels)[None],
        positions=torch.from_numpy(layout.positions_in_document)[None],
        layout=layout,
        tiles=torch.from_numpy(np.concatenate([sample.tiles for sample in samples])),
        tile_ids=torch.arange(len(first)),
        routes=routes,
        sample_ids=tuple(range(len(samples))),
    )


def our_side(packs: Sequence[Sequence[Sample]]) -> Callable[[], object]:
    """A function that takes one optimizer step over all packs with training/step.py."""
    stage = StageConfig(
        name="bench",
        model=MODEL,
        data=DataConfig(seq_length=PACK, reset_per_document=True),
        optimizer=OptimizerConfig(lr=1e-4),
        train=TrainConfig(global_batch_size=len(packs), train_iters=1000),
        checkpoint=CheckpointConfig(),
    )
    batches = [our_batch(samples) for samples in packs]
    step = StepBatches(
        micro_batches=batches,
        pack_ids=tuple(range(len(packs))),
        sample_ids=(),
        num_labels=sum(int((batch.labels >= 0).sum()) for batch in batches),
        failed=(),
        consumed_packs=len(packs),
    )
    setup = build_model_and_optimizer(stage)
    return lambda: train_step(stage, setup.groups, setup.wrapped, setup.optimizer, setup.scheduler, step, 1)


def stock_side(packs: Sequence[Sequence[Sample]]) -> Callable[[], object]:
    """The same with stock transformers: one padded batch for each pack, one optimizer step over all of them."""
    config = InternVLConfig(
        vision_config={
            "hidden_size": VISION.hidden_size,
            "num_hidden_layers": VISION.num_layers,
            "num_attention_heads": VISION.num_attention_heads,
            "intermediate_size": VISION.ffn_hidden_size,
            "image_size": [VISION.image_size] * 2,
            "patch_size": [VISION.patch_size] * 2,
            "attention_bias": True,
        },
        text_config={
            "model_type": "qwen2",
            "hidden_size": MODEL.hidden_size,
            "num_hidden_layers": MODEL.num_layers,
            "num_attention_heads": MODEL.num_attention_heads,
            "num_key_value_heads": MODEL.num_query_groups,
            "intermediate_size": MODEL.ffn_hidden_size,
            "vocab_size": VOCAB,
            "rope_theta": MODEL.rotary_base,
            "use_cache": False,
        },
        image_token_id=CONTEXT_ID,
        image_seq_length=VISION.tokens_per_tile,
        tie_word_embeddings=False,
    )
    config._attn_implementation = "eager"
    model = InternVLForConditionalGeneration(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.0)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in IMAGE_NORMS["imagenet"])
    batches = []
    for samples in packs:
        longest = max(len(sample.tokens) for sample in samples)

        def padded(arrays: Sequence[np.ndarray], fill: int, longest: int = longest) -> torch.Tensor:
            rows = [np.pad(array, (0, longest - len(array)), constant_values=fill) for array in arrays]
            return torch.from_numpy(np.stack(rows))

        pixels = torch.from_numpy(np.concatenate([sample.tiles for sample in samples])).float() / 255
        batches.append(
            {
                "input_ids": padded([sample.tokens for sample in samples], 0),
                "attention_mask": padded([np.ones_like(sample.tokens) for sample in samples], 0),
                "labels": padded([sample.labels for sample in samples], -100),
                "pixel_values": (pixels - mean) / std,
            }
        )

    def step() -> None:
        optimizer.zero_grad()
        for batch in batches:
            (model(**batch, use_cache=False).loss / len(batches)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return step


def best_seconds(sides: Sequence[Callable[[], object]], repeats: int) -> list[float]:
    """Least CPU seconds of each side over interleaved repeats, after one that warms up."""
    best = [float("inf")] * len(sides)
    for repeat in range(repeats + 1):
        for index, side in enumerate(sides):
            began = time.process_time()
            side()
            if repeat:
                best[index] = min(best[index], time.process_time() - began)
    return best


def main() -> int:
    """Measure both mixes and print the ratios."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--profile", action="store_true", help="where our step's time goes")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    init_distributed()
    rng = np.random.default_rng(0)
    spread = np.clip(rng.lognormal(5.6, 0.8, 24), 40, PACK).astype(int).tolist()
    for title, lengths, bar in (("mixed lengths", spread, 1.0), ("one length of 512", [512] * 8, 0.9)):
        samples = make_samples(lengths, rng)
        packs = [[samples[index] for index in one] for one in pack(lengths, PACK)]
        ours, stock = our_side(packs), stock_side(packs)
        seconds = best_seconds([ours, stock], arguments.repeats)
        rates = [len(samples) / one for one in seconds]
        fill = sum(lengths) / (PACK * len(packs))
        tokens = sum(len(one) * max(len(sample.tokens) for sample in one) for one in packs)
        print(
            f"{title}: {len(samples)} samples; packs {fill:.0%} full, padded {sum(lengths) / tokens:.0%} full\n"
            f"  ours {rates[0]:.2f}, stock {rates[1]:.2f} samples per CPU-second: {rates[0] / rates[1]:.2f} (bar {bar})"
        )
        if arguments.profile:
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
                ours()
            print(profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=20, max_name_column_width=50))
        destroy_groups()
    return 0


if __name__ == "__main__":
    sys.exit(main())
