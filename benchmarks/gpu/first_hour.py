"""The first hour on a real GPU: what dry runs and CPU tests cannot show. Two parts of five minutes on an H200.

    python benchmarks/gpu/first_hour.py --part 1 [--output first_hour]
    python benchmarks/gpu/first_hour.py --part 2 [--output first_hour]

Part 1: the machine and its kernels; parity of every fused kernel; one step of tiny models in each dtype against plain
PyTorch; 20 training steps of 12 layers of the 14B recipe at 16K, with MFU, memory against the dry run and a profile;
the block schedules of all context ranks against one flash call. Part 2: training at 128K, save and resume,
prefill at 128K, a rank of 64 alone against its dry run.

Each section is a process of its own with a time limit: one that fails, dies or hangs costs the others nothing but its
time, and what it had measured is kept. Rows and weights are made; no data is needed. OUTPUT gets part1.json, part1.md
(docs/gpu.md says what to send where) and a log of each section. `--size tiny` runs everything on a CPU in seconds and
says nothing about speed. Exit status 1 if any section is not ok.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import time
import warnings
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve()
sys.path[:0] = [str(HERE.parent), str(HERE.parents[2])]
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # asking for a GPU does not prevent forking
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
warnings.simplefilter("ignore")  # megatron-core's, of what is not installed

PART_S = 295.0
"""Seconds of a part, start-up included."""
SECTIONS: tuple[tuple[str, int, float, str, str], ...] = (
    # Name, part, seconds after which it is killed, what it is, function
    ("machine", 1, 20, "Versions, and what is computed with what.", "attention.machine"),
    ("kernel parity", 1, 60, "Every fused kernel against its reference.", "attention.parity"),
    ("dtype grid", 1, 75, "Tiny models in each dtype against plain PyTorch.", "attention.dtype_grid"),
    ("training at 16K", 1, 110, "12 layers of the 14B recipe, packed pictures.", "training.steps_short"),
    ("schedules", 1, 30, "All context ranks' blocks against one flash call.", "attention.emulation"),
    ("training at 128K", 2, 115, "12 layers of the 14B recipe, one video.", "training.steps_long"),
    ("save and resume", 2, 65, "A checkpoint in the background, and exact resumption.", "training.resume"),
    ("prefill at 128K", 2, 60, "A long prompt through the engine.", "generation.prefill"),
    ("a rank alone", 2, 80, "A rank of 64 with real tensors against its dry run.", "training.rank_alone"),
)


def main(argv: list[str] | None = None) -> int:
    """Run a part; 0 if every section is ok."""
    began = time.monotonic()
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0], allow_abbrev=False)
    parser.add_argument("--part", type=int, choices=(1, 2), help="which half; by default both")
    parser.add_argument("--size", choices=("real", "tiny"), default="real", help="tiny: to try the script on a CPU")
    parser.add_argument("--output", type=Path, default=Path("first_hour"), help="folder of the reports")
    parser.add_argument(
        "--only", choices=[name for name, *_ in SECTIONS], help="a single section, with reports of its own"
    )
    parser.add_argument(
        "--expect", action="store_true", help="dry-run the training sections instead, and write expected.json: no GPU"
    )
    arguments = parser.parse_args(argv)
    # Only now, as it takes seconds; and before the first fork, so that no section has to.
    import training
    from harness import Result, Section, run_section
    from sizes import size_of

    size = size_of(arguments.size)
    if arguments.expect:
        training.expect(size)
        return 0
    arguments.output.mkdir(parents=True, exist_ok=True)
    good = True
    for part in (1, 2) if arguments.part is None else (arguments.part,):
        chosen = [
            Section(name, limit, about, getattr(importlib.import_module(module), function))
            for name, number, limit, about, where in SECTIONS
            for module, _, function in [where.partition(".")]
            if number == part and arguments.only in (None, name)
        ]
        results: list[Result] = []
        for section in chosen:
            log = arguments.output / f"{section.name.replace(' ', '_')}.log"
            limit = min(section.limit_s, PART_S - (time.monotonic() - began))
            result = run_section(section, size, limit, log)
            results.append(result)
            print(f"{section.name:20} {result.status:10} {result.seconds:6.1f} s", flush=True)
            _write(log.with_suffix("") if arguments.only else log.with_name(f"part{part}"), part, size.name, results)
        good &= all(one.status == "ok" for one in results)
        began = time.monotonic()
    print(f"reports in {arguments.output}")
    return 0 if good else 1


def _write(path: Path, part: int, size: str, results: list[Any]) -> None:
    """Both reports, after each section: what is measured is kept, whatever comes."""
    from harness import markdown

    content = {"part": part, "size": size, "sections": [one.to_json() for one in results]}
    path.with_suffix(".json").write_text(json.dumps(content, indent=1))
    header = [f"Size {size}. Written by `benchmarks/gpu/first_hour.py`."]
    path.with_suffix(".md").write_text(markdown(f"First hour on a GPU, part {part}", header, results))


if __name__ == "__main__":
    sys.exit(main())
