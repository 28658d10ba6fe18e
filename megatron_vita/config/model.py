"""Section `model`: decoder and projector (vision tower: vision.py). Field names are Megatron's flag names."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_vita.config.bounds import at_least, positive
from megatron_vita.config.rotary import RotaryConfig
from megatron_vita.config.vision import VisionConfig
from megatron_vita.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class ProjectorConfig:
    """LayerNorm, linear, exact GELU, linear: from 4 * tower width (after pixel shuffle) to the decoder's width."""

    ffn_hidden_size: int | None = None
    """Hidden size of the MLP; by default the decoder's hidden_size (InternVL). Long-VITA: the tower's hidden_size."""
    bias: bool = True
    """Biases in both linear layers (InternVL: true, Long-VITA: false)."""
    norm_epsilon: float = 1e-5
    """Epsilon of the LayerNorm: PyTorch's default in all published models, not the decoder's."""

    def __post_init__(self) -> None:
        at_least(1, "model.projector", self, "ffn_hidden_size")
        positive("model.projector", self, "norm_epsilon")


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig(RotaryConfig):
    """A decoder like Qwen2, Qwen3, Llama, Mistral or GLM-4, and optionally a vision tower with its projector.

    Defaults are Qwen2's. Qwen3: add_qkv_bias false, qk_layernorm true, kv_channels = head_dim of its config.json.
    Llama and Mistral: add_qkv_bias false; since Llama 3.1 also rope_scaling_factor. GLM-4: rotary_percent 0.5,
    rotary_interleaved.
    """

    num_layers: int = 4
    """Decoder layers."""
    hidden_size: int = 128
    """Decoder width."""
    ffn_hidden_size: int = 344
    """Hidden size of the SwiGLU MLP."""
    num_attention_heads: int = 4
    """Query heads."""
    num_query_groups: int = 2
    """Key/value heads (grouped-query attention)."""
    kv_channels: int | None = None
    """Size of one head; by default hidden_size / num_attention_heads."""
    vocab_size: int = 0
    """Vocabulary size (config.json's vocab_size), before padding for tensor parallelism."""
    make_vocab_size_divisible_by: int = 1
    """The padded vocabulary is a multiple of this times the tensor-parallel size."""
    untie_embeddings_and_output_weights: bool = True
    """The output layer has weights of its own; false: tied to the embedding."""
    add_qkv_bias: bool = True
    """Biases of the query, key and value projections (Qwen2, Qwen2.5)."""
    qk_layernorm: bool = False
    """RMSNorm over each query and key head, before the rotary embedding (Qwen3)."""
    norm_epsilon: float = 1e-6
    """Epsilon of the decoder's RMSNorms."""
    max_position_embeddings: int = 32768
    """Longest sequence in tokens, scaled where the rotary embedding is; data.seq_length may not exceed it, and exported
    configs state it."""
    init_method_std: float = 0.02
    """Standard deviation of randomly initialised weights."""
    embedding_init_method_std: float | None = None
    """Standard deviation of a randomly initialised embedding; by default init_method_std."""
    transformer_impl: str = "auto"
    """Layer classes: `local` (megatron-core's), `te` (Transformer Engine's), or `auto`: te where it is installed."""
    vision: VisionConfig | None = None
    """The vision tower; None: a text-only decoder."""
    projector: ProjectorConfig = ProjectorConfig()
    """The projector between vision tower and decoder."""

    def __post_init__(self) -> None:
        sizes = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups")
        at_least(1, "model", self, *sizes, "kv_channels", "make_vocab_size_divisible_by", "max_position_embeddings")
        at_least(0, "model", self, "vocab_size", "init_method_std", "embedding_init_method_std")
        positive("model", self, "norm_epsilon")
        self.check_rotary()
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
                f"model: the heads are {self.head_dim} wide, but the rotary embedding rotates pairs. Choose an even "
                "model.kv_channels, or an even hidden_size / num_attention_heads."
            )
        if not 0 < self.rotary_percent <= 1 or self.rotary_dim < 2 or self.rotary_dim % 2:
            raise ConfigError(
                f"model.rotary_percent={self.rotary_percent}: of heads {self.head_dim} wide, the rotary embedding "
                f"would turn {self.rotary_dim} numbers, but it turns pairs. Choose a share above 0, of at most 1, that "
                "makes an even number."
            )
        if self.transformer_impl not in ("auto", "local", "te"):
            raise ConfigError(f"model.transformer_impl={self.transformer_impl!r}: choose auto, local or te.")

    @property
    def head_dim(self) -> int:
        """Size of one attention head."""
        return self.kv_channels or self.hidden_size // self.num_attention_heads

    @property
    def rotary_dim(self) -> int:
        """Numbers of each head that the rotary embedding turns."""
        return int(self.head_dim * self.rotary_percent)

    @property
    def projector_width(self) -> int:
        """Hidden size of the projector's MLP."""
        return self.projector.ffn_hidden_size or self.hidden_size

    def padded_vocab_size(self, tensor_parallel: int) -> int:
        """vocab_size rounded up to a multiple of make_vocab_size_divisible_by * tensor_parallel."""
        multiple = self.make_vocab_size_divisible_by * tensor_parallel
        return -(-self.vocab_size // multiple) * multiple
