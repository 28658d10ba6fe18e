"""The model's forward pass in generation: the same weights, without what only training needs.

megatron-core's modules ask for gradients, dropout, recomputation and sequence parallelism at every call. For one token
that costs several times the arithmetic, so a step calls the tensor operations directly, in the modules' order and with
their roundings. Transformer Engine's modules hold their weights otherwise and are called as they are. Legend: t local
tokens, H decoder width, g key/value heads of this tensor rank, r query heads of each, d head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from torch import Tensor

from megatron_vita.layout import SequenceLayout, TileRoutes
from megatron_vita.models.norms import HeadRMSNorm, RMSNorm, rms_norm
from megatron_vita.models.vita import VitaModel
from megatron_vita.parallel.cached_attention import cached_attention
from megatron_vita.parallel.collectives import reduce_
from megatron_vita.parallel.context import PackedSeqContext
from megatron_vita.parallel.kv_cache import CacheStep
from megatron_vita.parallel.rotary import rotated
from megatron_vita.parallel.tiles import build_exchange, exchange_features


class CachedForward:
    """Forward passes of one pipeline stage over new tokens, with a key/value cache."""

    def __init__(self, model: VitaModel) -> None:
        """Find the weights of every layer; they are shared with the modules, not copied."""
        self._model = model
        self._decoder = model.language_model.decoder
        self._config = model.config
        self._groups = model.groups
        self._layers = [_Layer(layer) for layer in self._decoder.layers] if _is_plain(self._decoder) else None

    def __call__(
        self,
        *,
        tokens: Tensor,
        positions: Tensor,
        layout: SequenceLayout | None,
        step: CacheStep,
        visual: tuple[Tensor, TileRoutes] | None = None,
        received: Tensor | None = None,
    ) -> Tensor:
        """Compute a step. All ranks of their tensor x context group call it.

        Args:
            tokens: int64 [1, t], this context rank's token ids: its share of the packed sequence of chunks, then one
                token of each decoding sequence.
            positions: int64 [1, t], position ids.
            layout: the packed sequence of chunks; None if there are none.
            step: use of the key/value cache.
            visual: visual tokens that this rank holds, in the order of their tiles, and where they go; given on every
                rank of the group or on none. First stage only.
            received: [t, 1, H], what the previous stage sent; None on the first stage.

        Returns:
            hidden states [t, 1, H], after the final norm on the last stage.
        """
        hidden = received
        if hidden is None:
            hidden = self._model.language_model.embedding.word_embeddings(tokens).transpose(0, 1)
            if visual is not None:
                features, routes = visual
                exchange = build_exchange(routes, self._groups.group_rank, features.device)
                features = exchange_features(features, exchange, self._groups)
                hidden = hidden.index_copy(0, exchange.index, features.to(hidden.dtype).unsqueeze(1))
        rotary = self._model.rotary(positions, self._config.params_dtype)
        packed_seq = PackedSeqContext(layout=layout, cp_rank=self._groups.cp_rank, rotary=rotary, step=step)
        if self._layers is None:
            if received is not None:
                self._model.set_input_tensor([received])
            return self._decoder(hidden_states=hidden, attention_mask=None, packed_seq_params=packed_seq)
        return self._run_layers(self._layers, hidden.squeeze(1), packed_seq).unsqueeze(1)

    def _run_layers(self, layers: Sequence[_Layer], x: Tensor, packed_seq: PackedSeqContext) -> Tensor:
        """Decoder layers, and on the last stage the final norm; [t, H] -> [t, H]."""
        assert packed_seq.rotary is not None, "a decoder has a rotary table"
        cos, sin = (table.unsqueeze(1) for table in packed_seq.rotary)  # [t, 1, 1, d / 2]
        for layer in layers:
            x = x + self._attention(layer, rms_norm(x, layer.input_norm, layer.epsilon), (cos, sin), packed_seq)
            x = x + self._mlp(layer, rms_norm(x, layer.mlp_norm, layer.epsilon))
        norm = self._decoder.final_layernorm
        return x if norm is None else rms_norm(x, norm.weight, norm.eps)

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
            qk[:, :, :r] = rms_norm(qk[:, :, :r], q_norm, layer.epsilon)
            qk[:, :, r] = rms_norm(qk[:, :, r], k_norm, layer.epsilon)
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
        self.head_norms: tuple[Tensor, Tensor] | None = None
        if isinstance(attention.q_layernorm, HeadRMSNorm):
            self.head_norms = attention.q_layernorm.weight, attention.k_layernorm.weight
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
