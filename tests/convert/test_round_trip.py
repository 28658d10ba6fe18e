"""Hugging Face -> checkpoint -> Hugging Face: the same bytes, and the same logits in stock transformers."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_vita import checkpoint
from megatron_vita.config import ModelConfig, ParallelConfig, ProjectorConfig, StageConfig
from megatron_vita.convert import cli, logits, open_model
from megatron_vita.convert.logits import ProbePrompt
from megatron_vita.data.spec import PreprocessSpec
from tests.convert import publishers
from tests.ranks import run_ranks

pytest.importorskip("transformers")


def convert(*arguments: object, expect: int = 0) -> None:
    assert cli.main([str(one) for one in arguments]) == expect


def verify_logits(a: Path, b: Path) -> None:
    """In a child: a process that has had a world of its own can no longer fork ranks."""
    run_ranks(1, convert, "verify", a, b, "--logits")


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """llm; vit and vit_remote, one tower under two publishers' names; joined, their checkpoint; hf, its export."""
    root = tmp_path_factory.mktemp("parts")
    publishers.write_qwen2(root / "llm")
    publishers.write_intern_vit(root / "vit", remote=False)
    publishers.write_intern_vit(root / "vit_remote", remote=True)
    convert("import", "--llm", root / "llm", "--vision", root / "vit_remote", "--output", root / "joined")
    convert("export", "--checkpoint", root / "joined", "--output", root / "hf", "--format", "internvl")
    return root


@pytest.mark.slow
@pytest.mark.parametrize("tied", [False, True])
def test_internvl_comes_back_byte_for_byte(tmp_path: Path, tied: bool) -> None:
    publishers.write_internvl(tmp_path / "hf", tied=tied)
    convert("import", "--model", tmp_path / "hf", "--output", tmp_path / "ckpt")
    convert(
        "export", "--checkpoint", tmp_path / "ckpt", "--output", tmp_path / "back", "--format", "internvl",
        "--max-shard-gb", "0.0002",
    )  # fmt: skip
    assert len(list((tmp_path / "back").glob("*.safetensors"))) > 2
    publishers.same_bytes(publishers.tensors_of(tmp_path / "hf"), publishers.tensors_of(tmp_path / "back"))
    verify_logits(tmp_path / "ckpt", tmp_path / "back")
    again = publishers.tensors_of(tmp_path / "back")
    in_memory = {_state_dict_spelling(name): one.clone() for name, one in again.items()}
    for path in (tmp_path / "back").glob("model*"):
        path.unlink()
    save_file(in_memory, tmp_path / "back" / "model.safetensors")
    convert("verify", tmp_path / "hf", tmp_path / "back")


def _state_dict_spelling(name: str) -> str:
    name = name.replace("language_model.model.", "model.language_model.")
    name = name.removeprefix("language_model.") if name == "language_model.lm_head.weight" else name
    return "model." + name if name.startswith(("vision_tower", "multi_modal_projector")) else name


@pytest.mark.parametrize(
    ("dtype", "changes"),
    [
        (torch.bfloat16, {}),
        (torch.float32, {"tie_word_embeddings": True, "num_key_value_heads": 3}),
        (torch.float16, {"num_key_value_heads": 6}),
    ],
)
def test_decoder_comes_back_byte_for_byte(tmp_path: Path, dtype: torch.dtype, changes: dict[str, Any]) -> None:
    publishers.write_qwen2(tmp_path / "hf", dtype=dtype, **changes)
    convert("import", "--llm", tmp_path / "hf", "--output", tmp_path / "ckpt")
    convert("export", "--checkpoint", tmp_path / "ckpt", "--output", tmp_path / "back", "--format", "llm")
    publishers.same_bytes(publishers.tensors_of(tmp_path / "hf"), publishers.tensors_of(tmp_path / "back"))
    convert("verify", tmp_path / "hf", tmp_path / "back", "--logits")
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert config["dtype"] == str(dtype).removeprefix("torch.")


def test_both_spellings_of_a_tower_are_one_tower(parts: Path, tmp_path: Path) -> None:
    convert("import", "--llm", parts / "llm", "--vision", parts / "vit", "--output", tmp_path / "ckpt")
    assert checkpoint.tensor_digests(tmp_path / "ckpt") == checkpoint.tensor_digests(parts / "joined")


def test_parts_keep_their_values_and_the_projector_follows_its_seed(parts: Path, tmp_path: Path) -> None:
    exported, llm = publishers.tensors_of(parts / "hf"), publishers.tensors_of(parts / "llm")
    for name, one in llm.items():
        assert torch.equal(exported["language_model." + name], one), name
    for name, one in publishers.tensors_of(parts / "vit").items():
        assert torch.equal(exported["vision_tower." + name], one), name
    digests = checkpoint.tensor_digests(parts / "joined")
    for seed, same in ((1234, True), (7, False)):
        output = tmp_path / str(seed)
        convert("import", "--llm", parts / "llm", "--vision", parts / "vit", "--output", output, "--seed", seed)
        other = checkpoint.tensor_digests(output)
        assert {name for name in digests if other[name] != digests[name]} == (
            set() if same else {f"vision_projection.encoder.linear_fc{n}.weight" for n in (1, 2)}
        )


