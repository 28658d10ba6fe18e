"""Live bytes and module paths of known programs, counted by hand; `meta` stands for a GPU."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megatron_vita.dryrun.memory import Memory, workspace_bytes
from megatron_vita.dryrun.mode import DryRunMode, fused
from megatron_vita.dryrun.modules import OUTSIDE, ModulePath

META = torch.device("meta")
UNIT = 4096
"""Bytes of every tensor below."""


@contextlib.contextmanager
def watching() -> Iterator[tuple[Memory, ModulePath]]:
    modules = ModulePath()
    memory = Memory(META, modules)
    with modules, DryRunMode(META, modules, memory, fake=True):
        yield memory, modules


def new() -> Tensor:
    return torch.empty(UNIT // 4, device=META)


class KeepsOne(torch.autograd.Function):
    """x² that keeps a tensor of its own for the backward."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor) -> Tensor:
        ctx.save_for_backward(torch.empty_like(x))
        return x * x

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> Tensor:  # type: ignore[override]
        return grad * ctx.saved_tensors[0]  # type: ignore[attr-defined]


def _views() -> object:
    x = new()
    return x.view(2, -1)[0], x.reshape(-1, 4), x[1:]


def _freed() -> object:
    return new().exp().exp().exp()


def _larger_output() -> object:
    x, out = new(), torch.empty(0, device=META)
    torch.add(x, x, out=out)
    return x, out


def _backward(*, retain: bool) -> object:
    x = new().requires_grad_()
    y = x.exp().exp()
    y.backward(torch.empty_like(y), retain_graph=retain)
    return x, y


def _recomputed(reentrant: bool) -> object:
    x = new().requires_grad_()
    y = checkpoint(lambda x: x.exp().exp().exp(), x, use_reentrant=reentrant)
    y.backward(torch.empty_like(y))
    return x, y


def _function() -> object:
    x = new().requires_grad_()
    return x, KeepsOne.apply(x)


@fused
def _many(x: Tensor) -> Tensor:
    return x.exp().exp().exp()


@pytest.mark.parametrize(
    ("program", "after", "peak"),
    [
        (_views, 1, 1),
        (lambda: new().mul_(2).add_(1), 1, 1),
        (_freed, 1, 2),
        (lambda: torch._foreach_mul([new(), new()], 2.0), 2, 4),
        (_larger_output, 2, 2),
        (lambda: _many(new()), 1, 2),
        (_function, 3, 3),
        # x, x.exp(), y, y's gradient; then the gradients of x.exp() and x
        (lambda: _backward(retain=False), 3, 6),
        (lambda: _backward(retain=True), 4, 6),  # x.exp() stays
        # x, y, y's gradient, the three results again, then two gradients
        (lambda: _recomputed(True), 3, 8),
        (lambda: _recomputed(False), 3, 7),  # lets go of a result once it is used
    ],
)
def test_live_bytes(program: Callable[[], object], after: int, peak: int) -> None:
    with watching() as (memory, _):
        kept = program()
        assert memory.now == after * UNIT
        assert memory.highest == peak * UNIT
        del kept
        assert memory.now == 0
        assert memory.highest == peak * UNIT


def test_workspace_of_flash_attention() -> None:
    dense = torch.empty(2, 3, 129, 40, device=META)
    assert workspace_bytes("aten::_scaled_dot_product_flash_attention_backward", (dense,) * 4) == 4 * 2 * 3 * 256 * 65
    query, key = torch.empty(100, 4, 64, device=META), torch.empty(100, 2, 64, dtype=torch.bfloat16, device=META)
    args = (query, query, key, key, query, None, [0, 30, 100])
    assert workspace_bytes("aten::_flash_attention_backward", args) == 4 * 4 * (100 + 256) * 65 + 2 * 100 * 4 * 64 * 2
    assert workspace_bytes("aten::mm", (query, key)) == 0


def test_a_weight_that_communication_fills_is_a_weight() -> None:
    weight, buffer = new(), new()
    with watching() as (memory, _):
        memory.part([weight], "weights")
        memory.part([weight[:8], buffer], "communication")
        assert memory.parts() == {"weights": UNIT, "communication": UNIT}


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4, device=META)

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(self.fc(x))


def test_a_function_is_a_module() -> None:
    modules = ModulePath()
    run = modules.scope(
        "decoder", lambda layer: modules.scope(lambda n: f"decoder.layers.{n}", lambda _: modules.now)(layer)
    )
    assert run(3) == "decoder.layers.3"
    assert modules.now == OUTSIDE


@pytest.mark.parametrize("reentrant", [None, True, False])
def test_paths_of_modules(reentrant: bool | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every product and activation is one of its layer's, in the forward, in recomputation and in the backward."""
    model = nn.ModuleDict({"layers": nn.ModuleList([Layer(), Layer()])})
    seen: list[tuple[str, str]] = []
    with watching() as (memory, modules):
        plain = memory.watch

        def watch(out: object, operation: str, **more: int) -> None:
            seen.append((operation.removeprefix("aten::"), modules.now))
            plain(out, operation, **more)

        monkeypatch.setattr(memory, "watch", watch)
        modules.name(model, "")
        x = torch.empty(2, 4, device=META, requires_grad=True)
        for layer in model["layers"]:
            x = layer(x) if reentrant is None else checkpoint(layer, x, use_reentrant=reentrant)
        x.backward(torch.empty_like(x))
        assert not modules._stack
    paths = {operation: [path for name, path in seen if name == operation] for operation, _ in seen}
    both = ["layers.0", "layers.1"]
    again = [] if reentrant is None else ["layers.1.fc", "layers.0.fc"]
    assert paths["addmm"] == [*(f"{one}.fc" for one in both), *again]
    assert paths["sigmoid_backward"] == both[::-1]
    assert [path.removesuffix(".fc") for path in paths["mm"]] == ["layers.1"] * 2 + ["layers.0"] * 2
