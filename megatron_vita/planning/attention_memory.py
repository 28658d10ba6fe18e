"""Activation memory of the decoder's attention, as parallel/document_attention.py and parallel/exchange.py allocate it.

Names on the tape: `mixed` is the joint projection of queries, keys and values; `query` the queries copied out of it;
`turned` queries and keys after the rotary embedding; `values` those copied out of `mixed`; `out` the attention output.
Under `a2a`, `scattered` are all tokens of this rank's heads, and `attended` their output.
"""

from __future__ import annotations

from megatron_vita.config import ModelConfig, ParallelConfig
from megatron_vita.planning.rows import Row
from megatron_vita.planning.tape import Tape

_WIDE = 4
"""Bytes of a float32 number."""
_SHORT = 4096
"""Off-diagonal blocks of fewer queries are gathered into one kernel call (parallel/schedule.py)."""


class AttentionMemory:
    """Sizes of one layer's attention on one tensor and context rank, and its steps on a tape."""

    def __init__(self, model: ModelConfig, parallel: ParallelConfig, row: Row, element: int) -> None:
        """Compute the sizes.

        Args:
            model: the decoder.
            parallel: the layout.
            row: the micro-batch.
            element: bytes of a number of weights and activations.
        """
        self._ranks = parallel.context_parallel_size
        self._kind = parallel.cp_comm_type if self._ranks > 1 else ""
        tp, d = parallel.tensor_model_parallel_size, model.head_dim
        tokens = row.tokens / self._ranks
        heads, groups = model.num_attention_heads / tp, model.num_query_groups / tp
        self.q, self.g = tokens * heads * d * element, tokens * groups * d * element
        self.mixed = self.q + 2 * self.g
        self._wide = tokens * heads * d * _WIDE
        self._wide_kv = 2 * tokens * groups * d * _WIDE
        self._lse = tokens * heads * _WIDE
        self._copied = self.q if groups > 1 else 0.0
        self._expanded = 2 * self.q if heads != groups else 0.0
        padding = 128 * len(row.documents) / (self._ranks if self._kind == "a2a" else 1)
        self._accumulator = _WIDE * (tokens + padding) * heads * (-(-d // 32) * 32 + 1)
        self._gathers = self._kind in ("p2p", "all_gather") and max(row.documents) / (2 * self._ranks) <= _SHORT

    def saved(self, *, trained: bool, selective: bool) -> set[str]:
        """Names of what is kept for the backward."""
        out = {"out"} if trained else set()  # the input of the output projection
        if selective:
            return {"mixed", "query"} | out
        if self._kind == "a2a":
            return {"scattered", "attended", "lse"} | out
        return {"turned", "values", "out", "lse"}

    def forward(self, tape: Tape) -> None:
        """From `mixed` to `out`."""
        tape.new(query=self._copied)
        self.attend(tape)

    def attend(self, tape: Tape) -> None:
        """The core attention: rotary embedding, exchange and blocks."""
        tape.new(turned=self.q + self.g)
        if self._kind == "a2a":
            self._a2a_forward(tape)
            return
        tape.new(values=self.g)
        self._start_exchange(tape)
        tape.new(out=self.q, lse=self._lse)
        if self._ranks == 1:
            return
        tape.new(wide_out=self._wide)
        tape.free("out")
        share = 1.0 if self._kind == "p2p" else 0.5  # queries of the largest block, of this rank's
        copies = self.q + 2 * self.g + self._wide if self._gathers else 0.0
        tape.brief(copies + share * (self.q + self._wide) + 2 * self._lse)
        tape.new(out=self.q)
        tape.free("wide_out", *_BUFFERS)

    def _start_exchange(self, tape: Tape) -> None:
        """Keys and values of this rank, and those that are received."""
        if self._kind == "p2p":
            tape.new(local_kv=2 * self.g, current_kv=2 * self.g, next_kv=2 * self.g if self._ranks > 2 else 0)
        elif self._kind == "all_gather":
            tape.new(local_kv=2 * self.g, current_kv=2 * self.g * self._ranks, next_kv=2 * self.g * self._ranks)

    def _a2a_forward(self, tape: Tape) -> None:
        tape.new(joined=self.mixed)
        tape.brief(2 * self.mixed)  # a copy to send, and what is received
        tape.new(received=self.mixed, scattered=self.mixed)
        tape.free("joined", "received")
        tape.new(attended=self.q, lse=self._lse)
        tape.brief(2 * self.q)
        tape.new(received=self.q, out=self.q)
        tape.free("received")

    def backward(self, tape: Tape, *, selective: bool) -> None:
        """From `d_out` to `d_mixed`; frees what the forward has saved."""
        if selective:
            tape.free("out")
            self.attend(tape)
        if self._kind == "a2a":
            self._a2a_backward(tape)
        else:
            self._blocks_backward(tape)
        tape.new(d_query=self.q)
        tape.free("d_q")
        tape.new(d_key=self.g)
        tape.free("d_k")
        tape.new(d_mixed=self.mixed)
        tape.free("d_query", "d_key", "d_v")

    def _blocks_backward(self, tape: Tape) -> None:
        self._start_exchange(tape)
        if self._kind != "p2p":
            self._own_backward(tape)
        if self._ranks > 1:
            tape.new(wide_dq=self._wide, d_kv=self._wide_kv * (1 if self._kind == "p2p" else self._ranks))
            if self._kind == "p2p":
                block = self.q + 2 * self.g + self._accumulator + self._expanded
                if self._ranks > 2:
                    tape.new(sent=self._wide_kv, received=self._wide_kv)
                tape.new(gradient=self._wide_kv)
            else:  # blocks of half the queries against up to all keys
                block = self.q / 2 + self._accumulator / 2 + (2 * self.g + self._expanded) * self._ranks
            copies = 3 * self.q + 2 * self.g if self._gathers else 0.0
            tape.brief(block + copies + 2 * self._lse)
            if self._kind == "p2p":
                tape.free("sent", "received")
                tape.new(received=self._wide_kv)
                self._own_backward(tape)
            else:
                tape.brief(self._wide_kv * (self._ranks + 1))
                tape.free("d_kv")
            tape.new(final_kv=self._wide_kv, wide_dkv=self._wide_kv)
            tape.free("d_q")
            tape.new(d_q=self.q)
            tape.free("wide_dq", "wide_dkv", "final_kv", "d_kv", "gradient", "received", *_BUFFERS)
        tape.free("mixed", "query", "turned", "values", "out", "lse", "d_out")

    def _own_backward(self, tape: Tape) -> None:
        """The diagonal blocks."""
        tape.new(d_q=self.q, d_k=self.g, d_v=self.g)
        tape.brief(self._accumulator + self._expanded + self._lse)

    def _a2a_backward(self, tape: Tape) -> None:
        tape.brief(2 * self.q)
        tape.new(received=self.q, d_attended=self.q)
        tape.free("d_out", "received")
        tape.new(d_heads=self.mixed)
        tape.brief(self._accumulator + self._expanded + self._lse)
        tape.free("scattered", "attended", "lse", "d_attended", "out")
        tape.new(d_scattered=self.mixed)
        tape.free("d_heads")
        tape.brief(2 * self.mixed)
        tape.new(received=self.mixed)
        tape.free("d_scattered")
        tape.new(d_q=self.q, d_k=self.g, d_v=self.g)
        tape.free("received", "mixed", "query", "turned", "values")


_BUFFERS = ("local_kv", "current_kv", "next_kv")
