"""How a run ends before its last step: all ranks after the same one, also when only one of them knows why."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import torch
import torch.distributed as dist

from megatron_vita import device
from megatron_vita.checkpoint.agree import on_rank_zero
from megatron_vita.errors import VitaError

log = logging.getLogger(__name__)

_FAILED = 1000
"""Code of a failed write on rank 0, above every signal's number."""


class Leaving:
    """Collects on each rank why the run should end; `check` ends it on all ranks. A context manager, which handles
    SIGTERM and SIGINT inside it."""

    def __init__(self) -> None:
        self._code = 0
        self._failure = ""
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> Leaving:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._handlers[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    @contextmanager
    def writing(self, path: Path | str) -> Iterator[None]:
        """Keep an OSError of what rank 0 alone writes during a step until `check` raises it on all ranks."""
        try:
            yield
        except OSError as error:
            self._code, self._failure = _FAILED, f"{path}: cannot be written ({error})."

    def check(self) -> None:
        """Leave if any rank has a reason to. Collective over the world, once a step.

        Raises:
            VitaError: rank 0 could not write a file; on every rank.
            SystemExit: a rank got a signal; with the shell's status for it, 130 or 143, on every rank.
        """
        code = self._code
        if dist.get_world_size() > 1:
            largest = torch.tensor([code])
            dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=device.host_group())
            code = int(largest.item())
        if code == _FAILED:
            on_rank_zero(self._fail)
        if code:
            log.warning("%s: the run ends here; the same command goes on from its last checkpoint", _name(code))
            raise SystemExit(128 + code)

    def _fail(self) -> None:
        raise VitaError(
            f"{self._failure} Make room there, then start the same command again: it goes on from the last checkpoint."
        )

    def _note(self, number: int, _: FrameType | None) -> None:
        """Signal handler. A launcher may send a signal twice, so that a second one changes nothing."""
        self._code = max(self._code, number)


def _name(number: int) -> str:
    return signal.Signals(number).name
