"""A large decoder made in seconds: random bytes that are finite numbers, repeated at shifting places."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from tests.convert.publishers import VOCAB, write_tokenizer

_SHARD = 1 << 30


def write_wide_qwen2(folder: Path, gigabytes: float, *, layers: int = 4, width: int = 4096, groups: int = 4) -> int:
    """A bfloat16 Qwen2 of about the given size, few layers and an inner width to fit, in shards of about 1 GiB.

    Returns:
        Bytes of tensors.
    """
    heads, head = 32, width // 32
    attention = 2 * width * width + 2 * width * groups * head
    inner = int((gigabytes * 1e9 / 2 / layers - attention) / (3 * width)) // 64 * 64
    assert inner > 0, "too small for this width"
    write_tokenizer(folder)
    vocabulary = 32003
    config = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "vocab_size": vocabulary,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
    assert vocabulary > VOCAB
    (folder / "config.json").write_text(json.dumps(config))
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, width)}
    for layer in range(layers):
        name = f"model.layers.{layer}."
        shapes[name + "input_layernorm.weight"] = (width,)
        for part, rows in (("q", heads * head), ("k", groups * head), ("v", groups * head)):
            shapes[f"{name}self_attn.{part}_proj.weight"] = (rows, width)
            shapes[f"{name}self_attn.{part}_proj.bias"] = (rows,)
        shapes[name + "self_attn.o_proj.weight"] = (width, heads * head)
        shapes[name + "post_attention_layernorm.weight"] = (width,)
        shapes[name + "mlp.gate_proj.weight"] = (inner, width)
        shapes[name + "mlp.up_proj.weight"] = (inner, width)
        shapes[name + "mlp.down_proj.weight"] = (width, inner)
    shapes["model.norm.weight"] = (width,)
    shapes["lm_head.weight"] = (vocabulary, width)
    return _write(folder, shapes)


def _write(folder: Path, shapes: dict[str, tuple[int, ...]]) -> int:
    noise = np.random.default_rng(5).integers(0, 1 << 16, (9 << 20) + 12347, dtype=np.uint16)
    noise &= 0xBFFF  # the exponent's highest bit off: no infinity, nothing that is no number
    pattern = memoryview(noise.tobytes())
    shards: list[list[str]] = [[]]
    filled = 0
    for name, shape in shapes.items():
        if shards[-1] and filled > _SHARD:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += 2 * int(np.prod(shape))
    total, weight_map, at = 0, {}, 0
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        header, offset = {}, 0
        for name in names:
            size = 2 * int(np.prod(shapes[name]))
            header[name] = {"dtype": "BF16", "shape": shapes[name], "data_offsets": [offset, offset + size]}
            offset += size
            weight_map[name] = file
        text = json.dumps(header).encode()
        with (folder / file).open("wb", buffering=0) as out:
            out.write(len(text).to_bytes(8, "little") + text)
            left = offset
            while left:
                block = pattern[at : at + left]
                out.write(block)
                left -= len(block)
                at = (at + len(block)) % len(pattern)
        total += offset
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total
