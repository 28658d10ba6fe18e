"""Saving and loading checkpoints of training, against what they must be compared with; each ratio from one run.

    OMP_NUM_THREADS=1 python benchmarks/checkpoint.py [--millions 120] [--repeats 5] [--scratch DIR] [--only SECTION]

A decoder of `--millions` parameters (float32: 12 bytes of state each) is trained with random weights and batches.

* spread: bytes written by each rank, every byte once; bytes that ranks read to resume, over those they hold.
* memory: what a save and a load add to a rank's memory, at the peak, in processes of their own.
* blocked: how long an asynchronous save keeps training, over one copy of the state into memory that is there; and steps
  while it writes, over steps while nothing does.
* throughput: a save over writing the same bytes from memory and syncing them; a load over `cat` of the files. All in
  turn, best of each, files in the page cache.

Conversion is measured by convert.py. `--quick` runs everything at a size that says nothing, and judges only what does
not depend on size. Takes three minutes and four times the state of disk; Linux only.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist
from figure import Figure
from inference_kit import PeakMemory, on_ranks

from megatron_vita import checkpoint, core_optimizer
from megatron_vita.checkpoint.boxes import volume, whole
from megatron_vita.checkpoint.folder import step_folder
from megatron_vita.checks.batches import step_batches
from megatron_vita.checks.options import make_stage
from megatron_vita.checks.tiny import Pack
from megatron_vita.config import ModelConfig, ParallelConfig
from megatron_vita.training.setup import ModelAndOptimizer, build_model_and_optimizer
from megatron_vita.training.step import train_step

VOCABULARY, LAYERS = 8192, 4
BLOCK_BYTES = 8 << 20
MIB = 1 << 20
DP, TP2 = ParallelConfig(), ParallelConfig(tensor_model_parallel_size=2)


def model_of(millions: float) -> ModelConfig:
    """A decoder of about so many million parameters."""
    width = 64
    while LAYERS * 12.25 * width**2 + 2 * VOCABULARY * width < millions * 1e6:
        width += 64
    return ModelConfig(
        num_layers=LAYERS,
        hidden_size=width,
        ffn_hidden_size=11 * width // 4,
        num_attention_heads=width // 32,
        num_query_groups=width // 32,
        vocab_size=VOCABULARY,
    )


class Run:
    """One rank's training."""

    def __init__(self, model: ModelConfig, parallel: ParallelConfig, tokens: int = 64) -> None:
        packs = [self._pack(seed, tokens) for seed in range(dist.get_world_size())]
        self.stage = make_stage(parallel, model, len(packs), 1, False, seq_length=tokens)
        self.setup: ModelAndOptimizer = build_model_and_optimizer(self.stage)
        self._batches = step_batches(self.stage, self.setup.groups, packs)
        self.iteration = 0
        self.step()  # the optimizer's state is there from its first step on

    @staticmethod
    def _pack(seed: int, tokens: int) -> Pack:
        source = torch.Generator().manual_seed(seed)
        ids, labels = torch.randint(0, VOCABULARY, (2, tokens), generator=source)
        return Pack((tokens,), ids, labels, torch.zeros((0, 3, 32, 32), dtype=torch.uint8), ())

    def step(self) -> None:
        """Train one step."""
        self.iteration += 1
        setup = self.setup
        train_step(
            self.stage, setup.groups, setup.wrapped, setup.optimizer, setup.scheduler, self._batches, self.iteration
        )

    def what(self) -> tuple[Any, ...]:
        """Arguments of a save."""
        state = checkpoint.RunState(stage=self.stage, iteration=self.iteration)
        return self.setup.models, self.setup.optimizer, self.setup.scheduler, state, self.setup.groups

    def load(self, folder: Path) -> None:
        """Resume from a checkpoint."""
        checkpoint.load_training(folder, self.setup.models, self.setup.optimizer, self.setup.scheduler)

    def held(self) -> list[torch.Tensor]:
        """Tensors of this rank that a checkpoint has: weights, and both moments of its share of them."""
        weights = [one.detach() for model in self.setup.models for one in model.parameters()]
        adams = (one.optimizer for one in core_optimizer.distributed_optimizers(self.setup.optimizer))
        moments = [
            value
            for adam in adams
            for state in adam.state.values()
            for value in state.values()
            if torch.is_tensor(value) and value.numel() > 1
        ]
        return [*weights, *moments]


def nbytes(tensors: list[torch.Tensor]) -> int:
    """Bytes of all elements."""
    return sum(one.nbytes for one in tensors)


def everywhere(value: Any) -> list[Any]:
    """A value of each rank."""
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


# ---- spread ----


def _spread(model: ModelConfig, parallel: ParallelConfig, root: Path) -> dict[str, Any]:
    run = Run(model, parallel)
    folder = checkpoint.save(root, *run.what())
    dist.barrier()
    before = _bytes_read()
    run.load(folder)
    read = _bytes_read() - before
    return {"read": read, "held": nbytes(run.held()), "folder": folder}


