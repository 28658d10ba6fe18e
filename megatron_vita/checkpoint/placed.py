"""Tensors that lie in files without gaps, read by byte range: what every format comes to once its header is known."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron_vita.checkpoint.dtypes import DType


@dataclass(frozen=True)
class TensorPlace:
    """Where one tensor's elements lie, row-major and without gaps."""

    file: Path
    dtype: DType
    shape: tuple[int, ...]
    start: int
    """Bytes from the file's beginning."""
