"""What the network is: the decoder, the vision tower and the projector. Field names are Megatron's flag names."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_vita.config.bounds import at_least, positive
from megatron_vita.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class VisionConfig:
    """An InternViT tower. Defaults: InternViT-300M-448px (its published config.json)."""

    model_type: str = "intern_vit"
    """Tower family; `intern_vit` is the one there is."""
    num_layers: int = 24
    """Transformer blocks."""
    hidden_size: int = 1024
    """Width of a block."""
    ffn_hidden_size: int = 4096
    """Inner width of the MLP."""
    num_attention_heads: int = 16
    """Attention heads; the head size is hidden_size / num_attention_heads."""
    norm_epsilon: float = 1e-6
    """Epsilon of the LayerNorms (the tower's own: it must not inherit the decoder's)."""
    image_size: int = 448
    """Side of a tile in pixels."""
    patch_size: int = 14
    """Side of a patch in pixels."""
    init_method_std: float = 0.02
    """Standard deviation of a fresh tower's weights."""
    layer_scale_init: float = 0.1
    """Initial value of ls1 and ls2 in a fresh tower."""
    image_norm: str = "imagenet"
    """Pixel normalisation: `imagenet`, `clip` or `siglip`."""

    def __post_init__(self) -> None:
        sizes = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "image_size", "patch_size")
        at_least(1, "model.vision", self, *sizes)
        at_least(0, "model.vision", self, "init_method_std")
        positive("model.vision", self, "norm_epsilon")
        if self.model_type != "intern_vit":
            raise ConfigError(f"model.vision.model_type={self.model_type!r} is not known. Use intern_vit.")
        if self.hidden_size % self.num_attention_heads:
            raise ConfigError(
                f"model.vision.hidden_size={self.hidden_size} does not split over num_attention_heads="
                f"{self.num_attention_heads}. Choose a number of heads that divides it."
            )
        if self.image_size % (2 * self.patch_size):
            raise ConfigError(
                f"model.vision.image_size={self.image_size} is not a multiple of twice patch_size={self.patch_size}: "
                "pixel shuffle joins 2 x 2 patches into one token. Change one of the two."
            )
        if self.image_norm not in IMAGE_NORMS:
            raise ConfigError(f"model.vision.image_norm={self.image_norm!r}: choose one of {sorted(IMAGE_NORMS)}.")

    @property
    def num_patches(self) -> int:
        """Patches of one tile (without the class token)."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def tokens_per_tile(self) -> int:
        """Context tokens that one tile becomes after pixel shuffle: (image_size / patch_size / 2) squared."""
        return self.num_patches // 4


IMAGE_NORMS: dict[str, tuple[tuple[float, float, float], tuple[float, float, float]]] = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    "siglip": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}
"""Mean and standard deviation per channel, for pixels scaled to 0..1."""


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
    """A Qwen2-style decoder and, if `vision` is given, what feeds it pictures."""

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
    norm_epsilon: float = 1e-6
    """Epsilon of the decoder's RMSNorms."""
    rotary_base: float = 1e6
    """Base of the rotary embedding (rope_theta)."""
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
        positive("model", self, "norm_epsilon", "rotary_base")
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
