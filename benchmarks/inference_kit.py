"""Shared by inference.py and lm_head.py: models with random weights, prompts of an exact length, ranks, memory."""

# ruff: noqa: E402 - warnings are silenced before megatron-core is imported
from __future__ import annotations

import ctypes
import multiprocessing
import os
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # before torch is imported
import numpy as np
import torch
import torch.distributed as dist
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
warnings.simplefilter("ignore")  # megatron-core's, of what is not installed

from megatron_vita.config import ModelConfig, ParallelConfig, StageConfig, TrainConfig
from megatron_vita.data.example import IGNORE_INDEX, Example
from megatron_vita.data.sample import Message, Sample, Text
from megatron_vita.data.spec import PreprocessSpec
from megatron_vita.data.text.tokenizer import VitaTokenizer
from megatron_vita.inference.engine import Engine
from megatron_vita.inference.prompt import Request
from megatron_vita.inference.sampling_config import SamplingConfig
from megatron_vita.inference.settings import EngineSettings
from megatron_vita.inference.worker import New, News, Worker
from megatron_vita.inference.world import inference_groups
from megatron_vita.models.build import build_model
from megatron_vita.parallel.groups import init_distributed
from tests.data.kit import tokenizer_folder

FULL_LENGTH = SamplingConfig(ignore_eos=True)
"""Greedy, and every answer is as long as it may be: the work does not depend on random weights."""
VOCAB_SIZE = 152_064
"""Of Qwen2.5, padded as its checkpoints are."""


def settings(**changed: Any) -> EngineSettings:
    """Engine settings with a cache of a fixed size, which does not depend on the machine."""
    return EngineSettings(**{"kv_cache_memory": "1GiB", **changed})


def make_engine(model: ModelConfig, engine: EngineSettings, spec: PreprocessSpec | None = None) -> Engine:
    """An engine with random weights on this rank; every rank of the layout calls it."""
    parallel = ParallelConfig(
        tensor_model_parallel_size=engine.tensor_model_parallel_size,
        context_parallel_size=engine.context_parallel_size,
    )
    stage = StageConfig(model=model, parallel=parallel, train=TrainConfig(seed=1))
    built = build_model(stage, inference_groups(parallel))[0]
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = VitaTokenizer.load(tokenizer_folder(Path(folder)))
    return Engine(built, tokenizer, spec or PreprocessSpec(), Path("random weights"), engine)


def make_worker(model: ModelConfig, engine: EngineSettings) -> Worker:
    """One rank of an engine; all ranks give it the same news."""
    return make_engine(model, engine).worker


def prompt(name: str, tokens: int, answer: int, sampling: SamplingConfig = FULL_LENGTH) -> New:
    """A prompt of random text tokens, with an answer of so many tokens; the same on every rank."""
    ids = np.random.default_rng(tokens).integers(0, 256, tokens, dtype=np.int32)
    sample = Sample((Message("user", (Text("random"),)),), (), (), "benchmark", 1)
    example = Example(ids, np.full(tokens, IGNORE_INDEX, np.int32))
    return New(Request(name, sample, sampling, answer), example, ())


def drive(worker: Worker, *new: New) -> int:
    """Answer prompts to their ends; the number of steps."""
    worker.step(News(new))
    steps = 1
    while worker.scheduler.busy:
        worker.step(None)
        steps += 1
    return steps


def on_ranks(ranks: int, task: Callable[..., Any], *args: Any, worlds: int = 1, limit_s: int = 1800) -> list[Any]:
    """Call `task(*args)` in forked processes of one thread each; what they return, by world and rank.

    Args:
        ranks: of each world; they are joined by a file and gloo.
        task: called on every rank with torch.distributed initialised.
        args: of the task.
        worlds: independent worlds that run at the same time.
        limit_s: seconds after which the ranks are killed.

    Raises:
        RuntimeError: a rank failed or did not end.
    """
    context = multiprocessing.get_context("fork")
    ends = [[context.Pipe(duplex=False) for _ in range(ranks)] for _ in range(worlds)]
    with tempfile.TemporaryDirectory() as folder:
        started = [
            context.Process(
                target=_rank_main, args=(rank, ranks, f"{folder}/{world}", ends[world][rank][1], task, args)
            )
            for world in range(worlds)
            for rank in range(ranks)
        ]
        for process in started:
            process.start()
        until = time.monotonic() + limit_s
        found = []
        try:
            for world in ends:
                for here, there in world:
                    there.close()  # so that a rank that dies ends the wait
                    if not here.poll(max(0.0, until - time.monotonic())):
                        raise RuntimeError(f"a rank did not end within {limit_s} s")
                    try:
                        error, result = here.recv()
                    except EOFError as caught:
                        raise RuntimeError("a rank died") from caught
                    if error:
                        raise RuntimeError(error)
                    found.append(result)
        finally:
            for process in started:
                if len(found) < len(started):
                    process.kill()
                process.join()
    return found


