"""benchmarks/gpu/first_hour.py at a tiny size on the CPU, and what becomes of sections that fail, die or hang."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_vita.planning import flops
from megatron_vita.planning.rows import Row
from tests.scripts import ROOT

GPU = ROOT / "benchmarks/gpu"


@pytest.fixture
def harness(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(GPU))
    import harness

    return harness


@pytest.mark.slow
def test_every_section_runs_and_reports(tmp_path: Path) -> None:
    command = [sys.executable, str(GPU / "first_hour.py"), "--size", "tiny", "--output", str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr + "".join(log.read_text() for log in tmp_path.glob("*.log"))
    measured = {}
    for part, count in ((1, 5), (2, 4)):
        report = json.loads((tmp_path / f"part{part}.json").read_text())
        assert (report["part"], report["size"], len(report["sections"])) == (part, "tiny", count)
        measured |= {one["name"]: {figure["name"]: figure for figure in one["figures"]} for one in report["sections"]}
        text = (tmp_path / f"part{part}.md").read_text()
        assert all(f"## {one['name']}\n" in text for one in report["sections"])
        assert all(one["status"] == "ok" and not one["error"] for one in report["sections"])
    assert measured["machine"]["kernel: attention of packed documents"]["value"]
    for name in ("training at 16K", "training at 128K"):
        assert {"loss", "step", "MFU", "model FLOPs", "busy", "peak memory"} <= measured[name].keys()
    assert measured["a rank alone"]["stage2: dry run, peak"]["value"] > 0
    assert measured["save and resume"]["weights, master weights, moments"]["ok"] is True
    assert measured["schedules"]["p2p against one call: gradient of k"]["ok"] is True
    assert measured["prefill at 128K"]["prefill speed"]["value"] > 0


@pytest.mark.slow
def test_the_real_sizes_have_a_dry_run_to_be_compared_with(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(GPU))
    import sizes
    import training

    from megatron_vita.dryrun.rows import rows_of

    size = sizes.size_of("real")
    expected = json.loads(training.EXPECTED.read_text())
    for stage in (size.short, size.long):
        found = expected[training.settings_of(stage)]
        assert 40 << 30 < found["peak_bytes"] < 130 << 30, "does not fit an H200, or is no real size"
        made = rows_of(stage, 1, 1)[0]
        labelled = sum(stop - start for start, stop in made.answers)
        counted = flops.step_flops(stage, Row(made.documents, len(made.first_token), labelled))
        assert found["flops"] == pytest.approx(counted, rel=0.005), "run first_hour.py --expect"
    assert (size.short.data.seq_length, size.long.data.seq_length, size.prompt) == (16384, 131072, 131072)


def _run(harness: Any, tmp_path: Path, run: Any, limit_s: float = 60.0) -> Any:
    class _Size:
        shortest_s = 0.0

    section = harness.Section("one", limit_s, "About.", run)
    return harness.run_section(section, _Size(), limit_s, tmp_path / "one.log")


def test_a_section_that_fails_keeps_its_figures(harness: Any, tmp_path: Path) -> None:
    def run(size: Any, within_s: float) -> Iterator[Any]:
        yield harness.Figure("first", 1.5, "s")
        raise ValueError("no such kernel")

    result = _run(harness, tmp_path, run)
    assert (result.status, [figure.name for figure in result.figures]) == ("failed", ["first"])
    assert "ValueError: no such kernel" in result.error
    text = harness.markdown("Title", [], [result])
    assert "| first | 1.5 s | |" in text
    assert "no such kernel" in text


def test_a_section_that_dies_is_told_with_the_end_of_its_log(harness: Any, tmp_path: Path) -> None:
    def run(size: Any, within_s: float) -> Iterator[Any]:
        yield harness.Figure("first", "as text")
        os.write(2, b"an illegal memory access was encountered\n")
        os.kill(os.getpid(), signal.SIGKILL)

    result = _run(harness, tmp_path, run)
    assert (result.status, len(result.figures)) == ("died", 1)
    assert "an illegal memory access" in result.error


def test_a_section_that_hangs_is_killed(harness: Any, tmp_path: Path) -> None:
    def run(size: Any, within_s: float) -> Iterator[Any]:
        (tmp_path / "pid").write_text(str(os.getpid()))
        while True:
            os.read(0, 0)
        yield

    result = _run(harness, tmp_path, run, limit_s=0.2)
    assert result.status == "timed out"
    if (tmp_path / "pid").exists():
        with pytest.raises(ProcessLookupError):
            os.kill(int((tmp_path / "pid").read_text()), 0)


def test_figures_of_a_killed_section_are_kept_up_to_the_last_line(harness: Any) -> None:
    reading, writing = os.pipe()
    os.write(writing, b'{"name": "first"}\n{"name": "sec')
    assert harness._read(reading, deadline=0.0) == (['{"name": "first"}'], False)
    os.write(writing, b'ond"}\n')
    os.close(writing)
    assert harness._read(reading, deadline=0.0) == (['ond"}'], True)


@pytest.mark.parametrize(("ok", "status"), [(True, "ok"), (None, "ok"), (False, "failed")])
def test_a_figure_beyond_its_bound_fails_its_section(
    harness: Any, tmp_path: Path, ok: bool | None, status: str
) -> None:
    result = _run(harness, tmp_path, lambda size, within_s: iter([harness.Figure("x", 3, ok=ok)]))
    assert result.status == status


def test_without_time_a_section_is_not_begun(harness: Any, tmp_path: Path) -> None:
    class _Size:
        shortest_s = 15.0

    section = harness.Section("one", 60.0, "About.", lambda size, within_s: iter(()))
    assert harness.run_section(section, _Size(), 10.0, tmp_path / "log").status == "no time"


@pytest.fixture
def gpu_modules(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script's modules, where torch says that there is an H200."""
    monkeypatch.syspath_prepend(str(GPU))
    import attention
    import sizes
    import training

    from megatron_vita import device

    facts = SimpleNamespace(name="NVIDIA H200", major=9, minor=0, total_memory=150 << 30)
    monkeypatch.setattr(device, "num_accelerators", lambda: 1)
    for name, value in (
        ("get_device_properties", facts),
        ("get_device_name", facts.name),
        ("get_device_capability", (9, 0)),
        ("current_device", 0),
        ("max_memory_allocated", 100 << 30),
        ("max_memory_reserved", 110 << 30),
    ):
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    return SimpleNamespace(attention=attention, sizes=sizes, training=training)