def test_special_tokens_take_spare_rows_or_mean_rows(parts: Path, tmp_path: Path) -> None:
    # 259 ids and 17 new ones; 307 rows hold them
    embedding = "language_model.embedding.word_embeddings.weight"
    assert checkpoint.read_tensors(parts / "joined").shape(embedding) == (publishers.VOCAB, 72)
    publishers.write_qwen2(tmp_path / "short", vocab_size=259)
    convert("import", "--llm", tmp_path / "short", "--vision", parts / "vit", "--output", tmp_path / "ckpt")
    tensors = checkpoint.read_tensors(tmp_path / "ckpt")
    old = publishers.tensors_of(tmp_path / "short")
    for name, source in (
        (embedding, "model.embed_tokens.weight"),
        ("language_model.output_layer.weight", "lm_head.weight"),
    ):
        rows = tensors[name]
        assert rows.shape == (276, 72)
        assert torch.equal(rows[:259], old[source])
        torch.testing.assert_close(rows[259:], old[source].mean(0).expand(17, -1))
    assert checkpoint.read_state(tmp_path / "ckpt").stage.model.vocab_size == 276
    names = json.loads((tmp_path / "ckpt/iter_0000000/tokenizer/tokenizer.json").read_text())["added_tokens"]
    assert {one["content"]: one["id"] for one in names}["<IMG_CONTEXT>"] == 261


def test_the_exported_folder_is_complete_for_stock_transformers(parts: Path) -> None:
    from transformers import (
        AutoConfig,
        AutoImageProcessor,
        AutoModelForImageTextToText,
        AutoTokenizer,
        GenerationConfig,
    )

    folder = parts / "hf"
    _, report = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    config = AutoConfig.from_pretrained(folder)
    assert config.vision_config.attention_bias
    assert config.text_config.rope_parameters["rope_theta"] == 1e6
    assert config.image_seq_length == 4
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.context_image_token == "<IMG_CONTEXT>"
    assert tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>") == config.image_token_id
    parts_ = [{"type": "image"}, {"type": "text", "text": "what?"}]
    text = tokenizer.apply_chat_template([{"role": "user", "content": parts_}], tokenize=False)
    assert "<IMG_CONTEXT>\nwhat?" in text
    images = AutoImageProcessor.from_pretrained(folder)
    assert tuple(images.image_mean) == (0.485, 0.456, 0.406)
    assert (images.size["height"], images.crop_to_patches, images.max_patches) == (16, True, 12)
    ends = GenerationConfig.from_pretrained(folder).eos_token_id
    assert ends == [tokenizer.convert_tokens_to_ids(one) for one in ("<|im_end|>", "<|endoftext|>")]
    for name in ("video_preprocessor_config.json", "processor_config.json", "README.md"):
        assert (folder / name).is_file()


def _two_rank_logits(folder: str, prompt: ProbePrompt, wanted: torch.Tensor) -> None:
    import numpy as np

    from megatron_vita.layout import SequenceLayout, TileRoutes
    from megatron_vita.models.build import build_model
    from megatron_vita.parallel.groups import build_groups, destroy_groups

    length = prompt.tokens.shape[1]
    for parallel in (
        ParallelConfig(tensor_model_parallel_size=2),
        ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True),
        ParallelConfig(context_parallel_size=2),
    ):
        groups = build_groups(parallel)
        model = checkpoint.read_state(folder).stage.model
        chunks = build_model(StageConfig(model=model, parallel=parallel), groups, dtype=torch.float32)
        checkpoint.load_weights(folder, chunks)
        layout = SequenceLayout((length,), cp=groups.cp_size, sp=groups.sequence_shards)
        routes = TileRoutes(layout, np.array(prompt.first_token, dtype=np.int64), 4, tp=groups.tp_size)
        mine = torch.from_numpy(layout.local_positions(groups.cp_rank))
        with torch.no_grad():
            got = chunks[0].eval()(
                tokens=prompt.tokens[:, mine],
                positions=mine[None],
                layout=layout,
                routes=routes,
                tiles=prompt.tiles[list(routes.tiles_of(groups.group_rank))],
                logits_indices=torch.arange(len(mine)),
            )
        torch.testing.assert_close(got, wanted[mine], rtol=0, atol=1e-4)
        destroy_groups()


