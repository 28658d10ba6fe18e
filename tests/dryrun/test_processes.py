"""Processes of a dry run that end before they have answered."""

from __future__ import annotations

import fcntl
import io
import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_vita.config import StageConfig
from megatron_vita.dryrun import jobs, worker
from megatron_vita.dryrun.jobs import DryRunJob, run_jobs
from megatron_vita.errors import VitaError
from megatron_vita.files import end_with_parent

ROOT = Path(__file__).resolve().parents[2]
JOB = DryRunJob(stage=StageConfig(), world_size=4, rank=3)


def test_a_killed_rank_is_a_report() -> None:
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writing, b'{"half an answer')
        os.kill(os.getpid(), signal.SIGKILL)
    os.close(writing)
    # Numbers above 1,024 are what a process with many open files gives; select(2) takes none.
    least = 1100 if resource.getrlimit(resource.RLIMIT_NOFILE)[0] > 1100 else 0
    high = fcntl.fcntl(reading, fcntl.F_DUPFD, least)
    os.close(reading)
    answers = io.StringIO()
    worker._collect({child: (0, os.fdopen(high))}, [JOB.to_json()], answers)
    report = json.loads(answers.getvalue())["report"]
    assert report["rank"] == 3
    assert "ended with status -9: this machine may have too little memory" in report["error"]


def test_a_worker_that_ends_early(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs.library, "build", lambda: None)
    monkeypatch.setattr(jobs.sys, "executable", "false")
    with pytest.raises(VitaError, match="ended with status 1 after 0 of 300 ranks"):
        list(run_jobs([JOB] * 300))  # more than a pipe holds


def test_a_worker_alone_says_what_it_is() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "megatron_vita.dryrun.worker"], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1
    assert done.stderr.startswith("This is the process behind `pretrain_vita.py")


@pytest.mark.skipif(sys.platform != "linux", reason="Linux alone tells a process that its parent has ended")
def test_no_process_outlives_its_parent() -> None:
    """A grandchild that would wait forever holds the pipe open, until its parent is killed."""
    reading, writing = os.pipe()
    parent = os.fork()
    if parent == 0:
        os.close(reading)
        if os.fork() == 0:
            end_with_parent()
            os.write(writing, b"ready")
            signal.pause()
        os.close(writing)
        signal.pause()
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        assert pipe.read(5) == b"ready"
        os.kill(parent, signal.SIGKILL)
        assert pipe.read() == b""
    os.waitpid(parent, 0)
