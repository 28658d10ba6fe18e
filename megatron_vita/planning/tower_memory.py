"""Activation memory of vision tower and projector, as models/vision/ allocates it.

Legend: `wide` is one tensor [positions, tiles, tower width] in bytes; `ffn` one of the MLP's width.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from megatron_vita.config import ModelConfig, StageConfig, VisionConfig
from megatron_vita.planning.parameters import rank_parameters
from megatron_vita.planning.rows import Row

_WIDE = 4
"""Bytes of a float32 number."""


@dataclass(frozen=True, slots=True)
class _Part:
    """Bytes of tower or projector for one encoder micro-batch."""

    kept: float
    """What a forward with gradients keeps."""
    forward: float
    """Most that lives in a forward that keeps nothing."""
    backward: float
    """Most that lives in a backward beside what is kept."""


class Encoder:
    """All tiles of a micro-batch on a rank of the first pipeline stage."""

    def __init__(self, stage: StageConfig, row: Row, element: int) -> None:
        """Compute, in bytes, what is `kept` until the backward, and the most in `forward` and `backward` with it.

        `pixels` live until the forward of the whole model has ended; 0 where they are kept anyway.

        Args:
            stage: the merged settings of the training stage.
            row: the micro-batch; of its tiles this rank encodes an even share, rounded up.
            element: bytes of a number of weights and activations.
        """
        self.kept = self.forward = self.backward = self.pixels = 0.0
        model, train, parallel, vision = stage.model, stage.train, stage.parallel, stage.model.vision
        if vision is None or not row.tiles:
            return
        tiles = ceil(row.tiles / (parallel.tensor_model_parallel_size * parallel.context_parallel_size))
        sharing = parallel.tensor_model_parallel_size if vision.tensor_parallel else 1
        turn = min(tiles * sharing, tiles_at_once(stage, vision))
        tower, projector = _tower(vision, turn, sharing, element), _projector(model, vision, turn / sharing, element)
        pixels = 3.0 * tiles * vision.image_size**2
        one_token = model.hidden_size * element
        features = tiles * vision.tokens_per_tile * one_token
        owners = parallel.context_parallel_size * parallel.sequence_shards
        received = row.tiles * vision.tokens_per_tile / owners * one_token
        again = encoder_micro_batches(stage, tiles) > 1
        states = tiles * vision.num_positions * vision.hidden_size * element
        counted = rank_parameters(model, parallel, 0)
        tower_trained, projector_trained = not train.freeze_vision_model, not train.freeze_vision_projection
        trained = counted.tower * tower_trained + counted.projector * projector_trained
        gradients = trained * (element + (_WIDE if again else 0))  # those of micro-batches are summed in float32
        turn_kept = working = kept = 0.0
        if tower_trained:
            turn_kept, working = tower.kept + projector.kept, max(tower.backward, projector.backward)
            kept = pixels if again else turn_kept
        elif projector_trained:
            turn_kept, working = projector.kept, projector.backward
            kept = states if again else turn_kept
        self.pixels = pixels * (kept != pixels)
        trains = tower_trained or projector_trained
        # index_copy keeps the visual tokens that it writes into the embeddings.
        self.kept = kept + received * (trains or not train.freeze_language_model)
        self.forward = self.pixels + kept + max(tower.forward, projector.forward + 2 * features + received)
        if trains:
            self.backward = kept + turn_kept * again + received + 2 * features + working + gradients


def tiles_at_once(stage: StageConfig, vision: VisionConfig) -> int:
    """Most tiles of an encoder micro-batch, of all ranks of a tensor-parallel tower together."""
    ranks = stage.parallel.tensor_model_parallel_size if vision.tensor_parallel else 1
    element = 2 if stage.train.bf16 else 4
    return vision.tiles_at_once(trained=not stage.train.freeze_vision_model, element_size=element, ranks=ranks)


def encoder_micro_batches(stage: StageConfig, tiles: int) -> int:
    """Encoder micro-batches of a rank with `tiles` tiles."""
    vision = stage.model.vision
    if vision is None or not tiles:
        return 0
    sharing = stage.parallel.tensor_model_parallel_size if vision.tensor_parallel else 1
    return ceil(tiles * sharing / tiles_at_once(stage, vision))


def _tower(vision: VisionConfig, tiles: float, ranks: int, element: int) -> _Part:
    """The tower on `tiles` tiles, its blocks split over `ranks`."""
    positions = tiles * vision.num_positions
    wide = positions * vision.hidden_size * element
    split, ffn = wide / ranks, positions * vision.ffn_hidden_size / ranks * element
    heads = vision.num_attention_heads / ranks
    lse = positions * heads * _WIDE
    # Both norms' inputs and outputs; LayerScale keeps its branches; joint projection and attention's output; the MLP
    # before and after its activation.
    block = (4 + 2 * vision.family.layer_scale) * wide + 4 * split + 2 * ffn + lse + 4 * positions * _WIDE
    head = -(-vision.hidden_size // vision.num_attention_heads // 32) * 32
    accumulator = _WIDE * positions * heads * (head + 1)
    patches = tiles * vision.num_patches * 3 * vision.patch_size**2 * element
    pixels = tiles * 3 * vision.image_size**2 * _WIDE
    return _Part(
        kept=vision.built_layers * block + patches,
        forward=max(3 * pixels, 3 * wide + 2 * ffn, 4 * wide + 8 * split + lse),
        backward=max(3 * ffn + 2 * wide, accumulator + 2 * wide + 7 * split),
    )


def _projector(model: ModelConfig, vision: VisionConfig, tiles: float, element: int) -> _Part:
    """The projector on `tiles` tiles."""
    joined = tiles * vision.num_patches * vision.hidden_size * element
    tokens = tiles * vision.tokens_per_tile * element
    inner, out = tokens * model.projector_width, tokens * model.hidden_size
    return _Part(kept=2 * joined + 2 * inner, forward=2 * joined + 2 * inner + out, backward=2 * joined + inner)