@pytest.mark.slow
@pytest.mark.parametrize("tied", [False, True])
def test_logits_equal_stock_transformers_in_several_layouts(tmp_path: Path, tied: bool) -> None:
    publishers.write_internvl(tmp_path / "hf", tied=tied)
    convert("import", "--model", tmp_path / "hf", "--output", tmp_path / "ckpt")
    opened = open_model(tmp_path / "hf")
    prompt = logits.make_probe_prompt(opened.model, 261, tiles=(1, 5, 2))
    wanted = logits.stock_logits(opened, prompt)
    assert wanted.abs().max() > 1
    length = prompt.tokens.shape[1] // 2 * 2  # two ranks share the row
    prompt = dataclasses.replace(prompt, tokens=prompt.tokens[:, :length])
    run_ranks(2, _two_rank_logits, str(tmp_path / "ckpt"), prompt, wanted[:length])


def long_vita_checkpoint(root: Path, parts: Path, width: int = 60) -> tuple[Path, ModelConfig]:
    """The joined model with Long-VITA's projector: no biases, as wide as the tower."""
    joined = checkpoint.read_tensors(parts / "joined")
    state = checkpoint.read_state(parts / "joined")
    model = dataclasses.replace(state.stage.model, projector=ProjectorConfig(ffn_hidden_size=width, bias=False))
    generator = torch.Generator().manual_seed(4)
    tensors = {name: joined[name] for name in joined if "encoder.linear_fc" not in name}
    for number, shape in ((1, (width, 240)), (2, (72, width))):
        tensors[f"vision_projection.encoder.linear_fc{number}.weight"] = 0.1 * torch.randn(shape, generator=generator)
    state = dataclasses.replace(state, stage=dataclasses.replace(state.stage, model=model))
    tokenizer = parts / "joined/iter_0000000/tokenizer"
    return checkpoint.write_tensors(root, 0, tensors, state, tokenizer), model


@pytest.mark.slow
def test_long_vita_names_round_trip_and_stock_code_runs_it_exactly(parts: Path, tmp_path: Path) -> None:
    folder, model = long_vita_checkpoint(tmp_path / "ckpt", parts)
    convert("export", "--checkpoint", folder, "--output", tmp_path / "lv", "--format", "long_vita")
    names = load_file(tmp_path / "lv" / "model.safetensors")
    assert names["model.vision_projection.mlp.0.weight"].shape == (60, 240)
    assert "model.vision_model.encoder.layers.1.attn.qkv.bias" in names
    convert("import", "--model", tmp_path / "lv", "--output", tmp_path / "again")
    assert checkpoint.tensor_digests(tmp_path / "again") == checkpoint.tensor_digests(folder)
    assert checkpoint.read_state(tmp_path / "again").stage.model == model
    # the stock projector is wider: the rest is zeros, which change nothing
    convert("export", "--checkpoint", folder, "--output", tmp_path / "internvl", "--format", "internvl")
    prompt = logits.make_probe_prompt(model, 261, tiles=(2, 1))
    stock = logits.stock_logits(open_model(tmp_path / "internvl"), prompt)
    run_ranks(1, _compare_ours, folder, prompt, stock)
    # and the folder remembers the projector without them
    convert("verify", folder, tmp_path / "internvl")
    convert("import", "--model", tmp_path / "internvl", "--output", tmp_path / "narrow")
    assert checkpoint.read_state(tmp_path / "narrow").stage.model == model
    convert("export", "--checkpoint", tmp_path / "narrow", "--output", tmp_path / "back", "--format", "long_vita")
    publishers.same_bytes(names, publishers.tensors_of(tmp_path / "back"))


def _compare_ours(folder: Path, prompt: ProbePrompt, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(logits.our_logits(open_model(folder), prompt), wanted, rtol=0, atol=1e-4)


def test_a_projector_without_room_is_refused(parts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, _ = long_vita_checkpoint(tmp_path / "wide", parts, width=80)
    convert("export", "--checkpoint", folder, "--output", tmp_path / "hf", "--format", "internvl", expect=1)
    assert "no room" in capsys.readouterr().err
    convert("export", "--checkpoint", parts / "joined", "--output", tmp_path / "hf", "--format", "long_vita", expect=1)
    assert "no biases" in capsys.readouterr().err
    assert not (tmp_path / "hf").exists()


def test_inference_opens_an_exported_folder(parts: Path) -> None:
    opened = open_model(parts / "hf")
    spec, tensors = opened.preprocess, opened.tensors
    assert spec == PreprocessSpec(image_size=16, patch_size=4)
    assert opened.model == checkpoint.read_state(parts / "joined").stage.model
    (parts / "hf" / "megatron_vita.json").rename(parts / "hf" / "aside.json")
    assert open_model(parts / "hf").preprocess == spec  # from the stock files alone
    (parts / "hf" / "aside.json").rename(parts / "hf" / "megatron_vita.json")
    joined = checkpoint.read_tensors(parts / "joined")
    assert all(torch.equal(tensors[name], joined[name]) for name in joined)
