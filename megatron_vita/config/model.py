"""What the network is: decoder and projector; the tower is in vision.py. Field names are Megatron's flag names."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_vita.config.bounds import at_least, positive
from megatron_vita.config.vision import VisionConfig
from megatron_vita.errors import ConfigError

LLAMA3_LOW, LLAMA3_HIGH, LLAMA3_LENGTH = 1.0, 4.0, 8192
"""low_freq_factor, high_freq_factor and original_max_position_embeddings of every published Llama 3.1, 3.2 and 3.3."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ProjectorConfig:
    """LayerNorm, linear, exact GELU, linear: from 4 x tower width to the decoder's width."""

    ffn_hidden_size: int | None = None
    """Inner width; by default the decoder's hidden_size (InternVL). Long-VITA uses the tower's width."""
    bias: bool = True
    """Biases in both linears (InternVL has them, Long-VITA does not)."""
    norm_epsilon: float = 1e-5
    """Epsilon of the LayerNorm: torch's default in every published model, never the decoder's."""

    def __post_init__(self) -> None:
        at_least(1, "model.projector", self, "ffn_hidden_size")
        positive("model.projector", self, "norm_epsilon")


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """A decoder of the Qwen2, Qwen3 or Llama kind and, if `vision` is given, what feeds it pictures.

    Defaults are Qwen2's. Qwen3: add_qkv_bias false, qk_layernorm true, and its config.json's head_dim as kv_channels.
    Llama: add_qkv_bias false; Llama 3.1 and later also rope_scaling_factor.
    """

    num_layers: int = 4
    """Decoder layers."""
    hidden_size: int = 128
    """Decoder width."""
    ffn_hidden_size: int = 344
    """Inner width of the SwiGLU MLP."""
    num_attention_heads: int = 4
    """Query heads."""
    num_query_groups: int = 2
    """Key/value heads (grouped-query attention)."""
    kv_channels: int | None = None
    """Size of one head; by default hidden_size / num_attention_heads."""
    vocab_size: int = 0
    """Rows of the embedding that mean something (config.json's vocab_size), before padding for TP."""
    make_vocab_size_divisible_by: int = 1
    """The padded vocabulary is a multiple of this times the tensor-parallel size."""
    untie_embeddings_and_output_weights: bool = True
    """A head of its own rather than the embedding table again."""
    add_qkv_bias: bool = True
    """Biases on queries, keys and values (Qwen2, Qwen2.5)."""
    qk_layernorm: bool = False
    """RMSNorm on each query head and each key head, before the rotary embedding (Qwen3)."""
    norm_epsilon: float = 1e-6
    """Epsilon of the decoder's RMSNorms."""
    rotary_base: float = 1e6
    """Base of the rotary embedding (rope_theta)."""
    rope_scaling_factor: float | None = None
    """Llama 3.1's rotary scaling: low frequencies turn this much slower (8 in Llama 3.1, 32 in Llama 3.2), high ones as
    before; what lies between, and the 8192 tokens that they are told apart by, is the same in every published model."""
    max_position_embeddings: int = 32768
    """Longest sequence the exported model claims to handle."""
    init_method_std: float = 0.02
    """Standard deviation of fresh weights."""
    embedding_init_method_std: float | None = None
    """Standard deviation of a fresh embedding table; by default init_method_std."""
    transformer_impl: str = "auto"
    """Layer classes: `local` (megatron-core's own), `te` (Transformer Engine), or `auto`: te where it imports."""
    vision: VisionConfig | None = None
    """The tower; none for a text-only decoder."""
    projector: ProjectorConfig = ProjectorConfig()
    """The projector between tower and decoder."""

    def __post_init__(self) -> None:
        sizes = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups")
        at_least(1, "model", self, *sizes, "kv_channels", "make_vocab_size_divisible_by", "max_position_embeddings")
        at_least(0, "model", self, "vocab_size", "init_method_std", "embedding_init_method_std")
        positive("model", self, "norm_epsilon", "rotary_base", "rope_scaling_factor")
        if self.num_attention_heads % self.num_query_groups:
            raise ConfigError(
                f"model.num_attention_heads={self.num_attention_heads} is not a multiple of num_query_groups="
                f"{self.num_query_groups}: each key/value head serves the same number of query heads."
            )
        if self.kv_channels is None and self.hidden_size % self.num_attention_heads:
            raise ConfigError(
                f"model.hidden_size={self.hidden_size} does not split over num_attention_heads="
                f"{self.num_attention_heads}. Change one, or set model.kv_channels."
            )
        if self.head_dim % 2:
            raise ConfigError(
                f"model: the heads are {self.head_dim} wide, but the rotary embedding turns pairs. Choose an even "
                "model.kv_channels, or an even hidden_size / num_attention_heads."
            )
        if self.transformer_impl not in ("auto", "local", "te"):
            raise ConfigError(f"model.transformer_impl={self.transformer_impl!r}: choose auto, local or te.")

    @property
    def head_dim(self) -> int:
        """Size of one attention head."""
        return self.kv_channels or self.hidden_size // self.num_attention_heads

    @property
    def projector_width(self) -> int:
        """Inner width of the projector."""
        return self.projector.ffn_hidden_size or self.hidden_size

    def padded_vocab_size(self, tensor_parallel: int) -> int:
        """Embedding rows at a tensor-parallel size: vocab_size rounded up."""
        multiple = self.make_vocab_size_divisible_by * tensor_parallel
        return -(-self.vocab_size // multiple) * multiple
