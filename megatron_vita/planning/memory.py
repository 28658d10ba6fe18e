"""Memory of one rank, computed from the settings, not measured; for choosing a parallel layout.

Compared with dry runs by benchmarks/planner.py. Not included: the allocator's fragmentation, CUDA's context (about
1 GiB), workspaces of cuBLAS and NCCL.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from megatron_vita.config import StageConfig
from megatron_vita.config.pipeline import pipeline_split
from megatron_vita.planning.decoder_memory import LayerMemory, decoder_layer
from megatron_vita.planning.head_memory import head_memory
from megatron_vita.planning.parameters import RankParameters, rank_parameters
from megatron_vita.planning.rows import Row, assumed_row
from megatron_vita.planning.tower_memory import Encoder


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """Bytes on one pipeline rank at the peak of a step."""

    pp_rank: int
    weights: float
    """Parameters in the training dtype."""
    gradients: float
    """float32 gradient buffers of the trainable parameters."""
    optimizer: float
    """Master weights and both moments, sharded over data x context ranks by the distributed optimizer."""
    activations: float
    """What decoder, tower and head keep for the backward, for the micro-batches in flight."""
    working_set: float
    """What lives beside them at the peak: tensors within a layer, the head or the tower, or the optimizer's."""
    communication: float
    """Buffers that stay: the sequence-parallel gather."""
    peak_at: str
    """Part of the step with the peak: `forward`, `backward`, `head`, `tower`, `optimizer`."""

    @property
    def total(self) -> float:
        """Bytes at the peak."""
        return self.before + self.activations + self.working_set + self.communication

    @property
    def before(self) -> float:
        """Bytes between steps."""
        return self.weights + self.gradients + self.optimizer


def estimate_memory(stage: StageConfig, world_size: int, row: Row | None = None) -> MemoryEstimate:
    """Estimate the memory of the pipeline rank with the most, among `world_size` ranks.

    Args:
        stage: the merged settings of the training stage.
        world_size: number of ranks.
        row: a micro-batch; by default `assumed_row`.

    Raises:
        ConfigError: world_size is not a multiple of the replica size, or the layers do not fit the pipeline.
    """
    row = row or assumed_row(stage)
    layer = decoder_layer(stage, row, element_size(stage))
    ranks = range(stage.parallel.pipeline_model_parallel_size)
    return max((_estimate(stage, world_size, rank, row, layer) for rank in ranks), key=lambda one: one.total)


def rank_memory(stage: StageConfig, world_size: int, pp_rank: int, row: Row | None = None) -> MemoryEstimate:
    """Estimate the memory of one pipeline rank; arguments and errors as in `estimate_memory`."""
    row = row or assumed_row(stage)
    return _estimate(stage, world_size, pp_rank, row, decoder_layer(stage, row, element_size(stage)))


def element_size(stage: StageConfig) -> int:
    """Bytes of a weight or an activation."""
    return 2 if stage.train.bf16 else 4


def _estimate(stage: StageConfig, world_size: int, pp_rank: int, row: Row, layer: LayerMemory) -> MemoryEstimate:
    rank = _Rank(stage, world_size, pp_rank, row, layer)
    kept, beside, where = rank.peak()
    return MemoryEstimate(
        pp_rank, rank.weights, rank.gradients, rank.optimizer, kept, beside, rank.buffers, where
    )  # fmt: skip


def trained_parameters(stage: StageConfig, counted: RankParameters) -> int:
    """Parameters of a rank that are not frozen."""
    train = stage.train
    return (
        counted.decoder * (not train.freeze_language_model)
        + counted.tower * (not train.freeze_vision_model)
        + counted.projector * (not train.freeze_vision_projection)
    )


def in_flight(pp: int, virtual: int, pp_rank: int, micro_batches: int) -> int:
    """Forward passes of a model chunk whose backward is outstanding, at most, on one pipeline rank.

    The warm-up of megatron-core's schedules (pipeline_parallel/schedules.py, get_pp_rank_microbatches), and the one
    after it.
    """
    warm_up = pp - pp_rank - 1
    if virtual > 1:
        warm_up = 2 * warm_up + (virtual - 1) * pp
    return min(warm_up + 1, micro_batches * virtual)


@dataclass(frozen=True, slots=True)
class _Chunk:
    """Decoder layers of one model chunk, for one micro-batch; bytes above what was kept before."""

    kept: float
    forward: float
    backward: float


def _chunk(stage: StageConfig, layer: LayerMemory, layers: int) -> _Chunk:
    """What a chunk of `layers` keeps, and the most that lives in its forward and its backward."""
    parallel = stage.parallel
    if parallel.recompute_granularity != "full":
        before = (layers - 1) * layer.kept
        return _Chunk(layers * layer.kept, before + layer.forward, before + layer.backward)
    again = layer.hidden + max(layer.forward, layer.backward)  # the gradient of its output, and the layer once more
    unit = parallel.recompute_num_layers or 1
    if parallel.recompute_method == "uniform":
        units = ceil(layers / unit)
        before = (units - 1) * layer.hidden
        return _Chunk(
            units * layer.hidden, before + layer.no_grad, before + (min(unit, layers) - 1) * layer.kept + again
        )
    recomputed = min(layers, unit)
    plain = layers - recomputed
    inputs = recomputed * layer.hidden
    forward = inputs - layer.hidden + layer.no_grad if recomputed else 0.0
    backward = inputs - layer.hidden + again if recomputed else 0.0
    if plain:
        before = inputs + (plain - 1) * layer.kept
        forward, backward = max(forward, before + layer.forward), max(backward, before + layer.backward)
    return _Chunk(inputs + plain * layer.kept, forward, backward)


