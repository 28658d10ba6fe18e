"""Checkpoint files of Megatron's ranks: find them, and present their tensors as one source.

DIR/latest_checkpointed_iteration.txt, DIR/iter_0000500/mp_rank_TT[_PPP]/model_optim_rng.pt: one file for each tensor
and pipeline rank, with the weights under `model` and the settings of the run under `args`.

The files are pickles of strangers. torch reads them with weights_only: tensors, plain values, and the names of ALLOWED
alone, which become inert objects. Whatever else a file names is refused, and nothing of it runs.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.serialization import (
    add_safe_globals,
    clear_safe_globals,
    get_safe_globals,
    get_unsafe_globals_in_checkpoint,
)

from megatron_vita.checkpoint.tensors import TensorsInMemory
from megatron_vita.convert.hf_config import shown
from megatron_vita.convert.values import CODES
from megatron_vita.errors import CheckpointError

MODEL_FILE = "model_optim_rng.pt"
LATEST = "latest_checkpointed_iteration.txt"
_RANK = re.compile(r"mp_rank_(\d{2})(?:_(\d{3}))?")
_NAME = re.compile(r"[\w.]{1,200}", re.ASCII)
NOT_WEIGHTS = re.compile(r"(.*\._extra_state|unused|.*rotary_pos_emb\.inv_freq)")
"""Transformer Engine's fp8 state, a dummy that Long-VITA's model carries, and a table that is computed."""


class Inert:
    """Takes the place of an object of the file, and keeps nothing of it."""

    def __new__(cls, *_: object, **__: object) -> Inert:
        return super().__new__(cls)

    def __setstate__(self, state: object) -> None:
        pass


def _npu_tensor(storage: Any, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: object) -> Tensor:
    """A tensor as Ascend's torch_npu saves it: torch's arguments, and one more of the device's own."""
    return torch._utils._rebuild_tensor_v2(storage, offset, size, stride, False, {})


_OBJECTS = (
    *("megatron.core.enums.ModelType", "megatron.core.enums.Fp8Recipe"),
    *(
        f"{module}.enums.{name}"
        for module in ("megatron.core.transformer", "megatron.model", "megatron.legacy.model")
        for name in ("AttnBackend", "AttnMaskType", "AttnType", "CudaGraphScope", "LayerType", "ModelType")
    ),
    *(f"megatron.core.rerun_state_machine.{name}" for name in ("RerunMode", "RerunState", "RerunDiagnostic")),
    *("_io.BytesIO", "signal.Signals", "pathlib.PosixPath"),
    *("numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct", "numpy.ndarray", "numpy.dtype"),
)
"""Enumerations among Megatron's arguments, Transformer Engine's fp8 state, states of random generators."""
ALLOWED: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
    argparse.Namespace,
    *((_npu_tensor, f"torch_npu.utils.{module}._rebuild_npu_tensor") for module in ("storage", "_module")),
    *((Inert, name) for name in _OBJECTS),
]
"""What a rank's file may name beside torch's own types, and what is taken for it."""


class RankFiles(TensorsInMemory):
    """The weights in the files of all ranks, mapped into memory, as `mp_rank_03:decoder.final_layernorm.weight`."""

    def __init__(self, tensors: Mapping[str, Tensor], unused_keys: Mapping[str, str]) -> None:
        """`unused_keys`: names of `tensors` that are deliberately unused, and why."""
        super().__init__(dict(tensors))
        self._unused_keys = dict(unused_keys)

    def unused_keys(self) -> Mapping[str, str]:
        return self._unused_keys


def find(path: Path) -> Path | None:
    """The folder with the ranks' folders: `path` itself, or the newest step below it; none if there is none. Raises
    CheckpointError: latest_checkpointed_iteration.txt names a step that is not there."""
    if _ranks(path):
        return path
    if (path / LATEST).is_file():
        text = (path / LATEST).read_bytes()[:40].decode(errors="replace").strip()
        step = path / (f"iter_{int(text):07d}" if text.isdecimal() else "release")
        if _ranks(step):
            return step
    steps = [step for step in sorted(path.glob("iter_*")) if _ranks(step)]
    if len(steps) > 1:
        raise CheckpointError(f"{path}: holds {len(steps)} steps and no {LATEST} that names one. Give one of them.")
    return steps[0] if steps else None


def _ranks(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.glob("mp_rank_*")) if (path / MODEL_FILE).is_file()]


@dataclass(frozen=True)
class RankWeights:
    """Tensors and settings of one rank's file."""

    tensors: dict[str, Tensor]
    """By the file's own names; mapped, nothing of them is read yet."""
    settings: Mapping[str, Any]
    """Of the run: plain values by name."""


