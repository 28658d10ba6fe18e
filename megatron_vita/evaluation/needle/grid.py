"""Where needles are put: depths of a haystack, and what is drawn at random for each question."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_vita.errors import ConfigError

_MOST = 1001
"""Depths that a number of depths may ask for."""
_FINE = 10_000
"""Steps of a depth: it has four digits."""


def depths_of(values: Sequence[float]) -> tuple[float, ...]:
    """Depths of a grid, ascending, to four digits.

    Args:
        values: one whole number n from 2 to 1,001, for n depths from 0 (first) to 1 (last) at equal distances; or the
            depths.

    Raises:
        ConfigError: a depth outside [0, 1], or none.
    """
    if len(values) == 1 and 2 <= values[0] <= _MOST and float(values[0]).is_integer():
        last = int(values[0]) - 1
        return tuple(round(number / last, 4) for number in range(last + 1))
    bad = [value for value in values if not 0 <= value <= 1]
    if bad or not values:
        raise ConfigError(
            f"--depths {' '.join(f'{value:g}' for value in values)}: give a number of depths (2 or more), or depths "
            "from 0 (the beginning) to 1 (the end)."
        )
    return tuple(sorted({round(float(value), 4) for value in values}))


def place(depth: float, length: int) -> int:
    """The index in `range(length)` that is nearest to a depth in [0, 1]."""
    return int(depth * (length - 1) + 0.5)


@dataclass(frozen=True, kw_only=True, slots=True)
class Grid:
    """Depths, and questions at each of them.

    Needle and haystack are drawn for each question of a depth, so that questions are independent; haystacks of all
    lengths draw alike, so that lengths compare.
    """

    depths: tuple[float, ...]
    samples: int
    """Questions at each depth."""
    seed: int

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise ConfigError(f"--samples {self.samples}: must be at least 1.")
        if self.seed < 0:
            raise ConfigError(f"--seed {self.seed}: needles are drawn with a seed from 0 on.")

    def __len__(self) -> int:
        return len(self.depths) * self.samples

    def __iter__(self) -> Iterator[tuple[float, int]]:
        """(depth, sample) of each question in order: one of every depth, then the next of every depth."""
        return ((depth, sample) for sample in range(self.samples) for depth in self.depths)

    def cell(self, index: int) -> tuple[float, int]:
        """(depth, sample) of a question. Raises IndexError behind the last."""
        sample, depth = divmod(range(len(self))[index], len(self.depths))
        return self.depths[depth], sample

    @staticmethod
    def line(depth: float, sample: int) -> int:
        """Number of a question, from 1, that grids with other depths or more samples have, too."""
        return sample * (_FINE + 1) + round(depth * _FINE) + 1

    def draw(self, depth: float, sample: int, purpose: int) -> np.random.Generator:
        """What a question draws from; each purpose (a small number) has its own stream."""
        return np.random.default_rng((self.seed, round(depth * _FINE), sample, purpose))
