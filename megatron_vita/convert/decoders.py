"""Decoders of transformers: Qwen2 (and Qwen2.5), Qwen3, Llama. Configuration and names, both ways."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from megatron_vita.config import ModelConfig
from megatron_vita.config.model import LLAMA3_HIGH, LLAMA3_LENGTH, LLAMA3_LOW
from megatron_vita.convert.hf_config import (
    MOST_HEADS,
    check_not_quantised,
    flag,
    integer,
    number,
    optional_integer,
    refuse,
    require,
    section,
    string,
    strings,
)
from megatron_vita.convert.rules import Rule, grouped_qkv, rename, stacked
from megatron_vita.errors import CheckpointError, ConfigError

log = logging.getLogger(__name__)

ARCHITECTURES = {"qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM", "llama": "LlamaForCausalLM"}
"""model_type -> transformers' class."""
BODY = "model."
HEAD = "lm_head.weight"
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_intermediate_size")
_LLAMA3 = {
    "low_freq_factor": LLAMA3_LOW,
    "high_freq_factor": LLAMA3_HIGH,
    "original_max_position_embeddings": LLAMA3_LENGTH,
}


def read_config(config: Mapping[str, Any], where: str) -> ModelConfig:
    """A decoder's config.json (or text_config) as ours.

    Raises:
        CheckpointError: a setting is missing, or asks for what the decoder cannot do.
    """
    kind = string(config, "model_type", "qwen2", where)
    check_features(config, where)
    heads = integer(config, "num_attention_heads", where, most=MOST_HEADS)
    hidden = integer(config, "hidden_size", where)
    if kind != "llama" and "num_key_value_heads" not in config:
        raise CheckpointError(  # Qwen2Config and Qwen3Config would take 32, whatever the heads
            f"{where}: names no num_key_value_heads. Copy it from the model's publisher; there is no safe default."
        )
    head_dim = optional_integer(config, "head_dim", where) or (128 if kind == "qwen3" else None)  # Qwen3Config's own
    base, factor = _read_rope(config, where)
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
            add_qkv_bias=kind not in ("qwen3", "llama"),
            qk_layernorm=kind == "qwen3",
            norm_epsilon=number(config, "rms_norm_eps", where),
            rotary_base=base,
            rope_scaling_factor=factor,
            max_position_embeddings=integer(config, "max_position_embeddings", where),
        )
    except ConfigError as error:
        raise CheckpointError(f"{where}: {error}") from None


def check_features(config: Mapping[str, Any], where: str) -> None:
    """Refuse what no decoder of ours has: windows, experts, quantised weights, further biases.

    Raises:
        CheckpointError: naming the setting.
    """
    window = "full attention only; set it to false if the weights allow it"
    if flag(config, "use_sliding_window", False, where):
        raise refuse(where, "use_sliding_window", True, window)
    other = [kind for kind in strings(config, "layer_types", where) if kind != "full_attention"]
    if other:
        raise refuse(where, "layer_types", other[0], "full_attention in every layer")
    for key in _EXPERTS:
        if config.get(key):
            raise refuse(where, key, config[key], "dense decoders only, no mixture of experts")
    check_not_quantised(config, where)
    require(config, "hidden_act", "silu", "silu", where)
    require(config, "is_causal", True, True, where)  # embedding models made of decoders look both ways
    if config.get("model_type") in ("qwen3", "llama"):  # Qwen2 has biases where we have them, whatever it says
        require(config, "attention_bias", False, False, where)
        require(config, "mlp_bias", False, False, where)


def _read_rope(config: Mapping[str, Any], where: str) -> tuple[float, float | None]:
    """(base, factor of Llama 3.1's scaling or none), from the one spelling or the other."""
    bases = {} if config.get("rope_theta") is None else {"rope_theta": number(config, "rope_theta", where)}
    factors: dict[str, float | None] = {}
    for key in ("rope_parameters", "rope_scaling"):
        rope = section(config, key, where)
        if not rope:
            continue
        for name, inner in rope.items():
            if isinstance(inner, Mapping):
                raise refuse(where, f"{key}.{name}", inner, "one rotary embedding for all layers")
        if rope.get("rope_theta") is not None:
            bases[f"{key}.rope_theta"] = number(rope, "rope_theta", f"{where}: {key}")
        factors[key] = _read_scaling(rope, key, config, where)
        require(rope, "partial_rotary_factor", 1.0, 1.0, f"{where}: {key}")
    require(config, "partial_rotary_factor", 1.0, 1.0, where)
    _agree("rotary scaling", factors, where)
    if not bases:
        raise CheckpointError(
            f"{where}: names no rope_theta. Copy it from the model's publisher; there is no safe default."
        )
    _agree("rotary base", bases, where)
    return next(iter(bases.values())), next(iter(factors.values()), None)


def _read_scaling(rope: Mapping[str, Any], key: str, config: Mapping[str, Any], where: str) -> float | None:
    """Factor of Llama 3.1's scaling, or none where nothing is scaled."""
    kind = string(rope, "rope_type", string(rope, "type", "default", f"{where}: {key}"), f"{where}: {key}")
    if kind == "llama3":
        for name, published in _LLAMA3.items():
            require(rope, name, published, None, f"{where}: {key}")
        return number(rope, "factor", f"{where}: {key}")
    if kind == "dynamic":  # InternVL3's; transformers' formula is the identity up to max_position_embeddings
        log.warning(
            "%s: %s 'dynamic' scales nothing up to max_position_embeddings=%s tokens, and is taken for none: beyond "
            "them, this model turns as it does up to there",
            where,
            key,
            config.get("max_position_embeddings"),
        )
    elif kind != "default":
        raise refuse(
            where, key, kind, "default, llama3 or dynamic; remove it if the weights were trained without it, as Qwen2.5"
        )
    return None


