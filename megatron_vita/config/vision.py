"""Section `model.vision`: the vision tower. Field names are Megatron's flag names."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_vita.config.bounds import at_least, positive
from megatron_vita.errors import ConfigError

IMAGE_NORMS: dict[str, tuple[tuple[float, float, float], tuple[float, float, float]]] = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    "siglip": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}
"""Mean and standard deviation per channel, for pixels scaled to 0..1."""


_ACTIVATION_BYTES = 2 * 1024**3
"""Most bytes of activations of one forward pass of the tower, if tiles_per_batch does not say how many tiles it has."""
_POSITIONS = 8192
"""Most positions (patches and class tokens) of such a pass: matrix products do not get faster with more."""


@dataclass(frozen=True, slots=True)
class TowerFamily:
    """Architecture that all vision towers of one family share."""

    class_token: bool
    """A class token precedes the patches; it is dropped before the projector."""
    patch_bias: bool
    """The patch convolution has a bias."""
    pre_norm: bool
    """LayerNorm before the first block."""
    post_norm: bool
    """LayerNorm after the last block."""
    layer_scale: bool
    """LayerScale: each residual branch is multiplied by a learned vector (ls1, ls2)."""
    activation: str
    """`gelu` (exact), `gelu_tanh` or `quick_gelu`."""
    select_layer: int
    """Default of VisionConfig.select_layer."""


TOWER_FAMILIES: dict[str, TowerFamily] = {
    "intern_vit": TowerFamily(True, True, False, False, True, "gelu", -1),
    # last_hidden_state of transformers' SiglipVisionModel, after post_layernorm, without the pooling head.
    "siglip": TowerFamily(False, True, False, True, False, "gelu_tanh", -1),
    # As LLaVA: the input of the last block. CLIP's post_layernorm applies to the class token only.
    "clip": TowerFamily(True, False, True, False, False, "quick_gelu", -2),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class VisionConfig:
    """A vision transformer. Defaults: InternViT-300M-448px (its published config.json).

    Differences of other published towers:

    * InternViT-6B: num_layers 45, hidden_size 3200, ffn_hidden_size 12800, num_attention_heads 25, normalization
      RMSNorm, add_qkv_bias false, qk_layernorm true.
    * SigLIP-400M (so400m): model_type siglip, num_layers 27, hidden_size 1152, ffn_hidden_size 4304, image_norm siglip;
      image_size 224 with patch_size 14, or 256, 384 or 512 with 16. (384 pixels with patch_size 14 give 27 x 27
      patches, an odd number, which pixel shuffle does not support.)
    * CLIP-L: model_type clip, norm_epsilon 1e-5, image_norm clip, image_size 224 or 336.
    """

    model_type: str = "intern_vit"
    """Tower family: `intern_vit`, `siglip` or `clip`."""
    num_layers: int = 24
    """Transformer blocks of the published model; blocks after select_layer are not built."""
    hidden_size: int = 1024
    """Hidden size."""
    ffn_hidden_size: int = 4096
    """Hidden size of the MLP."""
    num_attention_heads: int = 16
    """Attention heads; the head size is hidden_size / num_attention_heads."""
    norm_epsilon: float = 1e-6
    """Epsilon of the tower's norms (independent of the decoder's)."""
    normalization: str = "LayerNorm"
    """`LayerNorm`, or `RMSNorm` (InternViT-6B)."""
    add_qkv_bias: bool = True
    """Biases of the query, key and value projections (false: InternViT-6B)."""
    qk_layernorm: bool = False
    """RMSNorm over all query heads together and over all key heads together (InternViT-6B)."""
    select_layer: int | None = None
    """Block whose output goes to the projector, counted from the end: -1 the last, -2 the second last. By default the
    family's: -2 for clip (as LLaVA), else -1."""
    image_size: int = 448
    """Side of a tile in pixels."""
    patch_size: int = 14
    """Side of a patch in pixels."""
    init_method_std: float = 0.02
    """Standard deviation of randomly initialised weights."""
    layer_scale_init: float = 0.1
    """Initial value of ls1 and ls2."""
    image_norm: str = "imagenet"
    """Pixel normalisation: `imagenet`, `clip` or `siglip`."""
    tensor_parallel: bool = False
    """Split the tower's blocks over the tensor-parallel ranks, for towers too large to replicate on every rank. False:
    every rank holds the whole tower and encodes a share of the tiles."""
    tiles_per_batch: int | None = None
    """Tiles in one forward pass of the tower, a split tower's tiles of all ranks together; a rank with more of them
    encodes one such micro-batch after the other. Fewer take less memory, more run faster; what is learned is the same.
    By default as many as have 2 GiB of activations (kept for the backward, or of one block if the tower is frozen), but
    at most 8,192 patches and class tokens. InternViT-300M in bfloat16: 2 tiles, or 7 if it is frozen."""

    def __post_init__(self) -> None:
        sizes = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "image_size", "patch_size")
        at_least(1, "model.vision", self, *sizes, "tiles_per_batch")
        at_least(0, "model.vision", self, "init_method_std")
        positive("model.vision", self, "norm_epsilon")
        if self.model_type not in TOWER_FAMILIES:
            raise ConfigError(
                f"model.vision.model_type={self.model_type!r} is not known. Use {', '.join(TOWER_FAMILIES)}."
            )
        if self.normalization not in ("LayerNorm", "RMSNorm"):
            raise ConfigError(f"model.vision.normalization={self.normalization!r}: choose LayerNorm or RMSNorm.")
        if self.model_type != "intern_vit" and (
            self.normalization != "LayerNorm" or self.qk_layernorm or not self.add_qkv_bias
        ):
            raise ConfigError(
                f"model.vision: a {self.model_type} tower has LayerNorms, biases on queries, keys and values, and no "
                "norm on them. Leave normalization, add_qkv_bias and qk_layernorm out."
            )
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
        if not -self.num_layers <= self.selected_layer <= -1:
            raise ConfigError(
                f"model.vision.select_layer={self.selected_layer} must lie in -{self.num_layers}..-1: -1 takes the "
                "last block's states."
            )

    @property
    def family(self) -> TowerFamily:
        """Architecture of this model_type."""
        return TOWER_FAMILIES[self.model_type]

    @property
    def selected_layer(self) -> int:
        """select_layer, or the family's default; negative."""
        return self.family.select_layer if self.select_layer is None else self.select_layer

    @property
    def built_layers(self) -> int:
        """Number of blocks up to the selected one; the others are not built."""
        return self.num_layers + 1 + self.selected_layer

    @property
    def post_norm(self) -> bool:
        """A LayerNorm follows the last block that is built."""
        return self.family.post_norm and self.selected_layer == -1

    @property
    def num_patches(self) -> int:
        """Patches of one tile (without the class token)."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def num_positions(self) -> int:
        """Sequence length of the tower per tile: patches plus class token, if any."""
        return self.num_patches + self.family.class_token

    @property
    def tokens_per_tile(self) -> int:
        """Visual tokens per tile after pixel shuffle: (image_size / patch_size / 2) squared."""
        return self.num_patches // 4

    def activation_bytes(self, *, trained: bool, element_size: int, ranks: int = 1) -> int:
        """Bytes of activations that one tile adds to a forward pass of the tower on one rank.

        Args:
            trained: the tower trains: what its blocks keep for the backward. Otherwise what exists at once in a block.
            element_size: bytes of a number.
            ranks: tensor-parallel ranks that a tensor-parallel tower is split over.
        """
        h, split = self.hidden_size, (4 * self.hidden_size + 2 * self.ffn_hidden_size) // ranks
        if not trained:  # residual, norm, and the MLP before and after bias and activation
            return self.num_positions * element_size * (2 * h + 3 * self.ffn_hidden_size // ranks)
        # Whole: both norms, and of each branch the sum; LayerScale keeps the branch too. Split: queries, keys, values
        # and output of the attention, and the MLP before and after the activation.
        whole = (4 + 2 * self.family.layer_scale) * h
        return self.built_layers * self.num_positions * element_size * (whole + split)

    def tiles_at_once(self, *, trained: bool, element_size: int, ranks: int = 1) -> int:
        """tiles_per_batch or its default, see there; the arguments as of `activation_bytes`."""
        if self.tiles_per_batch is not None:
            return self.tiles_per_batch
        each = self.activation_bytes(trained=trained, element_size=element_size, ranks=ranks)
        return max(1, min(_ACTIVATION_BYTES // each, _POSITIONS // self.num_positions))
