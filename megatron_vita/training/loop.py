"""The training loop of one stage: load a batch, step, log, validate, save checkpoints."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_vita import checkpoint
from megatron_vita.checkpoint.agree import everywhere, on_rank_zero
from megatron_vita.data.loading.loader import StepBatches
from megatron_vita.training.faults import FailedSamples, NotFiniteError
from megatron_vita.training.leaving import Leaving
from megatron_vita.training.ledger import LEDGER, VALIDATION, Ledger, LedgerLine
from megatron_vita.training.metrics import Progress
from megatron_vita.training.setup import Session
from megatron_vita.training.step import train_step, validate

log = logging.getLogger(__name__)


def train(session: Session, folder: Path) -> Path:
    """Run the steps of a stage from session.state.iteration to train.train_iters. All ranks call it.

    Args:
        session: model, optimizer and state of the stage; its state is updated.
        folder: the stage's folder; receives checkpoints, ledger.jsonl and validation.jsonl.

    Returns:
        The folder of the last checkpoint.

    Raises:
        DataError: too many samples with undecodable images.
        VitaError: the loss or the gradient norm is not finite, or a file cannot be written; on every rank.
        SystemExit: a rank got SIGTERM or SIGINT; on every rank.
    """
    settings = session.stage.checkpoint
    with Leaving() as leaving, _Logs(session, folder, leaving) as logs:
        saver = checkpoint.Saver(
            folder, asynchronous=settings.async_save, keep_last=settings.keep_last, keep_every=settings.keep_every
        )
        try:
            with saver:  # which waits for a save under way
                return _steps(session, folder, logs, leaving, saver)
        except NotFiniteError as error:
            saved = saver.published or session.resumed
            again = f"goes on from {saved}" if saved else "starts the stage again, which has no checkpoint yet"
            raise NotFiniteError(f"{error} The same command then {again}.") from None


def _steps(session: Session, folder: Path, logs: _Logs, leaving: Leaving, saver: checkpoint.Saver) -> Path:
    stage, rank = session.stage, dist.get_rank()
    start, last = session.state.iteration, stage.train.train_iters
    every, save_every = stage.train.eval_interval, stage.checkpoint.save_interval
    where = f"logging.tensorboard_dir={stage.logging.tensorboard_dir}"
    with everywhere(lambda: Progress(stage, start=start, rank=rank), where) as progress, session.loader() as loader:
        if start == 0:
            _validate(session, progress, logs, leaving)
        for iteration in range(start + 1, last + 1):
            began = time.monotonic()
            step, masked = logs.failed.mask(next(loader))
            loss, grad_norm = train_step(
                stage,
                session.groups,
                session.wrapped,
                session.optimizer,
                session.scheduler,
                step,
                iteration,
            )
            line = LedgerLine(
                stage=stage.name,
                iteration=iteration,
                loss=loss,
                grad_norm=grad_norm,
                lr=session.scheduler.get_lr({}),  # without the vision tower's multipliers
                num_labels=step.num_labels,
                num_tokens=stage.train.global_batch_size * stage.data.seq_length,
                consumed_packs=step.consumed_packs,
                failed_samples=list(masked),
                seconds=time.monotonic() - began,
            )
            logs.write(LEDGER, dataclasses.asdict(line))
            with leaving.writing(where):
                progress.step(line)
            session.state = dataclasses.replace(session.state, iteration=iteration, consumed_packs=step.consumed_packs)
            if iteration == last or (every and iteration % every == 0):
                _validate(session, progress, logs, leaving)
            leaving.check()
            saver.poll()
            if iteration == last or (save_every and iteration % save_every == 0):
                _save(session, saver, logs.positions())
        saved = saver.wait()
        leaving.check()  # and no rank may destroy the process groups while another one still validates or saves
    assert saved is not None
    return saved


class _Logs:
    """A stage's ledger.jsonl and validation.jsonl, and the failed samples in them. Rank 0 writes, all ranks call."""

    def __init__(self, session: Session, folder: Path, leaving: Leaving) -> None:
        self._leaving = leaving
        self._files: dict[str, Ledger] = {}
        state, extra = session.state, session.state.extra

        def open_files() -> frozenset[int]:
            for name in (LEDGER, VALIDATION):
                path = folder / f"{name}.jsonl"
                self._files[name] = Ledger(path, resume_at=state.iteration, saved=extra.get(name))
            return self._files[LEDGER].failed_samples

        already = on_rank_zero(open_files)
        already = extra[LEDGER]["failed_samples"] if LEDGER in extra else already
        self.failed = FailedSamples(budget=session.stage.data.max_failed_samples, already=already)

    def write(self, name: str, line: dict[str, Any]) -> None:
        """Append a line. One that cannot be written ends the run at the next Leaving.check."""
        if name in self._files:
            with self._leaving.writing(self._files[name].path):
                self._files[name].write(line)

    def positions(self) -> dict[str, Any]:
        """What a checkpoint holds of them, for RunState.extra. Collective; raises CheckpointError: a disk failed."""
        positions = on_rank_zero(lambda: {name: file.position() for name, file in self._files.items()})
        positions[LEDGER]["failed_samples"] = sorted(self.failed.known)
        return positions

    def __enter__(self) -> _Logs:
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files.values():
            file.close()


def _validate(session: Session, progress: Progress, logs: _Logs, leaving: Leaving) -> None:
    """Compute the loss on data.valid_data_path, if it is set, and append it to `validation.jsonl`."""
    stage, iteration = session.stage, session.state.iteration
    if stage.data.valid_data_path is None:
        return
    with session.loader(valid=True) as loader:
        failed = FailedSamples(budget=stage.data.max_failed_samples)

        def steps() -> Iterator[StepBatches]:
            for step in itertools.islice(loader, stage.train.eval_iters):
                leaving.check()
                yield failed.mask(step)[0]

        loss = validate(stage, session.groups, session.wrapped, steps())
    logs.write(VALIDATION, {"iteration": iteration, "loss": loss})
    with leaving.writing(f"logging.tensorboard_dir={stage.logging.tensorboard_dir}"):
        progress.validation(iteration, loss)


def _save(session: Session, saver: checkpoint.Saver, positions: dict[str, Any]) -> None:
    """Begin to save the current state, and how far the logs reach."""
    keep = session.stage.checkpoint.keep_optimizer
    session.state = dataclasses.replace(session.state, extra={**session.state.extra, **positions})
    saver.save(
        session.models,
        session.optimizer if keep else None,
        session.scheduler if keep else None,
        session.state,
        session.groups,
        tokenizer=session.stage.data.tokenizer_model,
    )
