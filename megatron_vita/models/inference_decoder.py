"""The decoder's forward pass in generation: the same weights, without what only training needs.

megatron-core's modules ask for gradients, dropout, recomputation and sequence parallelism at every call. For one token
that costs several times the arithmetic, so a step calls the tensor operations directly, in the modules' order and with
their roundings. Transformer Engine's modules hold their weights otherwise and are called as they are. Legend: t local
tokens, H decoder width, g key/value heads of this tensor rank, r query heads of each, d head size.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from torch import Tensor

from megatron_vita.models.norms import HeadRMSNorm, RMSNorm, rms_norm
from megatron_vita.parallel.cached_attention import cached_attention
from megatron_vita.parallel.collectives import reduce_
from megatron_vita.parallel.context import PackedSeqContext
from megatron_vita.parallel.groups import Groups
from megatron_vita.parallel.rotary import rotated


class InferenceDecoder:
    """The decoder layers of one pipeline stage."""

    def __init__(self, language_model: GPTModel, groups: Groups) -> None:
        """Find the weights of every layer; they are shared with the modules, not copied."""
        self._decoder = language_model.decoder
        self._config = language_model.config
        self._groups = groups
        self._layers = [_Layer(layer) for layer in self._decoder.layers] if _is_plain(self._decoder) else None

    def forward(self, hidden: Tensor | None, packed_seq: PackedSeqContext) -> Tensor:
        """Decoder layers, and on the last stage the final norm.

        Args:
            hidden: [t, 1, H]; None where `set_input_tensor` has put what the previous stage sent.
            packed_seq: layout, rotary table and use of the cache.

        Returns:
            [t, 1, H].
        """
        if self._layers is None:
            states: Tensor = self._decoder(hidden_states=hidden, attention_mask=None, packed_seq_params=packed_seq)
            return states
        x = (self._decoder.input_tensor if hidden is None else hidden).squeeze(1)
        assert packed_seq.rotary is not None, "a decoder has a rotary table"
        cos, sin = (table.unsqueeze(1) for table in packed_seq.rotary)  # [t, 1, 1, d / 2]
        for layer in self._layers:
            x = x + self._attention(layer, rms_norm(x, layer.input_norm, layer.epsilon), (cos, sin), packed_seq)
            x = x + self._mlp(layer, rms_norm(x, layer.mlp_norm, layer.epsilon))
        if self._decoder.final_layernorm is not None:
            x = rms_norm(x, self._decoder.final_layernorm.weight, self._decoder.final_layernorm.eps)
        return x.unsqueeze(1)

    def _attention(
        self, layer: _Layer, x: Tensor, rotary: tuple[Tensor, Tensor], packed_seq: PackedSeqContext
    ) -> Tensor:
        """Normed hidden states [t, H] -> [t, H]."""
        assert packed_seq.step is not None, "generation uses the cache"
        core, r = layer.core, layer.queries_per_group
        # The rows of linear_qkv: for each key/value head its query heads, the key, the value.
        qkv = F.linear(x, layer.qkv_weight, layer.qkv_bias).unflatten(1, (-1, r + 2, layer.head_dim))
        qk = qkv[:, :, : r + 1]
        if layer.head_norms is not None:
            q_norm, k_norm = layer.head_norms
            qk = qk.clone()
            qk[:, :, :r] = rms_norm(qk[:, :, :r], q_norm.weight, q_norm.eps)
            qk[:, :, r] = rms_norm(qk[:, :, r], k_norm.weight, k_norm.eps)
        qk = rotated(qk, *rotary, self._config.rotary_interleaved)
        out = cached_attention(
            qk[:, :, :r].flatten(1, 2),
            qk[:, :, r],
            qkv[:, :, r + 1],
            step=packed_seq.step,
            schedule=None if packed_seq.layout is None else packed_seq.schedule(x.device, core.cp_comm_type),
            layer=layer.number,
            cp_group=core.cp_group,
            scale=core.scale,
        )
        return self._summed(F.linear(out.flatten(1), layer.proj_weight))

    def _mlp(self, layer: _Layer, x: Tensor) -> Tensor:
        """Normed hidden states [t, H] -> [t, H]."""
        gate, up = F.linear(x, layer.fc1_weight).chunk(2, dim=-1)
        return self._summed(F.linear(F.silu(gate).mul_(up), layer.fc2_weight))

    def _summed(self, partial: Tensor) -> Tensor:
        """Sum over the tensor ranks, each of which has multiplied with a part of the weight's columns."""
        reduce_(partial, self._groups.collection.tp)
        return partial


class _Layer:
    """Weights of one of megatron-core's own transformer layers."""

    __slots__ = (
        "core", "epsilon", "fc1_weight", "fc2_weight", "head_dim", "head_norms", "input_norm", "mlp_norm", "number",
        "proj_weight", "qkv_bias", "qkv_weight", "queries_per_group",
    )  # fmt: skip

    def __init__(self, layer: Any) -> None:
        attention = layer.self_attention
        self.number: int = layer.layer_number
        self.core = attention.core_attention
        self.head_dim: int = attention.hidden_size_per_attention_head
        self.queries_per_group = attention.num_attention_heads_per_partition // attention.num_query_groups_per_partition
        self.input_norm: Tensor = layer.input_layernorm.weight
        self.mlp_norm: Tensor = layer.pre_mlp_layernorm.weight
        self.epsilon: float = layer.input_layernorm.eps
        self.qkv_weight: Tensor = attention.linear_qkv.weight
        self.qkv_bias: Tensor | None = attention.linear_qkv.bias
        self.head_norms: tuple[HeadRMSNorm, HeadRMSNorm] | None = None
        if isinstance(attention.q_layernorm, HeadRMSNorm):
            self.head_norms = attention.q_layernorm, attention.k_layernorm
        self.proj_weight: Tensor = attention.linear_proj.weight
        self.fc1_weight: Tensor = layer.mlp.linear_fc1.weight
        self.fc2_weight: Tensor = layer.mlp.linear_fc2.weight


def _is_plain(decoder: Any) -> bool:
    """True if every layer is made of the modules whose arithmetic is repeated here."""
    return all(
        type(layer.input_layernorm) is RMSNorm
        and type(layer.pre_mlp_layernorm) is RMSNorm
        and type(layer.self_attention.linear_qkv) is ColumnParallelLinear
        and type(layer.self_attention.linear_proj) is RowParallelLinear
        and type(layer.mlp.linear_fc1) is ColumnParallelLinear
        and type(layer.mlp.linear_fc2) is RowParallelLinear
        for layer in decoder.layers
    )
