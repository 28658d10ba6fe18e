"""Steps of the shipped recipes on fake CUDA tensors: full widths and lengths, few layers."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from megatron_vita.config import StageConfig, load_run
from megatron_vita.dryrun.jobs import DryRunJob, run_jobs
from megatron_vita.dryrun.report import Report

ROOT = Path(__file__).resolve().parents[2]
RECIPES = {"0.5b": 8, "7b": 32, "14b": 64}
"""Recipe -> GPUs it is written for."""
SHALLOW = ("--num-layers", "2", "--vision-num-layers", "2")
NO_RECOMPUTE = ("--recompute-granularity", "none", "--recompute-method", "none", "--recompute-num-layers", "none")
TP2_PP2 = ("--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "2")


def job(recipe: str, stage: int, *flags: str, ranks: int = 0, rank: int = 0, prompt: int = 0) -> DryRunJob:
    """A rank of a stage of a shipped recipe."""
    layers = SHALLOW if "--num-layers" not in flags else SHALLOW[2:]
    run = load_run(ROOT / f"examples/long_vita_{recipe}/run.yaml", [*layers, *flags], expand=False)
    one, world = run.stages[stage - 1], ranks or RECIPES[recipe]
    one.check_layout(world)
    return DryRunJob(stage=one, world_size=world, rank=rank % world, steps=1, prompt_tokens=prompt)


JOBS: dict[str, DryRunJob] = {
    **{f"{recipe}, stage {stage}": job(recipe, stage) for recipe in RECIPES for stage in (1, 2, 3, 4)},
    "p2p, last rank": job("14b", 3, "--cp-comm-type", "p2p", ranks=16, rank=-1),
    "all_gather": job("14b", 3, "--cp-comm-type", "all_gather", ranks=16, rank=-1),
    "a2a": job("14b", 3, "--cp-comm-type", "a2a", "--tensor-model-parallel-size", "4", ranks=8, rank=-1),
    "documents over cp": job("7b", 2, *NO_RECOMPUTE, "--context-parallel-size", "4", ranks=16, rank=-1),
    "two packs a row": job("7b", 2, *NO_RECOMPUTE, "--micro-batch-size", "2", ranks=4),
    "no sequence parallelism": job("7b", 2, *NO_RECOMPUTE, "--sequence-parallel", "false", ranks=4),
    "split tower": job("7b", 2, "--vision-tensor-parallel", "true", ranks=4),
    "uniform": job("7b", 2, "--recompute-granularity", "full", "--recompute-method", "uniform",
                   "--recompute-num-layers", "1", ranks=4),
    "selective": job("7b", 2, *NO_RECOMPUTE, "--recompute-granularity", "selective", ranks=4),
    "decoder alone": job("7b", 2, "--freeze-vision-model", "true", "--freeze-vision-projection", "true",
                         "--freeze-language-model", "false", ranks=4),
    "pipeline, first": job("7b", 2, *NO_RECOMPUTE, *TP2_PP2, ranks=4),
    "pipeline, last": job("7b", 2, *NO_RECOMPUTE, *TP2_PP2, ranks=4, rank=-1),
    "pipeline of 4, virtual, middle": job(
        "7b", 2, *NO_RECOMPUTE, *TP2_PP2[:2], "--pipeline-model-parallel-size", "4", "--num-layers", "8",
        "--num-virtual-stages-per-pipeline-rank", "2", ranks=8, rank=4),
    "prefill and decode": job("14b", 4, prompt=65536, rank=-1),
    "prefill and decode, pipeline": job("7b", 1, *NO_RECOMPUTE, *TP2_PP2, prompt=4096, ranks=4, rank=-1),
}  # fmt: skip


@pytest.fixture(scope="module")
def reports() -> dict[str, Report]:
    """All jobs, by one process."""
    return dict(zip(JOBS, run_jobs(list(JOBS.values()), workers=1), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("name", JOBS)
def test_it_runs(reports: dict[str, Report], name: str) -> None:
    report = reports[name]
    assert report.error is None
    assert report.peak_bytes >= sum(report.before.values()) > 0
    assert sum(report.peak.values()) == pytest.approx(report.peak_bytes, rel=0.002)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, one in JOBS.items() if not one.prompt_tokens])
def test_memory_that_lives_as_long_as_the_stage(reports: dict[str, Report], name: str) -> None:
    one, report = JOBS[name], reports[name]
    assert report.peak["weights"] == pytest.approx(2 * report.parameters, rel=0.01)
    if report.trainable:
        shards = one.world_size // one.stage.parallel.replica_size * one.stage.parallel.context_parallel_size
        assert report.peak["gradients"] == pytest.approx(4 * report.trainable, rel=0.01)
        assert report.after["optimizer"] == pytest.approx(12 * report.trainable / shards, rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, one in JOBS.items() if not one.prompt_tokens])
def test_the_host_waits_for_loss_and_norm_alone(reports: dict[str, Report], name: str) -> None:
    waits = reports[name].host_syncs
    assert sum(one.count for one in waits) <= 3, waits
    assert not [one for one in waits if one.phase == "micro-batches"], waits


@pytest.mark.slow
def test_every_rank_of_a_ring_sends_what_it_receives(reports: dict[str, Report]) -> None:
    report, stage = reports["p2p, last rank"], JOBS["p2p, last rank"].stage
    found = {(one.kind, one.group): one for one in report.collectives}
    sent, received = found["send", "cp"], found["recv", "cp"]
    assert (sent.calls, sent.nbytes) == (received.calls, received.nbytes)
    # Of each of two layers and micro-batches, keys and values in bfloat16 in the forward and its recomputation, then in
    # the backward with their float32 gradients.
    local = stage.data.seq_length // 2 * 2 * stage.model.head_dim * stage.model.num_query_groups // 8
    assert sent.nbytes == 2 * 2 * local * (2 + 2 + 2 + 4)


@pytest.mark.slow
def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from megatron_vita.dryrun import cli

    command = [
        sys.executable,
        "pretrain_vita.py",
        "--config",
        str(ROOT / "examples/long_vita_0.5b/run.yaml"),
        "--dry-run",
        *SHALLOW,
    ]
    result = _run([*command, "--stage", "1", "--world-size", "8", "--steps", "1", "--json", str(tmp_path / "r.json")])
    assert result.returncode == 0, result.stderr
    assert "stage1: 32,768 tokens, 8 ranks" in result.stdout
    assert re.search(
        r"^  attention of packed documents +(PyTorch flash|flash-attn \d), varlen", result.stdout, re.MULTILINE
    )
    assert "fits:" in result.stdout
    assert result.stdout.splitlines()[-1].endswith("ranks of 1 stages ran and fit")
    reports = [Report.from_json(one) for one in json.loads((tmp_path / "r.json").read_text())]
    monkeypatch.setattr(cli, "run_jobs", lambda jobs, **_: reports[: len(jobs)])
    words = ["--stage", "1", "--world-size", "8", "--steps", "1", "--rank", "0", "--gpu-memory", "1"]
    assert cli.main([*command[2:], *words]) == 1
    assert "DOES NOT FIT" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--world-size", "12"), "Launch a multiple of"),
        (("--rank", "64"), "64 ranks are 0 to 63"),
        (("--stage", "5"), "the recipe has stages 1 to 4"),
        (("--steps", "0"), "must be at least 1"),
        (("--gpu-memory", "nan"), "must be more than 0 GiB"),
        (("--json", "/no/folder/reports.json"), "cannot be written"),
        (("--prompt-tokens", "2000000"), "exceeds model.max_position_embeddings"),
        (("--tensor-model-parallel-size", "3", "--world-size", "48"), "is not a multiple of"),
        (("--no-such-flag", "1"), "unknown flag"),
    ],
)
def test_a_usage_error_is_one_line(flags: Sequence[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    from megatron_vita.dryrun.cli import main

    recipe = str(ROOT / "examples/long_vita_14b/run.yaml")
    assert main(["--config", recipe, "--dry-run", *flags]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert len(error.splitlines()) == 1


def test_ranks_of_torchrun_are_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from megatron_vita.dryrun.cli import main

    monkeypatch.setenv("WORLD_SIZE", "8")
    assert main(["--config", str(ROOT / "examples/long_vita_14b/run.yaml"), "--dry-run"]) == 2
    assert "Start it with python" in capsys.readouterr().err


def test_ctrl_c_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from megatron_vita.dryrun import cli

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_stages", interrupt)
    assert cli.main(["--config", "run.yaml", "--dry-run"]) == cli.INTERRUPTED
    assert capsys.readouterr().err == "pretrain_vita --dry-run: interrupted.\n"


def test_a_reader_that_has_seen_enough() -> None:
    program = (
        "from megatron_vita.dryrun import cli; cli._dry_run = lambda *_: print('line\\n' * 99999);"
        "raise SystemExit(cli.main(['--config', 'run.yaml', '--dry-run']))"
    )
    done = _run(["bash", "-c", f'"{sys.executable}" -c "{program}" | head -1; exit ${{PIPESTATUS[0]}}'])
    assert (done.returncode, done.stdout, done.stderr) == (1, "line\n", "")


def test_a_real_run_needs_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    from megatron_vita.dryrun.cli import main

    assert main(["--config", str(ROOT / "examples/long_vita_14b/run.yaml"), "--dry-run", "real"]) == 2
    assert "needs a GPU" in capsys.readouterr().err


def test_a_report_survives_json(tmp_path: Path) -> None:
    report = Report(stage="one", world_size=2, rank=1, peak={"weights": 3}, measured={"peak": 1.0})
    assert Report.from_json(report.to_json()) == report
    one = DryRunJob(stage=StageConfig(), world_size=2, rank=1, prompt_tokens=5)
    assert DryRunJob.from_json(one.to_json()) == one


def _run(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
