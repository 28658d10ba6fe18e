"""Which packs make which step: pure arithmetic on (seed, manifest digest, consumed packs) and the packs' work.

The stream of packs is endless, epoch after epoch. Neither the data-parallel size, nor the micro-batch size, nor any
rank appears here; `data/loading/balance.py` decides which rank computes a pack, never which packs make a step.

All arithmetic is on integers and all sorting on distinct keys, so that every machine and every numpy gives one order.
"""

from __future__ import annotations

import hashlib
from functools import cached_property, lru_cache

import numpy as np
import numpy.typing as npt

from megatron_vita.errors import ConfigError
from megatron_vita.layout import Int64

_ALIKE = (101, 100)
"""A window is not cut further once its most expensive pack has at most this ratio to its cheapest, in each kind."""


class PackOrder:
    """The order in which a stage consumes the packs of one set.

    In every epoch the packs are cut into windows whose packs are alike in every kind of work at once (attention and
    tiles), each a whole number of steps: recursive bisection, always of the kind in which the packs of a window
    differ more. The packs of a window are shuffled and cut into steps, and then all steps are shuffled. So
    whatever the data-parallel size, no rank waits long for another, neither for its attention nor for its tower;
    which packs meet in a step changes from epoch to epoch; and no kind of pack comes in a run: work goes with kind
    (long videos, single pictures), and a model that sees one kind for many steps forgets the others. Steps may straddle
    two epochs: the packs of a broken step, at the end of one epoch and at the start of the next, are near the median,
    so that such a step is alike, too.
    """

    def __init__(self, work: npt.ArrayLike, *, seed: int, digest: str, global_batch_size: int) -> None:
        """Prepare the order of one set.

        Args:
            work: of each pack and kind, in any unit, 0 to 2^46, `[packs, kinds]` (`ShardSet.pack_work`).
            seed: `train.seed`.
            digest: the manifest's digest.
            global_batch_size: packs of one step.

        Raises:
            ConfigError: there are no packs.
        """
        self.work = np.asarray(work, dtype=np.int64)
        if not len(self.work):
            raise ConfigError("a shard set without packs has no order")
        self.global_batch_size = global_batch_size
        self._seed, self._digest = seed, digest
        self._epoch = lru_cache(maxsize=2)(self._shuffled)

    def packs(self, consumed: int) -> Int64:
        """Pack ids of the step that begins after `consumed` packs, `[global_batch_size]`, whole epochs in turn."""
        stop = consumed + self.global_batch_size
        size = len(self.work)
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
        size, step = len(self.work), self.global_batch_size
        mixed = _permutation(random, size)
        head = -epoch * size % step  # packs that complete the step the last epoch left open
        if head >= size:
            return mixed
        first, last = self._broken_steps(mixed, head, (size - head) % step)
        whole = np.ones(size, dtype=bool)
        whole[first] = whole[last] = False
        rest = mixed[whole[mixed]]
        if not len(rest):
            return np.concatenate([first, last])
        steps = rest[_windows(self.work[rest], step, random)].reshape(-1, step)
        return np.concatenate([first, steps[_permutation(random, len(steps))].reshape(-1), last])

    def _broken_steps(self, mixed: Int64, head: int, tail: int) -> tuple[Int64, Int64]:
        """Packs for the step that the last epoch began, and for the one that the next epoch will end.

        They are drawn from packs near the median; heads from every other one of these, tails from those between, so
        that no pack stands twice in a step unless the set is smaller than two steps.
        """
        near = self._near_median
        heads, tails = (mixed[np.isin(mixed, part)] for part in (near[0::2], near[1::2]))
        if len(heads) < head or len(tails) < tail:
            heads, tails = mixed[:head], mixed[head:]
        return heads[:head], tails[:tail]

    @cached_property
    def _near_median(self) -> Int64:
        """The packs nearest to the median one in every kind of work, four steps' worth."""
        size = len(self.work)
        distance = np.zeros(size, dtype=np.int64)
        for values in self.work.T:
            median = int(np.partition(values, size // 2)[size // 2])
            distance = np.maximum(distance, (np.abs(values - median) << 16) // (median + 1))
        wanted = min(size, 4 * self.global_batch_size)
        near = np.flatnonzero(distance <= np.partition(distance, wanted - 1)[wanted - 1])
        return near[np.argsort(distance[near], kind="stable")][:wanted]


def _windows(work: Int64, step: int, random: np.random.Philox) -> Int64:
    """Lay packs out so that each run of `step` of them is alike in every kind of work.

    Args:
        work: `[packs, kinds]`, in random order; packs is a multiple of `step`.
        step: packs of one step.
        random: decides where a window is cut, so that other packs meet in every epoch.

    Returns:
        A permutation of the packs.
    """
    orders = [np.argsort(values, kind="stable") for values in work.T]
    ranked = [values[order] for values, order in zip(work.T, orders, strict=True)]
    # Rank of every pack in each kind: distinct, so that a cut leaves no choice to the library.
    ranks = []
    for order in orders:
        rank = np.empty(len(work), dtype=np.int64)
        rank[order] = np.arange(len(work))
        ranks.append(rank)
    done, stack = [], [ranks]
    while stack:
        window = stack.pop()
        steps = len(window[0]) // step
        # least and most work of the window, plus one: a pack without tiles is much like one that has a single tile
        spans = [
            (int(values[rank.min()]) + 1, int(values[rank.max()]) + 1)
            for values, rank in zip(ranked, window, strict=True)
        ]
        if steps <= 1 or all(most * _ALIKE[1] <= least * _ALIKE[0] for least, most in spans):
            done.append(window[0])
            continue
        kind = 0
        for other, (least, most) in enumerate(spans):
            if most * spans[kind][0] > spans[kind][1] * least:
                kind = other
        third = steps // 3  # the cut: anywhere between a third and two thirds
        cut = step * (third + 1 + int(random.random_raw()) % max(1, steps - 2 * third - 1))
        parts = np.argpartition(window[kind], cut - 1)
        stack += [[rank.take(part) for rank in window] for part in (parts[:cut], parts[cut:])]
    # `work` came in random order: ascending positions are a shuffle of the window
    return np.concatenate([np.sort(orders[0][window]) for window in done])


def _permutation(random: np.random.Philox, size: int) -> Int64:
    """A permutation made of raw random bits: unlike Generator.permutation, they are promised never to change."""
    return np.argsort(random.random_raw(size), kind="stable")
