"""Saves of a run: one at a time, in the background by default, each published whole or not at all, old ones deleted."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict_saver import async_save

from megatron_vita import device
from megatron_vita.checkpoint import folder as folders
from megatron_vita.checkpoint.agree import all_true
from megatron_vita.checkpoint.integrity import PieceDigests
from megatron_vita.checkpoint.parts import as_checkpoint_errors
from megatron_vita.checkpoint.planner import PARTS, Planner
from megatron_vita.checkpoint.retention import prune
from megatron_vita.checkpoint.sharded import training_parts
from megatron_vita.checkpoint.state import RunState
from megatron_vita.checkpoint.writer import Writer, write

log = logging.getLogger(__name__)


class HostCopy:
    """Copies what a rank writes into host memory (pinned, from a GPU), which is kept for the next save."""

    def __init__(self) -> None:
        self._memory: dict[str, Tensor] = {}

    def __call__(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A copy that training does not change. Returns when it is complete."""
        for label in self._memory.keys() - state.keys():
            del self._memory[label]
        for label, tensor in state.items():
            if label not in self._memory:
                self._memory[label] = device.host_buffer(tensor)
            self._memory[label].copy_(tensor.detach(), non_blocking=True)
        device.synchronize()
        return dict(self._memory)


class Saver:
    """Writes the checkpoints of one stage. Every rank makes one, and calls every method at the same point."""

    def __init__(self, root: str | Path, *, asynchronous: bool = True, keep_last: int = 0, keep_every: int = 0) -> None:
        """Prepare.

        Args:
            root: folder of checkpoints, on a file system that all ranks see.
            asynchronous: copy the state to host memory, and write it while training goes on.
            keep_last: checkpoints to keep; 0: all.
            keep_every: steps whose multiples are kept for good; 0: none.
        """
        self._root = Path(root)
        self._asynchronous = asynchronous
        self._keep = keep_last, keep_every
        # Its collectives run beside those of training, on tensors of the host.
        own = asynchronous or not device.default_group_is_of_the_host()
        self._group = device.new_host_group() if own and dist.is_initialized() else None
        self._copy = HostCopy()
        self._future: Future[Any] | None = None
        self._iteration, self._began = -1, 0.0
        self.published: Path | None = None
        """The checkpoint that was published last, as far as `wait` or `poll` has seen."""

    def save(
        self,
        model_chunks: Sequence[nn.Module],
        optimizer: Any | None,
        scheduler: Any | None,
        state: RunState,
        groups: Any = None,
        *,
        tokenizer: str | Path | None = None,
    ) -> None:
        """Begin to write root/iter_<state.iteration>, once an earlier save is complete.

        Args:
            model_chunks: this rank's part of the model, wrapped or bare.
            optimizer: megatron-core's optimizer; none writes weights only.
            scheduler: its OptimizerParamScheduler.
            state: what goes to run.json; rank 0's is written.
            groups: the layout (parallel.groups.Groups); by default megatron-core's current one.
            tokenizer: folder or file to copy along.

        Raises:
            CheckpointError: on every rank, if any rank failed in the save before (or in this one, where it is not
                asynchronous). What was there before is untouched, and nothing is published in part.
        """
        self.wait()
        self._iteration, self._began = state.iteration, time.monotonic()
        parts, common = training_parts(model_chunks, optimizer, scheduler, state, groups)
        source = Path(tokenizer) if tokenizer else None
        writer = Writer(
            folders.staging_folder(self._root, state.iteration),
            start=partial(folders.start_staging, self._root, state.iteration),
            publish=partial(self._publish, state, source),
            stage=self._copy,
        )
        planner = Planner(parts, common=common)
        content = {part.label: part.data for part in parts}
        if self._asynchronous:
            future = async_save({PARTS: content}, storage_writer=writer, planner=planner, process_group=self._group)
            assert isinstance(future, Future)
            self._future = future
            log.info("step %d: copied in %.2f s, written in the background", state.iteration, self._elapsed())
            return
        self._conclude(lambda: write(planner, writer, content, group=self._group))

    def poll(self) -> None:
        """Look whether a save in the background has ended. Once a step; costs one small all-reduce while one runs.

        Raises:
            CheckpointError: it has failed; on every rank at the same step.
        """
        if self._future is not None and all_true(self._future.done()):
            self.wait()

    def wait(self) -> Path | None:
        """Wait for a save under way.

        Returns:
            The checkpoint that was published last, if any.

        Raises:
            CheckpointError: it has failed; on every rank.
        """
        future, self._future = self._future, None
        if future is not None:
            self._conclude(future.result)
        return self.published

    def _conclude(self, end: Callable[[], object]) -> None:
        """Do the last of a save, and note what it published; or delete what it has written."""
        try:
            with as_checkpoint_errors():
                end()
        except BaseException:
            if not dist.is_initialized() or dist.get_rank() == 0:
                folders.discard_staging(self._root, self._iteration)
            raise
        self.published = folders.step_folder(self._root, self._iteration)
        log.info("saved %s in %.1f s", self.published, self._elapsed())

    def _elapsed(self) -> float:
        return time.monotonic() - self._began

    def _publish(self, state: RunState, tokenizer: Path | None, pieces: PieceDigests) -> None:
        """Rank 0's last acts: what lies beside the tensors, the digests, the name; then older ones go."""
        staging = folders.staging_folder(self._root, state.iteration)
        folders.write_files(staging, state, tokenizer, pieces)
        folders.publish(self._root, state.iteration)
        keep_last, keep_every = self._keep
        prune(self._root, keep_last=keep_last, keep_every=keep_every, verified=state.iteration)

    def close(self) -> None:
        """Wait for a save under way, and let go of memory and process group. Raises CheckpointError as `wait`."""
        try:
            self.wait()
        finally:
            self._copy = HostCopy()
            if self._group is not None:
                dist.destroy_process_group(self._group)
                self._group = None

    def __enter__(self) -> Saver:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.close()
        except MemoryError:
            raise
        except Exception as problem:
            if error is None:
                raise
            log.error("the save under way failed, too: %s", problem)


def save(
    root: str | Path,
    model_chunks: Sequence[nn.Module],
    optimizer: Any | None,
    scheduler: Any | None,
    state: RunState,
    groups: Any = None,
    *,
    tokenizer: str | Path | None = None,
) -> Path:
    """Write one checkpoint and wait for it; arguments and errors as of Saver.save. Returns its folder."""
    with Saver(root, asynchronous=False) as saver:
        saver.save(model_chunks, optimizer, scheduler, state, groups, tokenizer=tokenizer)
        published = saver.wait()
    assert published is not None
    return published
