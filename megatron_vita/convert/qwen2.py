"""The decoder of Qwen2 and Qwen2.5: configuration and names, both ways."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_vita.config import ModelConfig
from megatron_vita.convert.hf_config import integer, number, refuse
from megatron_vita.convert.rules import Rule, grouped_qkv, rename, stacked
from megatron_vita.errors import CheckpointError, ConfigError

MODEL_TYPE = "qwen2"
ARCHITECTURE = "Qwen2ForCausalLM"
BODY = "model."
HEAD = "lm_head.weight"


def read_config(config: Mapping[str, Any], where: str) -> ModelConfig:
    """A decoder's config.json (or text_config) as ours.

    Raises:
        CheckpointError: a setting is missing, or asks for what the decoder cannot do.
    """
    if config.get("use_sliding_window"):
        raise refuse(where, "use_sliding_window", True, "full attention only; set it to false if the weights allow it")
    for kind in (config.get("rope_scaling"), config.get("rope_parameters")):
        name = (kind or {}).get("rope_type", (kind or {}).get("type", "default"))
        if name != "default":
            raise refuse(where, "rope_scaling", name, "plain rotary embeddings only")
    if config.get("quantization_config"):
        raise refuse(where, "quantization_config", "...", "dequantise the weights first")
    if config.get("hidden_act", "silu") != "silu":
        raise refuse(where, "hidden_act", config["hidden_act"], "silu only")
    rope = config.get("rope_theta", (config.get("rope_parameters") or {}).get("rope_theta"))
    if rope is None:
        raise CheckpointError(
            f"{where}: names no rope_theta. Copy it from the model's publisher; there is no safe default."
        )
    heads = integer(config, "num_attention_heads", where)
    hidden = integer(config, "hidden_size", where)
    head_dim = config.get("head_dim")
    try:
        return ModelConfig(
            num_layers=integer(config, "num_hidden_layers", where),
            hidden_size=hidden,
            ffn_hidden_size=integer(config, "intermediate_size", where),
            num_attention_heads=heads,
            num_query_groups=int(config.get("num_key_value_heads") or heads),
            kv_channels=int(head_dim) if head_dim and int(head_dim) * heads != hidden else None,
            vocab_size=integer(config, "vocab_size", where),
            untie_embeddings_and_output_weights=not config.get("tie_word_embeddings", False),
            add_qkv_bias=True,
            norm_epsilon=number(config, "rms_norm_eps", where),
            rotary_base=float(rope),
            max_position_embeddings=integer(config, "max_position_embeddings", where),
        )
    except ConfigError as error:
        raise CheckpointError(f"{where}: {error}") from None


def write_config(model: ModelConfig, dtype: str, special_ids: Mapping[str, int]) -> dict[str, Any]:
    """Our decoder as a Qwen2 config.json.

    Args:
        dtype: torch's name of the weights' type, e.g. `bfloat16`.
        special_ids: ids of `<|im_end|>` and `<|endoftext|>`.
    """
    return {
        "architectures": [ARCHITECTURE],
        "model_type": MODEL_TYPE,
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
        # Releases differ in which of the two they read, and with neither fall back to 1e4 in silence.
        "rope_theta": model.rotary_base,
        "rope_parameters": {"rope_type": "default", "rope_theta": model.rotary_base},
        "use_sliding_window": False,
        "sliding_window": None,
        "attention_dropout": 0.0,
        "initializer_range": model.init_method_std,
        "tie_word_embeddings": not model.untie_embeddings_and_output_weights,
        "use_cache": True,
        "bos_token_id": special_ids.get("<|endoftext|>"),
        "eos_token_id": special_ids.get("<|im_end|>"),
        "dtype": dtype,
        "torch_dtype": dtype,
    }


def check_exportable(model: ModelConfig) -> None:
    """Refuse a decoder that Qwen2's classes cannot hold.

    Raises:
        CheckpointError: it has no query, key and value biases.
    """
    if not model.add_qkv_bias:
        raise CheckpointError(
            "the decoder has no query, key and value biases, which Qwen2 always has: it cannot be exported. "
            "Train with model.add_qkv_bias."
        )


def rules(model: ModelConfig, body: str = BODY, head: str = HEAD) -> list[Rule]:
    """Every tensor of the decoder. A tied head has no rule: it is the embedding.

    Args:
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
    for layer in range(model.num_layers):
        ours, theirs = f"language_model.decoder.layers.{layer}.", f"{body}layers.{layer}."
        table.append(
            rename(ours + "self_attention.linear_qkv.layer_norm_weight", theirs + "input_layernorm.weight", (width,))
        )
        for kind, columns in (("weight", width), ("bias", None)):
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
