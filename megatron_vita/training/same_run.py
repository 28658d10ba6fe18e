"""Whether a checkpoint belongs to the run that would go on from it: its settings, shards and initial weights.

Shards, tokenizer and weights are known by their digests, so that they may lie elsewhere than before. (The tokenizer's
digest is in the shards' manifest, which training/stages.py compares with the tokenizer.)
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_vita import checkpoint
from megatron_vita.checkpoint.integrity import is_checkpoint
from megatron_vita.config import StageConfig, to_dict
from megatron_vita.data.shards.manifest import load_manifest
from megatron_vita.errors import ConfigError
from megatron_vita.training import weights as start
from megatron_vita.training.ledger import LEDGER
from megatron_vita.training.optimizer import warmup_steps
from megatron_vita.training.setup import STARTED_FROM

log = logging.getLogger(__name__)

_MAY_CHANGE = {
    "parallel",
    "logging",
    "checkpoint",
    "data.data_path",
    "data.valid_data_path",
    "data.tokenizer_model",
    "data.num_workers",
    "data.max_failed_samples",
    "model.transformer_impl",
    "model.vision.tiles_per_batch",
    "train.micro_batch_size",
    "train.eval_interval",
    "train.eval_iters",
}
"""Settings and sections that may change when a stage is resumed: they do not affect what is learned."""

_CHANGES_WHAT_IS_LEARNED = {"optimizer.lr", "optimizer.min_lr", "optimizer.clip_grad"}
"""Settings that may change, which is said: a run that went to NaN goes on with a lower learning rate."""


def check_same_run(stage: StageConfig, state: checkpoint.RunState, found: Path, weights: Path | None) -> None:
    """Check that a checkpoint was written with the same settings, shards and initial weights. On rank 0.

    Args:
        stage: the settings now.
        state: of the checkpoint.
        found: the checkpoint's folder, for messages.
        weights: the stage's initial weights now; None: random initialisation.

    Raises:
        ConfigError: they differ; names every setting that does.
    """
    now, then = _flat(to_dict(stage)), _flat(to_dict(state.stage))
    changed = {
        name: f"{name} was {then.get(name)!r} and is {now.get(name)!r}"
        for name in {**now, **then}
        if then.get(name) != now.get(name) and _MAY_CHANGE.isdisjoint((name, name.partition(".")[0]))
    }
    learned = [text for name, text in changed.items() if name in _CHANGES_WHAT_IS_LEARNED]
    longer = changed.get("train.train_iters") if stage.train.train_iters >= state.iteration else None
    differing = [text for name, text in changed.items() if name not in _CHANGES_WHAT_IS_LEARNED and text is not longer]
    digest = load_manifest(stage.data.data_path).digest
    if state.manifest_digest not in (None, digest):  # other packs, or another order
        differing.append(f"the digest of the shards {stage.data.data_path} was {state.manifest_digest} and is {digest}")
    # Earlier releases, whose checkpoints do not tell of the ledger, knew a Hugging Face folder by its files' times.
    comparable = weights and (is_checkpoint(weights) or LEDGER in state.extra)
    started = state.extra.get(STARTED_FROM)
    if started and weights and comparable and not start.is_same(weights, started):
        differing.append(f"the weights it started from are no longer those of {weights}")
    if differing:
        raise ConfigError(
            f"{found} belongs to a run with other settings ({'; '.join(differing)}). Choose another checkpoint.save, "
            "remove that folder, or restore the settings."
        )
    if learned:
        log.warning("%s, after step %d: %s", stage.name, state.iteration, "; ".join(learned))
    if longer:
        log.info(
            "%s, after step %d: %s: the warmup ends at step %d (before: %d), the %s schedule at step %d (before: %d)",
            *(stage.name, state.iteration, longer, warmup_steps(stage), warmup_steps(state.stage)),
            *(stage.optimizer.lr_decay_style, stage.train.train_iters, state.stage.train.train_iters),
        )


def _flat(sections: Mapping[str, Any]) -> dict[str, Any]:
    """Flatten nested settings to {`section.key`: value}; top-level values keep their key."""
    flat: dict[str, Any] = {}
    for section, content in sections.items():
        if isinstance(content, dict):
            flat |= {f"{section}.{key}": value for key, value in _flat(content).items()}
        else:
            flat[section] = content
    return flat
