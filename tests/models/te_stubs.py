"""Stubs of Transformer Engine's layers, so that the `te` layer specs can be built without a GPU.

Each has the parameters, the names and the shapes that megatron-core's wrapper of the real one declares: `weight` and
`bias`, `layer_norm_weight` and `layer_norm_bias` inside the linear behind a norm, and a pickled `_extra_state`. What is
checked through them is our use of megatron-core's own te spec, not Transformer Engine's arithmetic.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from megatron.core.extensions import transformer_engine, transformer_engine_spec_provider
from megatron.core.models.gpt import gpt_layer_specs
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

from megatron_vita.models import build
from megatron_vita.models.norms import RMSNorm


class _ExtraState:
    def get_extra_state(self) -> torch.Tensor:
        return torch.zeros(3, dtype=torch.uint8)

    def set_extra_state(self, state: Any) -> None:
        assert state is None, "_extra_state was asked for"  # None: megatron-core's own linears put it there


class StubRowParallelLinear(_ExtraState, RowParallelLinear):
    """TERowParallelLinear."""


class StubLayerNormColumnParallelLinear(_ExtraState, ColumnParallelLinear):
    """TELayerNormColumnParallelLinear."""

    def __init__(self, input_size: int, output_size: int, *, config: Any, **kwargs: Any) -> None:
        super().__init__(input_size, output_size, config=config, **kwargs)
        self.layer_norm_weight = torch.nn.Parameter(torch.ones(input_size, dtype=config.params_dtype))
        self.layer_norm_weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        if config.normalization == "LayerNorm":
            self.layer_norm_bias = torch.nn.Parameter(torch.zeros(input_size, dtype=config.params_dtype))
            self.layer_norm_bias.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: torch.Tensor, *args: Any) -> Any:
        eps = self.config.layernorm_epsilon
        if self.config.normalization == "LayerNorm":
            normed = F.layer_norm(x, x.shape[-1:], self.layer_norm_weight, self.layer_norm_bias, eps)
        else:
            normed = F.rms_norm(x, x.shape[-1:], self.layer_norm_weight, eps)
        return super().forward(normed, *args)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: Any = None) -> Any:
        state = self.state_dict(prefix="", keep_vars=True)
        return make_sharded_tensors_for_checkpoint(
            state,
            prefix,
            {"weight": 0, "bias": 0},
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=metadata["dp_cp_group"],
        )


class Provider(transformer_engine_spec_provider.TESpecProvider):
    """megatron-core's provider, which names the real classes."""

    def column_parallel_layer_norm_linear(self) -> type:
        return StubLayerNormColumnParallelLinear

    def row_parallel_linear(self) -> type:
        return StubRowParallelLinear

    def layer_norm(self, rms_norm: bool = False, for_qk: bool = False) -> type:
        return RMSNorm


@contextmanager
def transformer_engine_stubs() -> Iterator[None]:
    """Models built inside take the te specs, made of the stubs."""
    with (
        mock.patch.object(gpt_layer_specs, "TESpecProvider", Provider, create=True),
        mock.patch.object(transformer_engine, "TENorm", RMSNorm),
        mock.patch.object(build, "choose_implementation", return_value="te"),
    ):
        yield
