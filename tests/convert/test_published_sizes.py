"""The tables of names against stock transformers at the published sizes: on the meta device, so with no weights.

Every published decoder, tower and whole model: the same names and shapes both ways, each element once, as many
parameters as the plan, stock code and the publisher count, and a config.json that comes back as it was.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pytest

from megatron_vita.checkpoint.tensors import TensorsInMemory
from megatron_vita.config import ModelConfig, ProjectorConfig, VisionConfig
from megatron_vita.convert.families import decoder as decoders
from megatron_vita.convert.families import intern_vit, internvl, long_vita, siglip_clip
from megatron_vita.convert.rules import Rule, prove
from megatron_vita.errors import CheckpointError
from megatron_vita.planning.parameters import count_parameters
from tests.convert import fields, published

pytest.importorskip("transformers")

from transformers import AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText

TOKEN_IDS = {"bos_token_id": 151643, "eos_token_id": 151645, "image_token_id": 151667}


def _hf_shapes(rules: Iterable[Rule]) -> dict[str, tuple[int, ...]]:
    return {named.name: named.shape for rule in rules for named in rule.hf}


def _elements(rules: Iterable[Rule]) -> int:
    return sum(math.prod(rule.mcore.shape) for rule in rules if rule.mcore is not None)


def _tower_alone(vision: VisionConfig) -> int:
    return count_parameters(ModelConfig(vocab_size=1, vision=vision)).tower


@pytest.mark.slow
@pytest.mark.parametrize("name", published.DECODERS)
def test_decoder(name: str) -> None:
    settings = published.decoder(name)
    stock = published.stock_config(settings)
    model = decoders.read_config(settings, name)
    for spelling in (stock.to_dict(), published.saved(stock)):  # as transformers rewrites it
        assert decoders.read_config(spelling, name) == model

    network = published.on_meta(AutoModelForCausalLM, stock)
    rules = decoders.rules(model)
    prove(rules)
    assert _hf_shapes(rules) == published.shapes(network)
    counts = {_elements(rules), count_parameters(model).total, network.num_parameters()}
    assert counts == {published.DECODERS[name]["parameters"]}

    written = decoders.write_config(model, "bfloat16", TOKEN_IDS, settings["model_type"])
    assert decoders.read_config(written, name) == model
    again = published.stock_config(written)
    fields.same_computation(again, stock)
    assert written["architectures"] == [type(network).__name__]


@pytest.mark.slow
@pytest.mark.parametrize("name", published.FACTS["intern_vit"])
def test_intern_vit(name: str) -> None:
    settings, remote = (published.intern_vit(name, native=native) for native in (True, False))
    stock = published.stock_config(settings)
    vision, names = intern_vit.read_config(settings, name)
    for spelling in (stock.to_dict(), published.saved(stock)):
        assert intern_vit.read_config(spelling, name) == (vision, names)
    network = published.on_meta(AutoModel, stock)
    rules = intern_vit.rules(vision, names)
    prove(rules)
    assert _hf_shapes(rules) == published.shapes(network)
    assert _elements(rules) == _tower_alone(vision) == network.num_parameters()
    assert _elements(rules) == published.FACTS["intern_vit"][name].get("parameters", _elements(rules))
    fields.same_computation(published.stock_config(intern_vit.write_config(vision, names, "bfloat16")), stock)

    # OpenGVLab's spelling, which stock code does not know: the same tower under the names of the reference.
    assert intern_vit.read_config(remote, name) == (vision, intern_vit.REMOTE)
    written = intern_vit.write_config(vision, intern_vit.REMOTE, "bfloat16")
    assert {key: written[key] for key in remote} == remote
    other = intern_vit.rules(vision, intern_vit.REMOTE)
    prove(other)
    assert _hf_shapes(other) == _remote_names(remote)
    assert {rule.mcore for rule in other} == {rule.mcore for rule in rules}


def _remote_names(config: dict[str, Any], prefix: str = "") -> dict[str, tuple[int, ...]]:
    """Names and shapes of OpenGVLab's InternViT, written down once more from the reference's table."""
    h, inner, side = config["hidden_size"], config["intermediate_size"], config["patch_size"]
    positions = (config["image_size"] // side) ** 2 + 1
    table: dict[str, tuple[int, ...]] = {
        "embeddings.class_embedding": (1, 1, h),
        "embeddings.position_embedding": (1, positions, h),
        "embeddings.patch_embedding.weight": (h, 3, side, side),
        "embeddings.patch_embedding.bias": (h,),
    }
    for layer in range(config["num_hidden_layers"]):
        one = {
            "attn.qkv.weight": (3 * h, h),
            "attn.proj.weight": (h, h),
            "attn.proj.bias": (h,),
            "mlp.fc1.weight": (inner, h),
            "mlp.fc1.bias": (inner,),
            "mlp.fc2.weight": (h, inner),
            "mlp.fc2.bias": (h,),
            **dict.fromkeys(("norm1.weight", "norm2.weight", "ls1", "ls2"), (h,)),
        }
        if config["qkv_bias"]:
            one["attn.qkv.bias"] = (3 * h,)
        if config["qk_normalization"]:
            one.update(dict.fromkeys(("attn.q_norm.weight", "attn.k_norm.weight"), (h,)))
        if config["norm_type"] == "layer_norm":
            one.update(dict.fromkeys(("norm1.bias", "norm2.bias"), (h,)))
        table.update({f"encoder.layers.{layer}.{key}": shape for key, shape in one.items()})
    return {prefix + key: shape for key, shape in table.items()}


UNUSED = {
    "siglip": r"vision_model\.head\.|text_model\.|logit_(scale|bias)$",
    "clip": r"vision_model\.(encoder\.layers\.23\.|post_layernorm\.)|text_model\.|\w+_projection\.|logit_scale$",
}
"""What the projector never sees."""


@pytest.mark.slow
@pytest.mark.parametrize("name", published.TEXT_TOWERS)
def test_towers_of_pictures_and_texts(name: str) -> None:
    settings = published.TEXT_TOWERS[name]
    stock = published.stock_config(settings)
    vision = siglip_clip.read_config(settings, name)
    assert siglip_clip.read_config(stock.to_dict(), name) == vision
    assert siglip_clip.read_config(stock.vision_config.to_dict(), name) == vision
    network = published.on_meta(AutoModel, stock)
    source = TensorsInMemory(network.state_dict())
    used = siglip_clip.without_unused(vision, source)
    rules = siglip_clip.rules(vision, siglip_clip.prefix_of(list(source)))
    prove(rules)
    assert _hf_shapes(rules) == {key: source.shape(key) for key in used}
    unused = re.compile(UNUSED[settings["model_type"]])
    assert set(source) - set(used) == {key for key in source if unused.match(key)}
    assert _elements(rules) == _tower_alone(vision)
    # The tower alone, as newer releases save it: the same table without the prefix.
    alone = published.on_meta(AutoModel, stock.vision_config)
    source = TensorsInMemory(alone.state_dict())
    assert siglip_clip.prefix_of(list(source)) == ""
    assert _hf_shapes(siglip_clip.rules(vision)) == {
        key: source.shape(key) for key in siglip_clip.without_unused(vision, source)
    }


def test_the_siglip_whose_patches_cannot_be_paired_is_refused() -> None:
    config = {**published.TEXT_TOWERS["SigLIP2-so400m-patch16-384"]}
    config["vision_config"] = {**config["vision_config"], "patch_size": 14}
    with pytest.raises(CheckpointError, match=r"image_size=384 is not a multiple of twice patch_size=14"):
        siglip_clip.read_config(config, "so400m-patch14-384")


@pytest.mark.slow
@pytest.mark.parametrize("name", published.INTERNVL)
def test_internvl(name: str) -> None:
    settings = published.internvl(name)
    stock = published.stock_config(settings)
    head = _has_head(name)
    network = published.on_meta(AutoModelForImageTextToText, _with_tie(stock, tied=not head))
    memory, disk = published.shapes(network), published.shapes(network, on_disk=True)
    assert set(memory).isdisjoint(disk)
    model = internvl.with_head_of(internvl.read_config(settings, name), settings, disk)
    assert model.untie_embeddings_and_output_weights == head
    for spelling in (stock.to_dict(), published.saved(stock)):
        assert internvl.with_head_of(internvl.read_config(spelling, name), spelling, memory) == model

    for names in (memory, disk):
        rules = internvl.rules(model, names)
        prove(rules)
        assert _hf_shapes(rules) == names
        assert _elements(rules) == count_parameters(model).total == network.num_parameters()
    _check_internvl_export(model, settings)


def _has_head(name: str) -> bool:
    family, _, text = published.INTERNVL[name]
    return not {**published.decoder(text), **family["text"]}["tie_word_embeddings"]


def _with_tie(stock: Any, *, tied: bool) -> Any:
    """What stock code finds once it has seen whether the folder holds a head."""
    stock.tie_word_embeddings = tied
    return stock


def _check_internvl_export(model: ModelConfig, settings: dict[str, Any] | None = None) -> None:
    """Stock code builds from the config.json that we write exactly the tensors that we write."""
    written = internvl.write_config(model, "bfloat16", TOKEN_IDS)
    again = published.stock_config(written)
    network = published.on_meta(AutoModelForImageTextToText, again)
    assert written["architectures"] == [type(network).__name__]
    assert _hf_shapes(internvl.rules(model)) == published.shapes(network, on_disk=True)
    assert replace(internvl.read_config(written, "written"), projector=model.projector) == model
    if settings is not None:
        plain = {**settings, "text_config": {**settings["text_config"], "rope_scaling": None}}
        fields.same_computation(again, _with_tie(published.stock_config(plain), tied=again.tie_word_embeddings))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "tower", "narrow"),
    [
        ("Llama-3.1-8B", "InternViT-300M-448px", False),
        ("Llama-3.2-1B", "InternViT-300M-448px", True),
        ("Qwen3-4B", "InternViT-6B-224px", False),
        ("Qwen2.5-7B", "InternViT-6B-448px", True),
    ],
)
def test_internvl_of_any_pair_is_what_stock_code_builds(text: str, tower: str, narrow: bool) -> None:
    model = decoders.read_config(published.decoder(text), text)
    vision, _ = intern_vit.read_config(published.intern_vit(tower, native=True), tower)
    projector = ProjectorConfig(ffn_hidden_size=1024, bias=False) if narrow else ProjectorConfig()
    _check_internvl_export(replace(model, vision=vision, projector=projector))


@pytest.mark.slow
@pytest.mark.parametrize("name", published.LONG_VITA)
def test_long_vita(name: str) -> None:
    settings = published.LONG_VITA[name]
    model = long_vita.read_config(settings, name)
    rules = long_vita.rules(model)
    prove(rules)
    assert _hf_shapes(rules) == _long_vita_names(settings)
    counted = count_parameters(model)
    assert (counted.decoder, counted.tower, counted.projector) == (14770033664, 304012288, 9445376)
    assert _elements(rules) == counted.total
    written = long_vita.write_config(model, "bfloat16", TOKEN_IDS)
    assert long_vita.read_config(written, name) == model
    assert set(settings) - set(written) == {"max_window_layers"}  # says nothing where no layer has a window
    # The published initial layer scale is not written, and with no layer that has a window its size says nothing.
    differing = {key for key in set(settings) & set(written) - {"visual"} if settings[key] != written[key]}
    assert differing == {"sliding_window"}
    assert {k for k in settings["visual"] if settings["visual"][k] != written["visual"][k]} == {"initializer_factor"}

    _check_internvl_export(model)  # and stock code holds it, its projector padded


def _long_vita_names(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the published folder, written down once more from the reference's table."""
    h, inner, rows = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    kv = config["num_key_value_heads"] * h // config["num_attention_heads"]
    tower = config["visual"]["hidden_size"]
    table: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (rows, h),
        "lm_head.weight": (rows, h),
        "model.norm.weight": (h,),
        "model.vision_projection.pre_proj_layernorm.weight": (4 * tower,),
        "model.vision_projection.pre_proj_layernorm.bias": (4 * tower,),
        "model.vision_projection.mlp.0.weight": (tower, 4 * tower),
        "model.vision_projection.mlp.2.weight": (h, tower),
    }
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}."
        for part, size in (("q", h), ("k", kv), ("v", kv)):
            table[f"{at}self_attn.{part}_proj.weight"] = (size, h)
            table[f"{at}self_attn.{part}_proj.bias"] = (size,)
        table[f"{at}self_attn.o_proj.weight"] = (h, h)
        table[f"{at}mlp.gate_proj.weight"] = table[f"{at}mlp.up_proj.weight"] = (inner, h)
        table[f"{at}mlp.down_proj.weight"] = (h, inner)
        table[f"{at}input_layernorm.weight"] = table[f"{at}post_attention_layernorm.weight"] = (h,)
    return table | _remote_names(config["visual"], "model.vision_model.")
