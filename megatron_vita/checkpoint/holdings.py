"""Which boxes of which tensors this rank holds, and which of them it writes.

megatron-core describes the model's tensors (ShardedTensor: key, global shape and offset, replica); of the distributed
optimizer it tells the range of each flattened parameter that this rank holds. Such a range is a run of a row-major
tensor, so it is a few boxes: the world writes every element once, from where it lies, and any layout reads what it
needs by overlap. Weights, of which every data-parallel rank holds a replica, are dealt in the same way, as runs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_vita import core_optimizer
from megatron_vita.checkpoint.boxes import boxes_of_run, extent, shift, volume, whole
from megatron_vita.checkpoint.parts import Part

_EXTRA_STATE = "_extra_state"
"""Transformer Engine's pickled fp8 state: neither written nor asked for, so CPU and GPU checkpoints are one format."""
OPTIMIZER_PREFIX = "optimizer.state."


@dataclass(frozen=True)
class Ranks:
    """This rank's place among those that hold replicas."""

    data: Any
    """The data- and context-parallel group."""
    tensor_rank: int
    tensor_size: int

    @classmethod
    def of(cls, groups: Any = None) -> Ranks:
        """Of parallel.groups.Groups, or of megatron-core's current layout."""
        from megatron.core import parallel_state

        if groups is not None:
            return cls(groups.collection.dp_cp, groups.tp_rank, groups.tp_size)
        return cls(
            parallel_state.get_data_parallel_group(with_context_parallel=True),
            parallel_state.get_tensor_model_parallel_rank(),
            parallel_state.get_tensor_model_parallel_world_size(),
        )


@dataclass(frozen=True)
class Holding:
    """A contiguous part of a parameter (or buffer) of this rank: a box of a tensor of the checkpoint."""

    key: str
    shape: tuple[int, ...]
    """Of the whole tensor, without the rows by which tensor parallelism pads a vocabulary."""
    offset: tuple[int, ...]
    """Of the box in the whole tensor."""
    view: Tensor
    """The box's elements, without padding rows."""
    padding: Tensor
    """The rows behind them that mean nothing."""
    padded_rows: int | None
    """Rows of the whole tensor with its padding, if it is a vocabulary."""
    parameter: Tensor
    """What it is a part of."""
    start: int
    """Its first element in the flattened parameter."""
    duplicate: bool
    """Whether another pipeline stage answers for it: the head that is tied to the embedding."""
    replicated: bool
    """Whether every tensor-parallel rank holds all of it."""

    def parts(self, start: int, stop: int, values: Tensor, *, prefix: str = "") -> Iterator[Part]:
        """The boxes of a run of it.

        Args:
            start: first element of the run, in this holding.
            stop: one past its last element.
            values: `[stop - start]`, the run's elements.
            prefix: of the keys.
        """
        done = 0
        origin = tuple(slice(-one, 0) for one in self.offset)
        for box in boxes_of_run(self.view.shape, start, stop):
            data = values[done : done + volume(box)].view(extent(box))
            yield Part(prefix + self.key, self.shape, shift(box, origin), data)
            done += volume(box)


def share(start: int, stop: int, index: int, count: int) -> tuple[int, int]:
    """The part of a run that belongs to one of several ranks."""
    size = stop - start
    return start + size * index // count, start + size * (index + 1) // count


def holdings(chunks: Sequence[Any], ranks: Ranks, rows_of: Callable[[str], int | None]) -> list[Holding]:
    """Everything that this rank holds of the model.

    Args:
        chunks: bare model chunks.
        rows_of: rows of a vocabulary tensor, by key, that are no padding; none: all.
    """
    metadata = {
        "dp_cp_group": ranks.data,
        # A key for each layer, so that pipeline stages of any size, and converters, can pick layers out.
        "non_homogeneous_layers": True,
        "singleton_local_shards": False,
    }
    found: list[Holding] = []
    for chunk in chunks:
        described = chunk.sharded_state_dict(metadata=metadata)
        covered = set()
        for name, one in described.items():
            if name.endswith(_EXTRA_STATE):
                continue
            covered.add(id(one.data))
            found += _held(one, ranks, rows_of)
        missing = [name for name, parameter in chunk.named_parameters() if id(parameter) not in covered]
        assert not missing, f"no place in a checkpoint: {missing}"
    return found


