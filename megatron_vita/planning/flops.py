"""FLOPs of a training step, computed from the settings, not measured. A multiply-add counts as two.

Two figures: those that are *executed*, recomputation included, which a counter of operations sees; and those of the
*model*, which MFU is about: forward and backward once each, whatever the kernels repeat.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

from megatron_vita.config import ModelConfig, StageConfig
from megatron_vita.config.pipeline import pipeline_split
from megatron_vita.planning.parameters import matrix_parameters
from megatron_vita.planning.rows import Row
from megatron_vita.planning.tower_memory import encoder_micro_batches

FLASH_BACKWARD = 2.5
"""Flash attention's backward over its forward: five products instead of two, the scores are computed again."""


def decoder_forward(model: ModelConfig, documents: Sequence[int], labelled: int) -> float:
    """FLOPs of the decoder's forward on one packed sequence.

    Args:
        model: the decoder.
        documents: length of each document; causal attention computes half of each square.
        labelled: tokens that go through the output layer.
    """
    row = Row(tuple(documents), 0, labelled)
    layer = _matrices(model, row) + _attention(model, row)
    return layer * model.num_layers + _head(model, row)


def tower_forward(model: ModelConfig, tiles: int) -> float:
    """FLOPs of the forward of vision tower and projector on `tiles` tiles; 0 without a tower."""
    parts = _tower_parts(model)
    return tiles * (parts.patches + parts.blocks + parts.attention + parts.projector)


def step_flops(stage: StageConfig, row: Row) -> float:
    """FLOPs that all ranks together execute in one optimizer step whose micro-batches are all like `row`.

    Frozen parts have no gradient of weights; a frozen tower has no backward. A tower of several encoder micro-batches
    is encoded again in the backward, if it trains.
    """
    micro_batches = stage.train.global_batch_size // stage.train.micro_batch_size
    ranks = range(stage.parallel.pipeline_model_parallel_size)
    shards = stage.parallel.tensor_model_parallel_size * stage.parallel.context_parallel_size
    return micro_batches * shards * sum(rank_flops(stage, rank, row) for rank in ranks)


def model_flops(stage: StageConfig, row: Row) -> float:
    """FLOPs of the model in one micro-batch: no recomputation, and attention's backward is twice its forward."""
    model, train = stage.model, stage.train
    decoder = decoder_forward(model, row.documents, row.labelled)
    parts = _tower_parts(model)
    encoder = (parts.patches + parts.blocks + parts.attention) * (1 if train.freeze_vision_model else 3)
    projector = parts.projector * _projector_passes(stage, again=False)
    return decoder * (2 if train.freeze_language_model else 3) + row.tiles * (encoder + projector)


def rank_flops(stage: StageConfig, pp_rank: int, row: Row, *, tiles: float | None = None) -> float:
    """FLOPs that one rank executes for one micro-batch.

    Args:
        stage: the merged settings of the training stage.
        pp_rank: pipeline rank.
        row: the micro-batch; its pairs and labels are shared evenly by the context ranks.
        tiles: that this rank encodes; by default an even share.
    """
    model, parallel = stage.model, stage.parallel
    tp, pp, cp = (
        parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size, parallel.context_parallel_size
    )  # fmt: skip
    chunks = pipeline_split(parallel, model.num_layers).layers[pp_rank::pp]
    layers, again = sum(chunks), sum(recomputed_layers(stage, one) for one in chunks)
    trained = not stage.train.freeze_language_model
    total = _matrices(model, row) * (layers * (2 + trained) + again)
    if pp_rank == pp - 1:
        # Both products of the backward are done in the forward, in chunks.
        total += _head(model, row) * (2 + trained) * model.padded_vocab_size(tp) / model.vocab_size
    total = total / (tp * cp) + attention_flops(stage, pp_rank, row)
    if pp_rank == 0 and model.vision is not None:
        total += _encoder(stage, row, row.tiles / (tp * cp) if tiles is None else tiles)
    return total


def attention_flops(stage: StageConfig, pp_rank: int, row: Row) -> float:
    """The decoder's attention in `rank_flops`."""
    parallel = stage.parallel
    chunks = pipeline_split(parallel, stage.model.num_layers).layers[pp_rank :: parallel.pipeline_model_parallel_size]
    layers, again = sum(chunks), sum(recomputed_layers(stage, one) for one in chunks)
    again += layers * (parallel.recompute_granularity == "selective")
    shards = parallel.tensor_model_parallel_size * parallel.context_parallel_size
    return _attention(stage.model, row) * (layers * (1 + FLASH_BACKWARD) + again) / shards


def recomputed_layers(stage: StageConfig, layers: int) -> int:
    """Layers of a model chunk of `layers` whose forward runs again in the backward."""
    parallel = stage.parallel
    if parallel.recompute_granularity != "full":
        return 0
    return layers if parallel.recompute_method == "uniform" else min(layers, parallel.recompute_num_layers or 0)


@dataclass(frozen=True, slots=True)
class _TowerParts:
    """FLOPs of one tile's forward."""

    patches: float = 0.0
    blocks: float = 0.0
    attention: float = 0.0
    projector: float = 0.0


def _tower_parts(model: ModelConfig) -> _TowerParts:
    vision = model.vision
    if vision is None:
        return _TowerParts()
    h, positions = vision.hidden_size, vision.num_positions
    return _TowerParts(
        patches=2.0 * vision.num_patches * 3 * vision.patch_size**2 * h,
        blocks=2.0 * positions * vision.built_layers * (4 * h * h + 2 * h * vision.ffn_hidden_size),
        attention=4.0 * positions**2 * h * vision.built_layers,
        projector=2.0 * vision.tokens_per_tile * model.projector_width * (4 * h + model.hidden_size),
    )


def _projector_passes(stage: StageConfig, *, again: bool) -> int:
    """Forwards that the projector's work amounts to: forward, perhaps again, gradients of inputs, of weights."""
    train = stage.train
    trained = not train.freeze_vision_projection
    backward = trained or not train.freeze_vision_model
    return 1 + (again and backward) + backward + trained


def _encoder(stage: StageConfig, row: Row, tiles: float) -> float:
    """FLOPs of tower and projector on a rank that encodes `tiles` tiles of its own."""
    parts, train = _tower_parts(stage.model), stage.train
    again = encoder_micro_batches(stage, ceil(tiles)) > 1
    out = parts.projector * _projector_passes(stage, again=again)
    if train.freeze_vision_model:
        return tiles * (out + parts.patches + parts.blocks + parts.attention)
    out += parts.patches * (2 + again) + parts.blocks * (3 + again)  # pixels have no gradient
    return tiles * (out + parts.attention * (1 + again + FLASH_BACKWARD))


def _matrices(model: ModelConfig, row: Row) -> float:
    """Matrix products of one layer's forward."""
    return 2.0 * matrix_parameters(model) * row.tokens


def _attention(model: ModelConfig, row: Row) -> float:
    """Attention of one layer's forward: two products of query-key pairs and head size."""
    return 4.0 * row.pairs * model.num_attention_heads * model.head_dim


def _head(model: ModelConfig, row: Row) -> float:
    return 2.0 * row.labelled * model.vocab_size * model.hidden_size
