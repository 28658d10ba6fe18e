"""A Long-VITA as published, in its three formats, written here without the package."""

from __future__ import annotations

import argparse
import io
import json
import math
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.convert import publishers

VISION = {"hidden_size": 64, "num_attention_heads": 16}
TEXT = {"hidden_size": 96, "num_attention_heads": 16, "num_key_value_heads": 8}
"""Eight ranks can share its heads and its groups."""
MORE_TOKENS = (
    "<img>", "</img>", "<IMG_CONTEXT>", "<vid>", "</vid>", "<VID_CONTEXT>", "<patch>", "</patch>", "<PATCH_CONTEXT>",
    "<quad>", "</quad>", "<ref>", "</ref>", "<box>", "</box>", "<image>", "<video>",
)  # fmt: skip
"""What Long-VITA adds to Qwen2.5's tokenizer, in its order."""
Weights = dict[str, torch.Tensor]


def write_long_vita(root: Path, **text: Any) -> Path:
    """root/hf: a Long-VITA in its Hugging Face format; root/llm and root/vit: its parts."""
    llm = publishers.write_decoder(root / "llm", **{**TEXT, **text})
    vit = publishers.write_intern_vit(root / "vit", remote=True, **VISION)
    tensors = dict(load_file(llm / "model.safetensors"))
    tensors.update({"model.vision_model." + name: one for name, one in publishers.tensors_of(vit).items()})
    generator = torch.Generator().manual_seed(5)
    for name, shape in (
        ("pre_proj_layernorm.weight", (256,)),
        ("pre_proj_layernorm.bias", (256,)),
        ("mlp.0.weight", (64, 256)),
        ("mlp.2.weight", (96, 64)),
    ):
        tensors["model.vision_projection." + name] = torch.randn(shape, generator=generator)
    folder = root / "hf"
    publishers.write_tokenizer(folder, extra=MORE_TOKENS)
    save_file(tensors, folder / "model.safetensors")
    config = json.loads((llm / "config.json").read_text())
    config.update(model_type="long_vita", visual=json.loads((vit / "config.json").read_text()))
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def _layers(count: int, stages: int) -> Iterator[tuple[int, int, int]]:
    """(layer, its stage, its number there)."""
    for layer in range(count):
        yield layer, layer * stages // count, layer % (count // stages)


def _in_ranks(hf: Weights, config: dict[str, Any], ranks: int, stages: int, mindspeed: bool) -> list[list[Weights]]:
    """[stage][rank] of Megatron's names, cut by the textbook."""
    out: list[list[Weights]] = [[{} for _ in range(ranks)] for _ in range(stages)]

    def put(stage: int, name: str, parts: list[torch.Tensor]) -> None:
        for rank, part in enumerate(parts):
            out[stage][rank][name] = part.contiguous().clone()

    def cut(one: torch.Tensor, axis: int) -> list[torch.Tensor]:
        return list(one.chunk(ranks, axis))

    norms = ("input_layernorm.", "pre_mlp_layernorm.") if mindspeed else (
        "self_attention.linear_qkv.layer_norm_", "mlp.linear_fc1.layer_norm_")  # fmt: skip
    groups, heads = config["num_key_value_heads"], config["num_attention_heads"]
    size = config["hidden_size"] // heads
    put(0, "embedding.word_embeddings.weight", _padded_rows(hf["model.embed_tokens.weight"], ranks))
    put(0, "unused", [torch.zeros(3)] * ranks)
    for layer, stage, number in _layers(config["num_hidden_layers"], stages):
        old, new = f"model.layers.{layer}.", f"decoder.layers.{number}."
        for kind in ("weight", "bias"):
            q, k, v = (hf[f"{old}self_attn.{one}_proj.{kind}"].unflatten(0, (groups, -1)) for one in "qkv")
            put(stage, f"{new}self_attention.linear_qkv.{kind}", cut(torch.cat([q, k, v], 1).flatten(0, 1), 0))
            assert q.shape[1] == heads // groups * size
        put(stage, new + "self_attention.linear_proj.weight", cut(hf[old + "self_attn.o_proj.weight"], 1))
        gate, up = (cut(hf[f"{old}mlp.{one}_proj.weight"], 0) for one in ("gate", "up"))
        put(stage, new + "mlp.linear_fc1.weight", [torch.cat(both) for both in zip(gate, up, strict=True)])
        put(stage, new + "mlp.linear_fc2.weight", cut(hf[old + "mlp.down_proj.weight"], 1))
        put(stage, f"{new}{norms[0]}weight", [hf[old + "input_layernorm.weight"]] * ranks)
        put(stage, f"{new}{norms[1]}weight", [hf[old + "post_attention_layernorm.weight"]] * ranks)
        for rank in range(ranks):
            out[stage][rank][new + "self_attention.linear_qkv._extra_state"] = io.BytesIO(b"fp8")  # type: ignore[assignment]
    put(stages - 1, "decoder.final_layernorm.weight", [hf["model.norm.weight"]] * ranks)
    tied = config["tie_word_embeddings"]
    if not tied or stages > 1:  # the last stage has a copy of its own
        head = hf["model.embed_tokens.weight" if tied else "lm_head.weight"]
        put(stages - 1, "output_layer.weight", _padded_rows(head, ranks))
    if "visual" in config:
        for name, parts in _tower_in_ranks(hf, config["visual"], ranks):
            put(0, "external_feature_model." + name, parts)
    return out


