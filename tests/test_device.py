"""device.py: patches for megatron-core on CPU, the repaired loading of the optimizer, no effect on other code."""

from __future__ import annotations

import io
import logging
import subprocess
import sys
from typing import Any

import pytest
import torch

from megatron_vita import device
from megatron_vita.config import ParallelConfig
from megatron_vita.parallel.groups import build_groups, destroy_groups
from tests.ranks import run_ranks

cpu_only = pytest.mark.skipif(torch.cuda.is_available(), reason="the shim is for machines without CUDA")


@cpu_only
def test_device_queries_return_cpu() -> None:
    device.install()
    device.install()  # twice is once
    assert torch.zeros(2, device="cuda").device.type == "cpu"
    assert torch.tensor([1], device=torch.cuda.current_device(), pin_memory=True).device.type == "cpu"
    assert torch.ones(2).cuda().device.type == "cpu"
    torch.cuda.synchronize()
    torch.cuda.current_stream().wait_stream(torch.cuda.current_stream())  # megatron-core 0.19 before each reduction
    torch.cuda.current_stream(0).wait_event(None)  # type: ignore[arg-type]
    torch.cuda.current_stream().synchronize()
    assert device.torch_device() == torch.device("cpu")
    assert device.backend() == "gloo"
    assert device.peak_memory_bytes() > 1 << 20


def test_asking_for_a_gpu_does_not_initialise_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.cuda.is_available may, and then ranks can no longer be forked; device_count asks the driver's library."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: pytest.fail("initialises CUDA"))
    for count in (0, 8):
        monkeypatch.setattr(torch.cuda, "device_count", lambda count=count: count)
        assert device.has_accelerator() == (count > 0)


def test_the_host_group_is_made_once_and_only_with_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[object] = []
    monkeypatch.setattr(device, "new_host_group", lambda: made.append(object()) or made[-1])
    for accelerator, groups in ((False, 0), (True, 1)):
        monkeypatch.setattr(device, "has_accelerator", lambda there=accelerator: there)
        assert device.host_group() is device.host_group()
        assert len(made) == groups
    device._host_group.cache_clear()


_META = """
from megatron_vita import device
device.install()
import torch
with torch.device("meta"):
    assert torch.empty(2).is_meta and torch.zeros(2).is_meta and torch.nn.Linear(2, 2).weight.is_meta
"""


@pytest.mark.slow
@cpu_only
def test_default_devices_still_apply() -> None:
    """In a process of its own: torch lists its factories once. Else transformers loads unfilled weights in silence."""
    subprocess.run([sys.executable, "-c", _META], check=True)


@cpu_only
def test_only_megatron_is_told_that_tensors_are_cuda() -> None:
    device.install()
    assert torch.ones(1).type() == "torch.FloatTensor"
    scope: dict[str, Any] = {"__name__": "megatron.core.anything", "torch": torch}
    exec("answer = torch.ones(1).type()", scope)
    assert scope["answer"] == "torch.cuda.FloatTensor"
    assert torch.ones(1).type(torch.float64).dtype == torch.float64


def _check_tracker() -> None:
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    groups = build_groups(ParallelConfig(tensor_model_parallel_size=2))
    device.seed_all(11, tp_rank=groups.tp_rank)
    before = torch.get_rng_state()
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    logging.getLogger("megatron").addHandler(handler)
    with get_cuda_rng_tracker().fork():
        drawn = torch.rand(4)
    assert stream.getvalue() == "", "the expected noise is filtered"
    assert torch.equal(torch.get_rng_state(), before), "a fork leaves the default stream alone"
    both = [torch.empty(4) for _ in range(2)]
    torch.distributed.all_gather(both, drawn, group=groups.collection.tp)
    assert not torch.equal(*both), "tensor ranks draw different numbers"
    device.seed_all(11, tp_rank=groups.tp_rank)
    with get_cuda_rng_tracker().fork():
        assert torch.equal(torch.rand(4), drawn), "seeding again repeats them"
    destroy_groups()


def test_tracker_is_seeded_distinct_and_quiet() -> None:
    run_ranks(2, _check_tracker)


def test_importing_the_module_changes_nothing() -> None:
    code = (
        "import torch; before = torch.zeros, torch.Tensor.type; import megatron_vita.device; "
        "assert before == (torch.zeros, torch.Tensor.type)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_a_lost_rank_is_told_apart_from_other_errors() -> None:
    assert device.is_lost_rank(RuntimeError("[pair.cc:553] Connection closed by peer [127.0.0.1]:3244."))
    assert device.is_lost_rank(torch.distributed.DistBackendError("NCCL error"))
    assert not device.is_lost_rank(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not device.is_lost_rank(ValueError("Connection closed by peer"))
