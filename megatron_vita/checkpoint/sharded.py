"""Save and load under any parallel layout, through megatron-core's distributed checkpoints.

megatron-core says which rank holds which part of which tensor (`sharded_state_dict`); our two strategies, plugged in
where it lets one plug them in, write and read the bytes (storage.py). Reading needs no plan and no exchange: a rank
reads the parts that overlap what it holds. All functions here are called by every rank of the world.
"""

from __future__ import annotations

import io
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_outplace, nested_values
from megatron.core.dist_checkpointing.mapping import (
    ShardedTensor,
    apply_factory_merges,
    is_main_replica,
)
from megatron.core.dist_checkpointing.state_dict_utils import load_preprocess
from megatron.core.dist_checkpointing.strategies.base import (
    LoadCommonStrategy,
    LoadShardedStrategy,
    SaveShardedStrategy,
)
from megatron.core.utils import unwrap_model
from torch import Tensor

from megatron_vita import device
from megatron_vita.checkpoint import folder as folders
from megatron_vita.checkpoint.integrity import Integrity, write_integrity
from megatron_vita.checkpoint.lazy import LazyTensors, as_lazy, box
from megatron_vita.checkpoint.offline import COMMON_FILE, model_keys
from megatron_vita.checkpoint.state import RUN_FILE, RunState
from megatron_vita.checkpoint.storage import (
    CheckpointTensors,
    Piece,
    WrittenPiece,
    load_pickled,
    write_metadata,
    write_pieces,
)
from megatron_vita.config import ModelConfig
from megatron_vita.errors import CheckpointError, VitaError

log = logging.getLogger(__name__)

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
    root = Path(root)
    staging = _on_rank_zero(lambda: folders.start_staging(root, state.iteration))
    try:
        content = _content(model_chunks, optimizer, scheduler, groups, loading=False)
        strategy = _WritePieces(state.stage.model.vocab_size)
        # megatron-core's own check that each part is written once would send every rank's list to every rank;
        # write_metadata proves the same on rank 0.
        dist_checkpointing.save(
            content, str(staging), strategy, validate_access_integrity=False, content_metadata=dict(CONTENT)
        )
        return _on_rank_zero(lambda: _finish(root, staging, state, tokenizer_dir, strategy.written))
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
    folder = folders.resolve(folder)
    state = RunState.read(folder)
    device.prepare_optimizer_for_load(optimizer)
    content = _content(model_chunks, optimizer, None, None, loading=True)
    loaded = _load(folder, content, model_chunks, state)
    if "optimizer" not in loaded or (scheduler is not None and "scheduler" not in loaded):
        raise CheckpointError(f"{folder}: holds weights only, no optimizer state. Start a new run from it instead.")
    optimizer.load_state_dict(loaded["optimizer"])
    device.fix_optimizer_after_load(optimizer)
    if scheduler is not None:
        scheduler.load_state_dict(loaded["scheduler"])
    return state


def load_tensors(tensors: Mapping[str, Tensor], model_chunks: Sequence[torch.nn.Module], where: str) -> None:
    """Load full tensors, by checkpoint key, into models laid out in any way: weights that never were in a checkpoint.

    Args:
        tensors: lazy ones (a Hugging Face folder through convert) are read a part at a time.
        where: names the source in errors.

    Raises:
        CheckpointError: a tensor is missing, left over or of another shape.
    """
    content = _content(model_chunks, None, None, None, loading=True)
    sharded, local, factories = load_preprocess(content)
    loaded = _ReadParts(as_lazy(tensors), where, vocab_size=None).load(sharded, None)
    loaded = apply_factory_merges(loaded, factories)
    _into_models(loaded, model_chunks)
    del local


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

    if groups is not None:
        data_ranks = groups.collection.dp_cp
    else:
        data_ranks = parallel_state.get_data_parallel_group(with_context_parallel=True)
    metadata = {**CONTENT, "dp_cp_group": data_ranks}
    content: dict[str, Any] = {}
    for number, chunk in enumerate(unwrap_model(list(model_chunks))):
        full = chunk.sharded_state_dict(metadata=metadata)
        content[f"model{number}"] = {name: one for name, one in full.items() if not name.endswith(_EXTRA_STATE)}
    if optimizer is not None:
        if not loading:
            device.prepare_optimizer_for_load(optimizer)  # one that never stepped has no state to describe yet
        content["optimizer"] = optimizer.sharded_state_dict(dict(content), is_loading=loading, metadata=metadata)
    if scheduler is not None:
        content["scheduler"] = scheduler.state_dict()
    return content


