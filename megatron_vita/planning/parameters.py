"""Number of parameters of each part of a model, computed from its settings."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_vita.config import ModelConfig, ParallelConfig, VisionConfig
from megatron_vita.config.pipeline import pipeline_split


@dataclass(frozen=True, slots=True)
class ParameterCount:
    """Parameters of each part. Long-VITA-14B: decoder 14,770,033,664, tower 304,012,288, projector 9,445,376."""

    embedding: int
    """Embedding."""
    layer: int
    """One decoder layer."""
    layers: int
    """Number of decoder layers."""
    head: int
    """Output layer (0 if tied to the embedding) and final norm."""
    tower: int
    """Vision tower."""
    projector: int
    """Projector."""

    @property
    def decoder(self) -> int:
        """Decoder with embedding and output layer."""
        return self.embedding + self.layer * self.layers + self.head

    @property
    def total(self) -> int:
        """All parts."""
        return self.decoder + self.tower + self.projector


def count_parameters(model: ModelConfig) -> ParameterCount:
    """Count the parameters of a model; the vocabulary without padding for tensor parallelism."""
    hidden, ffn = model.hidden_size, model.ffn_hidden_size
    queries = model.num_attention_heads * model.head_dim
    keys_values = 2 * model.num_query_groups * model.head_dim
    qkv = (queries + keys_values) * (hidden + (1 if model.add_qkv_bias else 0))
    layer = qkv + queries * hidden + 3 * ffn * hidden + 2 * hidden + 2 * model.head_dim * model.qk_layernorm
    table = model.vocab_size * hidden
    head = hidden + (table if model.untie_embeddings_and_output_weights else 0)
    tower = projector = 0
    if model.vision is not None:
        tower = _tower(model.vision)
        joined, width = 4 * model.vision.hidden_size, model.projector_width
        bias = width + hidden if model.projector.bias else 0
        projector = 2 * joined + joined * width + width * hidden + bias
    return ParameterCount(table, layer, model.num_layers, head, tower, projector)


def matrix_parameters(model: ModelConfig) -> int:
    """Parameters of one decoder layer's matrices: all but norms and biases."""
    queries, keys_values = model.num_attention_heads * model.head_dim, 2 * model.num_query_groups * model.head_dim
    return model.hidden_size * (2 * queries + keys_values + 3 * model.ffn_hidden_size)


def _tower(vision: VisionConfig) -> int:
    """Patch embedding, class token, position embedding, outer norms, and the blocks that are built."""
    h, ffn, family = vision.hidden_size, vision.ffn_hidden_size, vision.family
    patches = 3 * vision.patch_size**2 * h + family.patch_bias * h
    positions = vision.num_positions * h + family.class_token * h  # position embedding and class token
    outer_norms = 2 * h * (family.pre_norm + vision.post_norm)
    attention = 3 * h * h + 3 * h * vision.add_qkv_bias + h * h + h + 2 * h * vision.qk_layernorm
    mlp = 2 * h * ffn + ffn + h
    norm = h if vision.normalization == "RMSNorm" else 2 * h
    block = attention + mlp + 2 * norm + 2 * h * family.layer_scale
    return patches + positions + outer_norms + vision.built_layers * block


@dataclass(frozen=True, slots=True)
class RankParameters:
    """Parameters on one rank, by part; vocabulary padded and split, norms replicated."""

    embedding: int
    layers: int
    head: int
    """Final norm, and the output layer or the last stage's copy of a tied embedding."""
    tower: int
    projector: int

    @property
    def decoder(self) -> int:
        """Parameters of the language model."""
        return self.embedding + self.layers + self.head

    @property
    def total(self) -> int:
        """All parts."""
        return self.decoder + self.tower + self.projector


def rank_parameters(model: ModelConfig, parallel: ParallelConfig, pp_rank: int) -> RankParameters:
    """Count the parameters of one pipeline rank, on each of its tensor ranks.

    Raises:
        ConfigError: the layers do not fit the pipeline.
    """
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    first, last = pp_rank == 0, pp_rank == pp - 1
    counted = count_parameters(model)
    replicated = 2 * model.hidden_size + 2 * model.head_dim * model.qk_layernorm
    layer = (counted.layer - replicated) // tp + replicated
    table = model.padded_vocab_size(tp) // tp * model.hidden_size
    owns_table = last and (model.untie_embeddings_and_output_weights or pp > 1)
    tower = counted.tower
    if model.vision is not None and model.vision.tensor_parallel:
        tower -= _tower_split(model.vision) * (tp - 1) // tp
    return RankParameters(
        embedding=table * first,
        layers=layer * pipeline_split(parallel, model.num_layers).on_rank(pp_rank),
        head=table * owns_table + model.hidden_size * last,
        tower=tower * first,
        projector=counted.projector * first,
    )


def _tower_split(vision: VisionConfig) -> int:
    """Parameters of the tower that a tensor-parallel tower splits: matrices, and the biases of column-parallel ones."""
    h, ffn = vision.hidden_size, vision.ffn_hidden_size
    attention = 3 * h * h + 3 * h * vision.add_qkv_bias + h * h + 2 * h * vision.qk_layernorm
    return vision.built_layers * (attention + 2 * h * ffn + ffn)
