"""Model settings of a Megatron checkpoint of Long-VITA, from config.json or its arguments and tensors."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron_vita.config import ModelConfig, ProjectorConfig, VisionConfig
from megatron_vita.convert.families import DECODERS, decoder, long_vita
from megatron_vita.convert.hf_config import integer, number, read_json, require
from megatron_vita.errors import CheckpointError, ConfigError

EMBEDDING = "language_model.embedding.word_embeddings.weight"
_TOWER_HEADS = {"intern_300m": 16}
"""--vision-model-type -> attention heads, which the shapes of tensors do not determine."""


def read_model(
    folder: Path,
    settings: Mapping[str, Any],
    found: Mapping[str, list[str]],
    stored: Mapping[str, Tensor],
    ranks: int,
    vocab_size: int | None,
) -> ModelConfig:
    """The model of a checkpoint: as the config.json beside it says, else as the run's settings and its tensors do.

    Args:
        folder: the step's.
        settings: the run's args.
        found: checkpoint key of each tensor -> its stored tensors, by rank.
        stored: the stored tensors.
        ranks: tensor-parallel ranks.
        vocab_size: rows of the embedding that are no padding, as the user says.

    Raises:
        ConfigError: nothing says the vocabulary, or two say it differently.
        CheckpointError: no settings, or such as are not supported.
    """
    for path in (folder / "config.json", folder.parent / "config.json"):
        if path.is_file():
            config = read_json(path)
            family = decoder if config.get("model_type") in tuple(DECODERS) else long_vita
            configured: ModelConfig = family.read_config(config, str(path))
            if vocab_size not in (None, configured.vocab_size):
                raise ConfigError(
                    f"--vocab-size {vocab_size}: {path} says {configured.vocab_size}. Leave the flag out."
                )
            return configured
    where = f"{folder}: the run's settings (args)"
    if not settings:
        raise CheckpointError(
            f"{folder}: its files hold no settings (args). Put the config.json of the model's Hugging Face repository "
            "beside them."
        )
    for key, wanted in (
        ("normalization", "RMSNorm"),
        ("swiglu", True),
        ("rotary_percent", 1.0),
        ("position_embedding_type", "rope"),
        ("rotary_interleaved", False),
        ("use_rope_scaling", False),
        ("rotary_seq_len_interpolation_factor", None),
        ("qk_layernorm", False),
        ("num_experts", None),
        ("add_bias_linear", False),
    ):
        require(settings, key, wanted, wanted, where)

    def rows(name: str) -> int:
        return sum(sum(stored[part].shape[:1]) for part in found.get(name, ()))

    heads = integer(settings, "num_attention_heads", where)
    grouped = settings.get("group_query_attention", True)
    layer = "language_model.decoder.layers.0.self_attention.linear_qkv.bias"
    epsilon = number(settings, "norm_epsilon", where)
    vocabulary = _vocabulary(rows(EMBEDDING), settings.get("vocab_size"), vocab_size, folder)
    try:
        model = ModelConfig(
            num_layers=integer(settings, "num_layers", where),
            hidden_size=integer(settings, "hidden_size", where),
            ffn_hidden_size=integer(settings, "ffn_hidden_size", where),
            num_attention_heads=heads,
            num_query_groups=integer(settings, "num_query_groups", where) if grouped else heads,
            vocab_size=vocabulary,
            untie_embeddings_and_output_weights=bool(settings.get("untie_embeddings_and_output_weights", False)),
            add_qkv_bias=layer in found,
            norm_epsilon=epsilon,
            rotary_base=number(settings, "rotary_base", where),
            max_position_embeddings=integer(settings, "max_position_embeddings", where),
        )
        if "vision_model.conv1.weight" not in found:
            return model
        tower = _tower(settings, found, stored, ranks, epsilon, where)
    except ConfigError as error:
        raise CheckpointError(f"{where}: {error}") from None
    width = rows("vision_projection.encoder.linear_fc1.weight")
    bias = "vision_projection.encoder.linear_fc1.bias" in found
    return replace(model, vision=tower, projector=ProjectorConfig(ffn_hidden_size=width or None, bias=bias))


def _vocabulary(rows: int, argument: Any, asked: int | None, folder: Path) -> int:
    """Rows of an embedding that are not Megatron's padding, which may hold anything: as asked for, else as the run's
    own --vocab-size says. A run that counted them from its tokenizer has not written them down."""
    known = asked if asked is not None else argument
    if isinstance(known, bool) or not isinstance(known, int) or known < 1:
        raise ConfigError(
            f"{folder}: its embedding has {rows} rows, and nothing says how many of them are Megatron's padding. Put "
            "the config.json of the model's Hugging Face repository beside the ranks, or import with --vocab-size N "
            "(that file's vocab_size; 152064 for Long-VITA-14B)."
        )
    if known > rows:
        raise ConfigError(f"{folder}: a vocabulary of {known} was asked for, but its embedding has {rows} rows.")
    return known


def _tower(
    settings: Mapping[str, Any],
    found: Mapping[str, list[str]],
    stored: Mapping[str, Tensor],
    ranks: int,
    epsilon: float,
    where: str,
) -> VisionConfig:
    """The tower's sizes are constants of Long-VITA's code: taken from its tensors, which must then fit."""
    kind = settings.get("vision_model_type")
    if kind not in _TOWER_HEADS:
        raise CheckpointError(
            f"{where}: vision_model_type={kind!r} is not supported ({', '.join(_TOWER_HEADS)} only). If it is an "
            "InternViT all the same, put a config.json with its `visual` object beside the ranks."
        )

    def shape(name: str, dimensions: int) -> tuple[int, ...]:
        parts = found.get("vision_model." + name)
        if not parts:
            raise CheckpointError(f"{where}: the tower's {name} is missing. The download is incomplete.")
        sizes = tuple(stored[parts[0]].shape)
        if len(sizes) != dimensions or 0 in sizes:
            raise CheckpointError(f"{where}: the tower's {name} has shape {sizes}, as no tower's has.")
        return sizes

    width, _, patch, _ = shape("conv1.weight", 4)
    layers = {int(m[1]) for m in (re.match(r"vision_model\.decoder\.layers\.(\d{1,6})\.", one) for one in found) if m}
    side = math.isqrt(shape("position_embeddings.weight", 2)[0] - 1)
    return VisionConfig(
        num_layers=1 + max(layers, default=-1),
        hidden_size=width,
        ffn_hidden_size=ranks * shape("decoder.layers.0.mlp.linear_fc1.weight", 2)[0],
        num_attention_heads=_TOWER_HEADS[kind],
        norm_epsilon=epsilon,  # Long-VITA's towers inherit the decoder's
        image_size=side * patch,
        patch_size=patch,
    )
