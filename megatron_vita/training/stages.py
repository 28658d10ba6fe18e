"""A run: training stages in sequence in the same processes, each from the previous one's checkpoint."""

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
"""Settings and sections that may change when a stage is resumed: they do not affect what is learned."""


def run_stages(run: RunConfig, *, only: int | None = None) -> list[Path]:
    """Train the stages of a run, resuming where an earlier run stopped. All ranks call it.

    Initialises torch.distributed. A stage with a checkpoint of its last step is skipped, a stage with an earlier
    checkpoint is resumed. Each stage starts from the weights of the previous one; its parallel layout may differ.

    Args:
        run: the recipe; `run.check(world_size)` has passed.
        only: number of a single stage to run, from 1; the stage before it must be complete.

    Returns:
        The last checkpoint of each stage that was run or skipped as complete.

    Raises:
        ConfigError: before the first step: missing or incompatible shards, tokenizer, checkpoints or settings, or the
            folder checkpoint.save belongs to a run with other settings.
        CheckpointError: the stage before `only` is not complete.
        DataError: too many samples with undecodable images.
        VitaError: a loss or gradient norm is not finite.
    """
    if only is not None and not 1 <= only <= len(run.stages):
        raise ConfigError(f"--stage {only}: the recipe has stages 1 to {len(run.stages)}.")
    init_distributed()
    first = run.stages[0].checkpoint.pretrained_checkpoint
    with _as_config_errors():
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
                _check_same_run(stage, state, found, weights)
            if done:
                log.info("%s is complete: %s", stage.name, found)
            else:
                found = _run_stage(stage, folder, weights=weights, resume=found)
        weights = found
        if weights is not None:
            finished.append(weights)
    return finished


def preflight(stage: StageConfig) -> None:
    """Check a stage's shards and tokenizer against its settings, before training starts.

    Raises:
        ConfigError: no tokenizer is set, or the shards were packed for another sequence length, token layout, tokenizer
            or tile size.
        DataError: missing or damaged shards.
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
    with _as_config_errors():
        session = open_session(stage, weights=weights, resume=resume)
    try:
        on_rank_zero(partial(_create_folder, stage, folder, settings))
        saved = train(session, folder)
    except BaseException:
        forget_groups()
        raise
    session.close()
    return saved


def _create_folder(stage: StageConfig, folder: Path, settings: str) -> None:
    """Create a stage's folder and write config.yaml into it. On rank 0.

    Raises:
        ConfigError: the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.yaml").write_text(settings, encoding="utf-8")
    except OSError as error:
        where = f"stage {stage.name!r}: checkpoint.save={stage.checkpoint.save}"
        raise ConfigError(f"{where}: cannot be written ({error}). Choose another.") from None


@contextmanager
def _as_config_errors() -> Iterator[None]:
    """Re-raise CheckpointError and DataError as ConfigError (exit status 2): errors before the first step."""
    try:
        yield
    except (CheckpointError, DataError) as error:
        raise ConfigError(str(error)) from error


def _check_same_run(stage: StageConfig, state: checkpoint.RunState, found: Path | None, weights: Path | None) -> None:
    """Check that a checkpoint was written with the same settings, shards and initial weights.

    Args:
        stage: the settings now.
        state: of the checkpoint.
        found: the checkpoint's folder, for the message.
        weights: the stage's initial weights now; None: random initialisation.

    Raises:
        ConfigError: they differ; names every setting that does.
    """
    now, then = _flat(to_dict(stage)), _flat(to_dict(state.stage))
    differing = [
        f"{name} was {then.get(name)!r} and is {value!r}"
        for name, value in now.items()
        if then.get(name) != value and _MAY_CHANGE.isdisjoint((name, name.partition(".")[0]))
    ]
    digest = load_manifest(stage.data.data_path).digest
    if state.manifest_digest not in (None, digest):  # the same path, but other packs or another order
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
    """Flatten nested settings to {`section.key`: value}; top-level values keep their key."""
    flat: dict[str, Any] = {}
    for section, content in sections.items():
        if isinstance(content, dict):
            flat |= {f"{section}.{key}": value for key, value in content.items()}
        else:
            flat[section] = content
    return flat
