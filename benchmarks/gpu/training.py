"""Sections that train: steps with MFU, memory and a profile; save and resume."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import json
import os
import re
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from harness import Figure
from sizes import Size
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from megatron_vita import checkpoint, core_optimizer, device
from megatron_vita.config import StageConfig
from megatron_vita.data.loading.loader import StepBatches
from megatron_vita.dryrun.jobs import DryRunJob, run_jobs
from megatron_vita.dryrun.report import Report
from megatron_vita.dryrun.rows import Row, rows_of
from megatron_vita.errors import VitaError
from megatron_vita.parallel.groups import destroy_groups, init_distributed
from megatron_vita.planning import flops, rows
from megatron_vita.planning.hardware import HARDWARE
from megatron_vita.planning.timing import step_time
from megatron_vita.training.device_batch import coords_of_groups, prepare_batch
from megatron_vita.training.setup import ModelAndOptimizer, build_model_and_optimizer
from megatron_vita.training.step import train_step

EXPECTED = Path(__file__).with_name("expected.json")
"""What dry runs of the same settings say, by `settings_of`; `first_hour.py --expect` writes it, where no GPU is."""
_MEMORY_BOUND = 0.1
"""Allowed difference of measured and expected peak memory, as a fraction."""


@contextlib.contextmanager
def world() -> Iterator[None]:
    """torch.distributed with this process as its only rank."""
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", LOCAL_WORLD_SIZE="1")
    with tempfile.TemporaryDirectory() as folder:
        init_distributed(init_method=f"file://{folder}/store")
        yield


def settings_of(stage: StageConfig) -> str:
    """Key of EXPECTED: what memory depends on and the sizes vary."""
    model, recomputed = stage.model, stage.parallel.recompute_num_layers or 0
    return (
        f"{stage.name}: {model.num_layers} layers of {model.hidden_size}, vocabulary {model.vocab_size}, "
        f"{stage.data.seq_length} tokens, {recomputed} layers recomputed"
    )


@torch.no_grad()
def fill(parameters: Any) -> None:
    """Random weights, drawn on the device in seconds; norms are 1 and biases 0."""
    source = torch.Generator(device.torch_device()).manual_seed(1)
    for name, parameter in parameters:
        if parameter.dim() > 1:
            parameter.normal_(0.0, 0.02, generator=source)
        else:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)


class Training:
    """A stage in training on one rank, over one made row: every step has the same one."""

    def __init__(self, stage: StageConfig) -> None:
        self.stage = stage
        self.setup: ModelAndOptimizer = build_model_and_optimizer(stage, resume=True)
        for model in self.setup.models:
            fill(model.named_parameters())
        self.setup.optimizer.reload_model_params()
        self.row = rows_of(stage, 1, 1)[0]
        self._batch = self._step_batches(self.row)
        self.iteration = 0

    def _step_batches(self, row: Row) -> StepBatches:
        vision = self.stage.model.vision
        coords = coords_of_groups(self.setup.groups, tower=vision is not None)
        sizes = (vision.tokens_per_tile, vision.image_size) if vision else (1, 1)
        batch = row.batch(coords, *sizes)
        source = torch.Generator().manual_seed(2)

        def drawn(like: Tensor, below: int) -> Tensor:
            return torch.randint(0, below, like.shape, generator=source, dtype=like.dtype)

        vocabulary = self.stage.model.vocab_size
        labels = torch.where(batch.labels >= 0, drawn(batch.labels, vocabulary), batch.labels)
        batch = dataclasses.replace(
            batch, tokens=drawn(batch.tokens, vocabulary), labels=labels, tiles=drawn(batch.tiles, 256)
        )
        prepared = prepare_batch(batch, coords, self.stage.parallel.cp_comm_type, device.torch_device())
        self.labelled = int((labels >= 0).sum())
        return StepBatches(
            micro_batches=[dataclasses.replace(batch, prepared=prepared)], pack_ids=(), sample_ids=(0,),
            num_labels=self.labelled, failed=(), consumed_packs=0,
        )  # fmt: skip

    def step(self) -> tuple[float, float]:
        """Train one step: loss and gradient norm."""
        self.iteration += 1
        setup = self.setup
        loss, norm = train_step(
            self.stage, setup.groups, setup.wrapped, setup.optimizer, setup.scheduler, self._batch, self.iteration
        )
        assert loss is not None
        assert norm is not None
        return loss, norm

    def held(self) -> Iterator[Tensor]:
        """Weights, master weights and moments."""
        for model in self.setup.models:
            yield from (one.detach() for one in model.parameters())
        for one in core_optimizer.distributed_optimizers(self.setup.optimizer):
            for group in one.optimizer.param_groups:
                yield from (parameter.detach() for parameter in group["params"])
            for state in one.optimizer.state.values():
                yield from (value for value in state.values() if torch.is_tensor(value) and value.numel() > 1)

    def fingerprint(self) -> int:
        """Of all bits of the training state, and their places."""
        total = 0
        for number, tensor in enumerate(self.held()):
            integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
            for place, part in enumerate(tensor.contiguous().view(integers).flatten().split(1 << 24)):
                weights = torch.arange(1, len(part) + 1, device=part.device)
                total = (total * 1_000_003 + int((part.long() * weights).sum()) + number + place) % (1 << 61)
        return total


def steps_short(size: Size, within_s: float) -> Iterator[Figure]:
    """Training steps at 16K: packed pictures, everything trained, half of the layers recomputed."""
    return _steps(size.short, size.steps, within_s)


def steps_long(size: Size, within_s: float) -> Iterator[Figure]:
    """Training steps at 128K: one video, the tower frozen, every layer recomputed."""
    return _steps(size.long, size.steps, within_s)


def _steps(stage: StageConfig, steps: int, within_s: float) -> Iterator[Figure]:
    began = time.monotonic()
    with world():
        training = Training(stage)
        yield Figure("set up", time.monotonic() - began, "s")
        row = training.row
        yield Figure(
            "row", f"{sum(row.documents)} tokens, {len(row.documents)} documents, {len(row.first_token)} tiles"
        )
        seconds: list[float] = []
        losses: list[float] = []
        gpu = device.num_accelerators() > 0
        # A step more and the one under the profiler must fit.
        while len(seconds) < 2 or (len(seconds) < steps and time.monotonic() - began + 2 * seconds[-1] < within_s):
            if len(seconds) == 1 and gpu:  # the optimizer's state is there from the first step on
                torch.cuda.reset_peak_memory_stats()
            device.synchronize()
            started = time.perf_counter()
            losses.append(training.step()[0])
            device.synchronize()
            seconds.append(time.perf_counter() - started)
        yield Figure("steps", len(seconds), note=f"of {steps}")
        yield Figure(
            "loss", losses[-1], note=f"from {losses[0]:.4f}, the same row every step", ok=losses[-1] < losses[0]
        )
        yield from _speed(stage, training, statistics.median(seconds[1:]))
        yield from _memory(stage)
        yield from _profile(training)


def _speed(stage: StageConfig, training: Training, seconds: float) -> Iterator[Figure]:
    yield Figure("step", seconds, "s", note="median, without the first")
    yield Figure("speed", sum(training.row.documents) / seconds, "tokens/s")
    row = rows.Row(training.row.documents, len(training.row.first_token), training.labelled)
    work, executed = flops.model_flops(stage, row), flops.step_flops(stage, row)
    yield Figure("model FLOPs", work / 1e12, "TFLOP/step", note="forward and backward once")
    yield Figure("executed FLOPs", executed / 1e12, "TFLOP/step", note="recomputation too")
    name = torch.cuda.get_device_name() if device.num_accelerators() else "CPU"
    gpu = next((one for key, one in HARDWARE.items() if re.search(rf"\b{key.split('-')[0]}\b", name)), None)
    for what, count in (("MFU", work), ("HFU", executed)):
        if gpu is None:
            yield Figure(what, count / seconds / 1e12, "TFLOP/s", note=f"no peak is stated for {name}")
        else:
            yield Figure(what, 100 * count / seconds / gpu.bf16, "%", note=f"of {gpu.bf16 / 1e12:g} TFLOP/s")
    if gpu is not None:
        planned = step_time(stage, 1, gpu, row).seconds
        yield Figure("step to the planner's", seconds / planned, "times", note=f"planned {planned:.2f} s")


def _memory(stage: StageConfig) -> Iterator[Figure]:
    """Peak memory of a step against the dry run's."""
    found = json.loads(EXPECTED.read_text()).get(settings_of(stage)) if EXPECTED.exists() else None
    if found is None:
        said = "no dry run of these settings: run first_hour.py --expect where no GPU is"
        yield Figure("dry run", "none", note=said)
    else:
        at = f"{found['peak_module']}, {found['peak_operation']}"
        yield Figure("dry run: peak memory", found["peak_bytes"] / 2**30, "GiB", note=at)
    if not device.num_accelerators():
        yield Figure("peak memory", "not measured", note="no GPU")
        return
    peak = torch.cuda.max_memory_allocated()
    yield Figure("peak memory, allocated", peak / 2**30, "GiB")
    yield Figure("peak memory, reserved", torch.cuda.max_memory_reserved() / 2**30, "GiB")
    if found is not None:
        ratio = peak / found["peak_bytes"]
        yield Figure("measured to dry run", ratio, "times", abs(ratio - 1) <= _MEMORY_BOUND)


