"""kernels.py: what is chosen on which device with which packages, and the table that says so; packages are stubs."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch

from megatron_vita import device, kernels
from megatron_vita.config import ModelConfig, StageConfig, TrainConfig
from megatron_vita.kernels import Attention
from megatron_vita.parallel import flash

CPU, GPU = torch.device("cpu"), torch.device("meta")


@pytest.fixture(autouse=True)
def choose_anew() -> Iterator[None]:
    kernels._on_gpu.cache_clear()
    yield
    kernels._on_gpu.cache_clear()


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A machine with a GPU of a compute capability, and packages: name -> its module; None cannot be imported."""

    def make(capability: tuple[int, int], **packages: ModuleType | None) -> None:
        for name, module in packages.items():
            monkeypatch.setitem(sys.modules, name, module)
            monkeypatch.setitem(sys.modules, f"{name}.flash_attn_interface", module)
        monkeypatch.setattr(device, "compute_capability", lambda: capability)
        monkeypatch.setattr(device, "torch_device", lambda: GPU)
        monkeypatch.setattr(kernels, "installed", lambda package: package in packages)

    return make


def _module(**functions: Any) -> ModuleType:
    module = ModuleType("stub")
    vars(module).update(functions)
    return module


def _called(log: list[dict[str, Any]], *results: torch.Tensor) -> Any:
    """The call is recorded, as positional names are the one thing that these functions share."""

    def record(arguments: dict[str, Any]) -> tuple[torch.Tensor, ...]:
        log.append(arguments)
        return results

    return record


def hopper_package(record: Any, *, latest: bool) -> ModuleType:
    """flash_attn_interface's two functions as two releases of it have them (arguments between left out)."""
    if latest:

        def _flash_attn_forward(
            q, k, v, k_new=None, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None,
            softmax_scale=None, causal=False, window_size_left=-1, num_splits=1,
        ):  # fmt: skip
            return record(locals())

        def _flash_attn_backward(
            dout, q, k, v, out, softmax_lse, cu_seqlens_q=None, cu_seqlens_k=None, sequed_q=None, max_seqlen_q=None,
            max_seqlen_k=None, dq=None, dk=None, dv=None, softmax_scale=None, is_causal=False, softcap=0.0,
        ):  # fmt: skip
            return record(locals())
    else:

        def _flash_attn_forward(
            q, k, v, k_new, qv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, page_table, softmax_scale,
            causal, window_size=(-1, -1), num_splits=1,
        ):  # fmt: skip
            return record(locals())

        def _flash_attn_backward(
            dout, q, k, v, out, softmax_lse, cu_seqlens_q, cu_seqlens_k, sequed_q, max_seqlen_q, max_seqlen_k,
            dq, dk, dv, softmax_scale, causal, window_size=(-1, -1), deterministic=False,
        ):  # fmt: skip
            return record(locals())

    return _module(_flash_attn_forward=_flash_attn_forward, _flash_attn_backward=_flash_attn_backward)


def _flash_attn_varlen_forward(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal,
    window_size_left=-1, window_size_right=-1, softcap=0.0, alibi_slopes=None, return_softmax=False,
):  # fmt: skip
    """As flash-attn 2.7 to 2.8 have it."""
    return q, q[..., 0].t(), None, None


def _flash_attn_varlen_backward(
    dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p,
    softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes, deterministic, rng_state=None,
):  # fmt: skip
    """As flash-attn 2.7 to 2.8 have it."""


def _of_an_older_release(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale,
                         causal, window_size, softcap, alibi_slopes, return_softmax):  # fmt: skip
    """As flash-attn 2.6 has it."""


FLASH_2 = _module(
    _flash_attn_varlen_forward=_flash_attn_varlen_forward, _flash_attn_varlen_backward=_flash_attn_varlen_backward
)
FLASH_2_OLD = _module(_flash_attn_varlen_forward=_of_an_older_release)
FLASH_3 = hopper_package(None, latest=True)


def test_the_cpu_has_its_own_kernels() -> None:
    chosen = kernels.on(CPU)
    assert chosen.attention(torch.bfloat16, 128) is chosen.attention(torch.float64, 7) is Attention.CPU_FLASH
    assert not chosen.variable_length
    assert not chosen.reads_pages(256, torch.bfloat16)


@pytest.mark.parametrize(
    ("dtype", "head_dim", "fused"),
    [
        (torch.bfloat16, 128, True), (torch.float16, 256, True), (torch.bfloat16, 8, True),
        (torch.bfloat16, 264, False), (torch.bfloat16, 20, False), (torch.float32, 128, False),
        (torch.float64, 64, False),
    ],
)  # fmt: skip
def test_other_dtypes_and_head_sizes_take_the_reference(dtype: torch.dtype, head_dim: int, fused: bool) -> None:
    kernel = kernels.on(GPU).attention(dtype, head_dim)
    assert kernel is (Attention.TORCH_FLASH if fused else Attention.REFERENCE)


