"""Compare the tensors of two models, in any two formats. (Running both: logits.py.)"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from megatron_vita.checkpoint.lazy import LazyTensors, Region

_BLOCK = 1 << 24
"""Elements compared at once, so that two embeddings of a large model need not be in memory."""


@dataclass(frozen=True)
class Difference:
    """One tensor of the one model against the other's."""

    name: str
    max_difference: float
    """Largest absolute difference; infinite where the tensor exists on one side only or the shapes differ."""
    cosine: float
    note: str = ""

    @property
    def equal(self) -> bool:
        """Bit for bit the same values."""
        return self.max_difference == 0.0 and not self.note


def compare_tensors(first: LazyTensors, second: LazyTensors) -> Iterator[Difference]:
    """Every tensor of two models, by checkpoint key, in the first one's order; then what only the second has."""
    for name in [*first, *(name for name in second if name not in first)]:
        if name not in second or name not in first:
            where = "first" if name in first else "second"
            yield Difference(name, float("inf"), 0.0, f"only in the {where} model")
        elif first.shape(name) != second.shape(name):
            yield Difference(name, float("inf"), 0.0, f"shapes {first.shape(name)} and {second.shape(name)}")
        else:
            yield _difference(name, first, second)


def _difference(name: str, first: LazyTensors, second: LazyTensors) -> Difference:
    worst = 0.0
    dot = square_a = square_b = 0.0
    for region in _blocks(first.shape(name)):
        a, b = first.read(name, region).double(), second.read(name, region).double()
        gap = (a - b).abs().max().item() if a.numel() else 0.0
        worst = max(worst, gap) if gap == gap else float("nan")
        if worst != worst:
            break
        dot += float((a * b).sum())
        square_a += float((a * a).sum())
        square_b += float((b * b).sum())
    norm = (square_a * square_b) ** 0.5
    cosine = dot / norm if norm else float(square_a == square_b)
    kinds = (first.dtype(name), second.dtype(name))
    note = "" if kinds[0] == kinds[1] else f"types {kinds[0]} and {kinds[1]}"
    return Difference(name, worst, cosine, note)


def _blocks(shape: tuple[int, ...]) -> Iterator[Region]:
    if not shape:
        yield ()
        return
    row = 1
    for size in shape[1:]:
        row *= size
    rows = max(1, _BLOCK // max(row, 1))
    for start in range(0, shape[0], rows):
        yield (slice(start, min(start + rows, shape[0])), *(slice(0, size) for size in shape[1:]))
