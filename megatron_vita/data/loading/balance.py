"""Assigns the packs of a step to data-parallel ranks: the same number to each, each kind of work evenly."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from megatron_vita.errors import ConfigError
from megatron_vita.layout import Int64

Float64 = npt.NDArray[np.float64]

_GAIN = 1e-6
"""An exchange that lowers the highest loads by less is not made."""


def assign_packs(packs: Int64, work: Int64, dp_size: int) -> list[Int64]:
    """Assign one step's packs to data-parallel ranks: the same number to each, and an even load of each kind of work.

    Which kind weighs more depends on the model and on the pipeline stage (only the first one encodes tiles), so each is
    balanced by itself. The most expensive pack is assigned first, each pack to the rank with the lowest load; then two
    ranks swap packs as long as that lowers the sum, over the kinds, of the highest load.

    Args:
        packs: pack ids, `[global_batch_size]`, a multiple of dp_size.
        work: of each pack and kind, `[global_batch_size, kinds]`.
        dp_size: data-parallel ranks.

    Returns:
        For each rank its pack ids, in the order of the step.

    Raises:
        ConfigError: the step does not split.
    """
    if len(packs) % dp_size:
        raise ConfigError(f"a step of {len(packs)} packs does not split over {dp_size} data-parallel ranks.")
    each = len(packs) // dp_size
    if each == 1 or dp_size == 1:  # nothing to choose
        return [packs[rank * each : (rank + 1) * each] for rank in range(dp_size)]
    # In parts of a rank's fair share; the one added keeps a step with hardly any tiles from ruling the attention.
    parts = work / (work.sum(axis=0) / dp_size + 1)
    owner = _most_expensive_first(parts, packs, dp_size, each)
    _exchange(parts, owner, dp_size)
    return [packs[owner == rank] for rank in range(dp_size)]


def _most_expensive_first(parts: Float64, packs: Int64, dp_size: int, each: int) -> Int64:
    """Rank of every pack, `[packs]`: the most expensive first, each to the rank whose load it raises least."""
    owner = np.empty(len(parts), dtype=np.int64)
    loads = np.zeros((dp_size, parts.shape[1]))
    places = np.full(dp_size, each)
    for index in np.lexsort((packs, -parts.max(axis=1))).tolist():
        after = (loads + parts[index]).max(axis=1)
        after[places == 0] = np.inf
        rank = int(np.argmin(after))
        owner[index] = rank
        loads[rank] += parts[index]
        places[rank] -= 1
    return owner


def _exchange(parts: Float64, owner: Int64, dp_size: int) -> None:
    """Swap packs of the most loaded rank of a kind with others' as long as it helps; changes `owner`."""
    loads = np.zeros((dp_size, parts.shape[1]))
    np.add.at(loads, owner, parts)
    for _ in range(4 * dp_size):
        best, swap = float(loads.max(axis=0).sum()) - _GAIN, (-1, -1)
        for loaded in sorted(set(loads.argmax(axis=0).tolist())):
            mine, others = np.flatnonzero(owner == loaded), np.flatnonzero(owner != loaded)
            difference = parts[others][None] - parts[mine][:, None]  # [mine, others, kinds]: what `loaded` gains
            other_load = loads[owner[others]][None] - difference
            rest = np.stack([_highest_but(loads, loaded, int(rank)) for rank in range(dp_size)])[owner[others]]
            score = np.maximum(np.maximum(loads[loaded] + difference, other_load), rest[None]).sum(axis=2)
            place = int(score.argmin())
            if score.flat[place] < best:
                best = float(score.flat[place])
                swap = (int(mine[place // len(others)]), int(others[place % len(others)]))
        if swap[0] < 0:
            return
        first, second = swap
        loads[owner[first]] += parts[second] - parts[first]
        loads[owner[second]] += parts[first] - parts[second]
        owner[first], owner[second] = owner[second], owner[first]


def _highest_but(loads: Float64, one: int, other: int) -> Float64:
    """Highest load of each kind, `[kinds]`, over all ranks but two."""
    keep = np.ones(len(loads), dtype=bool)
    keep[[one, other]] = False
    return loads[keep].max(axis=0) if keep.any() else np.zeros(loads.shape[1])
