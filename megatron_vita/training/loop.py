"""The training loop of one stage: load a batch, step, log, validate, save checkpoints."""

from __future__ import annotations

import dataclasses
import itertools
import json
import logging
import time
from pathlib import Path

import torch.distributed as dist

from megatron_vita import checkpoint
from megatron_vita.checkpoint.agree import on_rank_zero
from megatron_vita.training.faults import FailedSamples
from megatron_vita.training.ledger import Ledger, LedgerLine, drop_later_lines
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
        VitaError: the loss or the gradient norm is not finite.
    """
    stage, rank = session.stage, dist.get_rank()
    start, last = session.state.iteration, stage.train.train_iters
    ledger = Ledger(folder / "ledger.jsonl", resume_at=start) if rank == 0 else None
    already = on_rank_zero(lambda: ledger.failed_samples if ledger else frozenset())
    failed = FailedSamples(budget=stage.data.max_failed_samples, already=already)
    saved = folder
    try:
        with Progress(stage, start=start, rank=rank) as progress, session.loader() as loader:
            if start == 0:
                _validate(session, progress, folder, 0)
            for iteration in range(start + 1, last + 1):
                began = time.monotonic()
                step, masked = failed.mask(next(loader))
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
                    sample_ids=list(step.sample_ids),
                    failed_samples=list(masked),
                    seconds=time.monotonic() - began,
                )
                if ledger:
                    ledger.write(line)
                progress.step(line)
                session.state = dataclasses.replace(
                    session.state, iteration=iteration, consumed_packs=step.consumed_packs
                )
                every, save_every = stage.train.eval_interval, stage.checkpoint.save_interval
                if iteration == last or (every and iteration % every == 0):
                    _validate(session, progress, folder, iteration)
                if iteration == last or (save_every and iteration % save_every == 0):
                    saved = _save(session, folder)
            dist.barrier()  # no rank may destroy the process groups while another one still validates or saves
    finally:
        if ledger:
            ledger.close()
    return saved


def _validate(session: Session, progress: Progress, folder: Path, iteration: int) -> None:
    """Compute the loss on data.valid_data_path, if it is set, and append it to `validation.jsonl`."""
    stage = session.stage
    if stage.data.valid_data_path is None:
        return
    with session.loader(valid=True) as loader:
        failed = FailedSamples(budget=stage.data.max_failed_samples)
        steps = (failed.mask(step)[0] for step in itertools.islice(loader, stage.train.eval_iters))
        loss = validate(stage, session.groups, session.wrapped, steps)
    progress.validation(iteration, loss)
    if dist.get_rank() == 0:
        path = folder / "validation.jsonl"
        # remove the validations of a killed run after its last checkpoint: they are computed again
        drop_later_lines(path, iteration - 1)
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"iteration": iteration, "loss": loss}) + "\n")


def _save(session: Session, folder: Path) -> Path:
    """Save a checkpoint of the current state; returns its folder."""
    keep = session.stage.checkpoint.keep_optimizer
    began = time.monotonic()
    saved = checkpoint.save(
        folder,
        session.models,
        session.optimizer if keep else None,
        session.scheduler if keep else None,
        session.state,
        session.groups,
        tokenizer=session.stage.data.tokenizer_model,
    )
    log.info("saved %s in %.1f s", saved, time.monotonic() - began)
    return saved