def _bytes_read() -> int:
    """Bytes that this process has asked the system for, from the page cache or not."""
    return int(psutil.Process().io_counters().read_chars)


def spread(model: ModelConfig, root: Path, arguments: argparse.Namespace) -> list[Figure]:
    """Who writes and reads how much."""
    figures = []
    for name, parallel in (("DP 4", DP), ("TP 2 x DP 2", TP2)):
        ranks = on_ranks(4, _spread, model, parallel, root / name)
        folder = ranks[0]["folder"]
        written = [0] * 4
        for path in folder.glob("*.distcp"):
            written[int(path.name.split("_")[2])] += path.stat().st_size
        stored = checkpoint.read_tensors(folder)
        elements = sum(volume(whole(stored.shape(key))) for key in stored)
        pieces = sum(volume(piece.box) for one in stored.stored.values() for piece in one.pieces)
        state = sum(stored.nbytes(key) for key in stored)
        uneven = max(written) / (sum(written) / 4)
        figures += [
            figure(f"{name}: bytes written by rank, max / mean", uneven, 1.10),
            Figure(
                f"{name}: every element is written once",
                f"{pieces} of {elements}; files / state {sum(written) / state:.3f}",
                "equal",
                pieces == elements,
            ),
            figure(
                f"{name}: bytes read to resume / held, worst rank",
                max(one["read"] / one["held"] for one in ranks),
                1.05,
                judged=not arguments.quick,
            ),
        ]
        shutil.rmtree(root / name)
    return figures


# ---- memory ----


def _memory_of_save(model: ModelConfig, root: Path, asynchronous: bool) -> tuple[int, int]:
    run = Run(model, DP)
    peak = PeakMemory()
    with checkpoint.Saver(root, asynchronous=asynchronous) as saver:
        saver.save(*run.what())
        saver.wait()
        gained = peak.gained()
    written = sum(path.stat().st_size for path in root.rglob(f"__{dist.get_rank()}_*.distcp"))
    return gained, written


def _memory_of_load(model: ModelConfig, root: Path) -> int:
    run = Run(model, DP)
    peak = PeakMemory()
    run.load(root)
    return peak.gained()


def memory(model: ModelConfig, root: Path, arguments: argparse.Namespace) -> list[Figure]:
    """What a rank needs beside what it holds. (Weights and moments are there before: a load fills them.)"""
    judged, figures = not arguments.quick, []
    for ranks in (1, 2):
        gained = on_ranks(ranks, _memory_of_save, model, root / "async", True)
        ratio = max(more / own for more, own in gained)
        figures.append(figure(f"DP {ranks}: asynchronous save, peak / own state", ratio, 1.1, judged=judged))
        gained = on_ranks(ranks, _memory_of_save, model, root / "sync", False)
        figures.append(mebibytes(f"DP {ranks}: plain save, peak", max(more for more, _ in gained), 256))
        loaded = on_ranks(ranks, _memory_of_load, model, root / "sync")
        figures.append(mebibytes(f"DP {ranks}: load, peak beyond what it fills", max(loaded), 256))
        shutil.rmtree(root / "async")
        shutil.rmtree(root / "sync")
    return figures


# ---- blocked ----


def _blocked(model: ModelConfig, root: Path, repeats: int, tokens: int) -> dict[str, Any]:
    run = Run(model, DP, tokens)
    state = run.held()
    copies = [torch.empty_like(one) for one in state]
    copying, saving, plain, beside = [], [], [], []
    with checkpoint.Saver(root, asynchronous=True, keep_last=1) as saver:
        for _ in range(repeats):
            copying.append(_timed(lambda: [to.copy_(one) for to, one in zip(copies, state, strict=True)]))
            plain += [_timed_step(run, saver) for _ in range(3)]
            saving.append(_timed(saver.save, *run.what()))
            published = step_folder(root, run.iteration)
            while not published.exists():
                beside.append(_timed_step(run, saver))
            saver.wait()
    return {"copy": copying, "save": saving, "plain": plain, "beside": beside}


def _timed_step(run: Run, saver: checkpoint.Saver) -> tuple[float, float]:
    """(seconds of one step, CPU seconds of this thread in it)."""
    began, busy = time.perf_counter(), time.thread_time()
    run.step()
    saver.poll()
    return time.perf_counter() - began, time.thread_time() - busy


