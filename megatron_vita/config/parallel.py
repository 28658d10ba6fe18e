"""Section `parallel`: parallelism degrees and communication. Names are Megatron's."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_vita.config.bounds import at_least
from megatron_vita.errors import ConfigError

CP_COMM_TYPES = ("p2p", "all_gather", "a2a")

_INTERLEAVING = ("num_layers_per_virtual_pipeline_stage", "num_virtual_stages_per_pipeline_rank")
_UNEVEN = ("decoder_first_pipeline_num_layers", "decoder_last_pipeline_num_layers")


@dataclass(frozen=True, kw_only=True, slots=True)
class ParallelConfig:
    """Parallel layout of one stage: world size = data x pipeline x context x tensor."""

    tensor_model_parallel_size: int = 1
    """Tensor-parallel ranks."""
    pipeline_model_parallel_size: int = 1
    """Pipeline-parallel ranks."""
    pipeline_model_parallel_layout: str | None = None
    """Layers of each pipeline stage in Megatron's notation, `Et*3|(tt|)*2,ttL` (E embedding and vision tower, t decoder
    layer, L output layer and loss). Several stages per rank are virtual stages, assigned to the ranks round-robin."""
    num_layers_per_virtual_pipeline_stage: int | None = None
    """Interleaved pipeline: decoder layers of one virtual stage."""
    num_virtual_stages_per_pipeline_rank: int | None = None
    """Interleaved pipeline, alternatively: virtual stages per rank."""
    decoder_first_pipeline_num_layers: int | None = None
    """Decoder layers of the first pipeline rank; the other ranks get equal shares of the rest."""
    decoder_last_pipeline_num_layers: int | None = None
    """Decoder layers of the last pipeline rank; the other ranks get equal shares of the rest."""
    context_parallel_size: int = 1
    """Context-parallel ranks, which split each packed sequence."""
    sequence_parallel: bool = False
    """Megatron's sequence parallelism: activations outside the matrix products are split over the tensor ranks too."""
    cp_comm_type: str = "p2p"
    """Communication of context-parallel attention: `p2p` ring send/recv of keys and values, overlapped with
    computation; `all_gather` of the keys and values of the whole packed sequence; `a2a` (Ulysses) all-to-all of heads
    and tokens."""
    overlap_grad_reduce: bool = False
    """Overlap the gradient reduction with the backward."""
    recompute_granularity: str | None = None
    """Activation recomputation: `full` (whole layers), `selective` (core attention), or None."""
    recompute_method: str | None = None
    """With `full`: `uniform` or `block`."""
    recompute_num_layers: int | None = None
    """With `full`: layers per recomputed unit (uniform) or number of recomputed layers (block)."""

    def __post_init__(self) -> None:
        sizes = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size")
        at_least(1, "parallel", self, *sizes, "recompute_num_layers", *_INTERLEAVING, *_UNEVEN)
        self._check_pipeline()
        if self.sequence_parallel and self.tensor_model_parallel_size == 1:
            raise ConfigError(
                "parallel.sequence_parallel needs parallel.tensor_model_parallel_size above 1. Change one of them."
            )
        if self.cp_comm_type not in CP_COMM_TYPES:
            raise ConfigError(f"parallel.cp_comm_type={self.cp_comm_type!r}: choose one of {', '.join(CP_COMM_TYPES)}.")
        if self.recompute_granularity not in (None, "full", "selective"):
            raise ConfigError(
                f"parallel.recompute_granularity={self.recompute_granularity!r}: choose full, selective or nothing."
            )
        if self.recompute_granularity == "full" and (
            self.recompute_method not in ("uniform", "block") or not self.recompute_num_layers
        ):
            raise ConfigError(
                "parallel.recompute_granularity=full needs recompute_method (uniform or block) "
                "and recompute_num_layers."
            )
        if self.recompute_granularity != "full" and (self.recompute_method or self.recompute_num_layers):
            raise ConfigError(
                "parallel.recompute_method and recompute_num_layers do nothing without recompute_granularity=full. "
                "Set that, or leave them out."
            )

    def _check_pipeline(self) -> None:
        """Raise ConfigError for pipeline settings that contradict each other or have no effect."""
        given = [name for name in (*_INTERLEAVING, *_UNEVEN) if getattr(self, name) is not None]
        if self.pipeline_model_parallel_layout is not None and given:
            raise ConfigError(
                f"parallel.pipeline_model_parallel_layout already says what parallel.{given[0]} would. Leave one out."
            )
        if all(name in given for name in _INTERLEAVING):
            raise ConfigError(f"parallel.{' and parallel.'.join(_INTERLEAVING)} say the same. Leave one out.")
        if self.pipeline_model_parallel_size > 1:
            return
        if self.pipeline_model_parallel_layout is not None:
            given = ["pipeline_model_parallel_layout"]
        if given:
            raise ConfigError(
                f"parallel.{given[0]} does nothing at pipeline_model_parallel_size 1. Raise that, or leave it out."
            )

    def check_heads(self, num_query_groups: int) -> None:
        """Check that the key/value heads of `a2a` attention divide over the context-parallel ranks.

        Raises:
            ConfigError: they do not; names a context-parallel size that works.
        """
        tp, cp = self.tensor_model_parallel_size, self.context_parallel_size
        heads = num_query_groups // tp
        if self.cp_comm_type == "a2a" and heads % cp:
            nearest = max(size for size in range(1, cp) if heads % size == 0)
            raise ConfigError(
                f"parallel.cp_comm_type=a2a splits key/value heads over the context ranks, but model.num_query_groups="
                f"{num_query_groups} / tensor_model_parallel_size={tp} = {heads} is not a multiple of "
                f"parallel.context_parallel_size={cp}. Use context_parallel_size={nearest}, or cp_comm_type p2p or "
                "all_gather."
            )

    @property
    def replica_size(self) -> int:
        """Ranks of one model replica, tensor x pipeline x context."""
        return self.tensor_model_parallel_size * self.pipeline_model_parallel_size * self.context_parallel_size

    @property
    def sequence_shards(self) -> int:
        """Tensor-parallel ranks that split the local sequence: TP with sequence parallelism, else 1."""
        return self.tensor_model_parallel_size if self.sequence_parallel else 1

    def data_parallel_size(self, world_size: int) -> int:
        """Data-parallel size of `world_size` ranks, world_size / replica_size.

        Raises:
            ConfigError: world_size is not a multiple of replica_size.
        """
        if world_size % self.replica_size:
            low = world_size // self.replica_size * self.replica_size
            sizes = f"{low} or {low + self.replica_size}" if low else str(self.replica_size)
            raise ConfigError(
                f"{world_size} ranks were launched, but one replica takes tensor {self.tensor_model_parallel_size} x "
                f"pipeline {self.pipeline_model_parallel_size} x context {self.context_parallel_size} = "
                f"{self.replica_size}. Launch a multiple of {self.replica_size} ({sizes}), or lower one degree."
            )
        return world_size // self.replica_size
