"""Every decoder with every tower, through import, our model in several layouts, and export, against stock transformers.

The parts are published tiny models of awkward shapes. Stock transformers runs the exported folder, our model the
checkpoint at TP and PP 1 and 2; and each published tensor is found again in the export, byte for byte, for logits
cannot see everything (a key bias of the tower, what stands in a padding).
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from megatron_vita import checkpoint
from megatron_vita.config import IMAGE_NORMS, ParallelConfig, StageConfig
from megatron_vita.convert import cli, logits, open_model
from megatron_vita.convert.logits import ProbePrompt
from megatron_vita.layout import SequenceLayout, TileRoutes
from tests.convert import publishers
from tests.ranks import run_ranks

pytest.importorskip("transformers")

TOLERANCE = 1e-4
LAYOUTS: list[dict[str, Any]] = [{}, {"tensor_model_parallel_size": 2}, {"pipeline_model_parallel_size": 2}]
"""On two ranks; with the first, each runs the whole model."""
BOTH: list[dict[str, Any]] = [{"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}]
"""On four ranks."""


def convert(*arguments: object) -> None:
    assert cli.main([str(one) for one in arguments]) == 0


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Each decoder and each tower, as its publisher's folder."""
    root = tmp_path_factory.mktemp("published")
    for seed, (name, settings) in enumerate(publishers.DECODERS.items()):
        publishers.write_decoder(root / name, seed=seed, **settings)
    for seed, name in enumerate(publishers.TOWERS, 100):
        publishers.write_tower(root / name, name, seed=seed)
    return root


def _all_layouts(folder: str, prompt: ProbePrompt, wanted: torch.Tensor, layouts: list[dict[str, Any]]) -> None:
    """Our logits in one world of ranks, one layout after the other."""
    for layout in layouts:
        gap = (_our_logits(folder, prompt, layout) - wanted).abs().max().item()
        assert gap < TOLERANCE, f"{layout}: logits differ by {gap}"


def _our_logits(folder: str, prompt: ProbePrompt, parallel: dict[str, Any]) -> torch.Tensor:
    """Float32 logits [s, vocab_size] of a checkpoint, on every rank."""
    import torch.distributed as dist

    from megatron_vita.models.build import build_model
    from megatron_vita.parallel.groups import build_groups, destroy_groups

    model = checkpoint.read_state(folder).stage.model
    groups = build_groups(ParallelConfig(**parallel))
    (part,) = build_model(StageConfig(model=model, parallel=ParallelConfig(**parallel)), groups, dtype=torch.float32)
    checkpoint.load_weights(folder, [part])
    length = prompt.tokens.shape[1]
    layout = SequenceLayout((length,), sp=groups.sequence_shards)
    per_tile = model.vision.tokens_per_tile if model.vision else 1
    first = np.array(prompt.first_token, dtype=np.int64)
    routes = TileRoutes(layout, first, per_tile, tp=groups.tp_size)
    mine = list(routes.tiles_of(groups.group_rank)) if groups.first_stage else []
    inputs = {
        "tokens": prompt.tokens,
        "positions": torch.arange(length)[None],
        "layout": layout,
        "routes": routes,
        "tiles": prompt.tiles[mine],
    }
    stages = parallel.get("pipeline_model_parallel_size", 1)
    rank, last = dist.get_rank(), dist.get_world_size() - 1
    out = torch.empty(length, model.vocab_size)
    with torch.no_grad():
        if stages == 1:
            out = part.eval()(**inputs, logits_indices=torch.arange(length)).float()
        elif groups.first_stage:
            dist.send(part.eval()(**inputs), rank + groups.tp_size)
        else:
            hidden = torch.empty(length, 1, model.hidden_size)
            dist.recv(hidden, rank - groups.tp_size)
            part.set_input_tensor([hidden])
            out = part.eval()(**inputs, logits_indices=torch.arange(length)).float()
    if stages > 1:
        out = out.contiguous()  # gloo sends the memory behind a view as it lies
        dist.broadcast(out, last)
    destroy_groups()
    return out


def _stock(folder: Path, tiles: tuple[int, ...] = (1, 5, 2)) -> tuple[ProbePrompt, torch.Tensor]:
    """An even number of tokens (two ranks may share them), and stock transformers' logits for them."""
    opened = open_model(folder)
    prompt = logits.make_probe_prompt(opened.model, 261, tiles=tiles)
    wanted = logits.stock_logits(opened, prompt)
    assert wanted.abs().max() > 1, "logits too small to compare"
    length = prompt.tokens.shape[1] // 2 * 2
    return dataclasses.replace(prompt, tokens=prompt.tokens[:, :length]), wanted[:length]


