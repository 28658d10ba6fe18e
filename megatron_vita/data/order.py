"""Which packs make which step: pure arithmetic on (seed, manifest digest, consumed packs) and the packs' costs.

The stream of packs is endless, epoch after epoch. Neither the data-parallel size, nor the micro-batch size, nor any
rank appears here but in `deal`, which says who computes a pack, never which packs make a step.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from megatron_vita.errors import ConfigError
from megatron_vita.layout import Int64

_ALIKE = 1.04
"""A window ends before a pack that costs this many times its cheapest one (unless a step is not full yet)."""


class PackOrder:
    """The order in which a stage consumes the packs of one set.

    In every epoch the packs are sorted by cost and cut into windows of similar cost, each a whole number of steps long.
    The packs of a window are shuffled and dealt into steps, and then all steps are shuffled. So the packs of one step
    cost alike, no data-parallel rank waits long for another, which packs meet in a step changes from epoch to epoch,
    and no kind of pack comes in a run: cost goes with kind (long videos, single pictures), and a model that sees one
    kind for many steps forgets the others. Steps may straddle two epochs: the packs of a broken step, at the end of
    one epoch and at the start of the next, are drawn around the median cost, so that such a step is alike, too.
    """

    def __init__(self, costs: npt.ArrayLike, *, seed: int, digest: str, global_batch_size: int) -> None:
        """Prepare the order of one set.

        Args:
            costs: work of each pack in any unit, `[packs]`.
            seed: `train.seed`.
            digest: the manifest's digest.
            global_batch_size: packs of one step.
        """
        self.costs = np.asarray(costs, dtype=np.int64)
        if not len(self.costs):
            raise ConfigError("a shard set without packs has no order")
        self.global_batch_size = global_batch_size
        self._seed, self._digest = seed, digest
        self._epoch = lru_cache(maxsize=2)(self._shuffled)

    def packs(self, consumed: int) -> Int64:
        """Pack ids of the step that begins after `consumed` packs, `[global_batch_size]`, whole epochs in turn."""
        stop = consumed + self.global_batch_size
        size = len(self.costs)
        pieces = []
        while consumed < stop:
            epoch, start = divmod(consumed, size)
            piece = self._epoch(epoch)[start : start + stop - consumed]
            pieces.append(piece)
            consumed += len(piece)
        return np.concatenate(pieces)

    def _shuffled(self, epoch: int) -> Int64:
        """All packs once, in the order of one epoch."""
        key = hashlib.sha256(f"{self._seed}:{self._digest}:{epoch}".encode()).digest()
        random = np.random.Philox(key=np.frombuffer(key[:16], dtype="<u8"))
        size, step = len(self.costs), self.global_batch_size
        mixed = _permutation(random, size)
        ranked = mixed[np.argsort(self.costs[mixed], kind="stable")]  # equal costs in random order
        head = -epoch * size % step  # packs that complete the step the last epoch left open
        if head >= size:
            return mixed
        broken = head + (size - head) % step
        first = (size - broken) // 2
        middle, rest = ranked[first : first + broken], np.delete(ranked, slice(first, first + broken))
        middle = middle[_permutation(random, broken)]
        windows = [window[_permutation(random, len(window))] for window in self._windows(rest)]
        steps = [window[at : at + step] for window in windows for at in range(0, len(window), step)]
        shuffled = [steps[index] for index in _permutation(random, len(steps)).tolist()]
        return np.concatenate([middle[:head], *shuffled, middle[head:]])

    def _windows(self, ranked: Int64) -> list[Int64]:
        """Cut packs sorted by cost into windows of whole steps and of similar cost."""
        step = self.global_batch_size
        costs = self.costs[ranked]
        windows, start = [], 0
        while start < len(ranked):
            alike = int(np.searchsorted(costs, _ALIKE * costs[start], side="right")) - start
            stop = start + max(step, alike // step * step)
            windows.append(ranked[start:stop])
            start = stop
        return windows


def _permutation(random: np.random.Philox, size: int) -> Int64:
    """A permutation made of raw random bits: unlike Generator.permutation, they are promised never to change."""
    return np.argsort(random.random_raw(size), kind="stable")


def deal(packs: Int64, costs: Int64, dp_size: int) -> list[Int64]:
    """Share one step's packs among data-parallel ranks: the same number to each, dearest first to the least laden.

    Args:
        packs: pack ids, `[global_batch_size]`, a multiple of dp_size.
        costs: their costs, `[global_batch_size]`.
        dp_size: data-parallel ranks.

    Returns:
        For each rank its pack ids, dearest first.
    """
    if len(packs) % dp_size:
        raise ConfigError(f"a step of {len(packs)} packs does not split over {dp_size} data-parallel ranks.")
    room = [len(packs) // dp_size] * dp_size
    load = [0] * dp_size
    hands: list[list[int]] = [[] for _ in range(dp_size)]
    for index in np.lexsort((packs, -costs)).tolist():
        rank = min((r for r in range(dp_size) if room[r]), key=lambda r: (load[r], r))
        hands[rank].append(int(packs[index]))
        load[rank] += int(costs[index])
        room[rank] -= 1
    return [np.array(hand, dtype=np.int64) for hand in hands]
