"""Bytes that one rank needs, estimated from the settings. An estimate to choose a layout by, not a measurement."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_vita.config import StageConfig
from megatron_vita.config.pipeline import pipeline_split
from megatron_vita.planning.parameters import count_parameters


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """Bytes on the busiest rank (the first pipeline stage, which also holds tower and embedding)."""

    weights: float
    gradients: float
    optimizer: float
    """Master weights and both moments, spread over data x context ranks by the distributed optimizer."""
    activations: float
    """What the backward needs of the decoder layers in flight."""
    head: float
    """Hidden states and logits of the labelled rows of one chunk."""

    @property
    def total(self) -> float:
        """All of it, without the allocator's fragmentation or the communication library's buffers."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.head


_HEAD_CHUNK = 4096
"""Labelled rows whose logits exist at once."""


def estimate_memory(stage: StageConfig, world_size: int) -> MemoryEstimate:
    """Estimate for one rank of `world_size`.

    Activations per layer and token, in elements: two norm inputs and outputs (4 h), q, k, v and the attention output,
    the MLP's gate, up and product (3 ffn), all split over tensor ranks but, without sequence parallelism, the norms'.

    Raises:
        ConfigError: the ranks do not divide into replicas, or the layers into pipeline stages.
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
    rows = min(tokens, _HEAD_CHUNK)
    return MemoryEstimate(
        weights=(decoder + vision) * element,
        gradients=trained * 4,
        optimizer=trained * master / (dp * cp),
        activations=activations * min(pp, max(1, stage.train.global_batch_size // (dp * stage.train.micro_batch_size))),
        head=rows * model.vocab_size / tp * 4 * 2,
    )