class _Rank:
    """The phases of a step on one pipeline rank."""

    def __init__(self, stage: StageConfig, world_size: int, pp_rank: int, row: Row, layer: LayerMemory) -> None:
        parallel = stage.parallel
        self._stage, self._row = stage, row
        self._pp, cp = parallel.pipeline_model_parallel_size, parallel.context_parallel_size
        dp = parallel.data_parallel_size(world_size)
        self._first, self._last = pp_rank == 0, pp_rank == self._pp - 1
        split = pipeline_split(parallel, stage.model.num_layers)
        self._virtual = split.virtual
        self._element = element_size(stage)
        self._tokens = row.tokens / cp
        self._layer = layer
        self._chunk = _chunk(stage, self._layer, max(split.layers[pp_rank :: self._pp]))
        counted = rank_parameters(stage.model, parallel, pp_rank)
        trained = trained_parameters(stage, counted)
        self.weights = counted.total * self._element
        self.gradients = trained * 4
        self._shard = trained / (dp * cp)
        self._tower_shard = 0 if stage.train.freeze_vision_model else counted.tower / (dp * cp)
        self.optimizer = self._shard * (12 if stage.train.bf16 else 8)
        micro_batches = max(1, stage.train.global_batch_size // (dp * stage.train.micro_batch_size))
        self._outstanding = in_flight(self._pp, self._virtual, pp_rank, micro_batches)

    @property
    def buffers(self) -> float:
        """The buffer of megatron-core's gathers under sequence parallelism: of trained linear layers."""
        used = self._stage.parallel.sequence_parallel and not self._stage.train.freeze_language_model
        return self._layer.gathered if used else 0.0

    def _batch(self) -> float:
        """Token ids, labels, positions, rotary table, index of the exchange, of a micro-batch in flight."""
        parallel = self._stage.parallel
        table = self._tokens * self._stage.model.rotary_dim * self._element
        exchanged = parallel.context_parallel_size > 1 and parallel.cp_comm_type != "p2p"
        return 24 * self._tokens + table + 16 * self._row.tokens * exchanged

    def peak(self) -> tuple[float, float, str]:
        """What is kept and what lives beside it at the peak of a step, and where the peak is."""
        encoder = Encoder(self._stage, self._row, self._element) if self._first else None
        tower_kept = encoder.kept if encoder else 0.0
        chunk = self._chunk
        others = (self._outstanding - 1) * (chunk.kept + self._batch())
        with_tower = max(1, self._outstanding - (self._virtual - 1) * self._pp)
        others += (with_tower - 1) * tower_kept
        if not self._last:
            others += self._outstanding * self._layer.hidden  # outputs, until their gradients arrive
        if not self._first:
            others += self._layer.hidden  # the gradient that was sent last
        mine = others + self._batch() + tower_kept
        in_forward = mine + (encoder.pixels if encoder else 0.0)
        phases = [(in_forward, chunk.forward, "forward"), (0.0, self._optimizer_step(), "optimizer")]
        if self._last:
            labelled = self._row.labelled * self._tokens / self._row.tokens
            head = head_memory(self._stage, labelled, self._tokens, self._element)
            phases += [(in_forward + chunk.kept, head.forward, "head"), (mine + chunk.kept, head.backward, "head")]
            mine += head.lasting
        phases.append((mine, chunk.backward, "backward"))
        if encoder is not None:
            phases += [
                (others + self._batch(), encoder.forward, "tower"),
                (others + self._batch(), encoder.backward, "tower"),
            ]
            phases.append((mine, self._embedding(), "embedding"))
        kept, beside, where = max(phases, key=lambda one: one[0] + one[1])
        if where in ("forward", "backward"):
            more = min(chunk.kept, beside)
            kept, beside = kept + more, beside - more
        return kept, beside, where

    def _embedding(self) -> float:
        """The embedding's output, or its gradient, before and after the reduce-scatter, and the weight's gradient."""
        hidden, gathered = self._layer.hidden, self._layer.gathered
        frozen = self._stage.train.freeze_language_model
        table = rank_parameters(self._stage.model, self._stage.parallel, 0).embedding * self._element
        return max(2 * gathered + hidden, hidden + gathered + (0 if frozen else table))

    def _optimizer_step(self) -> float:
        """PyTorch's foreach AdamW holds the root of the second moment of a whole parameter group.

        The tower's layers are groups of their own if they have learning rates of their own.
        """
        settings = self._stage.optimizer
        own = settings.vision_model_lr_mult != 1 or settings.vision_model_lr_decay_rate != 1
        return (self._shard - self._tower_shard * own) * 4