def _rank_main(rank: int, ranks: int, store: str, out: Any, task: Callable[..., Any], args: tuple[Any, ...]) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_RANK=str(rank))
    torch.set_num_threads(1)
    try:
        init_distributed(init_method=f"file://{store}", timeout_s=600)
        result = task(*args)
        dist.barrier()  # nobody leaves while another one needs it
        out.send((None, result))
    except Exception:
        out.send((traceback.format_exc(), None))


class PeakMemory:
    """Resident memory that this process gains, at most, from the making of the object on.

    glibc keeps freed memory below its threshold, which grows with use; here it gives everything large back at once, so
    that peaks are those of live tensors. Linux only.
    """

    def __init__(self) -> None:
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):
            libc.mallopt(-3, 65536)  # M_MMAP_THRESHOLD
            libc.malloc_trim(0)
        self.start = self.resident("VmRSS")
        try:
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # VmHWM begins anew
        except OSError as error:
            raise SystemExit(f"peaks of memory are read from /proc, which Linux alone has: {error}") from error

    def gained(self) -> int:
        """Bytes at the peak, beyond the start."""
        return self.resident("VmHWM") - self.start

    @staticmethod
    def resident(field: str) -> int:
        """Bytes that this process holds (`VmRSS`), held at most (`VmHWM`), or may write to (`VmData`)."""
        try:
            lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        except OSError as error:
            raise SystemExit(f"memory is read from /proc, which Linux alone has: {error}") from error
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def peak_allocated(run: Callable[[], Any]) -> int:
    """Bytes of tensors that `run` has alive at its peak, beyond those from before: torch's allocator's own record.

    It counts what kernels allocate through torch, and not what the libraries below (MKL, gloo) allocate themselves; it
    is exact, where resident memory varies by a few MiB.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run()
    results = recorded.profiler
    assert results is not None, "the profiler ran"
    pending, changes = list(results.kineto_results.experimental_event_tree()), []
    while pending:
        event = pending.pop()
        pending += event.children
        if event.tag == _EventType.Allocation:
            changes.append((event.start_time_ns, event.extra_fields.alloc_size, event.extra_fields.total_allocated))
    _, size, total = min(changes)
    # The totals, not the sum of sizes: what gloo's threads free is in them only.
    return max(one[2] for one in changes) - (total - size)


class Received:
    """Bytes that this rank receives through torch.distributed, by process group, from the making of the object on."""

    def __init__(self) -> None:
        self._bytes: dict[str, int] = {}
        for name, which, share in (
            ("all_gather_into_tensor", 0, lambda ranks: (ranks - 1) / ranks),
            ("reduce_scatter_tensor", 1, lambda ranks: (ranks - 1) / ranks),
            ("all_to_all_single", 0, lambda ranks: (ranks - 1) / ranks),
            ("all_reduce", 0, lambda ranks: 2 * (ranks - 1) / ranks),
            ("broadcast", 0, lambda ranks: 1),
            ("recv", 0, lambda ranks: 1),
        ):
            self._watch(name, which, share)
        started = dist.batch_isend_irecv

        def watched(operations: list[Any]) -> Any:
            for one in operations:
                if one.op is dist.irecv:
                    self._add(one.group, one.tensor.nbytes)
            return started(operations)

        dist.batch_isend_irecv = watched

    def on(self, group: dist.ProcessGroup) -> int:
        """Bytes received in a group."""
        return self._bytes.get(group.group_name, 0)

    def clear(self) -> None:
        """Begin anew."""
        self._bytes.clear()

    def _watch(self, name: str, which: int, share: Callable[[int], float]) -> None:
        original = getattr(dist, name)

        def watched(*args: Any, **options: Any) -> Any:
            group = options.get("group") or dist.group.WORLD
            self._add(group, int(args[which].nbytes * share(group.size())))
            return original(*args, **options)

        setattr(dist, name, watched)

    def _add(self, group: dist.ProcessGroup, count: int) -> None:
        self._bytes[group.group_name] = self._bytes.get(group.group_name, 0) + count
