"""Save and load under any parallel layout, through megatron-core's distributed checkpoints.

megatron-core says which rank holds which part of which tensor (`sharded_state_dict`); our two strategies, plugged in
where it lets one plug them in, write and read the bytes (storage.py, stored.py). Reading needs no plan and no
exchange: a rank reads the parts that overlap what it holds. All functions here are called by every rank of the world.

megatron-core and torch are imported where they are used: conversion does without them and their seconds of imports.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_vita.checkpoint import folder as folders
from megatron_vita.checkpoint.agree import on_rank_zero
from megatron_vita.checkpoint.integrity import Integrity, write_integrity
from megatron_vita.checkpoint.offline import model_keys
from megatron_vita.checkpoint.state import RUN_FILE, RunState
from megatron_vita.checkpoint.storage import WrittenPiece
from megatron_vita.checkpoint.stored import CheckpointTensors
from megatron_vita.config import ModelConfig
from megatron_vita.errors import CheckpointError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

CONTENT: dict[str, Any] = {
    # The one optimizer format of 0.16.1 that every layout can read (the default one is dead code).
    "distrib_optim_sharding_type": "fully_reshardable",
    "chained_optim_avoid_prefix": True,
    "singleton_local_shards": False,
    # A key for each layer, so that pipeline stages of any size, and converters, can pick layers out.
    "non_homogeneous_layers": True,
}
_EXTRA_STATE = "_extra_state"
"""Transformer Engine's pickled fp8 state: neither written nor asked for, so CPU and GPU checkpoints are one format."""


def save(
    root: str | Path,
    model_chunks: Sequence[torch.nn.Module],
    optimizer: Any | None,
    scheduler: Any | None,
    state: RunState,
    groups: Any = None,
    *,
    tokenizer_dir: str | Path | None = None,
) -> Path:
    """Write root/iter_<state.iteration>: everything or, if anything fails or is killed, nothing.

    Args:
        root: folder of checkpoints, on a file system that all ranks see.
        model_chunks: this rank's part of the model, wrapped or bare.
        optimizer: megatron-core's optimizer; none writes weights only.
        scheduler: anything with `state_dict()`, for instance OptimizerParamScheduler.
        state: what goes to run.json; the same on every rank.
        groups: the layout (parallel.groups.Groups); by default megatron-core's current one.
        tokenizer_dir: Hugging Face tokenizer folder to copy along.

    Returns:
        The published folder, on every rank.

    Raises:
        CheckpointError: on every rank, if any rank could not write its part.
    """
    import torch.distributed as dist
    from megatron.core import dist_checkpointing

    from megatron_vita.checkpoint.strategies import WritePieces

    root = Path(root)
    staging = on_rank_zero(lambda: folders.start_staging(root, state.iteration))
    try:
        content = _content(model_chunks, optimizer, scheduler, groups, loading=False)
        strategy = WritePieces(state.stage.model.vocab_size)
        # megatron-core's own check that each part is written once would send every rank's list to every rank;
        # write_metadata proves the same on rank 0.
        dist_checkpointing.save(
            content, str(staging), strategy, validate_access_integrity=False, content_metadata=dict(CONTENT)
        )
        return on_rank_zero(lambda: _finish(root, staging, state, tokenizer_dir, strategy.written))
    except BaseException:
        if dist.get_rank() == 0:
            folders.discard_staging(root, state.iteration)
        raise


def load_weights(folder: str | Path, model_chunks: Sequence[torch.nn.Module]) -> RunState:
    """Load a checkpoint's weights, and nothing else, into models laid out in any way.

    Raises:
        CheckpointError: on every rank and before any weight has changed, if the folder is damaged, or a tensor is
            missing, left over or of another shape (named, with both shapes).
    """
    folder = folders.resolve(folder)
    state = RunState.read(folder)
    _load(folder, _content(model_chunks, None, None, None, loading=True), model_chunks, state)
    return state


def load_training(
    folder: str | Path, model_chunks: Sequence[torch.nn.Module], optimizer: Any, scheduler: Any
) -> RunState:
    """Load weights, optimizer and schedule, so that the next step is what it would have been.

    Raises:
        CheckpointError: as load_weights; or the checkpoint was saved without its optimizer.
    """
    from megatron_vita import device

    folder = folders.resolve(folder)
    state = RunState.read(folder)
    device.prepare_optimizer_for_load(optimizer)
    content = _content(model_chunks, optimizer, None, None, loading=True)
    loaded = _load(folder, content, model_chunks, state)
    optimizer.load_state_dict(loaded["optimizer"])
    device.fix_optimizer_after_load(optimizer)
    if scheduler is not None:
        scheduler.load_state_dict(loaded["scheduler"])
    return state


