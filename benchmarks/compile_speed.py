"""The data compiler end to end: a JSONL file and JPEG files become packed shards.

    python benchmarks/compile_speed.py [--photos 3000] [--workers 2] [--repeats 3] [--profile]

Photos: crops of scikit-learn's two, at other sizes, encoded as distinct JPEGs of 100 to 400 kB; one short caption each.

* Ours: `tools/preprocess_data.py` as a user runs it (tiles of 448, at most 12, packs of 16,384 tokens, pictures
  embedded as they are), start-up, checksums, SHA-256 of every file and fsync included.
* Baseline: what a script does without a compiler: for each sample decode with Pillow, cut into the same tiles,
  normalise in float32, np.save; one process. CPU time per sample.
* Raw write: the same bytes as the finished set, from memory, in blocks of 1 MiB, with fsync; one process.

CPU time is user + system of the process and its children. Runs are interleaved, the best of each counts. The bars:
samples per CPU-second at least 20 times the baseline's; bytes per second of wall time at least 0.6 of the raw write's.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_image

from megatron_vita.config import IMAGE_NORMS
from megatron_vita.data.media.tiling import grid_for
from megatron_vita.data.spec import PreprocessSpec
from tests.data.kit import tokenizer_folder

ROOT = Path(__file__).resolve().parents[1]
SPEC = PreprocessSpec()
SEQ_LENGTH = 16384


def make_photo(number: int, folder: Path) -> None:
    """A distinct JPEG of 100 to 400 kB."""
    rng = np.random.default_rng(number)
    photo = Image.fromarray(load_sample_image(("china.jpg", "flower.jpg")[number % 2]))
    width, height = photo.size
    left, top = int(rng.integers(0, width // 4)), int(rng.integers(0, height // 4))
    photo = photo.crop((left, top, left + width * 3 // 4, top + height * 3 // 4))
    side = int(rng.integers(800, 1400))
    shape = (side, int(side * rng.uniform(0.6, 0.8))) if rng.random() < 0.7 else (int(side * 0.75), side)
    quality = 92
    while True:
        buffer = io.BytesIO()
        photo.resize(shape, Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=quality)
        if len(buffer.getvalue()) <= 400_000 or quality < 60:
            break
        quality -= 8
    (folder / f"{number:05d}.jpg").write_bytes(buffer.getvalue())


def make_photos(first: int, last: int, folder: Path) -> None:
    """Photos first..last-1."""
    for number in range(first, last):
        make_photo(number, folder)


def make_data(folder: Path, photos: int) -> None:
    """Photos, captions, mix and tokenizer."""
    (folder / "photos").mkdir()
    with ProcessPoolExecutor() as pool:
        parts = [pool.submit(make_photos, n, min(n + 100, photos), folder / "photos") for n in range(0, photos, 100)]
        for part in parts:
            part.result()
    with (folder / "captions.jsonl").open("w") as stream:
        for number in range(photos):
            turns = [
                {"from": "human", "value": "<image>\nDescribe the picture in one sentence."},
                {"from": "gpt", "value": f"Picture {number} shows a palace or a flower, cut out and made larger."},
            ]
            stream.write(json.dumps({"image": f"photos/{number:05d}.jpg", "conversations": turns}) + "\n")
    group = {"data_paths": [str(folder / "captions.jsonl")], "media_root": str(folder)}
    (folder / "mix.yaml").write_text(json.dumps({"dataset": {"photos": group}}))
    tokenizer_folder(folder / "tokenizer")


def baseline(folder: Path, photos: int) -> None:
    """Pillow, tiles, float32, np.save."""
    mean, std = (np.array(part, dtype=np.float32).reshape(3, 1, 1) for part in IMAGE_NORMS[SPEC.image_norm])
    side = SPEC.image_size
    for number in range(photos):
        photo = Image.open(folder / f"photos/{number:05d}.jpg").convert("RGB")
        cols, rows = grid_for(*photo.size, SPEC)
        grid = photo.resize((cols * side, rows * side), Image.Resampling.BICUBIC)
        boxes = [(c * side, r * side, (c + 1) * side, (r + 1) * side) for r in range(rows) for c in range(cols)]
        tiles = [grid.crop(box) for box in boxes]
        if len(tiles) > 1:
            tiles.append(photo.resize((side, side), Image.Resampling.BICUBIC))
        pixels = np.stack([np.asarray(tile, dtype=np.float32).transpose(2, 0, 1) for tile in tiles])
        np.save(folder / "sample.npy", (pixels / 255.0 - mean) / std)


def raw_write(folder: Path, size: int) -> None:
    """As many bytes as the set has."""
    block = os.urandom(1 << 20)
    with (folder / "raw.bin").open("wb", buffering=0) as stream:
        for start in range(0, size, len(block)):
            stream.write(block[: size - start])
        os.fsync(stream.fileno())
    (folder / "raw.bin").unlink()


def ours(folder: Path, workers: int, profile: bool = False) -> None:
    """The command line."""
    command = [sys.executable, *(["-m", "cProfile", "-o", str(folder / "profile")] if profile else [])]
    command += [str(ROOT / "tools/preprocess_data.py"), "--data-config", str(folder / "mix.yaml")]
    command += ["--tokenizer", str(folder / "tokenizer"), "--output", str(folder / "out/set")]
    command += ["--seq-length", str(SEQ_LENGTH), "--workers", str(workers)]
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


def measured(work: Callable[[], None]) -> tuple[float, float]:
    """(CPU seconds with children, wall seconds)."""

    def cpu() -> float:
        usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
        return sum(usage.ru_utime + usage.ru_stime for usage in usages)

    os.sync()  # flush the writes of earlier runs first
    before, start = cpu(), time.perf_counter()
    work()
    return cpu() - before, time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--photos", type=int, default=3000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--profile", action="store_true", help="show where the time of one process goes")
    args = parser.parse_args()
    some = min(args.photos, 40)
    with tempfile.TemporaryDirectory(dir=ROOT / "runs" if (ROOT / "runs").is_dir() else None) as name:
        folder = Path(name)
        make_data(folder, args.photos)
        if args.profile:
            import pstats

            ours(folder, 1, profile=True)
            pstats.Stats(str(folder / "profile")).sort_stats("tottime").print_stats(30)
            return
        best: dict[str, tuple[float, float]] = {}
        ours(folder, args.workers)  # warms the page cache, and says how many bytes a set has
        size = sum(path.stat().st_size for path in (folder / "out").iterdir())
        runs: dict[str, Callable[[], None]] = {
            "ours": lambda: ours(folder, args.workers),
            "baseline": lambda: baseline(folder, some),
            "raw write": lambda: raw_write(folder, size),
        }
        for _ in range(args.repeats):
            for key, work in runs.items():
                new = measured(work)
                best[key] = tuple(map(min, best.get(key, new), new))  # type: ignore[assignment]
        cpu, wall = best["ours"]
        slow = best["baseline"][0] / some
        raw_cpu, raw_wall = best["raw write"]
        print(f"{args.photos} photos, {size / args.photos / 1e3:.0f} kB a sample in the set, {args.workers} workers")
        print(f"ours      {args.photos / cpu:8.0f} samples per CPU-second  {size / wall / 1e6:6.0f} MB/s  {wall:.2f} s")
        print(f"baseline  {1 / slow:8.1f} samples per CPU-second")
        raw = f"{size / raw_wall / 1e6:14.0f} MB/s  {raw_wall:.2f} s"
        print(f"raw write {size / raw_cpu / 1e6:8.0f} MB per CPU-second  {raw}")
        print(f"samples per CPU-second, ours : baseline = {slow * args.photos / cpu:.1f} (bar 20)")
        print(f"bytes per second, ours : raw write      = {raw_wall / wall:.2f} of wall time (bar 0.6)")
        print(f"                                          {raw_cpu / cpu:.2f} of CPU time")


if __name__ == "__main__":
    main()