def read_rank(rank: Path) -> RankWeights:
    """Open a rank's file, `rank` being its folder. Raises CheckpointError: it is no file of Megatron's, damaged, or
    holds what is not allowed."""
    path = rank / MODEL_FILE
    content = _load(path)
    if isinstance(content, dict) and "model0" in content:
        raise CheckpointError(
            f"{path}: holds virtual pipeline stages (model0), which is not supported. Save it anew without them."
        )
    weights = content.get("model") if isinstance(content, dict) else None
    if not isinstance(weights, dict) or not weights:
        raise CheckpointError(f"{path}: holds no weights under `model`. Is it a checkpoint of Megatron's?")
    tensors = {}
    for name, value in weights.items():
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise CheckpointError(f"{path}: {shown(name)} under `model` is no tensor's name. Refused.")
        if isinstance(value, Tensor):
            if value.is_meta or value.layout != torch.strided or value.dtype not in CODES.values():
                raise CheckpointError(f"{path}: {name} is no tensor of plain numbers ({value.dtype}). Refused.")
            if not value.is_contiguous():
                raise CheckpointError(f"{path}: {name} has gaps or is turned around, as no weight is. Refused.")
            tensors[name] = value.detach()
        elif not NOT_WEIGHTS.fullmatch(name):
            raise CheckpointError(f"{path}: {name} under `model` is no tensor. Refused.")
    arguments = content.get("args")
    state = vars(arguments) if isinstance(arguments, argparse.Namespace) else {}
    return RankWeights(tensors, {str(key): _plain(value) for key, value in state.items()})


def _load(path: Path) -> Any:
    """The content of a file of torch.save; its tensors are mapped. Raises CheckpointError: no such file, damaged, or it
    names what is not allowed."""
    try:
        with zipfile.ZipFile(path) as archive:
            packed = [one.filename for one in archive.infolist() if one.compress_type or one.flag_bits & 1]
        if packed:
            raise CheckpointError(f"{path}: {shown(packed[0])} is compressed or encrypted. Refused.")
        with _only(ALLOWED):
            others = sorted(get_unsafe_globals_in_checkpoint(path))
            if others:
                raise CheckpointError(
                    f"{path}: refused, it names {shown(others[0])}, which no weights need. Nothing of it was run; if "
                    "you trust it, load it in a sandbox and save `model` and `args` anew as plain values."
                )
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file. The download is incomplete.") from None
    except zipfile.BadZipFile as error:
        raise CheckpointError(
            f"{path}: not a zip as torch.save writes since torch 1.6 ({error}). Download it again; a file of an older "
            "torch must be saved anew in a sandbox."
        ) from None
    except CheckpointError:
        raise
    except Exception as error:  # what a stranger's pickle may bring torch to is no list
        said = shown(str(error).partition("\n")[0])
        raise CheckpointError(
            f"{path}: refused, it cannot be read ({type(error).__name__}: {said}). Nothing of it was run; download it "
            "again."
        ) from error


@contextlib.contextmanager
def _only(allowed: Sequence[Callable[..., Any] | tuple[Callable[..., Any], str]]) -> Iterator[None]:
    """Allow these names alone: other libraries of the process (transformers) add some of their own to torch's list."""
    others = get_safe_globals()
    clear_safe_globals()
    add_safe_globals(list(allowed))
    try:
        yield
    finally:
        clear_safe_globals()
        add_safe_globals(others)


def _plain(value: Any) -> Any:
    """A setting as a value that is safe to compare and print, whatever a hostile file holds."""
    small = value is None or isinstance(value, bool | float) or (isinstance(value, int) and abs(value) < 1 << 63)
    return value if small or (isinstance(value, str) and len(value) < 100) else "an object"


def grid(folder: Path) -> dict[tuple[int, int], Path]:
    """(pipeline rank, tensor rank) -> folder. Raises CheckpointError: not all are there, or folders of another layout,
    too."""
    files: dict[tuple[int, int], Path] = {}
    for path in sorted(folder.glob("mp_rank_*")):
        match = _RANK.fullmatch(path.name)
        if match is None:
            raise CheckpointError(
                f"{path}: neither mp_rank_TT nor mp_rank_TT_PPP. Expert parallelism is not supported."
            )
        files[int(match[2] or 0), int(match[1])] = path
    stages, ranks = 1 + max(one[0] for one in files), 1 + max(one[1] for one in files)
    missing = [(p, t) for p in range(stages) for t in range(ranks) if (p, t) not in files]
    if missing or len({len(path.name) for path in files.values()}) > 1:
        what = (
            f"pipeline rank {missing[0][0]}, tensor rank {missing[0][1]} is missing" if missing else "two layouts mix"
        )
        raise CheckpointError(f"{folder}: {what} (of {stages} x {ranks}). The download is incomplete.")
    return files
