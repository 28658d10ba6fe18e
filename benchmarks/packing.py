"""How full packs are, and how many lengths a CPU-second packs.

    python benchmarks/packing.py [--samples 1000000] [--repeats 3]

The lengths are the realistic mixes of mix.py at 16K, 32K and 128K. Bars: 99.5 % full, a million lengths a CPU-second
(best of the repeats). `first fit in input order` packs the same lengths as a streaming packer with 64 open packs would.
"""

from __future__ import annotations

import argparse
import time

import mix

from megatron_vita.data.shards.writer.packing import fill, pack

FILL_BAR, SPEED_BAR, OPEN = 0.995, 1_000_000, 64


def streaming_fill(lengths: mix.Int64, capacity: int) -> float:
    """Fill of first fit with `OPEN` packs open at a time; the fullest is closed where a length fits into none."""
    free: list[int] = []
    packs = 0
    for length in lengths.tolist():
        place = next((index for index, left in enumerate(free) if left >= length), None)
        if place is None:
            if len(free) == OPEN:
                free.remove(min(free))
            free.append(capacity)
            packs += 1
            place = len(free) - 1
        free[place] -= length
    return float(lengths.sum()) / (packs * capacity)


def main() -> None:
    """Print a line for each sequence length."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--samples", type=int, default=1_000_000)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    for capacity, long in ((16384, False), (32768, False), (131072, True)):
        lengths, _ = mix.samples(args.samples, capacity, long=long)
        seconds = []
        for _ in range(args.repeats):
            start = time.process_time()
            packs = pack(lengths, capacity)
            seconds.append(time.process_time() - start)
        full, speed = fill(lengths, packs, capacity), len(lengths) / min(seconds)
        stream = streaming_fill(lengths[:50_000], capacity)
        print(
            f"{capacity >> 10:>4}K: {len(packs)} packs, {full:.4%} full ({'meets' if full >= FILL_BAR else 'MISSES'} "
            f"{FILL_BAR:.1%}; first fit in input order {stream:.2%}), {speed / 1e6:.2f} million lengths a CPU-second "
            f"= {speed / SPEED_BAR:.2f} of the bar"
        )


if __name__ == "__main__":
    main()