@pytest.mark.slow
def test_what_is_said_on_a_gpu(gpu_modules: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    size = gpu_modules.sizes.size_of("real")
    row = SimpleNamespace(documents=(9000, 7384), first_token=range(39))
    training = SimpleNamespace(row=row, labelled=3600)
    found = {figure.name: figure for figure in gpu_modules.training._speed(size.short, training, 1.0)}
    assert 40 < found["MFU"].value < found["HFU"].value < 60
    assert found["MFU"].note == "of 989.5 TFLOP/s"
    assert 0.5 < found["step to the planner's"].value < 2
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 200 << 30)
    memory = {figure.name: figure for figure in gpu_modules.training._memory(size.short)}
    assert memory["measured to dry run"].ok is False
    assert memory["dry run: peak memory"].value < 130
    facts = {figure.name: figure.value for figure in gpu_modules.attention.machine(size, 1.0)}
    assert (facts["GPU"], facts["GPUs"], facts["memory of the GPU"]) == ("NVIDIA H200", 1, 150.0)


@pytest.mark.slow
def test_a_rank_alone_is_compared_with_its_dry_run(gpu_modules: Any) -> None:
    from megatron_vita.dryrun.report import Collective, Report

    sent = Collective(kind="send", group="cp", ranks=8, phase="micro-batches", calls=4, nbytes=100)
    dry = Report(stage="one", world_size=64, rank=1, peak_bytes=1000, collectives=[sent])
    measured = {"peak": 1050.0, "reserved": 1300.0, "step_seconds": 0.5}

    def verdicts(**changed: Any) -> dict[str, bool | None]:
        real = dataclasses.replace(dry, **{"measured": measured, **changed})
        return {figure.name: figure.ok for figure in gpu_modules.training._compared(dry, real)}

    assert set(verdicts().values()) == {True, None}
    assert verdicts(measured={**measured, "peak": 1200.0})["one: peak to dry run"] is False
    assert verdicts(collectives=[])["one: same collectives"] is False
    assert verdicts(error="a device-side assert")["one: with real tensors"] is False


def test_figures_are_read_where_many_files_are_open(harness: Any) -> None:
    reading, writing = os.pipe()
    high = fcntl.fcntl(reading, fcntl.F_DUPFD, 1025)  # more than select.select takes
    try:
        os.write(writing, b'{"one": 1}\n{"tw')
        os.close(writing)
        assert harness._read(high, time.monotonic() + 60) == (['{"one": 1}', '{"tw'], True)
    finally:
        os.close(reading)
        os.close(high)
