"""The table of decoder families: how each differs from Llama in config.json and tensors.

A decoder of the Llama kind needs a row here, and nothing else of the package; docs/convert.md says what to look for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron_vita.config import ModelConfig
from megatron_vita.errors import CheckpointError


@dataclass(frozen=True, kw_only=True)
class DecoderFamily:
    """How transformers' classes of one model_type differ from Llama's."""

    model_type: str
    """As config.json says it."""
    architecture: str
    """transformers' class with the head."""
    add_qkv_bias: bool = False
    """Biases on queries, keys and values, and nowhere else."""
    qk_layernorm: bool = False
    """RMSNorm on each query and key head."""
    rotary_interleaved: bool = False
    """The rotary embedding pairs adjacent elements of a head rather than its halves."""
    rotary_percent: float | None = None
    """Default of partial_rotary_factor; none: the class always rotates the whole head."""
    head_dim: int | None = None
    """Default head size; none: hidden_size / num_attention_heads."""
    heads_divide: bool = False
    """hidden_size must be a multiple of the heads, whatever head_dim says."""
    groups_are_heads: bool = False
    """Without num_key_value_heads each query head has its own. (Other classes have a number that fits one model.)"""
    window: int | None = None
    """Default of sliding_window, of a class that applies it whenever it is a number."""
    gate_up: str | None = None
    """Name of gate and up as one tensor, gate above up; none: `gate_proj` and `up_proj`."""
    required: Mapping[str, Any] = field(default_factory=dict)
    """Settings that are supported with one value only, which is the class's default, too."""
    written: Mapping[str, Any] = field(default_factory=dict)
    """Further settings of an exported config.json."""

    def lacks(self, model: ModelConfig) -> str | None:
        """Why this family cannot hold a decoder; none if it can."""
        for name in ("add_qkv_bias", "qk_layernorm", "rotary_interleaved"):
            if getattr(model, name) != getattr(self, name):
                return f"model.{name}={getattr(model, name)}"
        if model.rotary_percent != 1 and self.rotary_percent is None:
            return f"model.rotary_percent={model.rotary_percent}"
        if self.heads_divide and model.hidden_size % model.num_attention_heads:
            return f"a hidden_size ({model.hidden_size}) that is no multiple of its heads ({model.num_attention_heads})"
        return None


_NO_WINDOW = {"use_sliding_window": False, "sliding_window": None}
_NO_BIAS = {"attention_bias": False, "mlp_bias": False}

DECODERS = {
    row.model_type: row
    for row in (
        DecoderFamily(model_type="qwen2", architecture="Qwen2ForCausalLM", add_qkv_bias=True, written=_NO_WINDOW),
        DecoderFamily(
            model_type="qwen3",
            architecture="Qwen3ForCausalLM",
            qk_layernorm=True,
            head_dim=128,
            required=_NO_BIAS,
            written={**_NO_WINDOW, "attention_bias": False},
        ),
        DecoderFamily(
            model_type="llama",
            architecture="LlamaForCausalLM",
            heads_divide=True,
            groups_are_heads=True,
            required=_NO_BIAS,
            written=_NO_BIAS,
        ),
        DecoderFamily(
            model_type="mistral", architecture="MistralForCausalLM", window=4096, written={"sliding_window": None}
        ),
        DecoderFamily(
            model_type="glm",
            architecture="GlmForCausalLM",
            add_qkv_bias=True,
            rotary_interleaved=True,
            rotary_percent=0.5,
            head_dim=128,
            gate_up="gate_up_proj",
            required={"attention_bias": True},
            written={"attention_bias": True},
        ),
    )
}
"""model_type -> row. A decoder that several rows hold is exported as what it was imported from, else as the first."""


def family_of(model: ModelConfig, wanted: str | None = None) -> DecoderFamily:
    """The family that a decoder is exported as. Raises CheckpointError: none holds it; says what each lacks.

    Args:
        model: the decoder.
        wanted: model_type of the one it came from, which is taken if it still holds it.
    """
    reasons = {kind: row.lacks(model) for kind, row in DECODERS.items()}
    holding = [kind for kind, reason in reasons.items() if reason is None]
    if not holding:
        lacks = "; ".join(f"{kind} has not {reason}" for kind, reason in reasons.items())
        raise CheckpointError(
            f"no class of transformers that is known here holds the decoder, so it cannot be exported: {lacks}. Train "
            "with the settings of one of them."
        )
    return DECODERS[wanted if wanted in holding else holding[0]]
