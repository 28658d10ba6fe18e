"""Time of a training step, estimated from FLOPs, bytes and stated hardware figures.

A roofline with stated efficiencies, not a simulation: kernels' launch times, the imbalance of packs within a step, the
loader and checkpoints are left out. Its use is to rank layouts of one model on one kind of GPU.

Ranks are numbered as megatron-core does, tensor fastest, then context, data, pipeline: a group is within a node if the
ranks that it spans are.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_vita.config import StageConfig
from megatron_vita.config.pipeline import pipeline_split
from megatron_vita.planning.decoder_memory import decoder_layer
from megatron_vita.planning.flops import attention_flops, model_flops, rank_flops, recomputed_layers
from megatron_vita.planning.hardware import Efficiency, Hardware
from megatron_vita.planning.memory import trained_parameters
from megatron_vita.planning.parameters import rank_parameters
from megatron_vita.planning.rows import Row, assumed_row

_GRADIENT = 4
"""Bytes of a gradient in the reduction."""
_OPTIMIZER = 40
"""Bytes that the optimizer reads and writes a parameter: gradient, norm, master weight, both moments, copies."""


@dataclass(frozen=True, slots=True)
class StepTime:
    """Seconds of one optimizer step on the pipeline rank with the most work, by what they are spent on."""

    matrices: float
    attention: float
    memory: float
    """Element-wise operations: norms, activations, residuals."""
    tensor: float
    """Exposed collectives of tensor and sequence parallelism."""
    context: float
    """Exposed communication of context-parallel attention."""
    pipeline: float
    """Hidden states between pipeline ranks."""
    bubble: float
    """Waiting of the pipeline's warm-up and cool-down."""
    data: float
    """Exposed reduction of gradients and all-gather of weights."""
    optimizer: float
    tokens: int
    """Tokens of the step."""
    model_flops: float
    """FLOPs of the model in the step, of all ranks."""
    peak_flops: float
    """Dense FLOP/s of all ranks together."""

    @property
    def parts(self) -> dict[str, float]:
        """Seconds by part."""
        names = ("matrices", "attention", "memory", "tensor", "context", "pipeline", "bubble", "data", "optimizer")
        return {name: getattr(self, name) for name in names}

    @property
    def seconds(self) -> float:
        """Of the step."""
        return sum(self.parts.values())

    @property
    def tokens_per_second(self) -> float:
        """Of all ranks together."""
        return self.tokens / self.seconds

    @property
    def mfu(self) -> float:
        """Model FLOPs utilisation: FLOPs of the model, recomputation not counted, over what the GPUs could do."""
        return self.model_flops / (self.seconds * self.peak_flops)

    @property
    def limit(self) -> str:
        """The part with the most seconds."""
        return max(self.parts, key=lambda name: self.parts[name])


def step_time(
    stage: StageConfig,
    world_size: int,
    hardware: Hardware,
    row: Row | None = None,
    efficiency: Efficiency | None = None,
) -> StepTime:
    """Estimate the time of one optimizer step whose micro-batches are all like `row`.

    Args:
        stage: the merged settings of the training stage.
        world_size: number of ranks.
        hardware: figures of the GPU and its links.
        row: a micro-batch; by default `assumed_row`.
        efficiency: fractions of these figures that are reached.

    Raises:
        ConfigError: world_size is not a multiple of the replica size, or the layers do not fit the pipeline.
    """
    row = row or assumed_row(stage)
    clock = _Clock(stage, world_size, hardware, row, efficiency or Efficiency())
    pp = stage.parallel.pipeline_model_parallel_size
    kinds = sorted({0, min(1, pp - 1), pp - 1})
    busiest = max((clock.micro_batch(rank) for rank in kinds), key=lambda parts: sum(parts.values()))
    return clock.step(busiest)


