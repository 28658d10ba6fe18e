"""Load under any parallel layout, and say what a save writes. All functions are called by every rank of the world.

A rank reads the stored pieces that overlap what it holds, in place: no plan of all ranks, no exchange, and no more
memory than a piece.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_vita import core_optimizer, device
from megatron_vita.checkpoint import folder as folders
from megatron_vita.checkpoint.agree import everywhere, on_rank_zero
from megatron_vita.checkpoint.holdings import (
    OPTIMIZER_PREFIX,
    Holding,
    Ranks,
    clear_padding,
    holdings,
    optimizer_parts,
    weights_to_read,
    weights_to_write,
)
from megatron_vita.checkpoint.offline import model_keys
from megatron_vita.checkpoint.parts import Part
from megatron_vita.checkpoint.reader import read
from megatron_vita.checkpoint.state import RunState
from megatron_vita.checkpoint.stored import CheckpointTensors
from megatron_vita.checkpoint.tensors import LazyTensors, as_lazy
from megatron_vita.checkpoint.writer import COMMON_FILE
from megatron_vita.config import ModelConfig
from megatron_vita.errors import CheckpointError

_STEP, _SCHEDULE = "optimizer_step", "scheduler_num_steps"
"""Keys of common.json: optimizer steps done, and steps that the schedule has counted."""
_COMMON_VERSION_2 = "common.pt"


def training_parts(
    model_chunks: Sequence[nn.Module], optimizer: Any | None, scheduler: Any | None, state: RunState, groups: Any
) -> tuple[list[Part], dict[str, float]]:
    """(what this rank writes of weights and optimizer, the numbers that go with it)."""
    ranks = Ranks.of(groups)
    vocabulary = state.stage.model.vocab_size or None
    held = holdings(_bare(model_chunks), ranks, lambda key: vocabulary)
    parts = weights_to_write(held, ranks)
    common: dict[str, float] = {}
    if optimizer is not None:
        core_optimizer.allocate(optimizer)  # one that never stepped has no state to describe yet
        parts += optimizer_parts(core_optimizer.states(optimizer), held, ranks)
        common[_STEP] = core_optimizer.steps_done(optimizer)
    if scheduler is not None:
        common[_SCHEDULE] = scheduler.num_steps
    return parts, common


def load_weights(folder: str | Path, model_chunks: Sequence[nn.Module]) -> RunState:
    """Load a checkpoint's weights, and nothing else, into models laid out in any way.

    Raises:
        CheckpointError: on every rank; before any weight has changed if a tensor is missing, left over or of another
            shape (named, with both shapes).
        DamagedError: the checkpoint is not what was written. Weights may have changed.
    """
    return _load(folder, model_chunks, None, None)


def load_training(folder: str | Path, model_chunks: Sequence[nn.Module], optimizer: Any, scheduler: Any) -> RunState:
    """Load weights, optimizer and schedule, so that the next step is what it would have been.

    Settings of optimizer and schedule stay those that they were built with.

    Raises:
        CheckpointError, DamagedError: as load_weights; or the checkpoint was saved without its optimizer.
    """
    return _load(folder, model_chunks, optimizer, scheduler)


def load_tensors(
    tensors: Mapping[str, Tensor],
    model_chunks: Sequence[nn.Module],
    where: str,
    *,
    saved: ModelConfig | None = None,
) -> None:
    """Load full tensors, by checkpoint key, into models laid out in any way: weights that never were in a checkpoint.

    Args:
        tensors: lazy ones (a Hugging Face folder through convert) are read a part at a time.
        where: names the source in errors.
        saved: the model that they belong to; what shapes do not show is compared with it.

    Raises:
        CheckpointError: a tensor is missing, left over or of another shape, or belongs to another model.
    """
    if saved is not None:
        _check_settings(where, saved, _bare(model_chunks))
    source = as_lazy(tensors)
    held = _held(source, model_chunks)
    parts = weights_to_read(held)
    _check(source, parts, held, where)

    def fill() -> None:
        with torch.no_grad():
            for part in parts:
                if part.data.dtype == source.dtype(part.key) and device.is_host_memory(part.data):
                    source.read_into(part.key, part.box, part.data)
                else:
                    part.data.copy_(source.read(part.key, part.box))

    everywhere(fill, where)
    clear_padding(held)


def read_state(folder: str | Path) -> RunState:
    """run.json of a checkpoint (or of the newest one in a folder of checkpoints), verified."""
    return RunState.read(folders.resolve(folder))


def _load(path: str | Path, model_chunks: Sequence[nn.Module], optimizer: Any, scheduler: Any) -> RunState:
    folder = on_rank_zero(lambda: folders.resolve(path))  # one rank looks at all files, not each
    where = str(folder)
    tensors = everywhere(lambda: CheckpointTensors(folder, check=False), where)
    state = everywhere(lambda: RunState.parse(tensors.integrity), where)
    _check_settings(where, state.stage.model, _bare(model_chunks))
    held = _held(tensors, model_chunks)
    parts = weights_to_read(held)
    states = []
    if optimizer is not None:
        if not any(key.startswith(OPTIMIZER_PREFIX) for key in tensors):
            raise CheckpointError(
                f"{folder}: holds weights only (checkpoint.keep_optimizer was false), so its stage cannot go on from "
                "it. Give another checkpoint.save, with this folder as checkpoint.pretrained_checkpoint."
            )
        common = everywhere(lambda: _common(tensors), where)
        core_optimizer.set_steps_done(optimizer, common[_STEP])
        states = list(core_optimizer.states(optimizer))
        parts += optimizer_parts(states, held)
        if scheduler is not None:
            scheduler.num_steps = int(common[_SCHEDULE])
            scheduler.step(0)
    _check(tensors, parts, held, where)
    everywhere(lambda: read(parts, tensors), where)
    for inner, parameter, _, loaded in states:
        core_optimizer.restore(inner, parameter, loaded)
    clear_padding(held)
    return state


def _common(tensors: CheckpointTensors) -> dict[str, float]:
    """Numbers of the optimizer and the schedule."""
    path = tensors.folder / COMMON_FILE
    try:
        if tensors.integrity.version >= 3:
            values = json.loads(tensors.integrity.read_file(COMMON_FILE))
            return {key: float(values[key]) for key in (_STEP, _SCHEDULE)}
        path = tensors.folder / _COMMON_VERSION_2
        content = io.BytesIO(tensors.integrity.read_file(_COMMON_VERSION_2))
        old = torch.load(content, map_location="cpu", weights_only=True)
        step = max(float(group["step"]) for group in old["optimizer"]["optimizer"]["param_groups"])
        return {_STEP: step, _SCHEDULE: float(old["scheduler"]["num_steps"])}
    except CheckpointError:
        raise
    except Exception as error:  # weights_only refuses with errors of many classes
        raise CheckpointError(f"{path}: refused ({error!r}). Do not use this checkpoint.") from error


def _held(tensors: LazyTensors, model_chunks: Sequence[nn.Module]) -> list[Holding]:
    def rows(key: str) -> int | None:
        return tensors.shape(key)[0] if key in tensors else None

    return holdings(_bare(model_chunks), Ranks.of(), rows)


def _check(tensors: LazyTensors, parts: Sequence[Part], held: Sequence[Holding], where: str) -> None:
    """Compare names and shapes on all ranks before anything is read; raise the same error on all of them."""
    needed = {part.key: part.shape for part in parts} | {one.key: one.shape for one in held}
    problems = [problem for key, shape in needed.items() if (problem := _mismatch(tensors, key, shape))]
    for one in held:
        if one.key in tensors and one.padded_rows is not None and one.padded_rows < tensors.shape(one.key)[0]:
            problems.append(
                f"{one.key} has {tensors.shape(one.key)[0]} rows in the checkpoint and {one.padded_rows} in the model"
            )
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, (problems, list(needed)))
    problems = sorted({problem for found, _ in everyone for problem in found})
    asked = {key for _, keys in everyone for key in keys}
    problems += [f"{key} {tensors.shape(key)} is not in the model" for key in model_keys(tensors) if key not in asked]
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise CheckpointError(
            f"{where}: does not fit the model: {problems[0]}{more}. "
            "Make the recipe's model section that of the checkpoint (run.json, stage.model), or use another one."
        )


def _mismatch(tensors: LazyTensors, key: str, needed: tuple[int, ...]) -> str:
    if key not in tensors:
        if key.startswith(OPTIMIZER_PREFIX):
            return f"{key} is missing (was the checkpoint saved with its optimizer, and the same parts trained?)"
        return f"{key} {needed} is missing"
    saved = tensors.shape(key)
    return "" if saved == needed else f"{key} has shape {saved} in the checkpoint and {needed} in the model"


def _check_settings(where: str, saved: ModelConfig, chunks: Sequence[nn.Module]) -> None:
    """Compare what shapes do not show: how rows split into heads, and how many rows of a vocabulary are padding."""
    for chunk in chunks:
        needed = getattr(chunk, "model", None)
        if not isinstance(needed, ModelConfig):
            continue
        pairs = [
            (f"model.{name}", getattr(saved, name), getattr(needed, name))
            for name in ("vocab_size", "num_attention_heads", "num_query_groups", "head_dim")
        ]
        if saved.vision is not None and needed.vision is not None:
            heads = (saved.vision.num_attention_heads, needed.vision.num_attention_heads)
            pairs.append(("model.vision.num_attention_heads", *heads))
        for name, ours, theirs in pairs:
            if ours != theirs:
                raise CheckpointError(
                    f"{where}: was saved with {name}={ours}, the recipe has {theirs}. Set it to {ours}, or start from "
                    "another checkpoint."
                )


def _bare(model_chunks: Sequence[nn.Module]) -> list[Any]:
    """The chunks without data parallelism and bf16 around them."""
    from megatron.core.utils import unwrap_model

    bare: list[Any] = unwrap_model(list(model_chunks))
    return bare
