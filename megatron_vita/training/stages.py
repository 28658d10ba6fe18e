"""A run: training stages in sequence in the same processes, each from the previous one's checkpoint."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import yaml

from megatron_vita import checkpoint, kernels
from megatron_vita.checkpoint.agree import on_rank_zero
from megatron_vita.config import RunConfig, StageConfig, to_dict
from megatron_vita.data.loading.compatible import check_compatible
from megatron_vita.data.shards.reader import ShardSet
from megatron_vita.data.text.tokenizer import VitaTokenizer
from megatron_vita.errors import CheckpointError, ConfigError, DamagedError, DataError
from megatron_vita.files import no_room, write_atomic
from megatron_vita.parallel.groups import forget_groups, init_distributed
from megatron_vita.training import weights as start
from megatron_vita.training.lock import RunLock
from megatron_vita.training.loop import train
from megatron_vita.training.resume import open_newest

log = logging.getLogger(__name__)


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
            folder checkpoint.save belongs to a run with other settings, or to one that is training now.
        CheckpointError: the stage before `only` is not complete.
        DataError: too many samples with undecodable images.
        VitaError: a loss or gradient norm is not finite, or a file cannot be written.
        SystemExit: a rank got SIGTERM or SIGINT; on every rank.
    """
    if only is not None and not 1 <= only <= len(run.stages):
        raise ConfigError(f"--stage {only}: the recipe has stages 1 to {len(run.stages)}.")
    init_distributed()
    first = run.stages[0].checkpoint.pretrained_checkpoint
    with _as_config_errors():
        on_rank_zero(lambda: _preflight_all(run.stages if only is None else run.stages[only - 1 : only]))
        weights = on_rank_zero(lambda: start.find(first)) if first and only in (None, 1) else None
    finished: dict[int, Path] = {}
    for number, stage in enumerate(run.stages[: (only or 1) - 1], 1):
        if found := on_rank_zero(partial(_complete, stage, required=number + 1 == only)):
            finished[number] = found
    folders = {stage.checkpoint.save: stage.name for stage in run.stages[(only or 1) - 1 : only]}
    with RunLock() as lock:
        on_rank_zero(partial(lock.take, folders))
        log.info("kernels:\n%s", "\n".join(map(str, kernels.kernel_table(run.stages[(only or 1) - 1]))))
        damaged: dict[Path, str] = {}
        number = only or 1
        while number <= (only or len(run.stages)):
            try:
                finished[number] = _run_stage(run.stages[number - 1], finished.get(number - 1, weights), damaged)
                damaged, number = {}, number + 1
            except DamagedError as error:  # its initial weights are: the stage before makes them again
                if number == (only or 1):
                    raise ConfigError(str(error)) from error
                number -= 1
                damaged = {finished[number]: str(error)}
    return [finished[number] for number in sorted(finished)]


def _complete(stage: StageConfig, *, required: bool) -> Path | None:
    """The newest checkpoint of a stage that is not run, if it has one. On rank 0.

    Raises:
        CheckpointError: the next stage starts from it, and it is not of the last step.
    """
    folder = Path(stage.checkpoint.save) / stage.name
    found = checkpoint.latest(folder)
    if required and (found is None or checkpoint.read_state(found).iteration < stage.train.train_iters):
        raise CheckpointError(
            f"the stage to run starts from stage {stage.name!r}, but {folder} holds no finished checkpoint. Train that "
            "first."
        )
    return found


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


def _preflight_all(stages: Sequence[StageConfig]) -> None:
    for stage in stages:
        preflight(stage)


def _run_stage(stage: StageConfig, weights: Path | None, damaged: dict[Path, str]) -> Path:
    folder = Path(stage.checkpoint.save) / stage.name
    with _as_config_errors():
        found, session = open_newest(stage, folder, weights, damaged)
    if session is None:
        assert found is not None
        log.info("%s is complete: %s", stage.name, found.path)
        return found.path
    settings = yaml.safe_dump(to_dict(stage), sort_keys=False)
    origin = f"again from {found.path}" if found else f"from {weights}"
    log.info("%s starts %s with\n%s", stage.name, origin, settings)
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
        CheckpointError: there is no room.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(folder / "config.yaml", settings)
    except OSError as error:
        where = f"stage {stage.name!r}: checkpoint.save={stage.checkpoint.save}"
        if no_room(error):
            raise CheckpointError(f"{where}: cannot be written ({error}). Make room, then start again.") from None
        raise ConfigError(f"{where}: cannot be written ({error}). Choose another.") from None


@contextmanager
def _as_config_errors() -> Iterator[None]:
    """Re-raise CheckpointError and DataError as ConfigError (exit status 2): errors before the first step. Damage of
    initial weights stays what it is."""
    try:
        yield
    except DamagedError:
        raise
    except (CheckpointError, DataError) as error:
        raise ConfigError(str(error)) from error