def _agree(what: str, values: Mapping[str, Any], where: str) -> None:
    """Refuse what is said twice and differently: each release of transformers believes another."""
    if len(set(values.values())) > 1:
        said = ", ".join(f"{key} {value}" for key, value in values.items())
        raise CheckpointError(f"{where}: says its {what} differently ({said}). Keep the one it was trained with.")


def kind_of(model: ModelConfig) -> str:
    """Which model_type holds a decoder.

    Raises:
        CheckpointError: none does.
    """
    if model.qk_layernorm and model.add_qkv_bias:
        raise CheckpointError(
            "the decoder has both norms and biases on queries and keys. Qwen2 has only biases, Qwen3 only norms: "
            "it cannot be exported. Train with one of model.qk_layernorm and model.add_qkv_bias."
        )
    if model.qk_layernorm:
        return "qwen3"
    if model.add_qkv_bias:
        return "qwen2"
    if model.hidden_size % model.num_attention_heads:
        raise CheckpointError(
            f"the decoder has no biases and no norms on queries and keys, as Llama, but Llama's hidden_size "
            f"({model.hidden_size}) must be a multiple of its heads ({model.num_attention_heads}): it cannot be "
            "exported. Train with such a hidden_size."
        )
    return "llama"


def write_config(model: ModelConfig, dtype: str, token_ids: Mapping[str, Any]) -> dict[str, Any]:
    """Our decoder as a config.json of the kind that holds it.

    Args:
        model: the decoder.
        dtype: torch's name of the weights' type, e.g. `bfloat16`.
        token_ids: `bos_token_id`, `eos_token_id` and `pad_token_id`, as far as they are known.
    """
    kind = kind_of(model)
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": model.rotary_base}
    if model.rope_scaling_factor is not None:
        rope.update(rope_type="llama3", factor=model.rope_scaling_factor, **_LLAMA3)
    no_window = {"use_sliding_window": False, "sliding_window": None}
    return {
        "architectures": [ARCHITECTURES[kind]],
        "model_type": kind,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.num_query_groups,
        "head_dim": model.head_dim,
        "hidden_act": "silu",
        "vocab_size": model.vocab_size,
        "max_position_embeddings": model.max_position_embeddings,
        "rms_norm_eps": model.norm_epsilon,
        # Releases differ in which of these they read, and with none fall back to 1e4 in silence.
        "rope_theta": model.rotary_base,
        "rope_parameters": rope,
        **({} if model.rope_scaling_factor is None else {"rope_scaling": rope}),
        **({} if kind == "llama" else no_window),
        **({} if kind == "qwen2" else {"attention_bias": False}),
        **({"mlp_bias": False} if kind == "llama" else {}),
        "attention_dropout": 0.0,
        "initializer_range": model.init_method_std,
        "tie_word_embeddings": not model.untie_embeddings_and_output_weights,
        "use_cache": True,
        **{key: token_ids.get(key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")},
        "dtype": dtype,
        "torch_dtype": dtype,
    }


def check_exportable(model: ModelConfig) -> None:
    """Refuse a decoder that no class of transformers holds.

    Raises:
        CheckpointError: saying what it has that they have not.
    """
    kind_of(model)


def rules(model: ModelConfig, body: str = BODY, head: str = HEAD) -> list[Rule]:
    """Every tensor of the decoder. A tied head has no rule: it is the embedding.

    Args:
        model: the decoder.
        body: their prefix of `embed_tokens`, `layers` and `norm`.
        head: their name of the output layer.
    """
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
        ours, theirs = f"language_model.decoder.layers.{layer}.", f"{body}layers.{layer}."
        table.append(
            rename(ours + "self_attention.linear_qkv.layer_norm_weight", theirs + "input_layernorm.weight", (width,))
        )
        for kind, columns in qkv_parts:
            table.append(
                grouped_qkv(
                    f"{ours}self_attention.linear_qkv.{kind}",
                    [f"{theirs}self_attn.{part}_proj.{kind}" for part in "qkv"],
                    heads=model.num_attention_heads,
                    groups=model.num_query_groups,
                    head_dim=model.head_dim,
                    columns=columns,
                )
            )
        if model.qk_layernorm:
            for part in "qk":
                one, two = f"{ours}self_attention.{part}_layernorm.weight", f"{theirs}self_attn.{part}_norm.weight"
                table.append(rename(one, two, (model.head_dim,)))
        table += [
            rename(ours + "self_attention.linear_proj.weight", theirs + "self_attn.o_proj.weight", (width, query)),
            rename(ours + "mlp.linear_fc1.layer_norm_weight", theirs + "post_attention_layernorm.weight", (width,)),
            stacked(
                ours + "mlp.linear_fc1.weight",
                (theirs + "mlp.gate_proj.weight", theirs + "mlp.up_proj.weight"),
                (inner, inner),
                width,
            ),
            rename(ours + "mlp.linear_fc2.weight", theirs + "mlp.down_proj.weight", (width, inner)),
        ]
    table.append(rename("language_model.decoder.final_layernorm.weight", body + "norm.weight", (width,)))
    if model.untie_embeddings_and_output_weights:
        table.append(rename("language_model.output_layer.weight", head, (model.vocab_size, width)))
    return table