def _check_tower_norms(tower: Path, ckpt: Path) -> None:
    """Exchanged, they would move no logit (their weights only ever meet as products) and come back exchanged again."""
    hf, mcore = publishers.tensors_of(tower), checkpoint.read_tensors(ckpt)
    for part in "qk":
        mine = mcore[f"vision_model.decoder.layers.1.self_attention.{part}_layernorm.weight"]
        assert torch.equal(mine, hf[f"encoder.layer.1.attention.{part}_norm.weight"])


INTERN = ("InternViT-300M", "InternViT-6B")
JOINED = [name for name in publishers.DECODERS if name not in ("mistral window tied", "glm tied", "qwen2 yarn")]
"""With every tower: of each family once, or twice."""
OTHER = ("SigLIP", "CLIP")


@pytest.mark.slow
@pytest.mark.parametrize("tower", INTERN)
@pytest.mark.parametrize("decoder", JOINED)
def test_parts_joined_and_exported_equal_stock(published: Path, tmp_path: Path, decoder: str, tower: str) -> None:
    convert("import", "--llm", published / decoder, "--vision", published / tower, "--output", tmp_path / "ckpt")
    convert("export", "--checkpoint", tmp_path / "ckpt", "--output", tmp_path / "hf", "--format", "internvl")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["text_config"]["model_type"] == publishers.DECODERS[decoder].get("model_type", "qwen2")
    left = publishers.tensors_of(tmp_path / "hf")
    for prefix, part in (("language_model.", decoder), ("vision_tower.", tower)):
        for name, one in publishers.tensors_of(published / part).items():
            assert torch.equal(left.pop(prefix + name), one), name
    if tower == "InternViT-6B":
        _check_tower_norms(published / tower, tmp_path / "ckpt")
    projector = ("layer_norm", "linear_1", "linear_2")
    assert set(left) == {f"multi_modal_projector.{one}.{kind}" for one in projector for kind in ("weight", "bias")}
    prompt, wanted = _stock(tmp_path / "hf")
    run_ranks(2, _all_layouts, str(tmp_path / "ckpt"), prompt, wanted, LAYOUTS)
    if tower == "InternViT-6B":
        run_ranks(4, _all_layouts, str(tmp_path / "ckpt"), prompt, wanted, BOTH)
    convert("import", "--model", tmp_path / "hf", "--output", tmp_path / "again")
    assert checkpoint.tensor_digests(tmp_path / "again") == checkpoint.tensor_digests(tmp_path / "ckpt")


