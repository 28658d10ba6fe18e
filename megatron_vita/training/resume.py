"""Which checkpoint a stage goes on from, and what becomes of damaged ones."""

from __future__ import annotations

import gc
import logging
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from megatron_vita import checkpoint
from megatron_vita.checkpoint.agree import on_rank_zero
from megatron_vita.checkpoint.folder import set_aside, steps
from megatron_vita.config import StageConfig
from megatron_vita.errors import ConfigError, DamagedError
from megatron_vita.training.ledger import LEDGER, VALIDATION, keep_later
from megatron_vita.training.same_run import check_same_run
from megatron_vita.training.setup import Session, open_session

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Step:
    """A checkpoint of a stage."""

    path: Path
    state: checkpoint.RunState


def newest(
    stage: StageConfig, folder: Path, weights: Path | None, damaged: dict[Path, str]
) -> tuple[Step | None, dict[Path, str]]:
    """The newest checkpoint of a stage whose files have their sizes. On rank 0.

    Args:
        stage: the settings now.
        folder: the stage's folder.
        weights: the stage's initial weights now.
        damaged: steps that are known to be damaged, and why.

    Returns:
        The checkpoint, if there is one; the damaged steps, with those newer than it that are found damaged now.

    Raises:
        ConfigError: a step is damaged and checkpoint.on_damage is `fail`, or the checkpoint belongs to another run.
        CheckpointError: a checkpoint cannot be read, which need not be its own fault.
    """
    damaged = dict(damaged)
    found = None
    for path in steps(folder):
        if path in damaged:
            continue
        try:
            found = Step(path, checkpoint.read_state(path))
            break
        except DamagedError as error:
            damaged[path] = str(error)
    if damaged and stage.checkpoint.on_damage == "fail":
        older = f"from {found.path}" if found else "from its beginning"
        raise ConfigError(
            f"{' '.join(damaged.values())} Put the files back, or set checkpoint.on_damage=fallback: the stage then "
            f"goes on {older}."
        )
    if found:
        check_same_run(stage, found.state, found.path, weights)
    return found, damaged


def open_newest(
    stage: StageConfig, folder: Path, weights: Path | None, damaged: dict[Path, str]
) -> tuple[Step | None, Session | None]:
    """Open a stage at its newest checkpoint that can be loaded, or at its beginning. All ranks call it.

    Damaged checkpoints are renamed, and the ledger's lines after the one that was loaded are moved to another file.

    Args:
        stage: the settings now.
        folder: the stage's folder.
        weights: the stage's initial weights now.
        damaged: steps that are known to be damaged, and why.

    Returns:
        The checkpoint, if there is one; the session, or None if the stage is complete.

    Raises:
        ConfigError, CheckpointError: as `newest` and `open_session`.
        DamagedError: the initial weights are damaged.
    """
    while True:
        found, damaged = on_rank_zero(partial(newest, stage, folder, weights, damaged))
        session = None
        if found is None or found.state.iteration < stage.train.train_iters:
            try:
                session = open_session(stage, weights=weights, resume=found.path if found else None)
            except DamagedError as error:  # on every rank
                if found is None:
                    raise
                damaged = {**damaged, found.path: str(error)}
        if session is not None or found is None or found.path not in damaged:
            break
        gc.collect()  # the model that was filled in part
    if damaged:
        on_rank_zero(partial(_give_way, stage, folder, found, damaged))
    return found, session


def _give_way(stage: StageConfig, folder: Path, found: Step | None, damaged: dict[Path, str]) -> None:
    """Set damaged steps aside, and the ledger's later lines; say so. On rank 0.

    The lines come first: a process killed in between finds the same steps damaged again.
    """
    last, extra = (found.state.iteration, found.state.extra) if found else (0, {})
    kept = [
        keep_later(folder / f"{name}.jsonl", last, extra.get(name) if found else {"bytes": 0})
        for name in (LEDGER, VALIDATION)
    ]
    aside = [f"{problem} It is kept as {set_aside(step).name}." for step, problem in damaged.items()]
    origin = f"from {found.path}" if found else "from its beginning, with its initial weights: no checkpoint is left"
    lines = f" Later lines of its logs are in {', '.join(name for name in kept if name)}." if any(kept) else ""
    log.error("stage %r: %s The stage goes on %s.%s", stage.name, " ".join(aside), origin, lines)
