"""The state of megatron-core's distributed optimizer, taken apart and put together again in the same steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

from megatron_vita import core_optimizer
from megatron_vita.config import ParallelConfig
from megatron_vita.parallel.groups import build_groups, destroy_groups
from tests.ranks import run_ranks


def _optimizer(seed: int) -> tuple[Any, Any]:
    """A distributed optimizer over a small DDP model, and the model."""
    from megatron.core.transformer.transformer_config import TransformerConfig

    torch.manual_seed(seed)
    config = TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1)
    module = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 4))
    module.config = config  # type: ignore[assignment]
    module.share_embeddings_and_output_weights = False  # type: ignore[assignment]
    ddp = DistributedDataParallelConfig(use_distributed_optimizer=True)
    wrapped = DistributedDataParallel(config, ddp, module)
    settings = OptimizerConfig(optimizer="adam", lr=1e-2, use_distributed_optimizer=True, clip_grad=1.0)
    return get_megatron_optimizer(settings, [wrapped]), wrapped


def _step(optimizer: Any, wrapped: Any, seed: int) -> None:
    wrapped.zero_grad_buffer()
    inputs = torch.randn(16, 8, generator=torch.Generator().manual_seed(seed))
    wrapped(inputs).square().sum().backward()
    wrapped.finish_grad_sync()
    optimizer.step()


def _check_copy() -> None:
    """Two steps, the state copied into a fresh optimizer, a third step in both."""
    build_groups(ParallelConfig())
    optimizer, wrapped = _optimizer(1)
    for seed in range(2):
        _step(optimizer, wrapped, seed)
    other, fresh = _optimizer(2)
    fresh.load_state_dict({name: one.clone() for name, one in wrapped.state_dict().items()})
    assert core_optimizer.steps_done(other) == 0
    core_optimizer.set_steps_done(other, core_optimizer.steps_done(optimizer))
    pairs = list(zip(core_optimizer.states(optimizer), core_optimizer.states(other), strict=True))
    assert pairs
    with torch.no_grad():
        for (_, _, start, tensors), (inner, parameter, first, targets) in pairs:
            assert (start, tensors.keys()) == (first, targets.keys())
            for name, one in tensors.items():
                targets[name].copy_(one)
            core_optimizer.restore(inner, parameter, targets)
    for pair in ((optimizer, wrapped), (other, fresh)):
        _step(*pair, 9)
    assert core_optimizer.steps_done(other) == core_optimizer.steps_done(optimizer) == 3
    for one, two in zip(wrapped.parameters(), fresh.parameters(), strict=True):
        assert torch.equal(one, two)
    destroy_groups()


@pytest.mark.slow
def test_a_copied_state_steps_like_its_source() -> None:
    run_ranks(2, _check_copy)
