"""Tiny random models in the folders that publishers write: odd sizes, so that a wrong order shows."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

VOCAB = 307
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def write_tokenizer(folder: Path, *, extra: tuple[str, ...] = ()) -> None:
    """A byte-level tokenizer of 256 bytes and Qwen2.5's three special tokens: 259 ids."""
    folder.mkdir(parents=True, exist_ok=True)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={one: i for i, one in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens([AddedToken(one, special=True, normalized=False) for one in (*SPECIAL, *extra)])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def randomise(network: torch.nn.Module, seed: int) -> None:
    """Values everywhere, norms and biases included, so that nothing is hidden by a one or a zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            scale, base = (0.2, 1.0) if "norm" in name and name.endswith("weight") else (0.15, 0.0)
            parameter.copy_(base + scale * noise)


def text_settings(**changes: Any) -> dict[str, Any]:
    """A Qwen2 of head size 12, two key/value groups of three heads, an odd vocabulary."""
    return {
        "vocab_size": VOCAB,
        "hidden_size": 72,
        "intermediate_size": 104,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e6,
        "tie_word_embeddings": False,
        **changes,
    }


def vision_settings(**changes: Any) -> dict[str, Any]:
    """An InternViT of head size 20 that makes 4 tokens of a 16-pixel tile."""
    return {
        "hidden_size": 60,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "intermediate_size": 88,
        "attention_bias": True,
        "image_size": [16, 16],
        "patch_size": [4, 4],
        **changes,
    }


DECODERS: dict[str, dict[str, Any]] = {
    "qwen2": {"num_hidden_layers": 2},
    "qwen2 tied": {"tie_word_embeddings": True, "num_key_value_heads": 6},
    "qwen3": {"model_type": "qwen3", "head_dim": 10},
    "qwen3 tied": {"model_type": "qwen3", "head_dim": 14, "tie_word_embeddings": True},
    "llama": {"model_type": "llama", "rope_theta": 1e4},
    "mistral": {"model_type": "mistral", "sliding_window": None, "rope_theta": 1e4},
    "mistral window tied": {
        "model_type": "mistral",
        "sliding_window": 512,
        "head_dim": 20,
        "tie_word_embeddings": True,
    },
    "glm": {"model_type": "glm", "head_dim": 16, "rope_theta": 1e4, "pad_token_id": 0},
    "glm tied": {
        "model_type": "glm",
        "head_dim": 24,
        "partial_rotary_factor": 0.25,
        "tie_word_embeddings": True,
        "pad_token_id": 0,
    },
    "qwen2 yarn": {
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 8.0,
            "original_max_position_embeddings": 64,
            "mscale": 1.0,
            "mscale_all_dim": 0.5,
        },
    },
    "llama 3.1 tied": {
        "model_type": "llama",
        "tie_word_embeddings": True,
        "rope_theta": 5e5,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    },
}
"""What of text_settings differs. Head sizes 12, 10 and 14; two groups of three heads, or one head to each group."""

TOWERS: dict[str, dict[str, Any]] = {
    "InternViT-300M": {"model_type": "internvl_vision"},
    "InternViT-6B": {
        "model_type": "internvl_vision",
        "attention_bias": False,
        "use_qk_norm": True,
        "norm_type": "rms_norm",
    },
    "SigLIP": {"model_type": "siglip_vision_model", "image_size": 16, "patch_size": 4, "vision_use_head": True},
    "CLIP": {"model_type": "clip_vision_model", "image_size": 16, "patch_size": 4, "num_hidden_layers": 3},
}
"""What of vision_settings differs. CLIP's third block is not used."""


def write_decoder(folder: Path, *, seed: int = 1, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    """A decoder as transformers saves it, with its tokenizer. `model_type`: qwen2 by default."""
    from transformers import AutoConfig, AutoModelForCausalLM

    changes = copy.deepcopy(changes)  # transformers writes into a rope_scaling that it is given
    config = AutoConfig.for_model(changes.pop("model_type", "qwen2"), **text_settings(**changes))
    network = AutoModelForCausalLM.from_config(config)
    randomise(network, seed)
    network.to(dtype).save_pretrained(folder)
    write_tokenizer(folder)
    return folder


def write_qwen2(folder: Path, **settings: Any) -> Path:
    """A Qwen2 as transformers saves it, with its tokenizer."""
    return write_decoder(folder, **settings)


def write_tower(folder: Path, name: str, *, seed: int = 2) -> Path:
    """One of TOWERS, alone, as transformers saves it."""
    from transformers import AutoConfig, AutoModel

    settings = {**vision_settings(), **TOWERS[name]}
    if not settings["model_type"].startswith("internvl"):
        settings.pop("attention_bias")
    network = AutoModel.from_config(AutoConfig.for_model(**settings))
    randomise(network, seed)
    network.save_pretrained(folder)
    return folder


def write_intern_vit(folder: Path, *, remote: bool, seed: int = 2, **changes: Any) -> Path:
    """A tower in transformers' names, or in those of OpenGVLab's remote code."""
    from transformers import InternVLVisionConfig, InternVLVisionModel

    settings = vision_settings(**changes)
    network = InternVLVisionModel(InternVLVisionConfig(**settings))
    randomise(network, seed)
    network.save_pretrained(folder)
    if remote:
        to_remote_names(folder, settings)
    return folder


def write_internvl(folder: Path, *, seed: int = 3, tied: bool = False, **text: Any) -> Path:
    """A whole native InternVL as transformers saves it, with its tokenizer."""
    from transformers import InternVLConfig, InternVLForConditionalGeneration

    config = InternVLConfig(
        text_config={"model_type": "qwen2", **text_settings(tie_word_embeddings=tied, **text)},
        vision_config=vision_settings(),
        image_token_id=261,
        image_seq_length=4,
        tie_word_embeddings=tied,
    )
    network = InternVLForConditionalGeneration(config)
    randomise(network, seed)
    network.save_pretrained(folder)
    write_tokenizer(folder, extra=("<img>", "</img>", "<IMG_CONTEXT>", "<video>"))
    return folder


def to_remote_names(folder: Path, settings: Mapping[str, Any]) -> None:
    """Rewrite a native tower as OpenGVLab publishes it. Written out here once more, not taken from the package."""
    native = load_file(folder / "model.safetensors")
    out: dict[str, torch.Tensor] = {
        "embeddings.class_embedding": native["embeddings.cls_token"],
        "embeddings.position_embedding": native["embeddings.position_embeddings"],
    }
    for kind in ("weight", "bias"):
        out[f"embeddings.patch_embedding.{kind}"] = native[f"embeddings.patch_embeddings.projection.{kind}"]
    bias, six = settings["attention_bias"], settings.get("use_qk_norm", False)
    for n in range(settings["num_hidden_layers"]):
        old, new = f"encoder.layer.{n}.", f"encoder.layers.{n}."
        for kind in ("weight", "bias"):
            if kind == "weight" or bias:
                out[f"{new}attn.qkv.{kind}"] = torch.cat([native[f"{old}attention.{p}_proj.{kind}"] for p in "qkv"])
            out[f"{new}attn.proj.{kind}"] = native[f"{old}attention.projection_layer.{kind}"]
            if kind == "weight" or not six:
                out[f"{new}norm1.{kind}"] = native[f"{old}layernorm_before.{kind}"]
                out[f"{new}norm2.{kind}"] = native[f"{old}layernorm_after.{kind}"]
            for layer in ("fc1", "fc2"):
                out[f"{new}mlp.{layer}.{kind}"] = native[f"{old}mlp.{layer}.{kind}"]
        for one in "qk" if six else "":
            out[f"{new}attn.{one}_norm.weight"] = native[f"{old}attention.{one}_norm.weight"]
        out[f"{new}ls1"], out[f"{new}ls2"] = native[f"{old}lambda_1"], native[f"{old}lambda_2"]
    save_file(out, folder / "model.safetensors", metadata={"format": "pt"})
    config = {
        "model_type": "intern_vit_6b",
        "architectures": ["InternVisionModel"],
        **{k: v for k, v in settings.items() if k.startswith(("hidden", "num", "intermediate"))},
        "image_size": 16,
        "patch_size": 4,
        "hidden_act": "gelu",
        "norm_type": settings.get("norm_type", "layer_norm"),
        "layer_norm_eps": 1e-6,
        "qkv_bias": bias,
        "qk_normalization": six,
        "num_channels": 3,
    }
    (folder / "config.json").write_text(json.dumps(config))


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder, by safetensors' own reader."""
    out: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        out.update(load_file(file))
    return out


def same_bytes(a: Mapping[str, torch.Tensor], b: Mapping[str, torch.Tensor]) -> None:
    """Assert the same names, shapes, types and bytes."""
    assert a.keys() == b.keys(), sorted(a.keys() ^ b.keys())[:5]
    for name in a:
        assert a[name].dtype == b[name].dtype, name
        assert a[name].shape == b[name].shape, name
        assert torch.equal(a[name].reshape(-1).view(torch.uint8), b[name].reshape(-1).view(torch.uint8)), name
