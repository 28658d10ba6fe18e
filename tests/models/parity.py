"""A tiny model, two packed sequences, and one training step without the update, in any parallel layout."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_vita.config import ModelConfig, ParallelConfig, StageConfig, TrainConfig, VisionConfig
from megatron_vita.layout import SequenceLayout, TileRoutes
from megatron_vita.models.build import build_model, global_name, local_shard
from megatron_vita.models.vita import VitaModel
from megatron_vita.parallel.grads import divide_grads, finalize_grads
from megatron_vita.parallel.groups import Groups, build_groups, destroy_groups

VISION = VisionConfig(
    num_layers=2, hidden_size=16, ffn_hidden_size=24, num_attention_heads=2, image_size=16, patch_size=4
)
MODEL = ModelConfig(
    num_layers=2,
    hidden_size=24,
    ffn_hidden_size=40,
    num_attention_heads=4,
    num_query_groups=2,
    vocab_size=37,
    init_method_std=0.3,
    vision=VISION,
)
GLM = dataclasses.replace(MODEL, kv_channels=8, rotary_percent=0.5, rotary_interleaved=True)
"""As GLM-4: half of each head is turned, by pairs of neighbours."""
TOKENS_PER_TILE = VISION.tokens_per_tile

SPECS: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...] = (
    ((13, 9, 20, 5, 1), (1, 14, 22, 27, 33)),
    ((30, 2, 16), (3, 34, 40)),
)
"""(documents, global index of the first placeholder of each tile) of each packed sequence. Tiles straddle every
boundary between ranks."""


@dataclasses.dataclass(frozen=True)
class FullSequence:
    """A full packed sequence, before it is partitioned over ranks."""

    documents: tuple[int, ...]
    first_token: tuple[int, ...]
    tokens: torch.Tensor
    labels: torch.Tensor
    tiles: torch.Tensor


def make_packed(specs: Any = SPECS, *, vocab: int = MODEL.vocab_size) -> list[FullSequence]:
    """The same packed sequences on every rank. The last document of each and about 60 % of all tokens have no label."""
    generator = torch.Generator().manual_seed(7)
    out = []
    for documents, first_token in specs:
        length = sum(documents)
        tokens = torch.randint(0, vocab, (length,), generator=generator)
        labels = torch.randint(0, vocab, (length,), generator=generator)
        labels[torch.rand(length, generator=generator) < 0.6] = -100
        labels[length - documents[-1] :] = -100
        size = VISION.image_size
        tiles = torch.randint(0, 256, (len(first_token), 3, size, size), generator=generator, dtype=torch.uint8)
        out.append(FullSequence(documents, first_token, tokens, labels, tiles))
    return out


def inputs_of(packed_seq: FullSequence, groups: Groups, *, reset: bool = True) -> dict[str, Any]:
    """VitaModel.forward's keyword arguments on this rank."""
    documents = packed_seq.documents if reset else (sum(packed_seq.documents),)
    layout = SequenceLayout(documents, cp=groups.cp_size, sp=groups.sequence_shards)
    routes = TileRoutes(layout, np.array(packed_seq.first_token, dtype=np.int64), TOKENS_PER_TILE, tp=groups.tp_size)
    mine = torch.from_numpy(layout.local_positions(groups.cp_rank))
    tiles = packed_seq.tiles[list(routes.tiles_of(groups.group_rank))] if groups.first_stage else packed_seq.tiles[:0]
    return {
        "tokens": packed_seq.tokens[mine][None],
        "positions": torch.from_numpy(layout.positions_in_document)[mine][None],
        "layout": layout,
        "routes": routes,
        "tiles": tiles,
        "labels": packed_seq.labels[mine][None],
    }


def stage_of(parallel: dict[str, Any], *, model: ModelConfig = MODEL, **train: Any) -> StageConfig:
    return StageConfig(model=model, parallel=ParallelConfig(**parallel), train=TrainConfig(**train))


