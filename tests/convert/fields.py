"""What each setting of the stock configuration classes is to us: the whole list, so that a new one is noticed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Read:
    """Is part of our own settings: another value is another model."""

    other: Any


@dataclass(frozen=True)
class Refused:
    """Changes the result in a way that we cannot: another value is refused, by name."""

    other: Any


@dataclass(frozen=True)
class Inert:
    """Changes nothing that the weights compute: another value is the same model."""

    other: Any
    why: str


Use = Read | Refused | Inert
_TRAINING = "acts in stock training alone"
_FRESH = "of fresh weights"
_TOKENS = "the tokenizer's matter"
_OUTPUT = "what is handed out, not what it is"

EVERYWHERE: dict[str, Use] = {
    "_name_or_path": Inert("elsewhere", "a note"),
    "architectures": Inert(["Other"], "the class with its head; the tensors say which"),
    "chunk_size_feed_forward": Inert(64, "the same product in pieces"),
    "dtype": Inert("float16", "the tensors have their own"),
    "id2label": Inert({"0": "x"}, "of classifiers"),
    "is_encoder_decoder": Inert(True, "none of these is one"),
    "label2id": Inert({"x": 0}, "of classifiers"),
    "model_type": Refused("mamba"),
    "output_attentions": Inert(True, _OUTPUT),
    "output_hidden_states": Inert(True, _OUTPUT),
    "problem_type": Inert("regression", "of classifiers"),
    "return_dict": Inert(False, _OUTPUT),
    "transformers_version": Inert("4.0.0", "a note"),
}
_ATTENTION: dict[str, Use] = {
    "hidden_size": Read(10240),
    "intermediate_size": Read(8888),
    "num_hidden_layers": Read(7),
    "num_attention_heads": Read(16),
    "hidden_act": Refused("relu"),
    "attention_dropout": Inert(0.1, _TRAINING),
}
_DECODER: dict[str, Use] = {
    **_ATTENTION,
    "num_key_value_heads": Read(4),
    "vocab_size": Read(1000),
    "rms_norm_eps": Read(1e-3),
    "max_position_embeddings": Read(1234),
    "tie_word_embeddings": Read(True),
    "rope_parameters": Read({"rope_type": "linear", "factor": 2.0}),
    "initializer_range": Inert(0.5, _FRESH),
    "use_cache": Inert(False, "the same values, computed again"),
    "pad_token_id": Inert(3, _TOKENS),
    "bos_token_id": Inert(3, _TOKENS),
    "eos_token_id": Inert(3, _TOKENS),
    # What the classes take without naming it, or other releases name.
    "rope_theta": Read(77.0),
    "rope_scaling": Read({"type": "yarn", "factor": 4.0}),
    "partial_rotary_factor": Refused(0.5),
    "is_causal": Refused(False),
    "quantization_config": Refused({"quant_method": "gptq"}),
    "compression_config": Refused({"format": "int-quantized"}),
    "num_experts": Refused(8),
}
_WINDOW: dict[str, Use] = {
    "use_sliding_window": Refused(True),
    "layer_types": Refused(["sliding_attention"] * 36),
    "sliding_window": Inert(128, "acts with use_sliding_window alone"),
    "max_window_layers": Inert(3, "acts with use_sliding_window alone"),
}
_PICTURE: dict[str, Use] = {
    **_ATTENTION,
    "hidden_size": Read(1536),
    "num_attention_heads": Read(8),
    "num_hidden_layers": Read(7),
    "num_channels": Refused(1),
    "image_size": Read(896),
    "patch_size": Read(28),
    "layer_norm_eps": Read(1e-3),
}

CLASSES: dict[str, dict[str, Use]] = {
    "Qwen2Config": {**_DECODER, **_WINDOW, "head_dim": Read(64)},
    "Qwen3Config": {**_DECODER, **_WINDOW, "head_dim": Read(64), "attention_bias": Refused(True)},
    "LlamaConfig": {
        **_DECODER,
        "head_dim": Read(64),
        "attention_bias": Refused(True),
        "mlp_bias": Refused(True),
        "pretraining_tp": Inert(2, "the same products in pieces"),
    },
    "MistralConfig": {**_DECODER, "head_dim": Read(64), "sliding_window": Refused(128)},
    "GlmConfig": {
        **_DECODER,
        "head_dim": Read(64),
        "attention_bias": Refused(False),
        "partial_rotary_factor": Read(0.25),
    },
    "InternVLVisionConfig": {
        **_PICTURE,
        "attention_bias": Read(False),
        "use_qk_norm": Read(True),
        "norm_type": Read("rms_norm"),
        "hidden_dropout_prob": Inert(0.1, _TRAINING),
        "projection_dropout": Inert(0.1, _TRAINING),
        "initializer_range": Inert(0.5, _FRESH),
        "layer_scale_init_value": Inert(0.5, _FRESH),
        "use_absolute_position_embeddings": Refused(False),
        "use_mask_token": Refused(True),
        "use_mean_pooling": Refused(False),
    },
    "InternVLConfig": {
        "text_config": Refused(None),
        "vision_config": Refused(None),
        "image_token_id": Inert(5, _TOKENS),
        "image_seq_length": Refused(64),
        "downsample_ratio": Refused(0.25),
        "projector_hidden_act": Refused("relu"),
        "vision_feature_layer": Refused(-2),
        "vision_feature_select_strategy": Refused("full"),
        "tie_word_embeddings": Read(True),
    },
    "SiglipVisionConfig": {
        **_PICTURE,
        "vision_use_head": Inert(False, "the pooling head, which the projector never sees"),
    },
    "CLIPVisionConfig": {
        **_PICTURE,
        "projection_dim": Inert(5, "of the pooled state, which the projector never sees"),
        "initializer_range": Inert(0.5, _FRESH),
        "initializer_factor": Inert(0.5, _FRESH),
    },
}
"""Stock class -> setting -> what it is to us."""


def use_of(kind: str, name: str) -> Use:
    """What a setting of a stock class is to us."""
    return (EVERYWHERE | CLASSES[kind])[name]


def same_computation(first: Any, second: Any) -> None:
    """Assert that two stock configurations of one class agree on all that is not inert."""
    assert type(first) is type(second)
    one, two = first.to_dict(), second.to_dict()
    for name in type(first)().to_dict():
        if isinstance(one[name], Mapping) and name.endswith("_config"):
            same_computation(getattr(first, name), getattr(second, name))
        elif not isinstance(use_of(type(first).__name__, name), Inert):
            assert one[name] == two[name], name
