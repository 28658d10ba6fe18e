"""The whole model: tower, projector, splice, decoder, head on the labelled rows.

Legend: s tokens of the row, h decoder width, t local tokens: s / cp, and s / (cp * tp) between splice and head under
sequence parallelism.
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
from megatron_vita.models.vision.micro_batches import Turn, encode_in_micro_batches, gather_uneven, make_turns, take_own
from megatron_vita.models.vision.tower import VisionTower
from megatron_vita.parallel.context import KVCache, PackedSeqContext
from megatron_vita.parallel.grads import attach_zero_gradients
from megatron_vita.parallel.groups import Groups
from megatron_vita.parallel.loss import vocab_parallel_loss
from megatron_vita.parallel.rotary import RotaryTable
from megatron_vita.parallel.tiles import exchange_features


class VitaModel(MegatronModule):
    """One (virtual) pipeline stage of the model; the first holds tower, projector and embedding, the last norm and
    head."""

    tower_tokens = 8192
    """Patches of one micro-chunk: more tiles go through the tower in turns."""

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
        self.rotary = RotaryTable(model.head_dim, model.rotary_base, model.rope_scaling_factor)

    def forward(
        self,
        *,
        tokens: Tensor,
        positions: Tensor,
        layout: SequenceLayout,
        routes: TileRoutes,
        tiles: Tensor,
        labels: Tensor | None = None,
        logit_rows: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """One pass of one row.

        Args:
            tokens: int64 [1, s/cp], placeholders included.
            positions: int64 [1, s/cp], counted as the stage's reset rule says; the rotary table is gathered by them.
            layout: who owns which token.
            routes: which feature row goes to which token.
            tiles: uint8 [n_local, 3, S, S], the tiles this rank encodes; n_local may be 0.
            labels: int64 [1, s/cp], -100 where there is no loss; last stage only.
            logit_rows: int64 [n], local token indices whose logits are wanted instead; last stage only.
            cache: past keys and values, when generating.

        Returns:
            not the last stage: hidden states [t, 1, h]. Last stage: with labels, the losses of this context rank's
            labelled rows, float32 or wider [n], n may be 0; with logit_rows, logits [n, vocab_size], gathered and
            cut; with neither, hidden states [t, 1, h] after the final norm.
        """
        hidden = self._embed(tokens, routes, tiles) if self.pre_process else None
        rotary = self.rotary(positions, self.config.params_dtype)
        row = PackedSeqContext(layout=layout, cp_rank=self.groups.cp_rank, rotary=rotary, cache=cache)
        hidden = self.language_model.decoder(hidden_states=hidden, attention_mask=None, packed_seq_params=row)
        if cache is not None:
            cache.advance(layout.documents)
        if not self.post_process or (labels is None and logit_rows is None):
            return hidden
        if logit_rows is not None:
            return self._logits(hidden, logit_rows)
        return self._losses(hidden, labels)

    def set_input_tensor(self, input_tensor: Any) -> None:
        """Take the previous stage's hidden states (megatron-core's schedules call this)."""
        self.language_model.set_input_tensor(input_tensor)

    def shared_embedding_or_output_weight(self) -> Tensor:
        """The table that embedding and head share (megatron-core sums its gradients over the two stages)."""
        return self.language_model.shared_embedding_or_output_weight()

    def encode(self, tiles: Tensor, counts: Sequence[int] | None = None) -> Tensor:
        """Features of this rank's tiles, a micro-chunk at a time.

        Args:
            tiles: uint8 [n, 3, S, S]; n may be 0.
            counts: n of every tensor rank, whose split tower encodes all their tiles together; none: this rank alone.

        Returns:
            [n * tokens_per_tile, h].
        """
        tower, projector = self._tower()
        parameters = [*tower.parameters(), *projector.parameters()]
        if counts is None or not tower.split:
            counts = (len(tiles),)
        if not any(counts):
            weight = projector.pre_proj_layernorm.weight
            empty = torch.zeros(0, self.config.hidden_size, dtype=weight.dtype, device=weight.device)
            return attach_zero_gradients(empty, parameters)
        turns = make_turns(tiles, counts, max(1, self.tower_tokens // tower.vision.num_positions // len(counts)))
        shape = (tower.vision.tokens_per_tile, self.config.hidden_size)
        return encode_in_micro_batches(self._encode, turns, shape, parameters).flatten(0, 1)

    def _encode(self, turn: Turn) -> Tensor:
        """[n, 3, S, S] -> [n, tokens_per_tile, h]; a frozen tower keeps nothing for a backward."""
        tower, projector = self._tower()
        frozen = not any(parameter.requires_grad for parameter in tower.parameters())
        with torch.set_grad_enabled(torch.is_grad_enabled() and not frozen):
            if tower.split:
                group = self.groups.collection.tp
                together = tower(gather_uneven(turn.tiles, turn.counts, group))
                patches = take_own(together, turn.counts, group)
            else:
                patches = tower(turn.tiles)
        tokens: Tensor = projector(patches)
        return tokens

    def _tower(self) -> tuple[VisionTower, Projector]:
        assert self.vision_model is not None, "this stage has no tower"
        assert self.vision_projection is not None, "this stage has no projector"
        return self.vision_model, self.vision_projection

    def _embed(self, tokens: Tensor, routes: TileRoutes, tiles: Tensor) -> Tensor:
        """Decoder input [t, 1, h]: embedded tokens, with this rank's feature rows in their places."""
        embedded: Tensor = self.language_model.embedding(input_ids=tokens, position_ids=None)
        if self.vision_model is not None:
            first = self.groups.cp_rank * self.groups.tp_size
            counts = [len(routes.tiles_of(first + rank)) for rank in range(self.groups.tp_size)]
            rows, index = exchange_features(self.encode(tiles, counts), routes, self.groups)
            embedded = embedded.index_copy(0, index, rows.to(embedded.dtype).unsqueeze(1))
        if torch.is_grad_enabled() and not embedded.requires_grad and self._trains_before_decoder():
            # A rank whose loss needs no gradient would skip its backward and leave the others waiting in theirs.
            embedded.requires_grad_(True)
        return embedded

    def _trains_before_decoder(self) -> bool:
        parts = [self.language_model.embedding, self.vision_model, self.vision_projection]
        return any(parameter.requires_grad for part in parts if part is not None for parameter in part.parameters())

    def _whole(self, hidden: Tensor) -> Tensor:
        """[t, 1, h] -> [s/cp, h], the context rank's tokens on each of its tensor ranks."""
        if self.groups.sequence_parallel:
            hidden = mappings.gather_from_sequence_parallel_region(hidden, group=self.groups.collection.tp)
        return hidden.squeeze(1)

    def _head_rows(self, hidden: Tensor, rows: Tensor) -> Tensor:
        """[n, h]: some of the local tokens; the tensor ranks sum their gradients, each from its own vocabulary part."""
        picked = self._whole(hidden).index_select(0, rows)
        if self.groups.sequence_parallel:
            return picked  # the gather's backward sums
        return mappings.copy_to_tensor_model_parallel_region(picked, group=self.groups.collection.tp)

    def _head_weight(self) -> Tensor:
        if self.share_embeddings_and_output_weights:
            return self.shared_embedding_or_output_weight()
        weight: Tensor = self.language_model.output_layer.weight
        return weight

    def _losses(self, hidden: Tensor, labels: Tensor | None) -> Tensor:
        assert labels is not None, "the loss needs labels"
        flat = labels.reshape(-1)
        labelled = (flat >= 0).nonzero().squeeze(1)
        return vocab_parallel_loss(
            self._head_rows(hidden, labelled),
            self._head_weight(),
            flat.index_select(0, labelled),
            vocab_size=self.model.vocab_size,
            group=self.groups.collection.tp,
        )

    def _logits(self, hidden: Tensor, rows: Tensor) -> Tensor:
        local = self._head_rows(hidden, rows) @ self._head_weight().t()
        group = self.groups.collection.tp
        logits = mappings.gather_from_tensor_model_parallel_region(local, group=group)
        return logits[:, : self.model.vocab_size]

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """What a distributed checkpoint stores of this stage: the same keys for any layout and any layer classes."""
        metadata = {
            **(metadata or {}),
            "non_homogeneous_layers": True,  # layers keep their own keys
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
        """How a checkpoint stores one parameter of tower or projector, by megatron-core's marks on it."""
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
    """A parameter's name in checkpoints, from its name in whichever layer classes built it."""
    for local, stored in TE_NAMES.items():
        name = name.replace(f".{local}", f".{stored}")
    return name