@pytest.mark.slow
@pytest.mark.parametrize("tower", OTHER)
@pytest.mark.parametrize("decoder", JOINED)
def test_towers_that_no_stock_folder_holds_equal_stock_modules(
    published: Path, tmp_path: Path, decoder: str, tower: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """transformers' InternVL runs them when it is built in memory from their own configs; no folder says so."""
    convert("import", "--llm", published / decoder, "--vision", published / tower, "--output", tmp_path / "ckpt")
    _check_tower(publishers.tensors_of(published / tower), checkpoint.read_tensors(tmp_path / "ckpt"), tower)
    model = checkpoint.read_state(tmp_path / "ckpt").stage.model
    network = _in_memory(published / decoder, published / tower, tmp_path / "ckpt")
    prompt = logits.make_probe_prompt(model, 261, tiles=(1, 5, 2))
    mean, std = (torch.tensor(one).view(3, 1, 1) for one in IMAGE_NORMS[tower.lower()])
    pixels = (prompt.tiles.float() / 255 - mean) / std
    with torch.no_grad():
        wanted = network(input_ids=prompt.tokens, pixel_values=pixels).logits[0]
    length = prompt.tokens.shape[1] // 2 * 2
    prompt, wanted = dataclasses.replace(prompt, tokens=prompt.tokens[:, :length]), wanted[:length]
    assert wanted.abs().max() > 1
    run_ranks(2, _all_layouts, str(tmp_path / "ckpt"), prompt, wanted, LAYOUTS)
    export = ["export", "--checkpoint", str(tmp_path / "ckpt"), "--output", str(tmp_path / "hf"), "--format"]
    assert cli.main([*export, "internvl"]) == 1
    assert f"model_type={tower.lower()}: this format's tower is an InternViT" in capsys.readouterr().err
    assert not (tmp_path / "hf").exists()
    convert(*export, "llm")
    publishers.same_bytes(publishers.tensors_of(published / decoder), publishers.tensors_of(tmp_path / "hf"))


_MCORE_NAMES = {
    "embeddings.patch_embedding": "conv1",
    "embeddings.position_embedding": "position_embeddings",
    "embeddings.class_embedding": "class_token",
    "pre_layrnorm": "ln_pre",
    "post_layernorm": "ln_post",
    "encoder.layers.": "decoder.layers.",
    "self_attn.out_proj": "self_attention.linear_proj",
    "mlp.fc": "mlp.linear_fc",
    "layer_norm1.": "self_attention.linear_qkv.layer_norm_",
    "layer_norm2.": "mlp.linear_fc1.layer_norm_",
}
"""Of SigLIP's and CLIP's names. Written out here once more, not taken from the package."""
_UNUSED = {"SigLIP": ("head.",), "CLIP": ("post_layernorm.", "encoder.layers.2.")}


def _check_tower(hf: Mapping[str, torch.Tensor], mcore: Mapping[str, torch.Tensor], tower: str) -> None:
    """Every tensor by name: logits cannot see a bias of the keys, which moves all scores of a query alike."""
    left = {name.removeprefix("vision_model."): mcore[name] for name in mcore if name.startswith("vision_model.")}
    heads = publishers.vision_settings()["num_attention_heads"]
    for name in [one for one in left if ".linear_qkv." in one and "layer_norm" not in one]:
        joined = left.pop(name)
        parts = joined.unflatten(0, (heads, 3, joined.shape[0] // (3 * heads))).transpose(0, 1).flatten(1, 2)
        for part, one in zip("qkv", parts, strict=True):
            left[name.replace("linear_qkv", f"{part}_proj")] = one
    for name, one in hf.items():
        name = name.removeprefix("vision_model.")
        if name.startswith(_UNUSED[tower]):
            continue
        for old, new in {**_MCORE_NAMES, "self_attn.": "self_attention."}.items():
            name = name.replace(old, new)
        assert torch.equal(left.pop(name).view_as(one), one), name
    assert not left, sorted(left)


def _in_memory(decoder: Path, tower: Path, ckpt: Path) -> Any:
    """Stock InternVL of published parts, with the projector of a checkpoint."""
    from transformers import (
        AutoConfig,
        AutoModel,
        AutoModelForCausalLM,
        InternVLConfig,
        InternVLForConditionalGeneration,
    )

    clip = tower.name == "CLIP"
    text = AutoModelForCausalLM.from_pretrained(decoder, dtype=torch.float32)
    config = InternVLConfig(
        text_config=text.config,
        vision_config=AutoConfig.from_pretrained(tower),
        image_token_id=261,
        image_seq_length=4,
        vision_feature_layer=-2 if clip else -1,
        vision_feature_select_strategy="default" if clip else "full",
        tie_word_embeddings=text.config.tie_word_embeddings,
    )
    network = InternVLForConditionalGeneration._from_config(config, attn_implementation="eager").float().eval()
    network.model.language_model.load_state_dict(text.model.state_dict())
    network.lm_head.load_state_dict(text.lm_head.state_dict())
    network.model.vision_tower.load_state_dict(AutoModel.from_pretrained(tower).state_dict())
    tensors = checkpoint.read_tensors(ckpt)
    names = {"layer_norm": "pre_proj_layernorm", "linear_1": "encoder.linear_fc1", "linear_2": "encoder.linear_fc2"}
    for hf_name, name in names.items():
        state = {kind: tensors[f"vision_projection.{name}.{kind}"] for kind in ("weight", "bias")}
        getattr(network.model.multi_modal_projector, hf_name).load_state_dict(state)
    return network


@pytest.mark.slow
@pytest.mark.parametrize("decoder", publishers.DECODERS)
def test_a_decoder_alone_equals_stock_and_comes_back(published: Path, tmp_path: Path, decoder: str) -> None:
    convert("import", "--llm", published / decoder, "--output", tmp_path / "ckpt")
    convert("export", "--checkpoint", tmp_path / "ckpt", "--output", tmp_path / "hf", "--format", "llm")
    publishers.same_bytes(publishers.tensors_of(published / decoder), publishers.tensors_of(tmp_path / "hf"))
    kinds = [
        json.loads((one / "config.json").read_text())["model_type"] for one in (published / decoder, tmp_path / "hf")
    ]
    assert kinds[0] == kinds[1]
    prompt, wanted = _stock(published / decoder)
    again, same = _stock(tmp_path / "hf")
    assert torch.equal(prompt.tokens, again.tokens)
    assert torch.equal(wanted, same), "the config that was written means another model"
    run_ranks(2, _all_layouts, str(tmp_path / "ckpt"), prompt, wanted, LAYOUTS)


@pytest.mark.slow
@pytest.mark.parametrize("tower", INTERN)
def test_long_vita_holds_every_intern_vit(published: Path, tmp_path: Path, tower: str) -> None:
    """Its names and config, and back; what stock code cannot load is compared by tensor and by our own logits."""
    settings = {**publishers.vision_settings(), **publishers.TOWERS[tower]}
    remote = tmp_path / "remote"
    shutil.copytree(published / tower, remote)
    publishers.to_remote_names(remote, settings)
    convert("import", "--llm", published / "qwen2", "--vision", remote, "--output", tmp_path / "ckpt")
    convert("import", "--llm", published / "qwen2", "--vision", published / tower, "--output", tmp_path / "native")
    assert checkpoint.tensor_digests(tmp_path / "ckpt") == checkpoint.tensor_digests(tmp_path / "native")
    folder = _with_long_vitas_projector(tmp_path)
    convert("export", "--checkpoint", folder, "--output", tmp_path / "lv", "--format", "long_vita")
    names = load_file(tmp_path / "lv" / "model.safetensors")
    for name, one in publishers.tensors_of(remote).items():
        assert torch.equal(names.pop("model.vision_model." + name), one), name
    convert("import", "--model", tmp_path / "lv", "--output", tmp_path / "again")
    assert checkpoint.tensor_digests(tmp_path / "again") == checkpoint.tensor_digests(folder)
    assert checkpoint.read_state(tmp_path / "again").stage.model == checkpoint.read_state(folder).stage.model
    convert("export", "--checkpoint", folder, "--output", tmp_path / "hf", "--format", "internvl")
    prompt, wanted = _stock(tmp_path / "hf")
    run_ranks(2, _all_layouts, str(tmp_path / "again"), prompt, wanted, LAYOUTS)


def _with_long_vitas_projector(root: Path) -> Path:
    """The joined model with Long-VITA's projector: no biases, as wide as the tower."""
    from megatron_vita.config import ProjectorConfig

    source, state = checkpoint.read_tensors(root / "ckpt"), checkpoint.read_state(root / "ckpt")
    projector = ProjectorConfig(ffn_hidden_size=60, bias=False)
    model = dataclasses.replace(state.stage.model, projector=projector)
    generator = torch.Generator().manual_seed(4)
    tensors = {name: source[name] for name in source if "encoder.linear_fc" not in name}
    for number, shape in ((1, (60, 240)), (2, (72, 60))):
        tensors[f"vision_projection.encoder.linear_fc{number}.weight"] = 0.1 * torch.randn(shape, generator=generator)
    state = dataclasses.replace(state, stage=dataclasses.replace(state.stage, model=model))
    return checkpoint.write_tensors(root / "long", 0, tensors, state, root / "ckpt/iter_0000000/tokenizer")


def test_a_llama_keeps_its_own_tokenizer_alone_and_gets_chatml_with_a_tower(published: Path, tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    shutil.copytree(published / "llama", tmp_path / "llama")
    values = json.loads((tmp_path / "llama" / "tokenizer.json").read_text())
    for entry, name in zip(values["added_tokens"], ("<s>", "</s>", "<unk>"), strict=True):
        entry["content"] = name
    (tmp_path / "llama" / "tokenizer.json").write_text(json.dumps(values))
    own = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>", "chat_template": "{{ messages }}"}
    (tmp_path / "llama" / "tokenizer_config.json").write_text(json.dumps(own))
    for name in ("config.json", "generation_config.json"):
        values = json.loads((tmp_path / "llama" / name).read_text())
        (tmp_path / "llama" / name).write_text(json.dumps({**values, "bos_token_id": 256, "eos_token_id": 257}))
    convert("import", "--llm", tmp_path / "llama", "--output", tmp_path / "alone")
    convert("export", "--checkpoint", tmp_path / "alone", "--output", tmp_path / "back", "--format", "llm")
    assert json.loads((tmp_path / "back" / "generation_config.json").read_text())["eos_token_id"] == 257
    assert json.loads((tmp_path / "back" / "config.json").read_text())["eos_token_id"] == 257
    assert json.loads((tmp_path / "back" / "tokenizer_config.json").read_text()) == own
    assert not (tmp_path / "back" / "chat_template.jinja").exists()
    tower = published / "InternViT-300M"
    convert("import", "--llm", tmp_path / "llama", "--vision", tower, "--output", tmp_path / "ckpt")
    convert("export", "--checkpoint", tmp_path / "ckpt", "--output", tmp_path / "hf", "--format", "internvl")
    tokenizer = Tokenizer.from_file(str(tmp_path / "hf" / "tokenizer.json"))
    added = [tokenizer.token_to_id(one) for one in ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<img>", "<video>")]
    assert added == [259, 260, 261, 262, 278]
    assert json.loads((tmp_path / "hf" / "generation_config.json").read_text())["eos_token_id"] == [261, 257]
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["image_token_id"] == 264


@pytest.mark.slow
@pytest.mark.parametrize("family", ["siglip", "clip"])
def test_a_tower_inside_a_model_of_pictures_and_texts(published: Path, tmp_path: Path, family: str) -> None:
    """As published: a text half beside it, a prefix, no defaults in the config, pixels as the processor says."""
    from transformers import CLIPConfig, CLIPModel, SiglipConfig, SiglipModel

    small = {"hidden_size": 60, "intermediate_size": 88, "num_hidden_layers": 3, "num_attention_heads": 3}
    text = {**small, "vocab_size": 99, "projection_size": 60}
    vision = {**small, "image_size": 16, "patch_size": 4}
    kind, config = (SiglipModel, SiglipConfig) if family == "siglip" else (CLIPModel, CLIPConfig)
    network = kind(config(text_config=text, vision_config=vision))
    publishers.randomise(network, 9)
    network.save_pretrained(tmp_path / "both")
    values = json.loads((tmp_path / "both" / "config.json").read_text())
    values["vision_config"] = {**vision, "model_type": f"{family}_vision_model"}
    (tmp_path / "both" / "config.json").write_text(json.dumps(values))
    flags = ["--llm", published / "qwen2", "--vision", tmp_path / "both"]
    convert("import", *flags, "--output", tmp_path / "ckpt")
    tower = checkpoint.read_state(tmp_path / "ckpt").stage.model.vision
    assert tower is not None
    assert (tower.image_norm, tower.norm_epsilon) == (family, 1e-6 if family == "siglip" else 1e-5)
    tensors, stock = checkpoint.read_tensors(tmp_path / "ckpt"), publishers.tensors_of(tmp_path / "both")
    name = "vision_model.encoder.layers.1.mlp.fc1.weight"
    assert torch.equal(tensors["vision_model.decoder.layers.1.mlp.linear_fc1.weight"], stock[name])
    blocks = {one.split(".")[3] for one in tensors if one.startswith("vision_model.decoder.layers.")}
    assert len(blocks) == (3 if family == "siglip" else 2)
    processor = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
    (tmp_path / "both" / "preprocessor_config.json").write_text(json.dumps(processor))
    convert("import", *flags, "--output", tmp_path / "other")
    state = checkpoint.read_state(tmp_path / "other")
    assert state.stage.model.vision == dataclasses.replace(tower, image_norm="imagenet")
    assert state.preprocess is not None
    assert state.preprocess.image_norm == "imagenet"


@pytest.mark.slow
def test_native_internvl_is_normalised_as_its_processor_says(published: Path, tmp_path: Path) -> None:
    publishers.write_internvl(tmp_path / "hf")
    processor = {"size": 16, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (tmp_path / "hf" / "preprocessor_config.json").write_text(json.dumps(processor))
    convert("import", "--model", tmp_path / "hf", "--output", tmp_path / "ckpt")
    prompt, wanted = _stock(tmp_path / "hf")
    run_ranks(2, _all_layouts, str(tmp_path / "ckpt"), prompt, wanted, LAYOUTS)
