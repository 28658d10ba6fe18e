"""The loader: throughput by worker threads, first batch after a resume, time to open a large set.

    python benchmarks/loader.py [--packs 48] [--steps 16] [--big-packs 200000]

The set: packs of 16K tokens, filled with photographs (noisy gradients as JPEG, 800 x 600, tiled to 12 and a thumbnail)
with a caption each; one pack a step, as a data-parallel rank has it at DP 8 and global batch 8. The page cache is warm.

    workers   tiles a second by number of worker threads, and CPU-seconds a step: what threads lose to the GIL.
    resume    the first batch of a fresh loader, set opened and order made, against a steady one. Nothing trains
              between: a steady step takes as long as its tiles take to decode. The bar is 1.5. Best of five of each.
    opening   ShardSet, PackOrder and the first step of a text-only set of many packs: what a resume pays once.
"""

from __future__ import annotations

import argparse
import io
import os
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from megatron_vita.config import DataConfig, TrainConfig
from megatron_vita.data.example import IGNORE_INDEX, Example, MediaItem, TileSlot
from megatron_vita.data.loading.loader import PackLoader, RankCoords
from megatron_vita.data.media.tiling import plan_tiles
from megatron_vita.data.shards.manifest import SourceCounts, TokenizerInfo
from megatron_vita.data.shards.writer.in_memory import ShardWriter
from megatron_vita.data.spec import PreprocessSpec

SPEC, LENGTH, CAPTION, CONTEXT = PreprocessSpec(), 16384, 250, 5
INFO = TokenizerInfo(sha256="0" * 64, vocab_size=1000, pad_id=0)


def photographs(number: int) -> list[MediaItem]:
    """JPEG files of about 80 kB."""
    rng, items = np.random.default_rng(0), []
    for _ in range(number):
        coarse = Image.fromarray(rng.integers(0, 256, (40, 60, 3), dtype=np.uint8)).resize((800, 600))
        pixels = np.asarray(coarse, dtype=np.int16) + rng.integers(-12, 13, (600, 800, 3))
        buffer = io.BytesIO()
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=85)
        items.append(MediaItem(buffer.getvalue(), 800, 600))
    return items


def caption(item: MediaItem) -> Example:
    """A picture and `CAPTION` learnt tokens."""
    slots = plan_tiles(item, 0, SPEC)
    tiles = tuple(
        TileSlot(1 + index * SPEC.tokens_per_tile, 0, slot.row, slot.col, slot.rows, slot.cols, slot.thumbnail)
        for index, slot in enumerate(slots)
    )
    tokens = np.full(2 + len(slots) * SPEC.tokens_per_tile + CAPTION, CONTEXT, dtype=np.int32)
    labels = np.full(len(tokens), IGNORE_INDEX, dtype=np.int32)
    labels[-CAPTION - 1 : -1] = tokens[-CAPTION:]
    return Example(tokens, labels, tiles, (item,))


def write_pictures(prefix: Path, packs: int) -> None:
    """`packs` packs of as many captions as they hold."""
    examples = [caption(item) for item in photographs(16)]
    each = LENGTH // len(examples[0].tokens)
    with ShardWriter(prefix, spec=SPEC, seq_length=LENGTH, tokenizer=INFO, template_sha256="0" * 64) as writer:
        for pack in range(packs):
            members = [examples[(pack * each + index) % len(examples)] for index in range(each)]
            writer.add_pack(members, [(0, pack * each + index + 1) for index in range(each)])
        writer.finish([SourceCounts(name="made", read=packs * each, used=packs * each)])


def write_text(prefix: Path, packs: int) -> None:
    """`packs` packs of three short texts."""
    lengths = np.random.default_rng(0).integers(4, 22, (packs, 3))
    made = {}
    for length in range(4, 22):
        tokens = np.full(length, 9, dtype=np.int32)
        made[length] = Example(tokens, np.append(tokens[1:], IGNORE_INDEX).astype(np.int32))
    with ShardWriter(prefix, spec=SPEC, seq_length=64, tokenizer=INFO, template_sha256="0" * 64) as writer:
        for pack, row in enumerate(lengths.tolist()):
            writer.add_pack([made[length] for length in row], [(0, pack * 3 + index + 1) for index in range(3)])
        writer.finish([SourceCounts(name="made", read=packs * 3, used=packs * 3)])


def open_loader(prefix: Path, workers: int, consumed: int, length: int = LENGTH, batch: int = 1) -> PackLoader:
    data = DataConfig(data_path=str(prefix), seq_length=length, num_workers=workers, reset_per_document=True)
    return PackLoader(data, TrainConfig(global_batch_size=batch), RankCoords(), consumed_packs=consumed)


def measure_workers(prefix: Path, steps: int, cores: int) -> None:
    """Print the throughput by worker threads."""
    alone = 0.0
    for workers in sorted({0, 1, cores, 2 * cores}):
        with open_loader(prefix, workers, 0) as loader:
            next(loader)
            wall, cpu, tiles = time.perf_counter(), time.process_time(), 0
            for _ in range(steps):
                tiles += sum(len(batch.tiles) for batch in next(loader).micro_batches)
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        alone = alone or wall
        print(
            f"workers {workers}: {tiles / wall:6.1f} tiles/s, {1000 * wall / steps:.0f} ms a step, "
            f"{1000 * cpu / steps:.0f} ms CPU a step, {alone / wall:.2f} times no worker"
        )


def measure_resume(prefix: Path, steps: int, cores: int) -> None:
    """Print the first batch of a fresh loader against the steps that follow it."""
    first, steady = [], []
    for attempt in range(5):
        start = time.perf_counter()
        with open_loader(prefix, cores, 7 * attempt) as loader:
            next(loader)
            first.append(time.perf_counter() - start)
            start = time.perf_counter()
            for _ in range(steps):
                next(loader)
            steady.append((time.perf_counter() - start) / steps)
    ratio = min(first) / min(steady)
    print(f"resume: first batch {1000 * min(first):.0f} ms, steady {1000 * min(steady):.0f} ms a step: {ratio:.2f}")


def main() -> None:
    """Print all three."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--packs", type=int, default=48)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--big-packs", type=int, default=200_000)
    args = parser.parse_args()
    cores = os.cpu_count() or 1
    with tempfile.TemporaryDirectory() as folder:
        write_pictures(Path(folder) / "pictures", args.packs)
        measure_workers(Path(folder) / "pictures", args.steps, cores)
        measure_resume(Path(folder) / "pictures", args.steps, cores)
        write_text(Path(folder) / "text", args.big_packs)
        for _ in range(2):
            start = time.perf_counter()
            with open_loader(Path(folder) / "text", 0, 80_000, length=64, batch=8) as loader:
                opened = time.perf_counter() - start
                next(loader)
                step = time.perf_counter() - start - opened
            print(
                f"opening a set of {args.big_packs} packs, {3 * args.big_packs} samples: {opened:.2f} s, "
                f"its order and first step {step:.2f} s"
            )


if __name__ == "__main__":
    main()