def _finish(root: Path, staging: Path, state: RunState, tokenizer_dir: Any, written: list[WrittenPiece]) -> Path:
    """Rank 0's last acts: what lies beside the tensors, the digests, the name."""
    (staging / RUN_FILE).write_text(state.to_json(), encoding="utf-8")
    folders.copy_tokenizer(Path(tokenizer_dir) if tokenizer_dir else None, staging)
    pieces: dict[str, list[tuple[int, str]]] = {}
    for one in written:
        pieces.setdefault(one.file, []).append((one.length, one.sha256))
    write_integrity(staging, pieces)
    return folders.publish(root, state.iteration)


def _load(folder: Path, content: dict[str, Any], model_chunks: Sequence[torch.nn.Module], state: RunState) -> Any:
    _check_settings(folder, state, unwrap_model(list(model_chunks)))
    tensors = CheckpointTensors(folder)
    try:
        loaded = dist_checkpointing.load(
            content,
            str(folder),
            _ReadParts(tensors, str(folder), vocab_size=state.stage.model.vocab_size),
            _ReadCommon(tensors.integrity),
            validate_access_integrity=False,
        )
    except CheckpointingException as error:
        raise CheckpointError(f"{folder}: {error}") from None
    _into_models(loaded, model_chunks)
    return loaded


def _check_settings(folder: Path, state: RunState, chunks: Sequence[torch.nn.Module]) -> None:
    """Compare what shapes do not show: how rows split into heads, and how many rows of a vocabulary are padding."""
    saved = state.stage.model
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
                    f"{folder}: was saved with {name}={ours}, the recipe has {theirs}. Set it to {ours}, or start from "
                    "another checkpoint."
                )


def _into_models(loaded: Mapping[str, Any], model_chunks: Sequence[torch.nn.Module]) -> None:
    for number, chunk in enumerate(unwrap_model(list(model_chunks))):
        result = chunk.load_state_dict(loaded[f"model{number}"], strict=False)
        missing = [name for name in result.missing_keys if not name.endswith(_EXTRA_STATE)]
        assert not missing, missing
        assert not result.unexpected_keys, result.unexpected_keys


