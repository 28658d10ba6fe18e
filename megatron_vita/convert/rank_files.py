"""Checkpoint files of Megatron's ranks: find them, read their directories, and present their tensors as one source.

DIR/latest_checkpointed_iteration.txt, DIR/iter_0000500/mp_rank_TT[_PPP]/model_optim_rng.pt: one file for each tensor
and pipeline rank, with the weights under `model` and the settings of the run under `args`, read by
checkpoint/archive.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_vita.checkpoint.archive import TorchFile
from megatron_vita.checkpoint.pickles import Record
from megatron_vita.checkpoint.placed import PlacedTensors, TensorPlace
from megatron_vita.errors import CheckpointError

MODEL_FILE = "model_optim_rng.pt"
LATEST = "latest_checkpointed_iteration.txt"
_RANK = re.compile(r"mp_rank_(\d{2})(?:_(\d{3}))?")
_NAME = re.compile(r"[\w.]{1,200}", re.ASCII)
NOT_WEIGHTS = re.compile(r"(.*\._extra_state|unused|.*rotary_pos_emb\.inv_freq)")
"""Transformer Engine's fp8 state, a dummy that Long-VITA's model carries, and a table that is computed."""


class RankFiles(PlacedTensors):
    """The weights in the files of all ranks, as `mp_rank_03:decoder.final_layernorm.weight`."""

    def __init__(self, places: Mapping[str, TensorPlace], unused_keys: Mapping[str, str]) -> None:
        """`unused_keys`: names of `places` that are deliberately unused, and why."""
        super().__init__(places)
        self._unused_keys = dict(unused_keys)

    def unused_keys(self) -> Mapping[str, str]:
        return self._unused_keys


def find(path: Path) -> Path | None:
    """The folder with the ranks' folders: `path` itself, or the newest step below it; none if there is none.

    Raises:
        CheckpointError: latest_checkpointed_iteration.txt names a step that is not there.
    """
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

    tensors: dict[str, TensorPlace]
    """By the file's own names."""
    settings: Mapping[str, Any]
    """Of the run: plain values by name."""


def read_rank(rank: Path) -> RankWeights:
    """Read the directory of a rank's file, `rank` being its folder.

    Raises:
        CheckpointError: it is no file of Megatron's, or damaged.
    """
    path = rank / MODEL_FILE
    content = TorchFile(path).content
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
            shown = repr(name[:80]) if isinstance(name, str) else "what is no text"
            raise CheckpointError(f"{path}: {shown} under `model` is no tensor's name. Refused.")
        if isinstance(value, TensorPlace):
            tensors[name] = value
        elif not NOT_WEIGHTS.fullmatch(name):
            raise CheckpointError(f"{path}: {name} under `model` is no tensor. Refused.")
    arguments = content.get("args")
    state = arguments.state if isinstance(arguments, Record) else None
    return RankWeights(tensors, {k: _plain(v) for k, v in state.items()} if isinstance(state, dict) else {})


def _plain(value: Any) -> Any:
    """A setting as a value that is safe to compare and print, whatever a hostile file holds."""
    small = value is None or isinstance(value, bool | float) or (isinstance(value, int) and abs(value) < 1 << 63)
    return value if small or (isinstance(value, str) and len(value) < 100) else "an object"


def grid(folder: Path) -> dict[tuple[int, int], Path]:
    """(pipeline rank, tensor rank) -> folder.

    Raises:
        CheckpointError: not all are there, or folders of another layout, too.
    """
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
