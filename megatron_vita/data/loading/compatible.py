"""Compares a shard set with the stage that would train on it, before anything expensive starts."""

from __future__ import annotations

from typing import Any

from megatron_vita.config import IMAGE_NORMS, StageConfig
from megatron_vita.data.shards.manifest import Manifest
from megatron_vita.data.text.tokenizer import VitaTokenizer
from megatron_vita.errors import ConfigError


def check_compatible(manifest: Manifest, stage: StageConfig, tokenizer: VitaTokenizer | None = None) -> None:
    """Reject shards that were made for another model, length, layout or tokenizer.

    Args:
        manifest: of the shard set.
        stage: the stage that would train on it.
        tokenizer: the stage's tokenizer, where it is at hand.

    Raises:
        ConfigError: naming every difference, both values, and what to change.
    """
    data, model, vision = stage.data, stage.model, stage.model.vision
    differences: list[str] = []

    def same(what: str, shards: Any, setting: str, wanted: Any) -> None:
        if shards != wanted:
            differences.append(f"{what} is {shards} in the shards, but {setting} is {wanted}")

    same("the length of a pack", manifest.seq_length, "data.seq_length", data.seq_length)
    if manifest.totals["tiles"]:
        same("the layout of pictures", manifest.layout, "data.layout", data.layout)
        if vision is None:
            differences.append(f"the shards hold {manifest.totals['tiles']} tiles, but model.vision is not set")
        else:
            mean, std = IMAGE_NORMS[vision.image_norm]
            image = manifest.image
            same("the tile size", image["size"], "model.vision.image_size", vision.image_size)
            same("the patch size", image["patch"], "model.vision.patch_size", vision.patch_size)
            same("tokens per tile", image["tokens_per_tile"], "what model.vision makes", vision.tokens_per_tile)
            same("the pixel mean", tuple(image["mean"]), f"model.vision.image_norm {vision.image_norm}", mean)
            same("the pixel deviation", tuple(image["std"]), f"model.vision.image_norm {vision.image_norm}", std)
    if manifest.tokenizer.vocab_size > model.vocab_size:
        differences.append(
            f"token ids reach up to {manifest.tokenizer.vocab_size - 1} in the shards, but model.vocab_size is "
            f"{model.vocab_size}"
        )
    if tokenizer is not None:
        name = f"that of {tokenizer.path}"
        same("the tokenizer's SHA-256", manifest.tokenizer.sha256, name, tokenizer.sha256)
        same("the chat template's SHA-256", manifest.template_sha256, name, tokenizer.template_sha256)
    if differences:
        raise ConfigError(
            f"stage {stage.name!r}: the shards do not fit: {'; '.join(differences)}. "
            "Change the settings, or preprocess again with the stage's own (--seq-length, --layout, --image-size, "
            "--patch-size, --image-norm, --tokenizer)."
        )
