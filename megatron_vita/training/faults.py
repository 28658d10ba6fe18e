"""Errors found during a step: images that cannot be decoded, NaN and infinite losses or gradient norms."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable

import torch
import torch.distributed as dist

from megatron_vita import device
from megatron_vita.data.loading.loader import StepBatches, mask_samples
from megatron_vita.errors import DataError, VitaError

log = logging.getLogger(__name__)


class FailedSamples:
    """Masks the labels of samples with undecodable images on every rank; stops the run when there are too many."""

    def __init__(self, *, budget: int, already: Iterable[int] = ()) -> None:
        """Start counting.

        Args:
            budget: number of different samples that may fail in the stage (data.max_failed_samples).
            already: ids of the samples that failed before a resume, the same on every rank.
        """
        self.budget = budget
        self.known = set(already)

    def mask(self, step: StepBatches) -> tuple[StepBatches, tuple[int, ...]]:
        """Exchange the ids of the samples that failed on any rank and mask their labels.

        Collective over the world. Without failures it costs one all-reduce of one integer.

        Args:
            step: this rank's micro-batches; `step.failed` are the samples that failed on this rank.

        Returns:
            The step with the failed samples' labels set to -100 and its labelled tokens recounted; the ids of the
            samples that failed on any rank, ascending.

        Raises:
            DataError: more samples failed in the stage than the budget; on every rank.
        """
        if dist.get_world_size() == 1:
            failed = set(step.failed)
        else:
            count = torch.tensor([len(step.failed)])
            dist.all_reduce(count, group=device.host_group())
            if not count.item():
                return step, ()
            by_rank: list[tuple[int, ...]] = [()] * dist.get_world_size()
            dist.all_gather_object(by_rank, tuple(step.failed))
            failed = {sample for one in by_rank for sample in one}
        if not failed:
            return step, ()
        self.known |= failed
        log.warning("samples %s have pictures that do not decode; their labels are masked", sorted(failed))
        if len(self.known) > self.budget:
            raise DataError(
                f"{len(self.known)} samples have pictures that do not decode, more than data.max_failed_samples="
                f"{self.budget}. Look at the ledger's failed_samples with tools/inspect_data.py, or raise the budget."
            )
        ids = tuple(sorted(failed))
        return mask_samples(step, ids), ids


class NotFiniteError(VitaError):
    """A loss or gradient norm that is NaN or infinite. Checkpoints are unaffected."""


def check_finite(name: str, value: float, *, stage: str, iteration: int, sample_ids: tuple[int, ...]) -> None:
    """Raise if a loss or gradient norm is NaN or infinite.

    Args:
        name: of the value, for the message.
        value: the same on every rank, so that all ranks stop.
        stage: name of the training stage, for the message.
        iteration: of the step, for the message.
        sample_ids: samples of the global batch, for the message.

    Raises:
        NotFiniteError: the value is not finite.
    """
    if not math.isfinite(value):
        shown = ", ".join(map(str, sample_ids[:20]))
        raise NotFiniteError(
            f"stage {stage!r}, step {iteration}: the {name} is {value}. The step's samples are {shown}. Look at "
            "them with tools/inspect_data.py --sample K; if they are sound, lower optimizer.lr."
        )
