"""Memory of output layer and loss on one tensor and context rank, as parallel/loss.py allocates it."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_vita.config import StageConfig

_WIDE = 4
"""Bytes of a float32 number."""
_MIN_TOKENS, _MIN_CHUNKS, _BLOCK = 256, 32, 16 * 1024**2
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
    """A tied weight's gradient, which waits for the embedding's until the end of the backward."""


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
    tied = parallel.pipeline_model_parallel_size == 1 and not model.untie_embeddings_and_output_weights
    chunk = head_chunk(labelled, model.hidden_size, shard)
    logits = chunk * shard
    # The weight's gradient is float32; blocks of it are made, and given on, in the weight's dtype.
    block = min(weight, _BLOCK * element) if element < _WIDE else 0.0
    # In float32 beside their half precision, before (logits) and after (gradient).
    of_chunk = logits * (_WIDE + element) + block
    kept = 2 * rows + wide_weight
    forward = 2 * hidden + max(3 * rows, kept + of_chunk)
    # The rows' gradient becomes that of all tokens: zeros, and under sequence parallelism those of all ranks' rows.
    spread = rows + hidden if parallel.sequence_parallel else 2 * gathered
    backward = hidden + max(kept + block, rows + wide_weight + spread)
    if not labelled:  # the weight's gradient is zeros in its own dtype, made in the backward
        return HeadMemory(hidden, 2 * hidden, hidden + weight + spread, weight * tied)
    return HeadMemory(hidden + kept, forward, backward, wide_weight * tied)