def _held(one: Any, ranks: Ranks, rows_of: Callable[[str], int | None]) -> Iterator[Holding]:
    from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory

    parameter = one.data
    shards = list(_shards(one.build() if isinstance(one, ShardedTensorFactory) else one))
    local = sum(math.prod(shard.local_shape) for shard in shards)
    for shard in shards:
        assert shard.prepend_axis_num == 0, f"{shard.key}: layers must have keys of their own"
        data = shard.data
        assert data.is_contiguous(), f"{shard.key}: its part is no run of the parameter"
        rows = rows_of(shard.key) if shard.allow_shape_mismatch else None
        shape, kept = tuple(shard.global_shape), len(data) if data.dim() else 1
        if rows is not None:
            shape = (rows, *shape[1:])
            kept = min(max(rows - shard.global_offset[0], 0), kept)
        yield Holding(
            key=shard.key,
            shape=shape,
            offset=tuple(shard.global_offset),
            view=data.detach()[:kept] if data.dim() else data.detach(),
            padding=data.detach()[kept:] if data.dim() else data.detach().reshape(-1)[1:],
            padded_rows=shard.global_shape[0] if shard.allow_shape_mismatch else None,
            parameter=parameter,
            start=data.storage_offset() - parameter.storage_offset(),
            duplicate=shard.replica_id[0] != 0,
            replicated=local == math.prod(shard.global_shape),
        )


def _shards(built: Any) -> Iterator[Any]:
    if isinstance(built, dict | list):  # what a factory has made of one parameter
        for one in built.values() if isinstance(built, dict) else built:
            yield from _shards(one)
    else:
        yield built


def weights_to_write(held: Sequence[Holding], ranks: Ranks) -> list[Part]:
    """This rank's share of the weights: a run of all that its data-parallel group has to write, laid end to end. Where
    tensor-parallel ranks hold the same, that is a share of it."""
    own = [one for one in held if not one.duplicate]
    runs = [
        share(0, one.view.numel(), *((ranks.tensor_rank, ranks.tensor_size) if one.replicated else (0, 1)))
        for one in own
    ]
    total = sum((end - begin) * one.view.element_size() for one, (begin, end) in zip(own, runs, strict=True))
    edges = share(0, total, ranks.data.rank(), ranks.data.size())
    parts: list[Part] = []
    at = 0
    for one, (begin, end) in zip(own, runs, strict=True):
        size = one.view.element_size()
        start, stop = (begin + min(max(-(-(edge - at) // size), 0), end - begin) for edge in edges)
        at += (end - begin) * size
        parts += one.parts(start, stop, one.view.reshape(-1)[start:stop])
    return parts


def weights_to_read(held: Sequence[Holding]) -> list[Part]:
    """All weights that this rank holds."""
    return [
        Part(one.key, one.shape, shift(whole(one.view.shape), tuple(slice(-zero, 0) for zero in one.offset)), one.view)
        for one in held
        if one.view.numel()
    ]


def optimizer_parts(
    states: Iterable[core_optimizer.State], held: Sequence[Holding], ranks: Ranks | None = None
) -> list[Part]:
    """The boxes of what this rank's optimizer holds: moments and, unless a weight itself is float32, its master.

    Args:
        ranks: to write them: without duplicates, and where tensor-parallel ranks hold the same, this rank's share.
            None: to read all of them.
    """
    by_parameter: dict[int, list[Holding]] = {}
    for one in held:
        by_parameter.setdefault(id(one.parameter), []).append(one)
    parts: list[Part] = []
    for _, parameter, first, tensors in states:
        weight = parameter.untyped_storage().data_ptr()
        for name, values in tensors.items():
            if values.untyped_storage().data_ptr() == weight:
                continue  # a float32 weight is its own master
            for one in by_parameter[id(parameter)]:
                if ranks is not None and one.duplicate:
                    continue
                start = max(first - one.start, 0)
                stop = min(first + values.numel() - one.start, one.view.numel())
                if ranks is not None and one.replicated:
                    start, stop = share(start, stop, ranks.tensor_rank, ranks.tensor_size)
                if start < stop:
                    begin = start + one.start - first
                    run = values.detach()[begin : begin + stop - start]
                    parts += one.parts(start, stop, run, prefix=f"{OPTIMIZER_PREFIX}{name}.")
    return parts


def clear_padding(held: Sequence[Holding]) -> None:
    """Rows of a vocabulary that mean nothing are zeros, whatever layout padded them."""
    with torch.no_grad():
        for one in held:
            one.padding.zero_()
