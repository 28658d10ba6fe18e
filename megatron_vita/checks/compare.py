"""Differences between a layout and the reference, and their bounds."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Bounds:
    """Allowed differences of a dtype."""

    loss: float
    """Relative."""
    gradient: float
    """Of each tensor: largest difference, relative to the tensor's largest element; or 1 - cosine."""
    weight: float | None
    """After the step. SGD: relative to the tensor's largest element; AdamW: as a part of the rate. None: not judged."""
    whole: float | None = None
    """1 - cosine of all gradients together; given, those of single tensors are measured by the cosine, too."""


BOUNDS = {
    torch.float64: Bounds(1e-9, 1e-9, 1e-6),
    torch.float32: Bounds(1e-5, 1e-5, 1e-2),
    # bfloat16's steps near 1 are as long as the rate, so its weights are not judged.
    torch.bfloat16: Bounds(2e-2, 1e-2, None, whole=1e-3),
}
NEGLIGIBLE = 1e-6
"""Elements whose gradient is below this fraction of the tensor's largest are ignored for AdamW: their sign is noise."""


@dataclass
class TensorDifference:
    """One tensor on one rank, or the worst of several ranks."""

    name: str
    place: int
    """Its index in the order of a forward pass."""
    where: str
    """The rank with the largest error."""
    error: float = 0.0
    """Largest difference of the gradient."""
    largest: float = 0.0
    """Largest element of the unsharded reference gradient."""
    products: tuple[float, float, float] = (0.0, 0.0, 0.0)
    """Over all ranks: dot product of gradient and reference, squared norm of the gradient, and of the reference."""
    square: float = 0.0
    """Squared norm of the unsharded reference gradient."""
    weight: float = 0.0
    """Difference of the weight after the step, as Bounds says."""
    broken: str | None = None
    """An error that is not a numerical difference."""

    def gradient(self, by_cosine: bool) -> float:
        """The gradient's difference, as Bounds says; infinite where it should be zero and is not."""
        if self.error == 0:
            return 0.0
        if not by_cosine:
            return self.error / self.largest if self.largest else math.inf
        dot, own, other = self.products
        return 1 - dot / math.sqrt(own * other) if own * other > 0 else math.inf


@dataclass
class Outcome:
    """Differences of one case from the reference."""

    dtype: torch.dtype
    loss: float = 0.0
    tensors: dict[str, TensorDifference] = field(default_factory=dict)

    @property
    def bounds(self) -> Bounds:
        """Bounds of the case's dtype."""
        return BOUNDS[self.dtype]

    @property
    def by_cosine(self) -> bool:
        """Whether gradients are measured by 1 - cosine."""
        return self.bounds.whole is not None

    def whole(self) -> float:
        """1 - cosine of all gradients together, every tensor once however many ranks hold it."""
        sums = [0.0, 0.0, 0.0]
        for one in self.tensors.values():
            scale = one.square / one.products[2] if one.products[2] else 1.0
            sums = [total + scale * product for total, product in zip(sums, one.products, strict=True)]
        return 1 - sums[0] / math.sqrt(sums[1] * sums[2]) if sums[1] * sums[2] else float(sums[1] != sums[2])

    def worst_gradient(self) -> TensorDifference:
        """The tensor whose gradient differs most."""
        return max(self.tensors.values(), key=lambda one: one.gradient(self.by_cosine))

    def worst_weight(self) -> TensorDifference:
        """The tensor whose weight differs most after the step."""
        return max(self.tensors.values(), key=lambda one: one.weight)

    def failures(self) -> list[str]:
        """Differences above a bound: the loss, then gradients in the order of a backward pass, so that the first one is
        the nearest to the cause; then weights, if all gradients are right."""
        bounds, found = self.bounds, []
        backward = sorted(self.tensors.values(), key=lambda one: -one.place)
        found += [f"{one.name}: {one.broken} ({one.where})" for one in backward if one.broken]
        if not self.loss <= bounds.loss:
            found.append(f"loss: differs by {self.loss:.1e}, allowed {bounds.loss:.0e}")
        if bounds.whole is not None and not self.whole() <= bounds.whole:
            found.append(f"all gradients: 1 - cosine is {self.whole():.1e}, allowed {bounds.whole:.0e}")
        kind = "1 - cosine" if self.by_cosine else "relative to its largest"
        for one in backward:
            amount = one.gradient(self.by_cosine)
            if not amount <= bounds.gradient:
                allowed = f"({kind}), allowed {bounds.gradient:.0e}"
                found.append(f"gradient of {one.name}: differs by {amount:.1e} {allowed} ({one.where})")
        if found or bounds.weight is None:
            return found
        return [
            f"weight of {one.name}, after the step: differs by {one.weight:.1e}, "
            f"allowed {bounds.weight:.0e} ({one.where})"
            for one in backward
            if not one.weight <= bounds.weight
        ]


class Comparison:
    """Collects the differences of one rank."""

    def __init__(self, dtype: torch.dtype, names: Sequence[str], where: str) -> None:
        """`names`: every weight of the model, in the order of a forward pass."""
        self.outcome = Outcome(dtype)
        self._place = {name: place for place, name in enumerate(names)}
        self._where = where

    def loss(self, value: float, expected: float) -> None:
        """Mean loss of the global batch."""
        self.outcome.loss = _nan_is_worst(abs(value - expected) / max(abs(expected), 1e-30))

    def gradient(self, name: str, own: Tensor, expected: Tensor, whole: Tensor) -> None:
        """Compare a gradient with this rank's shard of the reference gradient."""
        own, expected, whole = own.detach().double().cpu(), expected.double(), whole.double()
        entry = self._entry(name)
        entry.error = _nan_is_worst(float((own - expected).abs().max())) if own.numel() else 0.0
        entry.largest, entry.square = float(whole.abs().max()), float(whole.square().sum())
        entry.products = float((own * expected).sum()), float(own.square().sum()), float(expected.square().sum())

    def weight(self, name: str, own: Tensor, expected: Tensor, counts: Tensor, unit: float) -> None:
        """A weight after the step, in units of `unit`, where `counts` is true."""
        difference = (own.detach().double().cpu() - expected.double()).abs()[counts]
        self._entry(name).weight = _nan_is_worst(float(difference.max()) / unit) if difference.numel() else 0.0

    def holds(self, name: str, broken: str | None = None) -> None:
        """This rank holds the weight; `broken` says what is wrong with it that is no number."""
        self._entry(name).broken = broken

    def _entry(self, name: str) -> TensorDifference:
        entry = TensorDifference(name, self._place.get(name, -1), self._where)
        return self.outcome.tensors.setdefault(name, entry)


def merge(outcomes: Iterable[Outcome], expected: Iterable[str]) -> Outcome:
    """The worst of all ranks; a tensor of `expected` that no rank holds is broken."""
    first, *others = outcomes
    for other in others:
        first.loss = max(first.loss, other.loss)
        for name, found in other.tensors.items():
            worst = first.tensors.setdefault(name, found)
            if worst is found:
                continue
            if max(found.error, found.weight) > max(worst.error, worst.weight):
                worst.where = found.where
            worst.error, worst.weight = max(worst.error, found.error), max(worst.weight, found.weight)
            (a, b, c), (d, e, f) = worst.products, found.products
            worst.products = a + d, b + e, c + f
            worst.broken = worst.broken or found.broken
    for place, name in enumerate(expected):
        if name not in first.tensors:
            first.tensors[name] = TensorDifference(name, place, "all", broken="stands on no rank")
    return first


def _nan_is_worst(value: float) -> float:
    return math.inf if math.isnan(value) else value