def _profile(training: Training) -> Iterator[Figure]:
    """The kernels that take most of a step."""
    gpu = device.num_accelerators() > 0
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]) as found:
        began = time.perf_counter()
        training.step()
        device.synchronize()
        seconds = time.perf_counter() - began
    events = [
        (one.self_device_time_total if gpu else one.self_cpu_time_total, one.key, one.count)
        for one in found.key_averages()
        if not gpu or one.device_type.name == "CUDA"
    ]
    busy = sum(time for time, _, _ in events)
    yield Figure("busy", busy / 1e4 / seconds, "%", note="kernels to the step's time, under the profiler")
    for taken, name, count in sorted(events, reverse=True)[:12]:
        yield Figure(f"`{name[:80]}`", 100 * taken / max(busy, 1e-9), "%", note=f"{count} calls, {taken / 1e3:.2f} ms")


def rank_alone(size: Size, within_s: float) -> Iterator[Figure]:
    """A rank of the recipe's own layout, two layers deep: a dry run, then the same step with real tensors."""
    jobs = [DryRunJob(stage=one, world_size=size.world_size, rank=1) for one in size.ranks_of_64]
    dry = list(run_jobs(jobs))
    for job, report in zip(jobs, dry, strict=True):
        if report.error:
            raise VitaError(report.error)
        where = f"rank 1 of {job.world_size}, {job.stage.data.seq_length} tokens"
        yield Figure(f"{report.stage}: dry run, peak", report.peak_bytes / 2**30, "GiB", note=where)
    if not device.num_accelerators():
        yield Figure("with real tensors", "not run", note="no GPU")
        return
    for report, real in zip(dry, run_jobs(jobs, real=True), strict=True):
        yield from _compared(report, real)


