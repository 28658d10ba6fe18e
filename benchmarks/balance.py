"""Load balance of data-parallel ranks within a step (attention and tiles), and the time to compute the pack order.

    python benchmarks/balance.py [--samples 500000] [--skip-scale]

Packs are built from the realistic mixes of mix.py, ordered by `PackOrder` and assigned by `assign_packs` to 8 ranks,
for global batches of 8 (one pack a rank) and 64. Stages 1 and 2 (16K, 32K) reset attention per sample; stages 3 and 4
(128K) do not. A rank's load is the query-key pairs of its packs, and their tiles, each by itself.

    waited    sum over the steps of the maximum load / sum over the steps of the mean load: the total cost of imbalance.
              The bar is 1.05.
    mean, median, p99, worst   of maximum / mean load of a step. For tiles only steps with at least one tile per rank
              are counted. The bar for the mean is 1.05.
    thin      steps that are not counted for that reason.

`random` is the same packs in random order, assigned alike. Sets of 100 to 10,000 packs show the limits of a small set.
"""

from __future__ import annotations

import argparse
import time

import mix
import numpy as np

from megatron_vita.data.loading.balance import assign_packs
from megatron_vita.data.loading.sampler import PackOrder
from megatron_vita.data.shards.format import attention_pairs
from megatron_vita.data.shards.writer.packing import pack

Int64 = mix.Int64
RANKS, BAR, STEPS = 8, 1.05, 4000


def pack_work(number: int, seq_length: int, *, long: bool) -> Int64:
    """Attention and tiles of each pack of a mix, `[packs, 2]`; `long`: without reset."""
    lengths, tiles = mix.samples(number, seq_length, long=long)
    packs = pack(lengths, seq_length)
    members, first = np.concatenate(packs), np.cumsum([0] + [len(one) for one in packs[:-1]])
    pairs = (
        attention_pairs(np.add.reduceat(lengths[members], first))
        if long
        else np.add.reduceat(attention_pairs(lengths)[members], first)
    )
    return np.stack([pairs, np.add.reduceat(tiles[members], first)], axis=1)


def loads(work: Int64, steps: Int64) -> Int64:
    """Load of each rank, `[steps, ranks, kinds]`, for pack ids `[steps, global batch]`."""
    return np.stack([[work[hand].sum(axis=0) for hand in assign_packs(ids, work[ids], RANKS)] for ids in steps])


def line(name: str, partitioned: Int64) -> str:
    """One line of the table."""
    most, mean = partitioned.max(axis=1), partitioned.mean(axis=1)
    cells = [f"{name:<34}"]
    for kind in range(2):
        counted = mean[:, kind] >= 1
        ratios = most[counted, kind] / mean[counted, kind]
        waited = most[:, kind].sum() / mean[:, kind].sum()
        figures = (waited, ratios.mean(), np.median(ratios), np.quantile(ratios, 0.99), ratios.max())
        cells.append(" ".join(f"{figure:7.4f}" for figure in figures))
    return " | ".join([*cells, f"{int((mean[:, 1] < 1).sum()):>3} of {len(partitioned)}"])


def measure(name: str, work: Int64, *, baseline: bool) -> None:
    """Two epochs (at most `STEPS` steps of each, evenly chosen) at both global batches."""
    for batch in (8, 64):
        order = PackOrder(work, seed=1, digest="benchmark", global_batch_size=batch)
        number = 2 * len(work) // batch
        chosen = np.unique(np.linspace(0, number - 1, min(number, 2 * STEPS)).astype(int))
        steps = np.stack([order.packs(int(step) * batch) for step in chosen])
        print(line(f"{name}, batch {batch}", loads(work, steps)))
        if baseline:
            mixed = np.random.default_rng(0).permutation(len(work))
            steps = mixed[: len(work) // batch * batch].reshape(-1, batch)[:STEPS]
            print(line("    random", loads(work, steps)))


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--samples", type=int, default=500_000, help="of the large sets")
    parser.add_argument("--skip-scale", action="store_true", help="do not time sets of a million and ten million packs")
    args = parser.parse_args()
    head = " ".join(f"{word:>7}" for word in ("waited", "mean", "median", "p99", "worst"))
    print(f"{'':<34} | {'attention':^39} | {'tiles':^39} |\n{'':<34} | {head} | {head} | thin")
    for seq_length, long in ((16384, False), (32768, False), (131072, True)):
        work = pack_work(args.samples, seq_length, long=long)
        measure(f"{seq_length >> 10}K, {len(work)} packs", work, baseline=True)
    small = pack_work(66_000, 16384, long=False)
    for packs in (100, 1000, 10_000):
        measure(f"16K, {packs} packs", pack_work(int(packs * 66_000 / len(small)), 16384, long=False), baseline=False)
    if args.skip_scale:
        return
    some = pack_work(args.samples, 16384, long=False)
    rng = np.random.default_rng(0)
    for packs in (1_000_000, 10_000_000):
        work = some[rng.integers(0, len(some), packs)]
        work[:, 0] += rng.integers(0, 1_000_000, packs)
        start = time.process_time()
        PackOrder(work, seed=1, digest="benchmark", global_batch_size=8).packs(0)
        print(f"order of one epoch of {packs} packs: {time.process_time() - start:.2f} CPU-seconds")


if __name__ == "__main__":
    main()
