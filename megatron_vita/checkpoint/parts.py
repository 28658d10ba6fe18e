"""What a process writes or reads of a checkpoint, and how torch.distributed.checkpoint says that it failed."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from megatron_vita.checkpoint.boxes import Slices
from megatron_vita.errors import CheckpointError, VitaError


@dataclass(frozen=True)
class Part:
    """A box of a tensor of the checkpoint, to be written or read by this process."""

    key: str
    shape: tuple[int, ...]
    """Of the whole tensor."""
    box: Slices
    data: Tensor
    """The box's elements, on any device: what is written, or where what is read goes."""

    @property
    def label(self) -> str:
        """A name that no other part of this process has."""
        return f"{self.key}[{','.join(f'{one.start}:{one.stop}' for one in self.box)}]"


@contextlib.contextmanager
def as_checkpoint_errors() -> Iterator[None]:
    """Turn torch's report of what failed on which rank into the first of these errors."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # one process is meant
            yield
    except CheckpointException as problem:
        rank, (error, _) = min(problem.failures.items())
        if isinstance(error, VitaError) or not isinstance(error, Exception):
            raise error from None
        raise CheckpointError(f"rank {rank}: {error or repr(error)}") from problem
