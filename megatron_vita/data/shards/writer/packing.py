"""Lay whole samples into packs of at most one sequence length: best fit, longest first, on lengths alone."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from megatron_vita.errors import DataError

_WORD = 1024
"""Bits of one leaf of the index of free spaces: a million-token pack needs about a thousand leaves."""


def pack(lengths: Sequence[int] | npt.NDArray[np.integer], capacity: int) -> list[list[int]]:
    """Best-fit decreasing: every item once, whole, into as few packs as the heuristic finds.

    Packs that are equally full are interchangeable, so the work is done on counts: items of one length are laid into
    runs of packs with the same free space at once, and only the number of distinct (length, free space) pairs
    costs anything. No random number is drawn: the same lengths give the same packs.

    Inside a pack the items keep their input order, not the order of length: stages without reset read a pack as one
    document, and a model that always saw the longest sample first would learn that. Packs come in the order of their
    first item, so that writing them reads the input nearly in sequence.

    Args:
        lengths: tokens of each item, `[n]`, each in 1..capacity.
        capacity: tokens a pack holds.

    Returns:
        For each pack the ascending indices of its items.

    Raises:
        DataError: an item is empty or longer than a pack (overlong samples are handled before packing).
    """
    bounds, items = pack_arrays(lengths, capacity)
    flat, edges = items.tolist(), bounds.tolist()
    return [flat[start:stop] for start, stop in itertools.pairwise(edges)]


def pack_arrays(
    lengths: Sequence[int] | npt.NDArray[np.integer], capacity: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """`pack` for many millions of items, without a Python object for each.

    Returns:
        (first place of each pack and the number of items, `[packs + 1]`; items in the order of the packs, `[n]`).
    """
    sizes = np.asarray(lengths, dtype=np.int64).reshape(-1)
    if not len(sizes):
        return np.zeros(1, dtype=np.int64), np.zeros(0, dtype=np.int64)
    wrong = np.flatnonzero((sizes < 1) | (sizes > capacity))
    if len(wrong):
        raise DataError(
            f"item {wrong[0]} has {sizes[wrong[0]]} tokens, but a pack holds 1 to {capacity}. "
            "Reject or shorten such samples before packing, or raise the sequence length."
        )
    longest_first = np.argsort(-sizes, kind="stable")
    values, counts = np.unique(sizes, return_counts=True)
    runs = _best_fit(values[::-1].tolist(), counts[::-1].tolist(), capacity)
    pack_of = np.empty(len(sizes), dtype=np.int64)
    pack_of[longest_first] = _expand(runs)
    # Number the packs by their first items: the first time that each is met.
    _, firsts = np.unique(pack_of, return_index=True)
    rank = np.empty(len(firsts), dtype=np.int64)
    rank[np.argsort(firsts)] = np.arange(len(firsts))
    pack_of = rank[pack_of]
    return np.concatenate([[0], np.cumsum(np.bincount(pack_of))]), np.argsort(pack_of, kind="stable")


def fill(lengths: Sequence[int] | npt.NDArray[np.integer], packs: Sequence[Sequence[int]], capacity: int) -> float:
    """Fill ratio: tokens by capacity of all packs, 0..1."""
    return float(np.sum(np.asarray(lengths, dtype=np.int64))) / (len(packs) * capacity) if packs else 1.0


class _FreeSpace:
    """Free capacity of the packs: runs of packs by free space, with an index that finds the tightest fit."""

    def __init__(self, capacity: int) -> None:
        self._runs: dict[int, list[tuple[int, int]]] = {}  # free space -> (first pack, packs)
        self._leaves = [0] * (capacity // _WORD + 1)  # bit r % _WORD of leaf r // _WORD: some pack has r tokens free
        self._summary = 0  # bit i: leaf i is not zero

    def tightest(self, value: int) -> int | None:
        """The least free space of at least `value` that some pack has: the lowest set bit there or above."""
        leaf = value // _WORD
        word = self._leaves[leaf] >> value % _WORD
        if word:
            return value + (word & -word).bit_length() - 1
        above = self._summary >> (leaf + 1)
        if not above:
            return None
        leaf += (above & -above).bit_length()
        word = self._leaves[leaf]
        return leaf * _WORD + (word & -word).bit_length() - 1

    def take(self, space: int) -> tuple[int, int]:
        """A run (first pack, packs) that has exactly this free space; it is no longer listed."""
        runs = self._runs[space]
        run = runs.pop()
        if not runs:
            del self._runs[space]
            leaf = space // _WORD
            self._leaves[leaf] ^= 1 << space % _WORD
            if not self._leaves[leaf]:
                self._summary ^= 1 << leaf
        return run

    def put(self, space: int, first: int, packs: int) -> None:
        """List a run of packs with this free space; full packs, and no packs, are not listed."""
        if not space or not packs:
            return
        if space not in self._runs:
            self._runs[space] = []
            leaf = space // _WORD
            self._leaves[leaf] |= 1 << space % _WORD
            self._summary |= 1 << leaf
        self._runs[space].append((first, packs))


def _best_fit(values: list[int], counts: list[int], capacity: int) -> list[tuple[int, int, int]]:
    """Assign items, longest length first, to numbered packs.

    Returns:
        Runs (first pack, packs, items for each of them), which consume the items in the order of `values`.
    """
    free = _FreeSpace(capacity)
    runs: list[tuple[int, int, int]] = []
    num_packs = 0
    for value, count in zip(values, counts, strict=True):
        while count:
            space = free.tightest(value)
            if space is None:  # new packs for all that is left of this length
                space = capacity
                each = space // value
                first, size = num_packs, -(-count // each)
                num_packs += size
            else:
                each = space // value  # the pack just filled is the tightest again, so it takes all it can
                first, size = free.take(space)
            filled = min(count // each, size)
            pieces = [(filled, each)]
            if filled < size:
                pieces.append((1, count - filled * each))  # what is left does not fill the next pack
            for packs, items in pieces:
                if packs and items:
                    runs.append((first, packs, items))
                    free.put(space - items * value, first, packs)
                    first, size, count = first + packs, size - packs, count - packs * items
            free.put(space, first, size)  # packs of the run that got nothing
    return runs


def _expand(runs: list[tuple[int, int, int]]) -> npt.NDArray[np.int64]:
    """Pack of every item, `[n]`, in the order in which the runs consume them."""
    first, number, each = np.array(runs, dtype=np.int64).T
    ends = np.cumsum(number)
    packs = np.arange(ends[-1]) + np.repeat(first - (ends - number), number)
    return np.repeat(packs, np.repeat(each, number))
