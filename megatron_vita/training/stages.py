"""A whole run: its stages one after the other in the same processes, weights handed over through checkpoints."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from megatron_vita import checkpoint
from megatron_vita.checkpoint.agree import on_rank_zero
from megatron_vita.config import RunConfig, StageConfig, to_dict
from megatron_vita.convert.identity import fingerprint
from megatron_vita.data.loading.compatible import check_compatible
from megatron_vita.data.shards.manifest import load_manifest
from megatron_vita.data.shards.reader import ShardSet
from megatron_vita.data.text.tokenizer import VitaTokenizer
from megatron_vita.errors import CheckpointError, ConfigError, DataError
from megatron_vita.parallel.groups import forget_groups, init_distributed
from megatron_vita.training import weights as start
from megatron_vita.training.loop import train
from megatron_vita.training.setup import STARTED_FROM, open_session

log = logging.getLogger(__name__)

_MAY_CHANGE = {
    "parallel",
    "logging",
    "checkpoint",
    "data.num_workers",
    "data.max_failed_samples",
    "data.valid_data_path",
    "train.micro_batch_size",
    "train.eval_interval",
    "train.eval_iters",
}
"""Settings (or whole sections) with which a stage may be continued although they differ: what is learnt stays."""


def run_stages(run: RunConfig, *, only: int | None = None) -> list[Path]:
    """Train every stage of a run, or go on where a killed run stopped.

    A stage whose last step is saved is left alone; one with an earlier checkpoint is resumed; the next stage
    takes the weights of the one before, at whatever layout it has.

    Args:
        run: the checked recipe.
        only: number of the one stage to run, from 1; the stage before it must be complete.

    Returns:
        The last checkpoint of each stage that was run or found complete.

    Raises:
        ConfigError: before anything is trained: shards, tokenizer, checkpoints, model and stages do not exist or do not
            fit together, or the run's folder holds another run.
        CheckpointError: the stage that `only` starts from is not complete.
    """
    if only is not None and not 1 <= only <= len(run.stages):
        raise ConfigError(f"--stage {only}: the recipe has stages 1 to {len(run.stages)}.")
    init_distributed()
    first = run.stages[0].checkpoint.pretrained_checkpoint
    with _before_training():
        for stage in run.stages if only is None else run.stages[only - 1 : only]:
            preflight(stage)
        weights = on_rank_zero(lambda: start.find(first)) if first and only in (None, 1) else None
    finished = []
    for number, stage in enumerate(run.stages[:only], 1):
        folder = Path(stage.checkpoint.save) / stage.name
        found = on_rank_zero(partial(checkpoint.latest, folder))
        state = checkpoint.read_state(found) if found else None
        done = state is not None and state.iteration >= stage.train.train_iters
        if only is not None and number < only:
            if number == only - 1 and not done:
                raise CheckpointError(
                    f"stage {only} starts from stage {number}, but {folder} holds no finished checkpoint. "
                    f"Train it first: --stage {number}."
                )
        else:
            if state is not None:
                _refuse_other_run(stage, state, found, weights)
            if done:
                log.info("%s is complete: %s", stage.name, found)
            else:
                found = _run_stage(stage, folder, weights=weights, resume=found)
        weights = found
        if weights is not None:
            finished.append(weights)
    return finished


def preflight(stage: StageConfig) -> None:
    """Open what a stage reads and see that it fits, before anything is trained.

    Raises:
        ConfigError: shards packed for another length, layout, tokenizer or tile size than the stage's.
        DataError: shards that are missing or damaged.
    """
    tokenizer = VitaTokenizer.load(stage.data.tokenizer_model) if stage.data.tokenizer_model else None
    if tokenizer is None:
        raise ConfigError(
            f"stage {stage.name!r}: data.tokenizer_model is not set. Give the folder the shards were made with."
        )
    for prefix in filter(None, (stage.data.data_path, stage.data.valid_data_path)):
        check_compatible(ShardSet(prefix).manifest, stage, tokenizer)


def _run_stage(stage: StageConfig, folder: Path, *, weights: Path | None, resume: Path | None) -> Path:
    settings = yaml.safe_dump(to_dict(stage), sort_keys=False)
    log.info("%s starts %s with\n%s", stage.name, f"again from {resume}" if resume else f"from {weights}", settings)
    with _before_training():
        session = open_session(stage, weights=weights, resume=resume)
    try:
        on_rank_zero(partial(_begin_folder, stage, folder, settings))
        saved = train(session, folder)
    except BaseException:
        forget_groups()
        raise
    session.close()
    return saved


def _begin_folder(stage: StageConfig, folder: Path, settings: str) -> None:
    """Make a stage's folder and write its settings down.

    Raises:
        ConfigError: nothing can be written there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.yaml").write_text(settings, encoding="utf-8")
    except OSError as error:
        where = f"stage {stage.name!r}: checkpoint.save={stage.checkpoint.save}"
        raise ConfigError(f"{where}: cannot be written ({error}). Choose another.") from None


@contextmanager
def _before_training() -> Iterator[None]:
    """Nothing is trained yet: whatever a user can mend now is a matter of configuration (exit status 2)."""
    try:
        yield
    except (CheckpointError, DataError) as error:
        raise ConfigError(str(error)) from error


def _refuse_other_run(stage: StageConfig, state: checkpoint.RunState, found: Path | None, weights: Path | None) -> None:
    """A checkpoint of other settings, other shards or other first weights must not be continued in silence.

    Raises:
        ConfigError: naming every setting that differs.
    """
    now, then = _flat(to_dict(stage)), _flat(to_dict(state.stage))
    differing = [
        f"{name} was {then.get(name)!r} and is {value!r}"
        for name, value in now.items()
        if then.get(name) != value and _MAY_CHANGE.isdisjoint((name, name.partition(".")[0]))
    ]
    digest = load_manifest(stage.data.data_path).digest
    if state.manifest_digest not in (None, digest):  # the same name, but other packs in another order
        differing.append(f"the digest of the shards {stage.data.data_path} was {state.manifest_digest} and is {digest}")
    started = state.extra.get(STARTED_FROM)
    if started and weights and started != fingerprint(weights):
        differing.append(f"the weights it started from are no longer those of {weights}")
    if differing:
        raise ConfigError(
            f"{found} belongs to a run with other settings ({'; '.join(differing)}). Choose another checkpoint.save, "
            "remove that folder, or restore the settings."
        )


def _flat(sections: Mapping[str, Any]) -> dict[str, Any]:
    """Settings by `section.key`; the stage's name by itself."""
    flat: dict[str, Any] = {}
    for section, content in sections.items():
        if isinstance(content, dict):
            flat |= {f"{section}.{key}": value for key, value in content.items()}
        else:
            flat[section] = content
    return flat