def _compared(dry: Report, real: Report) -> Iterator[Figure]:
    """A step with real tensors beside its dry run."""
    if real.error:
        yield Figure(f"{real.stage}: with real tensors", real.error, ok=False)
        return
    for name in ("peak", "reserved"):
        ratio = real.measured[name] / dry.peak_bytes
        yield Figure(f"{real.stage}: {name} to dry run", ratio, "times",
                     abs(ratio - 1) <= _MEMORY_BOUND if name == "peak" else None)  # fmt: skip
    yield Figure(f"{real.stage}: same collectives", real.collectives == dry.collectives,
                 ok=real.collectives == dry.collectives)  # fmt: skip
    yield Figure(f"{real.stage}: step", real.measured["step_seconds"], "s", note="nothing is communicated")


def resume(size: Size, within_s: float) -> Iterator[Figure]:
    """Save in the background, load into a new model and optimizer: the same bits, and the same next step."""
    stage = size.resumed
    with world(), tempfile.TemporaryDirectory() as folder:
        training = Training(stage)
        for _ in range(2):
            training.step()
        before = training.fingerprint()
        saver = checkpoint.Saver(folder)
        state = checkpoint.RunState(stage=stage, iteration=training.iteration)
        setup = training.setup
        began = time.perf_counter()
        saver.save(setup.models, setup.optimizer, setup.scheduler, state, setup.groups)
        yield Figure("training is kept", time.perf_counter() - began, "s", note="by the first save")
        loss, norm = training.step()
        saver.wait()
        seconds = time.perf_counter() - began
        nbytes = sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file())
        yield Figure("checkpoint", nbytes / 1e9, "GB")
        yield Figure("written after", seconds, "s", note=f"{nbytes / 1e9 / seconds:.2f} GB/s")
        destroy_groups()
        del training, setup
        gc.collect()  # DDP's buffers are in reference cycles
        device.empty_cache()
        again = Training(stage)
        began = time.perf_counter()
        setup = again.setup
        loaded = checkpoint.load_training(checkpoint.resolve(folder), setup.models, setup.optimizer, setup.scheduler)
        again.iteration = loaded.iteration
        device.synchronize()
        yield Figure("loaded in", time.perf_counter() - began, "s")
        same = again.fingerprint() == before
        yield Figure("weights, master weights, moments", "equal to the bit" if same else "differ", ok=same)
        next_loss, next_norm = again.step()
        yield Figure("loss of the next step", next_loss, ok=next_loss == loss, note=f"uninterrupted {loss!r}")
        close = abs(next_norm / norm - 1)
        yield Figure("its gradient norm", close, "relative difference", close <= 1e-3,
                     "flash attention's backward adds in any order")  # fmt: skip


def expect(size: Size) -> None:
    """Dry-run the training sections and write what they say to EXPECTED. On a machine without a GPU.

    Raises:
        VitaError: a dry run is not possible here, or found a mistake.
    """
    found = json.loads(EXPECTED.read_text()) if EXPECTED.exists() else {}
    stages = size.short, size.long
    reports = run_jobs([DryRunJob(stage=one, world_size=1) for one in stages], workers=1)
    for stage, report in zip(stages, reports, strict=True):
        if report.error:
            raise VitaError(report.error)
        kept = ("stage", "peak_bytes", "peak_module", "peak_operation", "flops", "operations", "attention_calls")
        found[settings_of(stage)] = {name: getattr(report, name) for name in kept}
        EXPECTED.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
