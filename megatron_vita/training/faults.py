"""What only training finds: pictures that do not decode, and numbers that are no numbers."""

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
    """Makes every rank mask the same samples, and stops the run when too many failed."""

    def __init__(self, *, budget: int, already: Iterable[int] = ()) -> None:
        """`budget`: samples that may fail in the stage, each counted once; `already`: which did before a resume (the
        same on every rank)."""
        self.budget = budget
        self.known = set(already)

    def agree(self, step: StepBatches) -> tuple[StepBatches, tuple[int, ...]]:
        """Exchange the failed sample ids of a step; mask their labels.

        Costs one all-reduce of one integer where nothing failed.

        Returns:
            The step with those samples' labels at -100 and its labelled tokens counted again; the failed ids.

        Raises:
            DataError: more samples failed than the budget allows.
        """
        if dist.get_world_size() == 1:
            failed = set(step.failed)
        else:
            count = torch.tensor([len(step.failed)], device=device.torch_device())
            dist.all_reduce(count)
            if not count.item():
                return step, ()
            everyone: list[tuple[int, ...]] = [()] * dist.get_world_size()
            dist.all_gather_object(everyone, tuple(step.failed))
            failed = {sample for one in everyone for sample in one}
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


def refuse_non_finite(name: str, value: float, *, stage: str, iteration: int, sample_ids: tuple[int, ...]) -> None:
    """Stop at a loss or gradient norm that is NaN or infinite, naming the step and its samples.

    Raises:
        VitaError: the value is not finite. The last checkpoint is unharmed.
    """
    if not math.isfinite(value):
        shown = ", ".join(map(str, sample_ids[:20]))
        raise VitaError(
            f"stage {stage!r}, step {iteration}: the {name} is {value}. The step's samples are {shown}. Look at "
            "them with tools/inspect_data.py --sample K; if they are sound, lower optimizer.lr. The last checkpoint is "
            "whole."
        )
