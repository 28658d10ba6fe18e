"""Which samples a step of a run took: a function of its ledger line, its settings and its shards."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import yaml

from megatron_vita import checkpoint
from megatron_vita.config.load import stage_from_dict
from megatron_vita.data.loading.loader import order_of, samples_of
from megatron_vita.data.shards.reader import ShardSet
from megatron_vita.errors import ConfigError
from megatron_vita.training.ledger import LEDGER, read_ledger


@dataclass(frozen=True, kw_only=True)
class StepData:
    """What one step took, in the order of the stream."""

    packs: list[int]
    samples: list[int]
    """Row numbers of the shards' samples file."""
    masked: list[int]
    """Those of them whose labels were masked, because their pictures do not decode."""


def data_of_step(shards: ShardSet, folder: Path, iteration: int) -> StepData:
    """Packs and samples of a step.

    Args:
        shards: the set that the stage was trained on; it may lie elsewhere now.
        folder: of the stage, with its config.yaml and ledger.jsonl.
        iteration: number of the step, from 1.

    Raises:
        ConfigError: the folder is no stage's, its ledger has no such step, or its checkpoints name other shards.
    """
    settings, ledger = folder / "config.yaml", folder / f"{LEDGER}.jsonl"
    if not settings.is_file() or not ledger.is_file():
        raise ConfigError(f"{folder}: has no config.yaml or no ledger. Give a stage's folder: checkpoint.save/<stage>.")
    stage = stage_from_dict(yaml.safe_load(settings.read_text(encoding="utf-8")), str(settings))
    line = next((line for line in read_ledger(ledger) if line["iteration"] == iteration), None)
    if line is None:
        raise ConfigError(f"{ledger}: has no line of step {iteration}. Give one that was done.")
    saved = checkpoint.latest(folder)
    if saved and (digest := checkpoint.read_state(saved).manifest_digest) not in (None, shards.manifest.digest):
        raise ConfigError(
            f"{folder} was trained on shards with the digest {digest}, not {shards.manifest.digest}. Give their prefix."
        )
    step = stage.train.global_batch_size
    consumed = line.get("consumed_packs", step * iteration)  # a line of an earlier release has sample_ids instead
    packs = order_of(shards, stage.data, stage.train).packs(consumed - step)
    samples = samples_of(shards, packs)
    return StepData(packs=packs.tolist(), samples=samples, masked=list(line["failed_samples"]))
