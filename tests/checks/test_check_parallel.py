"""The command itself: green as things are, and red, with the tensor's name, when something is broken on purpose.

What is broken is patched here and inherited by the ranks, which are forked from this process.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_vita import device
from megatron_vita.checks import kernels_report, reference
from megatron_vita.parallel import grads, loss
from megatron_vita.training import setup, step
from tests.scripts import load_script

check_parallel = load_script("tools/check_parallel.py")
FC2 = "language_model.decoder.layers.1.mlp.linear_fc2.weight"


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    status = check_parallel.main(list(arguments))
    said = capsys.readouterr()
    return status, said.out + said.err


@pytest.mark.slow
def test_the_small_grid_is_green(capsys: pytest.CaptureFixture[str]) -> None:
    status, said = run(capsys, "--grid", "small")
    assert status == 0, said
    assert "cases are one process's model" in said
    assert "excluded: " in said


def _wrong_scale(chunks: list[Any], *arguments: Any, **named: Any) -> None:
    """One tensor's gradient is too large by a millionth, on the second rank alone."""
    grads.finalize_grads(chunks, *arguments, **named)
    if dist.get_rank() == 1:
        for name, parameter in chunks[0].named_parameters():
            if name.endswith("decoder.layers.1.mlp.linear_fc2.weight") and "language_model" in name:
                parameter.main_grad *= 1 + 1e-6


def _miscount(chunks: Any, labels: int) -> None:
    """A label too many in the normaliser."""
    grads.divide_grads(chunks, labels + 1)


def _shifted(*arguments: Any) -> dict[str, Any]:
    """A label is one place off, on the second rank alone."""
    inputs = step_model_inputs(*arguments)
    if dist.get_rank() == 1:
        inputs["labels"] = inputs["labels"].roll(1)
    return inputs


step_model_inputs = step.model_inputs


def _nothing(*_: Any) -> None:
    """A reduction that is forgotten."""


def _one_column_more(*arguments: Any, vocab_size: int, **named: Any) -> torch.Tensor:
    """The softmax takes a column of padding in."""
    return vocab_parallel_loss(*arguments, vocab_size=vocab_size + 1, **named)


vocab_parallel_loss = loss.vocab_parallel_loss


@pytest.mark.slow
@pytest.mark.parametrize(
    ("grid", "place", "instead", "first"),
    [
        ("tp=2 sp=on", (setup, "finalize_grads"), _wrong_scale, f"gradient of {FC2}"),
        ("dp=2", (step, "divide_grads"), _miscount, "gradient of language_model.output_layer.weight"),
        (
            "tp=2",
            (grads, "tensor_parallel_sum_"),
            _nothing,
            "gradient of vision_projection.encoder.linear_fc2.bias",
        ),
        ("cp=2 comm=p2p", (step, "model_inputs"), _shifted, "loss"),
        ("tp=2 dtype=float32", ("megatron_vita.models.vita", "vocab_parallel_loss"), _one_column_more, "loss"),
    ],
    ids=["scale", "labels miscounted", "all-reduce dropped", "label shifted", "padding counted"],
)
def test_a_defect_is_named(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    grid: str,
    place: tuple[Any, str],
    instead: Any,
    first: str,
) -> None:
    where, name = place
    if isinstance(where, str):
        monkeypatch.setattr(f"{where}.{name}", instead)
    else:
        monkeypatch.setattr(where, name, instead)
    status, said = run(capsys, "--grid", grid)
    assert status == 1, said
    assert f"FAILED {first}: differs by" in said, said
    assert said.splitlines()[-1].startswith(f"FAILED: 1 of 1; the first: {grid}: {first}"), said


@pytest.mark.slow
def test_an_update_is_checked_too(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Here the reference forgets to clip; gradients agree, weights do not."""
    monkeypatch.setattr(reference, "clip_scale", lambda *_: 1.0)
    status, said = run(capsys, "--grid", "dp=2 dtype=float32")
    assert status == 1, said
    assert "FAILED weight of language_model.output_layer.weight, after the step: differs by" in said, said


def _skip_on_one_rank(tensors: Any, group: Any) -> None:
    if dist.get_rank() == 0:
        dist.all_reduce(tensors[0], group=group)


@pytest.mark.slow
def test_a_rank_that_waits_for_ever_is_a_failure(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grads, "tensor_parallel_sum_", _skip_on_one_rank)
    status, said = run(capsys, "--grid", "tp=2 freeze=none,tower", "--limit", "4")
    assert status == 1, said
    assert "hangs: not done after 4 s" in said
    assert "rank 0 stands at" in said
    assert "_skip_on_one_rank" in said
    assert "FAILED: 2 of 2; the first: tp=2: hangs" in said, "the next case gets new ranks"


def _die(*_: Any) -> None:
    if dist.get_rank() == 1:
        os._exit(7)


def _raise(*_: Any) -> None:
    raise RuntimeError("no such thing")


@pytest.mark.slow
def test_a_rank_that_dies_or_raises_is_a_failure(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for instead, says in ((_die, "rank 1 died"), (_raise, "RuntimeError: no such thing")):
        monkeypatch.setattr(grads, "tensor_parallel_sum_", instead)
        status, said = run(capsys, "--grid", "tp=2")
        assert status == 1, said
        assert says in said


def _silu_alone(gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return gate * up


@pytest.mark.slow
def test_fused_kernels_pass_fail_or_are_not_installed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = {kernel.name: kernel for kernel in kernels_report.check_kernels()}
    assert not any(kernel.broken for kernel in found.values())
    for name in (
        "RMSNorm (ours)",
        "SwiGLU (ours)",
        "rotary embedding (ours)",
        "rotary embedding (GLM-4's, ours)",
        "block attention (PyTorch flash, CPU)",
    ):
        assert found[name].verdict.startswith("ok")
    if not device.has_accelerator():
        others = [kernel.verdict for name, kernel in found.items() if "ours" not in name and "CPU" not in name]
        assert all(verdict.startswith("not installed") for verdict in others)
    monkeypatch.setattr(kernels_report, "SwiGLU", lambda _: _silu_alone)
    status, said = run(capsys, "--grid", "tp=1")
    assert status == 1
    assert "  attention of packed documents  " in said  # the table of kernels
    assert said.splitlines()[-1] == "FAILED: fused SwiGLU (ours) differs from its reference implementation"


def test_usage_errors_have_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, says in (
        (["--grid", "cp=3"], "choose of 1, 2, 4"),
        (["--dtype", "float16"], "choose of float64, float32, bf16"),
        (["--config", "missing.yaml"], "no such file"),
    ):
        status, said = run(capsys, *arguments)
        assert status == 2
        assert says in said


@pytest.mark.slow
def test_a_list_runs_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    status, said = run(capsys, "--grid", "small", "--list")
    assert status == 0
    assert "excluded, " in said
    assert sum(" ranks  " in line for line in said.splitlines()) > 5