def _padded_rows(one: torch.Tensor, ranks: int) -> list[torch.Tensor]:
    """Megatron pads the vocabulary to a multiple of 128 times the ranks, with rows that hold anything: whole ranks may
    hold nothing else."""
    rows = 128 * ranks * math.ceil(len(one) / (128 * ranks))
    return list(torch.cat([one, torch.full((rows - len(one), one.shape[1]), 7.0)]).chunk(ranks))


def _tower_in_ranks(hf: Weights, visual: dict[str, Any], ranks: int) -> Iterator[tuple[str, list[torch.Tensor]]]:
    old, heads = "model.vision_model.", visual["num_attention_heads"]
    yield "vit.class_token", [hf[old + "embeddings.class_embedding"]] * ranks
    yield "vit.position_embeddings.weight", [hf[old + "embeddings.position_embedding"][0]] * ranks
    for kind in ("weight", "bias"):
        yield f"vit.conv1.{kind}", [hf[f"{old}embeddings.patch_embedding.{kind}"]] * ranks
        projection = hf[f"model.vision_projection.pre_proj_layernorm.{kind}"]
        yield f"pre_proj_layernorm.{kind}", [projection] * ranks
        for layer in range(visual["num_hidden_layers"]):
            at, new = f"{old}encoder.layers.{layer}.", f"vit.decoder.layers.{layer}."
            joint = hf[f"{at}attn.qkv.{kind}"].unflatten(0, (3, heads, -1)).transpose(0, 1).flatten(0, 2)
            yield f"{new}self_attention.linear_qkv.{kind}", list(joint.chunk(ranks))
            yield f"{new}mlp.linear_fc1.{kind}", list(hf[f"{at}mlp.fc1.{kind}"].chunk(ranks))
            for one, two in (("self_attention.linear_proj", "attn.proj"), ("mlp.linear_fc2", "mlp.fc2")):
                whole = hf[f"{at}{two}.{kind}"]
                yield f"{new}{one}.{kind}", list(whole.chunk(ranks, 1)) if kind == "weight" else [whole] * ranks
            for one, two in (("input_layernorm", "norm1"), ("pre_mlp_layernorm", "norm2")):
                yield f"{new}{one}.{kind}", [hf[f"{at}{two}.{kind}"]] * ranks
            if kind == "weight":
                yield new + "ls1", [hf[at + "ls1"]] * ranks
                yield new + "ls2", [hf[at + "ls2"]] * ranks
    yield "vision_projection.encoder.linear_fc1.weight", list(hf["model.vision_projection.mlp.0.weight"].chunk(ranks))
    yield (
        "vision_projection.encoder.linear_fc2.weight",
        list(hf["model.vision_projection.mlp.2.weight"].chunk(ranks, 1)),
    )


def write_layout(
    folder: Path,
    hf: Path,
    *,
    ranks: int = 2,
    stages: int = 1,
    mindspeed: bool = False,
    change: Callable[[list[list[Weights]]], object] = lambda weights: None,
    args: dict[str, Any] | None = None,
) -> Path:
    """A published folder of either layout, at step 500.

    Args:
        hf: the same model in its Hugging Face format; or a Qwen2, which a run without a tower would save.
        change: applied to the weights, [stage][rank] by Megatron's names, before they are saved.
        args: settings of the run that differ.
    """
    config = json.loads((hf / "config.json").read_text())
    weights = _in_ranks(load_file(hf / "model.safetensors"), config, ranks, stages, mindspeed)
    change(weights)
    settings = argparse.Namespace(
        num_layers=config["num_hidden_layers"],
        hidden_size=config["hidden_size"],
        ffn_hidden_size=config["intermediate_size"],
        num_attention_heads=config["num_attention_heads"],
        num_query_groups=config["num_key_value_heads"],
        group_query_attention=True,
        norm_epsilon=1e-5,
        rotary_base=1000000,
        max_position_embeddings=512,
        untie_embeddings_and_output_weights=not config["tie_word_embeddings"],
        vision_model_type="intern_300m",
        swiglu=True,
        normalization="RMSNorm",
        params_dtype=torch.bfloat16,
        device=torch.device("cpu"),
    )
    vars(settings).update(args or {})
    (folder / "iter_0000500").mkdir(parents=True)
    (folder / "latest_checkpointed_iteration.txt").write_text("500")
    for stage, row in enumerate(weights):
        for rank, one in enumerate(row):
            name = f"mp_rank_{rank:02d}" + (f"_{stage:03d}" if stages > 1 else "")
            path = folder / "iter_0000500" / name / "model_optim_rng.pt"
            path.parent.mkdir()
            rng = [{"python": (3, (1, 2), None), "torch": torch.get_rng_state()}]
            content = {"args": settings, "checkpoint_version": 3.0, "iteration": 500, "model": one, "rng_state": rng}
            torch.save(content, path)
            if mindspeed:
                _as_an_ascend_saves(path)
    return folder


def _as_an_ascend_saves(path: Path) -> None:
    """Other words for the call that makes a tensor, and for the device."""
    with zipfile.ZipFile(path) as archive:
        members = {one.filename: archive.read(one) for one in archive.infolist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            call = b"ctorch_npu.utils.storage\n_rebuild_npu_tensor\n"
            archive.writestr(name, content.replace(b"ctorch._utils\n_rebuild_tensor_v2\n", call))
