"""Conversion against the two things it must be compared with: copying the same bytes, and load-split-save.

    PYTHONPATH=. python benchmarks/convert.py [--gigabytes 4] [--repeats 5] [--scratch DIR] [--workers N]

One synthetic Qwen2 decoder (bfloat16, random bytes, wide and few layers) is imported and exported, side by side with

* `cp` of the same files, and the same with `sync -d`, which is what --fsync does;
* load-split-save: what converters do that keep a whole state dict: load every tensor, fuse q, k, v, cut the
  result (gate and up alike) into two tensor-parallel ranks, torch.save each;
* `cmp` of the two copies of the decoder's files, for `verify` of the checkpoint against its source.

All are repeated in turn, with the sources in the page cache; the best time of each counts. Output files are deleted
before each run, outside the time. CPU time includes child processes. Every run is a process of its own, as a user
starts it, and its start-up (interpreter and imports) is measured by itself and printed: it weighs most with a small
model. Ratios are given with it and without it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_vita.files import usable_cores
from tests.convert.synthetic import write_wide_qwen2

ROOT = Path(__file__).resolve().parents[1]
_NAIVE = """
import sys, torch
from pathlib import Path
from safetensors.torch import load_file
state = {}
for file in sorted(Path(sys.argv[1]).glob("*.safetensors")):
    state.update(load_file(file))
heads, groups = int(sys.argv[3]), int(sys.argv[4])
ranks = [{}, {}]
for name in list(state):
    if name not in state:
        continue
    value = state.pop(name)
    if ".q_proj." in name:
        k, v = (state.pop(name.replace("q_proj", part)) for part in ("k_proj", "v_proj"))
        rest = value.shape[1:]
        value = torch.cat([one.view(groups, -1, *rest) for one in (value, k, v)], 1).reshape(-1, *rest)
        name = name.replace("q_proj", "qkv")
    elif ".gate_proj." in name:
        up = state.pop(name.replace("gate_proj", "up_proj"))
        for rank, pair in enumerate(zip(value.chunk(2), up.chunk(2))):
            ranks[rank][name] = torch.cat(pair)
        continue
    axis = 1 if "o_proj" in name or "down_proj" in name else 0
    for rank, part in enumerate(value.chunk(2, axis) if value.dim() > axis else [value, value]):
        ranks[rank][name] = part.contiguous().clone()
for rank, tensors in enumerate(ranks):
    folder = Path(sys.argv[2]) / f"mp_rank_{rank:02d}"
    folder.mkdir(parents=True)
    torch.save({"model": tensors}, folder / "model_optim_rng.pt")
"""


@dataclass
class Result:
    """The best of several runs of one command."""

    wall: float = float("inf")
    cpu: float = float("inf")
    peak: int = 0
    """Largest resident set of any run, bytes."""


def measure(command: Sequence[str], result: Result) -> None:
    """Run a command to its end and keep its times if they are the best so far."""
    start = time.perf_counter()
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - start
    assert process.stderr is not None
    if status:
        raise SystemExit(f"{' '.join(command)} failed:\\n{process.stderr.read()}")

    result.wall = min(result.wall, wall)
    result.cpu = min(result.cpu, usage.ru_utime + usage.ru_stime)
    result.peak = max(result.peak, usage.ru_maxrss * 1024)


def main() -> None:
    """Parse, measure in turn, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--gigabytes", type=float, default=4.0, help="weights of the synthetic model")
    parser.add_argument("--repeats", type=int, default=5, help="runs of each; the best counts")
    parser.add_argument("--scratch", type=Path, help="folder for about five times the weights")
    parser.add_argument("--workers", type=int, help="threads of the conversion (default: its own)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as scratch:
        run(Path(scratch), arguments.gigabytes, arguments.repeats, arguments.workers)


def run(scratch: Path, gigabytes: float, repeats: int, workers: int | None) -> None:
    """Measure everything in one folder."""
    source, out = scratch / "hf", scratch / "out"
    size = write_wide_qwen2(source, gigabytes)
    config = json.loads((source / "config.json").read_text())
    tool = [sys.executable, "tools/convert_ckpt.py"]
    more = ["--workers", str(workers)] if workers else []
    subprocess.run([*tool, "import", "--llm", str(source), "--output", str(scratch / "ckpt")], cwd=ROOT, check=True)
    shutil.copytree(source, scratch / "copy")
    step = scratch / "ckpt/iter_0000000"
    heads = [str(config["num_attention_heads"]), str(config["num_key_value_heads"])]
    importing = [*tool, "import", "--llm", str(source), "--output", str(out), *more]
    exporting = [*tool, "export", "--checkpoint", str(step), "--output", str(out), "--format", "llm", *more]
    commands: dict[str, list[str]] = {
        "start-up alone": [*tool, "verify", "--help"],
        "cp (HF folder)": ["cp", "-r", str(source), str(out)],
        "cp + sync": ["sh", "-c", f"cp -r {source} {out} && sync -d {out}/*.safetensors"],
        "import": importing,
        "import --fsync": [*importing, "--fsync"],
        "cp (checkpoint)": ["cp", "-r", str(step), str(out)],
        "export": exporting,
        "cmp": ["sh", "-c", f"for file in {source}/*.safetensors; do cmp $file {scratch}/copy/$(basename $file); done"],
        "verify": [*tool, "verify", str(step), str(source)],
        "load-split-save": [sys.executable, "-c", _NAIVE, str(source), str(out), *heads],
    }
    results = {name: Result() for name in commands}
    for _ in range(repeats):
        for name, command in commands.items():
            shutil.rmtree(out, ignore_errors=True)
            for folder in {"cp (checkpoint)": [step], "export": [step], "verify": [step, source]}.get(name, [source]):
                _warm(folder)
            measure(command, results[name])
    _print(results, size)


def _warm(folder: Path) -> None:
    block = bytearray(1 << 22)
    for path in folder.iterdir():
        if path.is_file():
            with path.open("rb", buffering=0) as file:
                while file.readinto(block):
                    pass


def _print(results: dict[str, Result], size: int) -> None:
    print(f"{size / 1e9:.2f} GB of weights, {usable_cores()} cores, best of each")
    for name, one in results.items():
        print(f"  {name:18s} {one.wall:7.2f} s   CPU {one.cpu:7.2f} s   peak {one.peak / 2**20:7.0f} MiB")
    idle = results["start-up alone"]

    def speed(name: str, against: str, key: Callable[[Result], float], without: float) -> float:
        return key(results[against]) / max(key(results[name]) - without, 1e-9)

    for name, against, bar in (
        ("import", "cp (HF folder)", 0.35),
        ("import --fsync", "cp + sync", 0.35),
        ("export", "cp (checkpoint)", 0.35),
        ("verify", "cmp", None),
        ("import", "load-split-save", 3.0),
        ("export", "load-split-save", 3.0),
    ):
        wall, cpu = (lambda one: one.wall), (lambda one: one.cpu)
        line = f"{name} / {against}: {speed(name, against, wall, 0):.2f} of its speed{f' (bar {bar})' if bar else ''}"
        line += f", by CPU time {speed(name, against, cpu, 0):.2f}"
        if against != "load-split-save":  # which has a start-up of its own
            line += f"; without start-up {speed(name, against, wall, idle.wall):.2f}"
            line += f", by CPU time {speed(name, against, cpu, idle.cpu):.2f}"
        print(line)


if __name__ == "__main__":
    main()