class _Clock:
    def __init__(
        self, stage: StageConfig, world_size: int, hardware: Hardware, row: Row, efficiency: Efficiency
    ) -> None:
        parallel = stage.parallel
        self._stage, self._row, self._hardware, self._efficiency = stage, row, hardware, efficiency
        self._world = world_size
        self._tp, self._pp, self._cp = (
            parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size, parallel.context_parallel_size
        )  # fmt: skip
        self._dp = parallel.data_parallel_size(world_size)
        self._micro_batches = stage.train.global_batch_size // (self._dp * stage.train.micro_batch_size)
        self._split = pipeline_split(parallel, stage.model.num_layers)
        self._element = 2 if stage.train.bf16 else 4
        self._layer = decoder_layer(stage, row, self._element)
        self._trained = not stage.train.freeze_language_model
        self._memory = hardware.memory_bandwidth * efficiency.memory

    def _link(self, span: int) -> float:
        """Bytes a second and rank in a group whose ranks span `span` consecutive ones."""
        within = span <= self._hardware.gpus_per_node
        return (self._hardware.nvlink if within else self._hardware.network) * self._efficiency.links

    def micro_batch(self, pp_rank: int) -> dict[str, float]:
        """Seconds of one micro-batch on a pipeline rank, by part."""
        model = self._stage.model
        chunks = self._split.layers[pp_rank :: self._pp]
        layers, again = sum(chunks), sum(recomputed_layers(self._stage, one) for one in chunks)
        executed = rank_flops(self._stage, pp_rank, self._row)
        attention = attention_flops(self._stage, pp_rank, self._row)
        peak = self._hardware.bf16
        passes = 5 * layers + 2 * again  # reads and writes of what a layer keeps: forward 2, backward 3
        seconds = {
            "matrices": (executed - attention) / (peak * self._efficiency.matrices),
            "attention": attention / (peak * self._efficiency.attention),
            "memory": passes * self._layer.kept / self._memory,
            "tensor": self._tensor(layers, again),
            "context": self._context(layers, again, attention / (peak * self._efficiency.attention)),
            "pipeline": 0.0,
        }
        if self._pp > 1:
            hops = 2 * self._split.virtual
            seconds["pipeline"] = hops * self._layer.hidden / self._link(self._world)
        assert model.num_layers >= layers
        return seconds

    def _tensor(self, layers: int, again: int) -> float:
        """Exposed collectives of the tensor ranks.

        A layer's forward has two all-gathers and two reduce-scatters (or two all-reduces, as long). In its backward the
        gradients of row-parallel layers are gathered, as many bytes as two of these; the rest overlaps with products.
        """
        if self._tp == 1:
            return 0.0
        one = self._layer.gathered * (self._tp - 1) / self._tp / self._link(self._tp)
        return one * (4 * layers + 4 * again + 2 * layers)

    def _context(self, layers: int, again: int, attention: float) -> float:
        """Exposed communication of context-parallel attention (bytes: parallel/exchange.py)."""
        if self._cp == 1:
            return 0.0
        model, n = self._stage.model, self._cp
        tokens = self._row.tokens / n
        width = model.head_dim / self._tp
        kv, q = 2 * model.num_query_groups * width, model.num_attention_heads * width
        if self._stage.parallel.cp_comm_type == "a2a":
            once = (n - 1) / n * tokens * (2 * q + kv) * self._element
            bytes_ = once * (2 * layers + again)
        else:
            once = (n - 1) * tokens * kv
            bytes_ = once * (self._element * (layers + again) + (self._element + _GRADIENT) * layers)
        seconds = bytes_ / self._link(self._tp * self._cp)
        if self._stage.parallel.cp_comm_type == "p2p":
            return max(0.0, seconds - attention)
        return seconds

    def step(self, busiest: dict[str, float]) -> StepTime:
        """The step, from a micro-batch on the pipeline rank with the most work."""
        stage = self._stage
        micro_batch = sum(busiest.values())
        counted = rank_parameters(stage.model, stage.parallel, 0)
        trained = trained_parameters(stage, counted)
        ranks = self._dp * self._cp
        link = self._link(self._tp * ranks if self._pp > 1 else self._world)
        share = (ranks - 1) / ranks
        reduced = trained * _GRADIENT * share / link
        if stage.parallel.overlap_grad_reduce:  # behind the last micro-batch's backward
            reduced = max(0.0, reduced - micro_batch * 2 / 3)
        gathered = trained * self._element * share / link
        packs = stage.train.global_batch_size
        return StepTime(
            **{name: seconds * self._micro_batches for name, seconds in busiest.items()},
            bubble=micro_batch * (self._pp - 1) / self._split.virtual,
            data=reduced + gathered,
            optimizer=trained / ranks * _OPTIMIZER / self._memory,
            tokens=packs * stage.data.seq_length,
            model_flops=model_flops(stage, self._row) * packs / stage.train.micro_batch_size,
            peak_flops=self._hardware.bf16 * self._world,
        )