class _WritePieces(SaveShardedStrategy):
    """Writes this rank's tensors in the calling thread, in the torch_dist format."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__("torch_dist", 1)
        self._vocab_size = vocab_size
        self.written: list[WrittenPiece] = []
        """On rank 0, after `save`: what all ranks wrote."""

    @property
    def can_handle_sharded_objects(self) -> bool:
        return True

    def save(self, sharded_state_dict: Any, checkpoint_dir: str | Path) -> None:
        mine: list[WrittenPiece] = []
        error = ""
        try:
            pieces = []
            for one in nested_values(sharded_state_dict):
                assert isinstance(one, ShardedTensor), f"{one.key}: only tensors are saved"
                assert one.prepend_axis_num == 0, f"{one.key}: layers must have keys of their own"
                if is_main_replica(one.replica_id):
                    pieces += self._piece(one)
            mine = write_pieces(Path(checkpoint_dir), f"__{dist.get_rank()}_0.distcp", pieces)
        except OSError as problem:
            error = f"rank {dist.get_rank()} could not write its part of {checkpoint_dir}: {problem}"
        gathered: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
        dist.gather_object((mine, error), gathered)

        def conclude() -> None:
            assert gathered is not None
            errors = [one[1] for one in gathered if one[1]]
            if errors:
                raise CheckpointError(f"{errors[0]}. Make room, or choose another checkpoint.save.")
            self.written = [piece for one in gathered for piece in one[0]]
            write_metadata(Path(checkpoint_dir), self.written)

        _on_rank_zero(conclude)

    def _piece(self, one: ShardedTensor) -> list[Piece]:
        """What to write of one tensor: all of it, or of a vocabulary's rows those that mean something.

        How far rows are padded depends on the tensor-parallel size, and a checkpoint must not.
        """
        if not one.allow_shape_mismatch or not self._vocab_size:
            return [Piece(one.key, one.global_shape, one.global_offset, one.data)]
        rows = self._vocab_size - one.global_offset[0]
        if rows <= 0:
            return []
        return [Piece(one.key, (self._vocab_size, *one.global_shape[1:]), one.global_offset, one.data[:rows])]


class _ReadParts(LoadShardedStrategy):
    """Reads, for each tensor that this rank holds a part of, that part."""

    def __init__(self, tensors: LazyTensors, where: str, *, vocab_size: int | None) -> None:
        self._tensors = tensors
        self._where = where
        self._vocab_size = vocab_size

    @property
    def can_handle_sharded_objects(self) -> bool:
        return True

    def load(self, sharded_state_dict: Any, checkpoint_dir: str | Path | None) -> Any:
        wanted = [one for one in nested_values(sharded_state_dict) if isinstance(one, ShardedTensor)]
        self._check(wanted)
        return _everywhere(lambda: dict_list_map_outplace(self._read, sharded_state_dict), self._where)

    def _check(self, wanted: Sequence[ShardedTensor]) -> None:
        """Compare names and shapes on all ranks before anything is read; raise the same error on all of them."""
        problems = [problem for one in wanted if (problem := self._mismatch(one))]
        mine = (problems, [one.key for one in wanted])
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, mine)
        problems = sorted({problem for found, _ in everyone for problem in found})
        asked = {key for _, keys in everyone for key in keys}
        problems += [
            f"{key} {self._tensors.shape(key)} is not in the model"
            for key in model_keys(self._tensors)
            if key not in asked
        ]
        if problems:
            more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
            raise CheckpointError(
                f"{self._where}: does not fit the model: {problems[0]}{more}. "
                "Make the recipe's model section that of the checkpoint (run.json, stage.model), or use another one."
            )

    def _mismatch(self, one: ShardedTensor) -> str:
        if one.key not in self._tensors:
            if one.key.startswith("optimizer."):
                return (
                    f"{one.key} is missing (was the checkpoint saved with its optimizer, and the same parts trained?)"
                )
            return f"{one.key} {tuple(one.global_shape)} is missing"
        saved, needed = self._tensors.shape(one.key), tuple(one.global_shape)
        if one.allow_shape_mismatch:  # vocabulary rows are padded to a multiple of the tensor-parallel size
            fits = saved[1:] == needed[1:] and (self._vocab_size is None or needed[0] >= self._vocab_size)
        else:
            fits = saved == needed
        return "" if fits else f"{one.key} has shape {saved} in the checkpoint and {needed} in the model"

    def _read(self, one: ShardedTensor) -> Tensor:
        assert one.prepend_axis_num == 0, f"{one.key}: layers must have keys of their own"
        region = box(one.global_offset, one.local_shape)
        saved = self._tensors.shape(one.key)
        if not one.allow_shape_mismatch:
            return self._tensors.read(one.key, region)
        out = torch.zeros(one.local_shape, dtype=self._tensors.dtype(one.key))
        first = region[0]
        rows = slice(min(first.start, saved[0]), min(first.stop, saved[0]))
        if rows.start < rows.stop:
            out[: rows.stop - rows.start] = self._tensors.read(one.key, (rows, *region[1:]))
        return out

    def load_tensors_metadata(self, checkpoint_dir: str | Path) -> Any:
        return {
            key: ShardedTensor.from_rank_offsets(
                key, torch.empty(self._tensors.shape(key), dtype=self._tensors.dtype(key), device="meta")
            ).without_data()
            for key in self._tensors
        }

    def check_backend_compatibility(self, loaded_backend: str) -> None:
        if loaded_backend != "torch_dist":
            raise CheckpointError(f"{self._where}: format {loaded_backend!r}, this program reads torch_dist.")

    def check_version_compatibility(self, loaded_version: int) -> None:
        if loaded_version != 1:
            raise CheckpointError(f"{self._where}: torch_dist version {loaded_version}, this program reads 1.")


class _ReadCommon(LoadCommonStrategy):
    """Reads common.pt (the optimizer's and the schedule's plain values), verified and with an allow-list."""

    def __init__(self, integrity: Integrity) -> None:
        self._integrity = integrity

    @property
    def can_handle_sharded_objects(self) -> bool:
        return True

    def load_common(self, checkpoint_dir: str | Path) -> Any:
        content = self._integrity.read_file(COMMON_FILE)
        return load_pickled(io.BytesIO(content), Path(checkpoint_dir) / COMMON_FILE)

    def load_sharded_objects(self, sharded_objects_state_dict: Any, checkpoint_dir: str | Path) -> Any:
        assert not sharded_objects_state_dict, "only tensors are saved"
        return sharded_objects_state_dict

    def check_backend_compatibility(self, loaded_backend: str) -> None:
        if loaded_backend != "torch":
            raise CheckpointError(f"common state in format {loaded_backend!r}; this program reads torch.")

    def check_version_compatibility(self, loaded_version: int) -> None:
        if loaded_version != 1:
            raise CheckpointError(f"common state in version {loaded_version}; this program reads 1.")


def _on_rank_zero(act: Callable[[], Any]) -> Any:
    """Do something on rank 0; its result, or its error, on every rank."""
    outcome: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            outcome[0] = act()
        except VitaError as error:
            outcome[1] = error
        except OSError as error:
            outcome[1] = CheckpointError(f"cannot write the checkpoint: {error}")
    dist.broadcast_object_list(outcome, src=0, device=device.torch_device())
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def _everywhere(act: Callable[[], Any], where: str) -> Any:
    """Do something on every rank; if it fails on one, raise the same error on all, so that nobody waits for ever."""
    result, error = None, ""
    try:
        result = act()
    except (VitaError, OSError) as problem:
        error = str(problem)
    errors: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(errors, error)
    first = next((one for one in errors if one), "")
    if first:
        raise CheckpointError(first if where in first else f"{where}: {first}")
    return result
