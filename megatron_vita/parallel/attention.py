"""Core attention of decoder and vision tower, as megatron-core core-attention modules.

Legend: t = s/cp tokens of this rank, h query heads, g key/value heads of this tensor-parallel rank, d head size.
"""

from __future__ import annotations

import math
from typing import Any

import torch.nn.functional as F
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from megatron_vita.parallel.cached_attention import cached_attention
from megatron_vita.parallel.context import PackedSeqContext
from megatron_vita.parallel.document_attention import document_attention
from megatron_vita.parallel.rotary import rotate


class VitaCoreAttention(MegatronModule):
    """The decoder's core attention: causal within documents, as the PackedSeqContext in `packed_seq_params` describes.

    The layer specs name this class; megatron-core's SelfAttention builds it, with the arguments of its own
    DotProductAttention, and calls it on every rank.
    """

    def __init__(
        self,
        config: Any,
        layer_number: int,
        attn_mask_type: Any = None,
        attention_type: str = "self",
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
    ) -> None:
        super().__init__(config=config)
        self.layer_number = layer_number
        self.scale = softmax_scale or 1.0 / math.sqrt(config.kv_channels)
        self.cp_group = pg_collection.cp
        # megatron-core passes cp_comm_type only with context parallelism.
        self.cp_comm_type = cp_comm_type or "all_gather"

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        /,
        *,
        packed_seq_params: PackedSeqContext,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
    ) -> Tensor:
        """Rotate queries and keys, then attend.

        Args:
            query: [t, 1, h, d].
            key: [t, 1, g, d].
            value: [t, 1, g, d].
            attention_mask: ignored; the mask follows from the documents.
            packed_seq_params: layout, rotary table and, in generation, the use of the key/value cache.
            attn_mask_type: ignored.
            attention_bias: ignored.

        Returns:
            [t, 1, h * d], the dtype of `query`.
        """
        packed_seq = packed_seq_params
        q, k, v = query.squeeze(1), key.squeeze(1), value.squeeze(1)
        if packed_seq.rotary is not None:
            q, k = (rotate(x, packed_seq.rotary, interleaved=self.config.rotary_interleaved) for x in (q, k))
        schedule = None if packed_seq.layout is None else packed_seq.schedule(q.device, self.cp_comm_type)
        if packed_seq.step is not None:
            out = cached_attention(
                q,
                k,
                v,
                step=packed_seq.step,
                schedule=schedule,
                layer=self.layer_number,
                cp_group=self.cp_group,
                scale=self.scale,
            )
        else:
            assert schedule is not None, "attention needs the layout of the packed sequence"
            out = document_attention(q, k, v, schedule, self.cp_group, self.scale)
        return out.reshape(out.shape[0], 1, -1)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: Any = None) -> dict[str, Any]:
        """Empty: the module has no parameters."""
        return {}


class TowerCoreAttention(MegatronModule):
    """The vision tower's core attention: bidirectional over the patches of each tile, without context parallelism."""

    def __init__(self, config: Any, layer_number: int, softmax_scale: float | None = None, **_: Any) -> None:
        super().__init__(config=config)
        self.scale = softmax_scale

    def forward(self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, /, **_: Any) -> Tensor:
        """query, key and value [patches, tiles, heads, d] -> [patches, tiles, heads * d]; the mask is ignored."""
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        out = F.scaled_dot_product_attention(q, k, v, scale=self.scale)
        return out.permute(2, 0, 1, 3).reshape(query.shape[0], query.shape[1], -1)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: Any = None) -> dict[str, Any]:
        """Empty: the module has no parameters."""
        return {}