def blocked(model: ModelConfig, root: Path, arguments: argparse.Namespace) -> list[Figure]:
    """What training notices of an asynchronous save."""
    (one,) = on_ranks(1, _blocked, model, root / "blocked", arguments.repeats + 1, arguments.tokens)
    judged = not arguments.quick
    steps = {name: [statistics.median(times) for times in zip(*one[name], strict=True)] for name in ("plain", "beside")}
    slower, busier = (a / b for a, b in zip(steps["beside"], steps["plain"], strict=True))
    seconds = f"{min(one['save'][1:]):.3f} s, the first {one['save'][0]:.3f} s; a copy {min(one['copy']):.3f} s"
    return [
        figure("blocked by an asynchronous save / copy", min(one["save"][1:]) / min(one["copy"]), 1.5, seconds, judged),
        figure(
            "a step while it is written / a step",
            slower,
            1.10,
            f"medians of {len(one['beside'])} and {len(one['plain'])}; by its thread's CPU time {busier:.3f}",
            judged,
        ),
    ]


# ---- throughput ----


def _timed(act: Callable[..., object], *args: Any) -> float:
    began = time.perf_counter()
    act(*args)
    return time.perf_counter() - began


def _throughput(model: ModelConfig, root: Path, repeats: int) -> dict[str, list[float]]:
    run, rank = Run(model, DP), dist.get_rank()
    found: dict[str, list[float]] = {"save": [], "raw": [], "load": [], "cat": []}
    raw = root / f"raw_{rank}"
    root.mkdir(exist_ok=True)
    for _ in range(repeats):
        dist.barrier()
        found["save"].append(_timed(checkpoint.save, root / "save", *run.what()))
        folder = checkpoint.resolve(root / "save")
        size = sum(path.stat().st_size for path in folder.glob(f"__{rank}_*.distcp"))
        content = torch.empty(size, dtype=torch.uint8).random_().numpy()
        dist.barrier()
        found["raw"].append(_timed(_write, raw, content))
        raw.unlink()
        del content
        dist.barrier()
        found["load"].append(_timed(run.load, folder))
        dist.barrier()
        command = ["sh", "-c", f"cat {folder}/.metadata {folder}/*.* > /dev/null"]
        found["cat"].append(_timed(subprocess.run, command))
        dist.barrier()
        if rank == 0:
            shutil.rmtree(root / "save")
    return found


def _write(path: Path, content: Any) -> None:
    with path.open("wb", buffering=0) as file:
        for start in range(0, len(content), BLOCK_BYTES):
            file.write(content[start : start + BLOCK_BYTES])
        os.fsync(file.fileno())


def throughput(model: ModelConfig, root: Path, arguments: argparse.Namespace) -> list[Figure]:
    """Seconds of a plain save and a load."""
    figures, judged = [], not arguments.quick
    for ranks in (1, 2):
        found = on_ranks(ranks, _throughput, model, root / str(ranks), arguments.repeats)
        best = {name: max(min(one[name]) for one in found) for name in found[0]}
        for name, against, what in (("save", "raw", "write and fsync"), ("load", "cat", "cat")):
            seconds = f"{best[name]:.2f} s : {best[against]:.2f} s"
            line = f"DP {ranks}: speed of a {name} / {what}"
            # with two ranks, each of which reads all weights, `cat` of everything by each is no measure
            kept = judged and (name == "save" or ranks == 1)
            figures.append(figure(line, best[against] / best[name], 0.6, seconds, kept, least=True))
    return figures


# ---- the table ----


def figure(name: str, value: float, bar: float, more: str = "", judged: bool = True, *, least: bool = False) -> Figure:
    """A ratio that is to be at most, or at least, its bar."""
    kept = value >= bar if least else value <= bar
    limit = f"at {'least' if least else 'most'} {bar:g}"
    return Figure(name, f"{value:.3f}{f' ({more})' if more else ''}", limit, kept if judged else None)


def mebibytes(name: str, value: int, bar: int) -> Figure:
    """Bytes that are to be at most so many MiB."""
    return Figure(name, f"{value / MIB:.0f} MiB", f"at most {bar} MiB", value <= bar * MIB)


SECTIONS = {"spread": spread, "memory": memory, "blocked": blocked, "throughput": throughput}


def main() -> int:
    """Measure section after section; exit status 1 if a bar is missed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--millions", type=float, default=120.0, help="parameters of the model")
    parser.add_argument("--tokens", type=int, default=128, help="of a step whose time is compared")
    parser.add_argument("--repeats", type=int, default=5, help="runs of each; the best counts")
    parser.add_argument("--scratch", type=Path, help="folder for four times the state")
    parser.add_argument("--only", nargs="*", choices=SECTIONS, default=list(SECTIONS), help="sections")
    parser.add_argument("--quick", action="store_true", help="a tiny model, once")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.millions, arguments.repeats = 1.0, 1
    model = model_of(arguments.millions)
    missed = False
    for name in arguments.only:
        print(f"-- {name}", flush=True)
        with tempfile.TemporaryDirectory(dir=arguments.scratch) as scratch:
            for one in SECTIONS[name](model, Path(scratch), arguments):
                print(one.line(), flush=True)
                missed = missed or one.kept is False
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
