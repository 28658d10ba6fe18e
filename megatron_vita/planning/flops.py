"""FLOPs of one training step, computed from the settings, not measured. A multiply-add counts as two."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_vita.config import ModelConfig, StageConfig
from megatron_vita.planning.parameters import count_parameters


def decoder_forward(model: ModelConfig, documents: Sequence[int], labelled: int) -> float:
    """FLOPs of the decoder's forward on one packed sequence.

    Args:
        model: the decoder.
        documents: length of each document; causal attention computes half of each square.
        labelled: tokens that go through the output layer.
    """
    counted = count_parameters(model)
    matrices = 2.0 * counted.layer * counted.layers * sum(documents)
    pairs = sum(length * (length + 1) / 2 for length in documents)
    attention = 4.0 * pairs * model.num_attention_heads * model.head_dim * model.num_layers
    head = 2.0 * labelled * model.vocab_size * model.hidden_size
    return matrices + attention + head


def tower_forward(model: ModelConfig, tiles: int) -> float:
    """FLOPs of the forward of vision tower and projector on `tiles` tiles; 0 without a tower."""
    vision = model.vision
    if vision is None:
        return 0.0
    counted = count_parameters(model)
    tokens = vision.num_positions
    tables = (vision.num_positions + vision.family.class_token) * vision.hidden_size
    matrices = 2.0 * (counted.tower - tables) * tokens
    attention = 4.0 * tokens**2 * vision.hidden_size * vision.built_layers
    projector = 2.0 * counted.projector * vision.tokens_per_tile
    return tiles * (matrices + attention + projector)


def step_flops(stage: StageConfig, *, tiles_per_pack: int, labelled_fraction: float) -> float:
    """FLOPs of one optimizer step (forward, backward, recomputation), summed over all ranks.

    The backward costs as much as the forward for the gradients of activations, and again for the gradients of weights.
    Frozen parts skip the latter; a frozen vision tower has no backward.

    Args:
        stage: sequence length, batch size, frozen parts and recomputation are used.
        tiles_per_pack: average number of tiles per pack.
        labelled_fraction: fraction of the tokens with a label.
    """
    model, train = stage.model, stage.train
    length = stage.data.seq_length
    decoder = decoder_forward(model, [length], round(length * labelled_fraction))
    passes = 2.0 + (0.0 if train.freeze_language_model else 1.0)
    if stage.parallel.recompute_granularity == "full":
        block = stage.parallel.recompute_method == "block"  # recompute_num_layers layers; uniform recomputes all
        passes += min(1.0, (stage.parallel.recompute_num_layers or 0) / model.num_layers) if block else 1.0
    tower = tower_forward(model, tiles_per_pack)
    tower_passes = 1.0 if train.freeze_vision_model else 3.0
    return train.global_batch_size * (decoder * passes + tower * tower_passes)
