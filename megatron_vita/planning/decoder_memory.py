"""Activation memory of one decoder layer: what autograd keeps, and the most that lives in its forward and backward.

The layer is megatron-core's (`local` spec) on CUDA: ColumnParallelLinear keeps its input before the sequence-parallel
gather and gathers again in the backward, into a buffer that all layers share; RMSNorm keeps its input; SwiGLU keeps
its input; attention is attention_memory.py's. A frozen linear layer keeps nothing. A tensor also lives while the
function that made it has not returned. Fused functions allocate their outputs only.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_vita.config import StageConfig
from megatron_vita.planning.attention_memory import AttentionMemory
from megatron_vita.planning.rows import Row
from megatron_vita.planning.tape import Tape


@dataclass(frozen=True, slots=True)
class LayerMemory:
    """Bytes of one layer for one micro-batch, above what the layers before have kept."""

    kept: float
    """What the forward leaves for the backward, the layer's input included."""
    forward: float
    """Most that lives in the forward, its input included."""
    no_grad: float
    """As `forward`, without keeping anything: the first pass of a recomputed layer."""
    backward: float
    """Most that lives in the backward, `kept` and the gradient of the layer's output included."""
    hidden: float
    """The layer's input, or output: [t, h] or its sequence-parallel share."""
    gathered: float
    """[t, h]."""


def decoder_layer(stage: StageConfig, row: Row, element: int) -> LayerMemory:
    """Walk through forward and backward of one layer on one tensor and context rank.

    Args:
        stage: model, parallel layout and frozen parts are used.
        row: the micro-batch.
        element: bytes of a number of weights and activations.
    """
    layer = _DecoderLayer(stage, row, element)
    no_grad, tape = layer.forward(keeps=False), layer.forward(keeps=True)
    forward = tape.peak
    tape.free("y")
    kept = tape.now
    tape.restart()
    layer.backward(tape)
    return LayerMemory(kept, forward, no_grad.peak, tape.peak, layer.hidden, layer.gathered)


class _DecoderLayer:
    """Sizes of a layer's tensors, and its steps on a tape."""

    def __init__(self, stage: StageConfig, row: Row, element: int) -> None:
        model, parallel = stage.model, stage.parallel
        tp = parallel.tensor_model_parallel_size
        tokens = row.tokens / parallel.context_parallel_size
        self._trained = not stage.train.freeze_language_model
        self._split = parallel.sequence_parallel
        self._selective = parallel.recompute_granularity == "selective"
        self._bias = model.add_qkv_bias
        self._attention = AttentionMemory(model, parallel, row, element)
        self.gathered = tokens * model.hidden_size * element
        self.hidden = self.gathered / parallel.sequence_shards
        self._ffn = tokens * model.ffn_hidden_size / tp * element
        self._rstd = tokens / parallel.sequence_shards * 4
        weights = element * model.hidden_size / tp if self._trained else 0  # their gradients
        self._fc2 = weights * model.ffn_hidden_size
        self._proj = weights * model.num_attention_heads * model.head_dim
        self._qkv = self._proj + weights * 2 * model.num_query_groups * model.head_dim

    def forward(self, *, keeps: bool) -> Tape:
        """The forward; at its end live what is kept, and the output `y`."""
        saved = {"x"}
        if keeps:
            saved |= {"rstd1", "x2", "rstd2", "gate_up"} | ({"norm1", "norm2", "product"} if self._trained else set())
            saved |= self._attention.saved(trained=self._trained, selective=self._selective)
        tape = Tape(x=self.hidden)
        tape.new(norm1=self.hidden, rstd1=self._rstd)
        self._column(tape, mixed=self._attention.mixed)
        if self._bias:
            tape.brief(self._attention.mixed)  # product + bias is a new tensor
        tape.free("gathered")
        self._attention.forward(tape)
        self._row(tape, "projected")
        tape.new(x2=self.hidden)  # with the residual
        tape.keep(saved | {"x2"})
        tape.new(norm2=self.hidden, rstd2=self._rstd)
        self._column(tape, gate_up=2 * self._ffn)
        tape.free("gathered")
        tape.new(product=self._ffn)
        if not keeps:
            tape.free("gate_up")
        self._row(tape, "projected")
        tape.new(y=self.hidden)
        tape.keep(saved | {"y"})
        return tape

    def _column(self, tape: Tape, **out: float) -> None:
        """Forward of a ColumnParallelLinear; a frozen one gathers into a tensor of its own."""
        if self._split and not self._trained:
            tape.new(gathered=self.gathered)
        tape.new(**out)

    def _row(self, tape: Tape, name: str) -> None:
        """Forward of a RowParallelLinear, with its reduce-scatter."""
        if self._split:
            tape.new(partial=self.gathered)
        tape.new(**{name: self.hidden})
        tape.free("partial")

    def backward(self, tape: Tape) -> None:
        """The backward of what `forward` has kept on the tape."""
        tape.new(dy=self.hidden)
        self._row_backward(tape, self._fc2, d_product=self._ffn)
        tape.free("product")
        tape.new(d_gate_up=2 * self._ffn)
        tape.free("d_product", "gate_up")
        self._column_backward(tape, 2 * self._fc2, "d_gate_up", "norm2", "x2", "rstd2")
        self._row_backward(tape, self._proj, d_out=self._attention.q)
        self._attention.backward(tape, selective=self._selective)
        self._column_backward(tape, self._qkv, "d_mixed", "norm1", "x", "rstd1")

    def _row_backward(self, tape: Tape, weight: float, **d_in: float) -> None:
        """Backward of a RowParallelLinear: all-gather of the gradient, then both products."""
        if self._split:
            tape.new(d_gathered=self.gathered)
        tape.new(**d_in)
        tape.brief(weight)
        tape.free("d_gathered")

    def _column_backward(self, tape: Tape, weight: float, grad: str, *saved: str) -> None:
        """Backward of a ColumnParallelLinear, of the norm before it, and the sum with the residual's gradient."""
        if self._split:
            tape.new(d_gathered=self.gathered)
        tape.new(d_norm=self.hidden)
        tape.brief(weight)
        tape.free("d_gathered", grad)
        tape.new(d_x=self.hidden)
        tape.free("d_norm", *saved)
        tape.brief(self.hidden)
        tape.free("d_x")