def load_tensors(
    tensors: Mapping[str, Tensor],
    model_chunks: Sequence[torch.nn.Module],
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
    from megatron_vita.checkpoint.strategies import fill

    if saved is not None:
        _check_settings(where, saved, _bare(model_chunks))
    content = _content(model_chunks, None, None, None, loading=True)
    _into_models(fill(content, tensors, where), model_chunks)


def read_state(folder: str | Path) -> RunState:
    """run.json of a checkpoint (or of the newest one in a folder of checkpoints), verified."""
    folder = folders.resolve(folder)
    Integrity.read(folder).read_file(RUN_FILE)
    return RunState.read(folder)


def _content(
    model_chunks: Sequence[torch.nn.Module], optimizer: Any, scheduler: Any, groups: Any, *, loading: bool
) -> dict[str, Any]:
    """megatron-core's sharded state dict of all that is saved or loaded."""
    from megatron.core import parallel_state

    from megatron_vita import device

    if groups is not None:
        data_ranks = groups.collection.dp_cp
    else:
        data_ranks = parallel_state.get_data_parallel_group(with_context_parallel=True)
    metadata = {**CONTENT, "dp_cp_group": data_ranks}
    content: dict[str, Any] = {}
    for number, chunk in enumerate(_bare(model_chunks)):
        full = chunk.sharded_state_dict(metadata=metadata)
        content[f"model{number}"] = {name: one for name, one in full.items() if not name.endswith(_EXTRA_STATE)}
    if optimizer is not None:
        if not loading:
            device.prepare_optimizer_for_load(optimizer)  # one that never stepped has no state to describe yet
        content["optimizer"] = optimizer.sharded_state_dict(dict(content), is_loading=loading, metadata=metadata)
    if scheduler is not None:
        content["scheduler"] = scheduler.state_dict()
    return content


def _finish(
    root: Path, staging: Path, state: RunState, tokenizer_dir: str | Path | None, written: list[WrittenPiece]
) -> Path:
    """Rank 0's last acts: what lies beside the tensors, the digests, the name."""
    (staging / RUN_FILE).write_text(state.to_json(), encoding="utf-8")
    folders.copy_tokenizer(Path(tokenizer_dir) if tokenizer_dir else None, staging)
    pieces: dict[str, list[tuple[int, str]]] = {}
    for one in written:
        pieces.setdefault(one.file, []).append((one.length, one.digest))
    write_integrity(staging, pieces)
    return folders.publish(root, state.iteration)


def _load(folder: Path, content: dict[str, Any], model_chunks: Sequence[torch.nn.Module], state: RunState) -> Any:
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.core import CheckpointingException

    from megatron_vita.checkpoint.strategies import ReadCommon, ReadParts

    _check_settings(str(folder), state.stage.model, _bare(model_chunks))
    tensors = CheckpointTensors(folder)
    tensors.integrity.read_file(RUN_FILE)  # `state` is what was written, too
    if "optimizer" in content and len(model_keys(tensors)) == len(tensors):
        raise CheckpointError(
            f"{folder}: holds weights only (checkpoint.keep_optimizer was false), so its stage cannot go on from it. "
            "Give another checkpoint.save, with this folder as checkpoint.pretrained_checkpoint."
        )
    try:
        loaded = dist_checkpointing.load(
            content,
            str(folder),
            ReadParts(tensors, str(folder), vocab_size=state.stage.model.vocab_size),
            ReadCommon(tensors.integrity),
            validate_access_integrity=False,
        )
    except CheckpointingException as error:
        raise CheckpointError(f"{folder}: {error}") from None
    _into_models(loaded, model_chunks)
    return loaded


def _check_settings(where: str, saved: ModelConfig, chunks: Sequence[torch.nn.Module]) -> None:
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


def _into_models(loaded: Mapping[str, Any], model_chunks: Sequence[torch.nn.Module]) -> None:
    for number, chunk in enumerate(_bare(model_chunks)):
        result = chunk.load_state_dict(loaded[f"model{number}"], strict=False)
        missing = [name for name in result.missing_keys if not name.endswith(_EXTRA_STATE)]
        assert not missing, missing
        assert not result.unexpected_keys, result.unexpected_keys


def _bare(model_chunks: Sequence[torch.nn.Module]) -> list[Any]:
    """The chunks without data parallelism and bf16 around them."""
    from megatron.core.utils import unwrap_model

    bare: list[Any] = unwrap_model(list(model_chunks))
    return bare
