"""Decoders of transformers: configuration and names, both ways, by the rows of decoder_table."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from megatron_vita.config import ModelConfig
from megatron_vita.convert.families.decoder_table import DECODERS, DecoderFamily, family_of
from megatron_vita.convert.families.rotary import read_rotary, write_rotary
from megatron_vita.convert.hf_config import (
    MOST_HEADS,
    check_not_quantised,
    choice,
    flag,
    integer,
    number,
    optional_integer,
    require,
    strings,
    unsupported,
)
from megatron_vita.convert.rules import Rule, grouped_qkv, rename, stacked
from megatron_vita.data.spec import PreprocessSpec
from megatron_vita.errors import CheckpointError, ConfigError

BODY = "model."
HEAD = "lm_head.weight"
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_intermediate_size")


def read_config(config: Mapping[str, Any], where: str) -> ModelConfig:
    """A decoder's config.json (or text_config) as a ModelConfig. Raises CheckpointError: a setting is missing or not
    supported."""
    check_features(config, where)  # a reason says more than a name
    family = DECODERS[choice(config, "model_type", DECODERS, "qwen2", where)]
    for key, wanted in family.required.items():
        require(config, key, wanted, wanted, where)
    heads = integer(config, "num_attention_heads", where, most=MOST_HEADS)
    hidden = integer(config, "hidden_size", where)
    if not family.groups_are_heads and "num_key_value_heads" not in config:
        raise CheckpointError(  # Qwen2Config and Qwen3Config would take 32, whatever the heads
            f"{where}: names no num_key_value_heads. Copy it from the model's publisher; there is no safe default."
        )
    head_dim = optional_integer(config, "head_dim", where) or family.head_dim
    length = integer(config, "max_position_embeddings", where)
    rotary = read_rotary(config, where, family.rotary_percent, length)
    longest = rotary.scaling["max_position_embeddings"]
    if family.window is not None:
        window = optional_integer({"sliding_window": family.window, **config}, "sliding_window", where)
        if window is not None and window < longest:
            raise unsupported(where, "sliding_window", window, f"full attention: null, or at least {longest} tokens")
    try:
        return ModelConfig(
            num_layers=integer(config, "num_hidden_layers", where),
            hidden_size=hidden,
            ffn_hidden_size=integer(config, "intermediate_size", where),
            num_attention_heads=heads,
            num_query_groups=optional_integer(config, "num_key_value_heads", where, most=MOST_HEADS) or heads,
            kv_channels=head_dim if head_dim and head_dim * heads != hidden else None,
            vocab_size=integer(config, "vocab_size", where),
            untie_embeddings_and_output_weights=not flag(config, "tie_word_embeddings", False, where),
            add_qkv_bias=family.add_qkv_bias,
            qk_layernorm=family.qk_layernorm,
            norm_epsilon=number(config, "rms_norm_eps", where),
            rotary_base=rotary.base,
            rotary_percent=rotary.percent,
            rotary_interleaved=family.rotary_interleaved,
            **rotary.scaling,
        )
    except ConfigError as error:
        raise CheckpointError(f"{where}: {error}") from None


def processor(folder: Path, model: ModelConfig) -> PreprocessSpec | None:
    """None: a decoder has no pictures."""
    return None


def completed(model: ModelConfig, config: Mapping[str, Any], folder: Path, names: Collection[str]) -> ModelConfig:
    """The model unchanged: config.json is complete."""
    return model


def image_token_id(config: Mapping[str, Any], where: str) -> int | None:
    """None: a decoder has no image token."""
    return None


def check_features(config: Mapping[str, Any], where: str) -> None:
    """Reject what the decoder here has not: windows, experts, quantised weights, further biases. Raises
    CheckpointError: naming the setting."""
    window = "full attention only; set it to false if the weights allow it"
    if flag(config, "use_sliding_window", False, where):
        raise unsupported(where, "use_sliding_window", True, window)
    other = [kind for kind in strings(config, "layer_types", where) if kind != "full_attention"]
    if other:
        raise unsupported(where, "layer_types", other[0], "full_attention in every layer")
    for key in _EXPERTS:
        if config.get(key):
            raise unsupported(where, key, config[key], "dense decoders only, no mixture of experts")
    check_not_quantised(config, where)
    require(config, "hidden_act", "silu", "silu", where)
    require(config, "is_causal", True, True, where)  # embedding models made of decoders look both ways


def write_config(
    model: ModelConfig, dtype: str, token_ids: Mapping[str, Any], decoder: str | None = None
) -> dict[str, Any]:
    """The decoder as a config.json of the family that holds it.

    Args:
        model: the decoder.
        dtype: torch's name of the weights' type, e.g. `bfloat16`.
        token_ids: `bos_token_id`, `eos_token_id` and `pad_token_id`, as far as they are known.
        decoder: model_type of the family that it came from.
    """
    family = family_of(model, decoder)
    return {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.num_query_groups,
        "head_dim": model.head_dim,
        "hidden_act": "silu",
        "vocab_size": model.vocab_size,
        "rms_norm_eps": model.norm_epsilon,
        **write_rotary(model, partial=family.rotary_percent is not None),
        **family.written,
        "attention_dropout": 0.0,
        "initializer_range": model.init_method_std,
        "tie_word_embeddings": not model.untie_embeddings_and_output_weights,
        "use_cache": True,
        **{key: token_ids.get(key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")},
        "dtype": dtype,
        "torch_dtype": dtype,
    }


def check_exportable(model: ModelConfig) -> None:
    """Reject a decoder that no class of transformers holds. Raises CheckpointError: naming what they lack."""
    family_of(model)


def rules(
    model: ModelConfig, names: Collection[str] = (), decoder: str | None = None, *, body: str = BODY, head: str = HEAD
) -> list[Rule]:
    """Every tensor of the decoder. A tied head has no rule: it is the embedding.

    Args:
        model: the decoder.
        names: tensor names of a folder that is being read; each family has one spelling.
        decoder: model_type of the family whose names are meant, where several hold it.
        body: prefix of the Hugging Face names of `embed_tokens`, `layers` and `norm`.
        head: Hugging Face name of the output layer.
    """
    family = family_of(model, decoder)
    width, inner = model.hidden_size, model.ffn_hidden_size
    query = model.num_attention_heads * model.head_dim
    table = [
        rename(
            "language_model.embedding.word_embeddings.weight", body + "embed_tokens.weight", (model.vocab_size, width)
        )
    ]
    qkv_parts: list[tuple[str, int | None]] = [("weight", width)]
    if model.add_qkv_bias:
        qkv_parts.append(("bias", None))
    for layer in range(model.num_layers):
        mcore, hf = f"language_model.decoder.layers.{layer}.", f"{body}layers.{layer}."
        table.append(
            rename(mcore + "self_attention.linear_qkv.layer_norm_weight", hf + "input_layernorm.weight", (width,))
        )
        for kind, columns in qkv_parts:
            table.append(
                grouped_qkv(
                    f"{mcore}self_attention.linear_qkv.{kind}",
                    [f"{hf}self_attn.{part}_proj.{kind}" for part in "qkv"],
                    heads=model.num_attention_heads,
                    groups=model.num_query_groups,
                    head_dim=model.head_dim,
                    columns=columns,
                )
            )
        if model.qk_layernorm:
            for part in "qk":
                one, two = f"{mcore}self_attention.{part}_layernorm.weight", f"{hf}self_attn.{part}_norm.weight"
                table.append(rename(one, two, (model.head_dim,)))
        table += [
            rename(mcore + "self_attention.linear_proj.weight", hf + "self_attn.o_proj.weight", (width, query)),
            rename(mcore + "mlp.linear_fc1.layer_norm_weight", hf + "post_attention_layernorm.weight", (width,)),
            _gate_up(family, mcore + "mlp.linear_fc1.weight", hf + "mlp.", inner, width),
            rename(mcore + "mlp.linear_fc2.weight", hf + "mlp.down_proj.weight", (width, inner)),
        ]
    table.append(rename("language_model.decoder.final_layernorm.weight", body + "norm.weight", (width,)))
    if model.untie_embeddings_and_output_weights:
        table.append(rename("language_model.output_layer.weight", head, (model.vocab_size, width)))
    return table


def _gate_up(family: DecoderFamily, mcore: str, hf: str, inner: int, width: int) -> Rule:
    if family.gate_up is not None:
        return rename(mcore, f"{hf}{family.gate_up}.weight", (2 * inner, width))
    return stacked(mcore, (hf + "gate_proj.weight", hf + "up_proj.weight"), (inner, inner), width)
