"""Memory of one rank, estimated from the settings, not measured; for choosing a parallel layout."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_vita.config import StageConfig
from megatron_vita.config.pipeline import pipeline_split
from megatron_vita.planning.parameters import count_parameters


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """Bytes per kind on the rank with the most memory (first pipeline stage, with vision tower and embedding)."""

    weights: float
    """Parameters in the training dtype."""
    gradients: float
    """float32 gradient buffers of the trainable parameters."""
    optimizer: float
    """Master weights and both moments, sharded over data x context ranks by the distributed optimizer."""
    activations: float
    """Saved activations of the decoder layers, for the micro-batches in flight."""
    head: float
    """Logits of one chunk of labelled tokens, and their gradient."""

    @property
    def total(self) -> float:
        """Sum of all, without allocator fragmentation and communication buffers."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.head


_HEAD_CHUNK = 4096
"""Labelled tokens whose logits are assumed to exist at once."""


def estimate_memory(stage: StageConfig, world_size: int) -> MemoryEstimate:
    """Estimate the memory of the rank with the most, among `world_size` ranks.

    Saved activations per layer and token, in elements: input and output of both norms (4 h); q, k, v and the attention
    output; the MLP's gate, up and product (3 ffn). All are split over the tensor ranks, the norms' only with sequence
    parallelism.

    Raises:
        ConfigError: world_size is not a multiple of the replica size, or the layers do not fit the pipeline.
    """
    model, parallel = stage.model, stage.parallel
    tp, pp, cp = (
        parallel.tensor_model_parallel_size,
        parallel.pipeline_model_parallel_size,
        parallel.context_parallel_size,
    )
    dp = parallel.data_parallel_size(world_size)
    counted = count_parameters(model)
    stages = pipeline_split(parallel, model.num_layers)
    layers = max(stages.on_rank(rank) for rank in range(pp))
    decoder = (counted.embedding + counted.layer * layers + (counted.head if pp == 1 else 0)) / tp
    tower = counted.tower / (tp if model.vision is not None and model.vision.tensor_parallel else 1)
    vision = tower + counted.projector
    trained = (0 if stage.train.freeze_language_model else decoder) + (
        (0 if stage.train.freeze_vision_model else tower)
        + (0 if stage.train.freeze_vision_projection else counted.projector)
    )
    element = 2 if stage.train.bf16 else 4
    master = 12 if stage.train.bf16 else 8
    tokens = stage.data.seq_length * stage.train.micro_batch_size / cp
    queries = model.num_attention_heads * model.head_dim
    kv = 2 * model.num_query_groups * model.head_dim
    split = (2 * queries + kv + 3 * model.ffn_hidden_size) / tp
    norms = 4 * model.hidden_size / parallel.sequence_shards
    per_layer = tokens * (split + norms) * element
    kept = tokens * model.hidden_size / parallel.sequence_shards * element
    if parallel.recompute_granularity == "full":
        recomputed = (
            layers if parallel.recompute_method == "uniform" else min(layers, parallel.recompute_num_layers or 0)
        )
        activations = recomputed * kept + (layers - recomputed) * per_layer + per_layer
    else:
        activations = layers * per_layer
    chunk = min(tokens, _HEAD_CHUNK)
    return MemoryEstimate(
        weights=(decoder + vision) * element,
        gradients=trained * 4,
        optimizer=trained * master / (dp * cp),
        activations=activations * min(pp, max(1, stage.train.global_batch_size // (dp * stage.train.micro_batch_size))),
        head=chunk * model.vocab_size / tp * 4 * 2,
    )