@pytest.mark.parametrize(
    ("capability", "packages", "want", "reason"),
    [
        ((9, 0), {"flash_attn_interface": FLASH_3, "flash_attn": FLASH_2}, Attention.FLASH_ATTN_3, None),
        ((9, 0), {"flash_attn": FLASH_2}, Attention.FLASH_ATTN_2, "flash_attn_interface is not installed"),
        ((8, 0), {"flash_attn_interface": FLASH_3, "flash_attn": FLASH_2}, Attention.FLASH_ATTN_2, "needs 9"),
        ((10, 0), {"flash_attn_interface": FLASH_3}, Attention.TORCH_FLASH, "compute capability 10.0, needs 9"),
        ((9, 0), {"flash_attn": FLASH_2_OLD}, Attention.TORCH_FLASH, "has no window_size_left"),
        ((9, 0), {"flash_attn_interface": FLASH_2}, Attention.TORCH_FLASH, "has no q"),
        ((9, 0), {"flash_attn": None}, Attention.TORCH_FLASH, "cannot be imported"),
        ((7, 5), {"flash_attn": FLASH_2}, Attention.REFERENCE, "compute capability 7.5, needs 8"),
    ],
)
def test_packages_and_gpu_choose_the_attention_kernel(
    machine: Any, capability: tuple[int, int], packages: dict[str, Any], want: Attention, reason: str | None
) -> None:
    machine(capability, **packages)
    assert kernels.on(GPU).attention(torch.bfloat16, 128) is want
    row = {row.what: row for row in kernels.kernel_table(_stage())}["attention of packed documents"]
    assert row.used == want.value
    assert reason is None or reason in row.why


@pytest.mark.parametrize("latest", [True, False])
def test_flash_attn_3_is_called_by_the_names_of_its_release(machine: Any, latest: bool) -> None:
    log: list[dict[str, Any]] = []
    out, lse = torch.randn(6, 4, 8), torch.randn(4, 6)
    machine((9, 0), flash_attn_interface=hopper_package(_called(log, out, lse, out), latest=latest))
    bounds = torch.tensor([0, 2, 6]), torch.tensor([0, 3, 5])
    q, k, v, grad = torch.randn(6, 4, 8), torch.randn(5, 2, 8), torch.randn(5, 2, 8), torch.randn(6, 4, 8)
    got = flash.forward(Attention.FLASH_ATTN_3, q, k, v, bounds, (4, 3), causal=True, scale=0.5)
    assert got[0] is out
    assert torch.equal(got[1], lse.t())
    grads = flash.backward(Attention.FLASH_ATTN_3, grad, q, k, v, out, got[1], bounds, (4, 3), causal=True, scale=0.5)
    assert [one.shape for one in grads] == [q.shape, k.shape, v.shape]
    forward, backward = log
    for call in log:
        assert (call["q"], call["k"], call["v"]) == (q, k, v) or call["q"] is q
        assert call["cu_seqlens_q"] is bounds[0]
        assert call["cu_seqlens_k"] is bounds[1]
        assert (call["max_seqlen_q"], call["max_seqlen_k"], call["softmax_scale"]) == (4, 3, 0.5)
    assert forward["causal"] is True
    assert backward["is_causal" if latest else "causal"] is True
    assert backward["dout"] is grad
    assert torch.equal(backward["softmax_lse"], lse)
    assert all(backward[name] is one for name, one in zip(("dq", "dk", "dv"), grads, strict=True))


def test_flash_attn_2_is_called_as_its_signature_says(machine: Any) -> None:
    machine((8, 0), flash_attn=FLASH_2)
    bounds = torch.tensor([0, 2, 6]), torch.tensor([0, 3, 5])
    q, k, v, grad = torch.randn(6, 4, 8), torch.randn(5, 2, 8), torch.randn(5, 2, 8), torch.randn(6, 4, 8)
    out, lse = flash.forward(Attention.FLASH_ATTN_2, q, k, v, bounds, (4, 3), causal=False, scale=0.5)
    assert out is q
    grads = flash.backward(Attention.FLASH_ATTN_2, grad, q, k, v, out, lse, bounds, (4, 3), causal=False, scale=0.5)
    assert [one.shape for one in grads] == [q.shape, k.shape, v.shape]


def test_a_custom_operators_names_are_read() -> None:
    @torch.library.custom_op("vita_test::one", mutates_args=())
    def one(q: torch.Tensor, causal: bool = False) -> torch.Tensor:
        return q.clone()

    assert kernels.parameters(one) == {"q": False, "causal": True}


def _stage() -> StageConfig:
    return StageConfig(model=ModelConfig(), train=TrainConfig(bf16=True))


def test_the_table_names_every_choice(machine: Any) -> None:
    on_cpu = {row.what: row.used for row in kernels.kernel_table(_stage())}
    if not torch.cuda.is_available():
        assert on_cpu["attention of packed documents"] == Attention.CPU_FLASH.value
        assert on_cpu["norms"] == on_cpu["SwiGLU"] == "ours"
        assert on_cpu["optimizer"] == "PyTorch AdamW"
    machine((9, 0), transformer_engine=_module(), fused_weight_gradient_mlp_cuda=_module())
    kernels._on_gpu.cache_clear()
    on_gpu = {row.what: row.used for row in kernels.kernel_table(_stage())}
    assert on_gpu.keys() == on_cpu.keys()
    assert on_gpu["layers"] == on_gpu["norms"] == "Transformer Engine"
    assert on_gpu["gradient accumulation"] == "apex, in the GEMM"
    assert on_gpu["attention of packed documents"] == Attention.TORCH_FLASH.value
    assert all(str(row).startswith(row.what) for row in kernels.kernel_table(_stage(), torch.float32))


def test_nothing_is_imported_to_choose_for_the_cpu() -> None:
    kernels.on(CPU)
    assert not {"flash_attn", "flash_attn_interface", "transformer_engine"} & set(sys.modules)
