"""The vision-language model: vision tower, projector, decoder, output layer and loss on labelled tokens.

Legend: s tokens of the packed sequence, h decoder width, t local tokens: s/cp, and s/(cp * tp) between embedding and
output layer under sequence parallelism; S side of a tile in pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel import mappings
from megatron.core.transformer.module import MegatronModule
from megatron.core.utils import make_sharded_tensor_for_checkpoint, make_tp_sharded_tensor_for_checkpoint
from torch import Tensor, nn

from megatron_vita.config import ModelConfig
from megatron_vita.layout import SequenceLayout, TileRoutes
from megatron_vita.models.layer_specs import TE_NAMES
from megatron_vita.models.projector import Projector
from megatron_vita.models.vision.micro_batches import (
    EncoderMicroBatch,
    encode_in_micro_batches,
    gather_uneven,
    select_local,
    split_tiles,
)
from megatron_vita.models.vision.tower import VisionTower
from megatron_vita.parallel.context import PackedSeqContext
from megatron_vita.parallel.grads import attach_zero_gradients
from megatron_vita.parallel.groups import Groups
from megatron_vita.parallel.loss import vocab_parallel_loss
from megatron_vita.parallel.rotary import RotaryTable
from megatron_vita.parallel.schedule import Schedule
from megatron_vita.parallel.selection import SelectedTokens, gather_selected, host_selection
from megatron_vita.parallel.tables import gather_tables
from megatron_vita.parallel.tiles import FeatureExchange, build_exchange, exchange_features


class VitaModel(MegatronModule):
    """One (virtual) pipeline stage of the model, built by models/build.py and driven by megatron-core's schedules.

    The first stage holds vision tower, projector and embedding, the last one final norm and output layer. The whole
    packed sequence is one micro-batch of batch size 1.
    """

    def __init__(
        self,
        *,
        model: ModelConfig,
        groups: Groups,
        vision_model: VisionTower | None,
        vision_projection: Projector | None,
        language_model: GPTModel,
    ) -> None:
        super().__init__(config=language_model.config)
        self.model = model
        self.groups = groups
        self.model_type = language_model.model_type  # read by megatron-core's schedules
        self.vp_stage = language_model.vp_stage  # read by megatron-core's schedules; none without virtual stages
        self.pre_process = language_model.pre_process
        self.post_process = language_model.post_process
        self.share_embeddings_and_output_weights = language_model.share_embeddings_and_output_weights
        self.vision_model = vision_model
        self.vision_projection = vision_projection
        self.language_model = language_model
        self.rotary = RotaryTable(model)

    def forward(
        self,
        *,
        tokens: Tensor,
        positions: Tensor,
        layout: SequenceLayout,
        routes: TileRoutes,
        tiles: Tensor,
        labels: Tensor | None = None,
        labelled: SelectedTokens | None = None,
        logits_indices: Tensor | None = None,
        schedule: Schedule | None = None,
        exchange: FeatureExchange | None = None,
    ) -> Tensor:
        """Forward pass of one packed sequence. All ranks of its tensor x context group call it.

        Args:
            tokens: int64 [1, s/cp], this context rank's token ids, image placeholders included.
            positions: int64 [1, s/cp], position ids for the rotary embedding; they restart at every document under
                document masking.
            layout: documents and their partition over ranks.
            routes: tiles of the packed sequence and the destinations of their visual tokens.
            tiles: uint8 [n_local, 3, S, S], the tiles that this rank encodes; n_local may be 0. First stage only.
            labels: int64 [1, s/cp], shifted, -100 where there is no loss. Last stage only.
            labelled: the tokens whose labels are not -100, on the device; None: found in `labels`, for which the host
                waits.
            logits_indices: int64 [n], indices into the s/cp local tokens whose logits are returned. Last stage only,
                and only without labels.
            schedule: this rank's attention blocks, on the device; None: built from layout, which copies its tables.
            exchange: this rank's exchange of visual tokens, on the device; None: built from routes, likewise.

        Returns:
            Not the last stage: hidden states [t, 1, h]. Last stage with labels: losses of this context rank's labelled
            tokens, [n], float32 or wider, n may be 0, equal on its tensor ranks. Last stage with logits_indices: logits
            [n, vocab_size], all-gathered over the tensor ranks, padding removed. Last stage with neither: hidden states
            [t, 1, h] after the final norm.
        """
        hidden = self._embed(tokens, self._visual_tokens(routes, tiles, exchange)) if self.pre_process else None
        packed_seq = PackedSeqContext(
            layout=layout,
            cp_rank=self.groups.cp_rank,
            rotary=self.rotary(positions, self.config.params_dtype),
            schedules={} if schedule is None else {schedule.comm_type: schedule},
        )
        hidden = self.language_model.decoder(hidden_states=hidden, attention_mask=None, packed_seq_params=packed_seq)
        if not self.post_process or (labels is None and logits_indices is None):
            return hidden
        if logits_indices is not None:
            return self.logits(self._output_layer_input(hidden, self._select(logits_indices, hidden)))
        return self._losses(hidden, labels, labelled)

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states [n, h] after the final norm -> logits [n, vocab_size], equal on all tensor ranks, which call it
        together. Last stage only."""
        local = hidden @ self._output_layer_weight().t()
        gathered: Tensor = mappings.gather_from_tensor_model_parallel_region(local, group=self.groups.collection.tp)
        return gathered[:, : self.model.vocab_size]

    def set_input_tensor(self, input_tensor: Any) -> None:
        """Set the hidden states received from the previous stage; megatron-core's schedules call it."""
        self.language_model.set_input_tensor(input_tensor)

    def shared_embedding_or_output_weight(self) -> Tensor:
        """Weight shared by embedding and output layer; megatron-core all-reduces its gradient over the two stages."""
        return self.language_model.shared_embedding_or_output_weight()

    def encode(self, tiles: Tensor, counts: Sequence[int] | None = None) -> Tensor:
        """Encode this rank's tiles in encoder micro-batches. First stage only.

        Args:
            tiles: uint8 [n, 3, S, S]; n may be 0.
            counts: n on every tensor-parallel rank; needed by a tensor-parallel tower, which encodes the tiles of all
                these ranks together and must be called by all of them. None: this rank only.

        Returns:
            visual tokens [n * tokens_per_tile, h].
        """
        tower, projector = self._tower()
        weight = projector.pre_proj_layernorm.weight
        if counts is None or not tower.split:
            counts = (len(tiles),)
        if not any(counts):
            empty = torch.zeros(0, self.config.hidden_size, dtype=weight.dtype, device=weight.device)
            return attach_zero_gradients(empty, [*tower.parameters(), *projector.parameters()])
        trained = torch.is_grad_enabled() and any(one.requires_grad for one in tower.parameters())
        at_once = tower.vision.tiles_at_once(trained=trained, element_size=weight.element_size(), ranks=len(counts))
        micro_batches = split_tiles(tiles, counts, at_once, self.groups.tp_rank if tower.split else 0)
        shape = (tower.vision.tokens_per_tile, self.config.hidden_size)
        return encode_in_micro_batches(
            self._patch_states, projector, micro_batches, shape, list(tower.parameters())
        ).flatten(0, 1)

    def _patch_states(self, micro_batch: EncoderMicroBatch) -> Tensor:
        """One micro-batch of n tiles of this rank -> patch states [n, patches, tower width]."""
        tower, _ = self._tower()
        if not tower.split:
            whole: Tensor = tower(micro_batch.tiles)
            return whole
        group = self.groups.collection.tp
        states = tower(gather_uneven(micro_batch.tiles, micro_batch.counts, group))
        return select_local(states, micro_batch.counts, group)

    def _tower(self) -> tuple[VisionTower, Projector]:
        assert self.vision_model is not None, "this stage has no tower"
        assert self.vision_projection is not None, "this stage has no projector"
        return self.vision_model, self.vision_projection

    def _visual_tokens(
        self, routes: TileRoutes, tiles: Tensor, exchange: FeatureExchange | None = None
    ) -> tuple[Tensor, Tensor] | None:
        """Encode this rank's tiles and exchange their visual tokens: those of this rank [r, h] and their local indices
        [r]; None for a model without a tower."""
        if self.vision_model is None:
            return None
        first = self.groups.cp_rank * self.groups.tp_size
        counts = [len(routes.tiles_of(first + rank)) for rank in range(self.groups.tp_size)]
        if exchange is None:
            exchange = build_exchange(routes, self.groups.group_rank, tiles.device)
        return exchange_features(self.encode(tiles, counts), exchange, self.groups), exchange.index

    def _embed(self, tokens: Tensor, visual: tuple[Tensor, Tensor] | None) -> Tensor:
        """Decoder input [t, 1, h]: token embeddings with the visual tokens at the placeholders."""
        embedded: Tensor = self.language_model.embedding(input_ids=tokens, position_ids=None)
        if visual is not None:
            features, index = visual
            embedded = embedded.index_copy(0, index, features.to(embedded.dtype).unsqueeze(1))
        if torch.is_grad_enabled() and not embedded.requires_grad and self._trains_before_decoder():
            # Otherwise a rank without visual tokens would skip its backward, and the other ranks' all-to-all would
            # hang.
            embedded.requires_grad_(True)
        return embedded

    def _trains_before_decoder(self) -> bool:
        parts = [self.language_model.embedding, self.vision_model, self.vision_projection]
        return any(parameter.requires_grad for part in parts if part is not None for parameter in part.parameters())

    def _select(self, index: Tensor, hidden: Tensor) -> SelectedTokens:
        """Tables of the tokens at `index` [n] of the s/cp, on the device; the host waits for them."""
        ranks = self.groups.sequence_shards
        rank = self.groups.tp_rank if ranks > 1 else 0
        tables = host_selection(index.cpu(), len(hidden) * ranks, rank=rank, ranks=ranks)
        return gather_tables(tables).to(hidden.device)

    def _output_layer_input(self, hidden: Tensor, selected: SelectedTokens) -> Tensor:
        """[n, h]: the selected tokens; the backward sums gradients over the tensor ranks (one per vocabulary shard)."""
        group = self.groups.collection.tp
        if self.groups.sequence_parallel:
            return gather_selected(hidden.squeeze(1), selected, group)
        return mappings.copy_to_tensor_model_parallel_region(
            hidden.squeeze(1).index_select(0, selected.index), group=group
        )

    def _output_layer_weight(self) -> Tensor:
        """[padded vocabulary / tp, h]."""
        if self.share_embeddings_and_output_weights:
            return self.shared_embedding_or_output_weight()
        weight: Tensor = self.language_model.output_layer.weight
        return weight

    def _losses(self, hidden: Tensor, labels: Tensor | None, labelled: SelectedTokens | None) -> Tensor:
        assert labels is not None, "the loss needs labels"
        flat = labels.reshape(-1)
        if labelled is None:
            labelled = self._select((flat >= 0).nonzero().squeeze(1), hidden)
        return vocab_parallel_loss(
            self._output_layer_input(hidden, labelled),
            self._output_layer_weight(),
            flat.index_select(0, labelled.index),
            vocab_size=self.model.vocab_size,
            group=self.groups.collection.tp,
        )

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """This stage's entry in a distributed checkpoint; keys depend neither on layout nor on layer implementation."""
        metadata = {
            **(metadata or {}),
            "non_homogeneous_layers": True,  # one key per layer, not one stacked tensor
            "dp_cp_group": self.groups.collection.dp_cp,
        }
        state = self.language_model.sharded_state_dict(f"{prefix}language_model.", sharded_offsets, metadata)
        state = {key: value for key, value in state.items() if "_extra_state" not in key}
        for name, part in (("vision_model", self.vision_model), ("vision_projection", self.vision_projection)):
            for local, parameter in part.named_parameters() if part is not None else ():
                key = f"{prefix}{name}.{local}"
                state[key] = self._sharded(parameter, checkpoint_name(key))
        return state

    def _sharded(self, parameter: nn.Parameter, key: str) -> Any:
        """ShardedTensor of one parameter of tower or projector, from its `tensor_model_parallel` attributes."""
        tensor_rank, data_rank = self.groups.tp_rank, self.groups.collection.dp_cp.rank()
        if not getattr(parameter, "tensor_model_parallel", False):
            return make_sharded_tensor_for_checkpoint(parameter, key, replica_id=(0, tensor_rank, data_rank))
        return make_tp_sharded_tensor_for_checkpoint(
            parameter,
            key,
            tp_axis=parameter.partition_dim,  # type: ignore[attr-defined]
            replica_id=(0, 0, data_rank),
            tp_group=self.groups.collection.tp,
            dp_cp_group=self.groups.collection.dp_cp,
        )


def checkpoint_name(name: str) -> str:
    """Map a parameter's name in the model, of either layer implementation, to its name in checkpoints."""
    for local, stored in TE_NAMES.items():
        name = name.replace(f".{local}", f".{stored}")
    return name