def one_step(
    stage: StageConfig,
    packed_seqs: list[FullSequence],
    *,
    dtype: torch.dtype = torch.float64,
    reset: bool = True,
    distributed_optimizer: bool = False,
    after: Callable[[Any], float] | None = None,
) -> tuple[list[VitaModel], Groups, float]:
    """Build, run all packed sequences through megatron-core's schedule and finish the gradients.

    Returns:
        this rank's chunks with `main_grad` on their trainable parameters, the groups (still alive), and the loss (sum /
        labels) or what `after` makes of the DDP-wrapped chunks.
    """
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.pipeline_parallel import get_forward_backward_func

    groups = build_groups(stage.parallel)
    models = build_model(stage, groups, dtype=dtype)
    models[0].config.finalize_model_grads_func = finalize_grads
    config = DistributedDataParallelConfig(
        overlap_grad_reduce=stage.parallel.overlap_grad_reduce, use_distributed_optimizer=distributed_optimizer
    )
    wrapped = [DistributedDataParallel(model.config, config, model) for model in models]
    if stage.parallel.overlap_grad_reduce:
        hooks = [chunk.no_sync for chunk in wrapped]
        models[0].config.no_sync_func = hooks if len(hooks) > 1 else hooks[0]
    for chunk in wrapped:
        chunk.train()
        chunk.zero_grad_buffer()
    mine = packed_seqs[groups.dp_rank :: groups.dp_size]
    losses: list[torch.Tensor] = []

    def sum_of(count: torch.Tensor, output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
        total = output.sum()
        losses.append(total.detach())
        return total, count, {}

    def step(rest: Iterator[FullSequence], chunk: Any) -> Any:
        inputs = inputs_of(next(rest), groups, reset=reset)
        if not chunk.module.post_process:
            return chunk(**{**inputs, "labels": None}), None
        count = (inputs["labels"] >= 0).sum().int()
        return chunk(**inputs), partial(sum_of, count)

    get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=[iter(mine) for _ in wrapped],
        model=wrapped,
        num_microbatches=len(mine),
        seq_length=sum(packed_seqs[0].documents),
        micro_batch_size=1,
        forward_only=False,
    )
    labels = sum(int((packed_seq.labels >= 0).sum()) for packed_seq in packed_seqs)
    divide_grads(wrapped, labels)
    if after is not None:
        return models, groups, after(wrapped)
    total = torch.stack(losses).sum() if losses else torch.zeros((), dtype=dtype)
    torch.distributed.all_reduce(total, group=groups.collection.dp_cp)
    return models, groups, float(total) / max(labels, 1)


def reference_step(path: str, train: dict[str, Any], specs: Any, reset: bool) -> None:
    """One process: write loss and all gradients to `path`."""
    models, _, loss = one_step(stage_of({}, **train), make_packed(specs), reset=reset)
    grads = {name: p.main_grad.clone() for name, p in named(*models) if p.requires_grad}
    torch.save({"loss": loss, "grads": grads}, path)


def named(*chunks: VitaModel) -> Iterator[tuple[str, Any]]:
    """Parameters under their names in checkpoints."""
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            yield global_name(name, chunk), parameter


def compare_step(
    reference: str,
    parallel: dict[str, Any],
    train: dict[str, Any],
    specs: Any = SPECS,
    reset: bool = True,
    tolerance: float = 1e-9,
) -> None:
    """Run one step in a layout; loss and every gradient must be the reference's, relative to the tensor's largest."""
    want = torch.load(reference, weights_only=True)
    models, groups, loss = one_step(stage_of(parallel, **train), make_packed(specs), reset=reset)
    if groups.last_stage:
        assert abs(loss - want["loss"]) <= tolerance * max(1.0, abs(want["loss"])), (loss, want["loss"])
    for name, parameter in named(*models):
        assert parameter.requires_grad == (name in want["grads"]), name
        if not parameter.requires_grad:
            continue
        whole = want["grads"][name]
        mine = local_shard(whole, parameter, name, models[0].model, groups)
        worst = float((parameter.main_grad - mine).abs().max() / whole.abs().max().clamp_min(1e-12))
        assert worst <= tolerance, f"{name}: relative difference {worst:.1e} in {parallel}"
    everyone: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyone, {name for name, p in named(*models) if p.requires_grad})
    assert set().union(*everyone) == set(want["grads"]), f"no rank holds a tensor of the reference in {parallel}"
    destroy_groups()


def write_reference(path: Path, train: dict[str, Any], specs: Any = SPECS, reset: bool = True) -> str:
    """Run the reference in a process of its own."""
    from tests.ranks import run_ranks

    run_ranks(1, reference_step, str(path), train, specs, reset)
    return str(path)
