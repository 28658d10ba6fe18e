"""Memory of output layer and loss on one tensor and context rank, as parallel/loss.py allocates it."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_vita.config import StageConfig

_WIDE = 4
"""Bytes of a float32 number."""
_MIN_TOKENS, _MIN_CHUNKS = 256, 32
"""As in parallel/loss.py."""


@dataclass(frozen=True, slots=True)
class HeadMemory:
    """Bytes above what the decoder's layers have kept."""

    kept: float
    """What the forward leaves for the backward, of which the backward makes the gradients."""
    forward: float
    """Most that lives in the forward."""
    backward: float
    """Most that lives in the backward."""
    lasting: float = 0.0
    """What lives until the backward of the whole micro-batch has ended."""


def head_chunk(labelled: float, hidden: int, shard: float) -> float:
    """Labelled tokens whose logits exist at once, of `labelled`, with `shard` vocabulary entries a rank."""
    return min(labelled, max(_MIN_TOKENS, min(labelled // _MIN_CHUNKS, labelled * hidden // shard)))


def head_memory(stage: StageConfig, labelled: float, tokens: float, element: int) -> HeadMemory:
    """Memory of the head for `labelled` of the `tokens` of a context rank."""
    model, parallel = stage.model, stage.parallel
    tp = parallel.tensor_model_parallel_size
    shard = model.padded_vocab_size(tp) / tp
    weight = shard * model.hidden_size * element if not stage.train.freeze_language_model else 0.0
    wide_weight = weight / element * _WIDE
    rows = labelled * model.hidden_size * element
    gathered = tokens * model.hidden_size * element
    hidden = gathered / parallel.sequence_shards
    chunk = head_chunk(labelled, model.hidden_size, shard)
    logits = chunk * shard
    # In float32 beside their half precision, before (logits) and after (gradient); then the weight's product.
    of_chunk = logits * (_WIDE + element) + (weight if element < _WIDE else 0.0)
    kept = 2 * rows + wide_weight
    forward = 2 * hidden + max(3 * rows, kept + of_chunk)
    # The rows' gradient becomes that of all tokens: zeros, and under sequence parallelism those of all ranks' rows.
    spread = rows + hidden if parallel.sequence_parallel else 2 * gathered
    backward = hidden + max(kept + weight, rows + weight + spread)
    if not labelled:  # the gradient of the weight, zeros, is made again and lives until the backward has ended
        return HeadMemory(hidden + kept, forward, backward + wide_weight, lasting=wide_weight)
    return HeadMemory(hidden + kept, forward, backward)
