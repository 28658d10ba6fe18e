"""Where megatron-core's distributed checkpoints let one plug in: writing pieces and reading parts, in our way."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_outplace, nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factory_merges, is_main_replica
from megatron.core.dist_checkpointing.state_dict_utils import load_preprocess
from megatron.core.dist_checkpointing.strategies.base import (
    LoadCommonStrategy,
    LoadShardedStrategy,
    SaveShardedStrategy,
)
from torch import Tensor

from megatron_vita.checkpoint.agree import everywhere, on_rank_zero
from megatron_vita.checkpoint.dtypes import torch_dtype
from megatron_vita.checkpoint.inert import load_pickled
from megatron_vita.checkpoint.integrity import Integrity
from megatron_vita.checkpoint.lazy import LazyTensors, as_lazy, slices_at
from megatron_vita.checkpoint.offline import COMMON_FILE, model_keys
from megatron_vita.checkpoint.storage import WrittenPiece, WrittenSlice, write_metadata, write_pieces
from megatron_vita.errors import CheckpointError, VitaError


def fill(content: Any, tensors: Mapping[str, Tensor], where: str) -> Any:
    """A sharded state dict with the values of full tensors, as `dist_checkpointing.load` would return it."""
    sharded, _, factories = load_preprocess(content)
    return apply_factory_merges(ReadParts(as_lazy(tensors), where, vocab_size=None).load(sharded, None), factories)


class WritePieces(SaveShardedStrategy):
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
            error = (
                f"rank {dist.get_rank()} could not write its part of {checkpoint_dir}: {problem}. Make room, or choose "
                "another checkpoint.save."
            )
        except VitaError as problem:
            error = f"rank {dist.get_rank()} could not write its part of {checkpoint_dir}: {problem}"
        gathered: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
        dist.gather_object((mine, error), gathered)

        def conclude() -> None:
            assert gathered is not None
            errors = [one[1] for one in gathered if one[1]]
            if errors:
                raise CheckpointError(errors[0])
            self.written = [piece for one in gathered for piece in one[0]]
            write_metadata(Path(checkpoint_dir), self.written)

        on_rank_zero(conclude)

    def _piece(self, one: ShardedTensor) -> list[WrittenSlice]:
        """What to write of one tensor: all of it, or of a vocabulary's rows those that mean something.

        How far rows are padded depends on the tensor-parallel size, and a checkpoint must not.
        """
        if not one.allow_shape_mismatch or not self._vocab_size:
            return [WrittenSlice(one.key, one.global_shape, one.global_offset, one.data)]
        rows = self._vocab_size - one.global_offset[0]
        if rows <= 0:
            return []
        return [WrittenSlice(one.key, (self._vocab_size, *one.global_shape[1:]), one.global_offset, one.data[:rows])]


class ReadParts(LoadShardedStrategy):
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
        return everywhere(lambda: dict_list_map_outplace(self._read, sharded_state_dict), self._where)

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
        slices = slices_at(one.global_offset, one.local_shape)
        saved = self._tensors.shape(one.key)
        if not one.allow_shape_mismatch:
            return self._tensors.read(one.key, slices)
        out = torch.zeros(one.local_shape, dtype=torch_dtype(self._tensors.dtype(one.key)))
        first = slices[0]
        rows = slice(min(first.start, saved[0]), min(first.stop, saved[0]))
        if rows.start < rows.stop:
            out[: rows.stop - rows.start] = self._tensors.read(one.key, (rows, *slices[1:]))
        return out

    def load_tensors_metadata(self, checkpoint_dir: str | Path) -> Any:
        return {
            key: ShardedTensor.from_rank_offsets(
                key, torch.empty(self._tensors.shape(key), dtype=torch_dtype(self._tensors.dtype(key)), device="meta")
            ).without_data()
            for key in self._tensors
        }

    def check_backend_compatibility(self, loaded_backend: str) -> None:
        if loaded_backend != "torch_dist":
            raise CheckpointError(f"{self._where}: format {loaded_backend!r}, this program reads torch_dist.")

    def check_version_compatibility(self, loaded_version: int) -> None:
        if loaded_version != 1:
            raise CheckpointError(f"{self._where}: torch_dist version {loaded_version}, this program reads 1.")


class ReadCommon(LoadCommonStrategy):
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
