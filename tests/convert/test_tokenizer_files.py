"""Tokenizer, chat template and generation settings, from the publisher's folder to an exported one."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_vita import checkpoint
from megatron_vita.convert import cli, open_model
from megatron_vita.convert.text_files import image_token
from megatron_vita.data.text.tokenizer import CHAT_TOKENS, DEFAULT_TEMPLATE, VITA_TOKENS
from megatron_vita.errors import CheckpointError
from tests.convert import publishers

pytest.importorskip("transformers")

TOOLS = "{% for m in messages %}{{ tools }}{{ m.role }}: {{ m.content }}{% endfor %}"
SEES = "{% for m in messages %}{{ m.role }}: {{ m.content }}<IMG_CONTEXT>{% endfor %}"
SAMPLING = {"do_sample": True, "temperature": 0.6, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.05}
ENDS = {"bos_token_id": 256, "eos_token_id": [258, 256], "pad_token_id": 256}
PICTURES = ("<img>", "</img>", "<IMG_CONTEXT>", "<video>")


def convert(*arguments: object, expect: int = 0) -> None:
    assert cli.main([str(one) for one in arguments]) == expect


def change(path: Path, **values: Any) -> None:
    old = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps({**old, **values}))


def read(path: Path) -> dict[str, Any]:
    values = json.loads(path.read_text())
    assert isinstance(values, dict)
    return values


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """llm and vit; ivl, a native InternVL; ivl_ckpt, its checkpoint; all for copying."""
    root = tmp_path_factory.mktemp("good")
    publishers.write_qwen2(root / "llm")
    publishers.write_intern_vit(root / "vit", remote=True)
    publishers.write_internvl(root / "ivl")
    convert("import", "--model", root / "ivl", "--output", root / "ivl_ckpt")
    return root


def _in_config(folder: Path) -> None:
    change(folder / "tokenizer_config.json", chat_template=TOOLS)


def _in_file(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text(TOOLS)


def _several(folder: Path) -> None:
    change(
        folder / "tokenizer_config.json",
        chat_template=[{"name": "default", "template": TOOLS}, {"name": "tool_use", "template": TOOLS + "!"}],
    )


def _folder_of_several(folder: Path) -> None:
    _in_file(folder)
    (folder / "chat_templates").mkdir()
    (folder / "chat_templates" / "tool_use.jinja").write_text(TOOLS + "!")


@pytest.mark.slow
@pytest.mark.parametrize("place", [_in_config, _in_file, _several, _folder_of_several])
def test_a_decoder_keeps_template_and_generation_settings(
    place: Callable[[Path], None], good: Path, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer, GenerationConfig

    shutil.copytree(good / "llm", tmp_path / "llm")
    place(tmp_path / "llm")
    (tmp_path / "llm" / "generation_config.json").write_text(json.dumps({**ENDS, **SAMPLING}))
    change(tmp_path / "llm" / "config.json", bos_token_id=256, eos_token_id=258)
    convert("import", "--llm", tmp_path / "llm", "--output", tmp_path / "ckpt")
    # as training saves: what is carried lies in the tokenizer folder, which is copied from step to step
    state = checkpoint.read_state(tmp_path / "ckpt")
    tensors = checkpoint.read_tensors(tmp_path / "ckpt")
    tokenizer = tmp_path / "ckpt" / "iter_0000000" / "tokenizer"
    checkpoint.write_tensors(tmp_path / "later", 0, {name: tensors[name] for name in tensors}, state, tokenizer)
    convert("export", "--checkpoint", tmp_path / "later", "--output", tmp_path / "out", "--format", "llm")
    old, new = (AutoTokenizer.from_pretrained(tmp_path / name) for name in ("llm", "out"))
    assert old.chat_template == new.chat_template
    turns = [{"role": "user", "content": "hi"}]
    assert old.apply_chat_template(turns, tokenize=False) == new.apply_chat_template(turns, tokenize=False)
    settings = [GenerationConfig.from_pretrained(tmp_path / name).to_diff_dict() for name in ("llm", "out")]
    assert settings[0] == settings[1] == {**settings[0], **SAMPLING}
    config = read(tmp_path / "out" / "config.json")
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (256, 258, None)
    sums = (tmp_path / "out" / "XXH128SUMS").read_text().split("\n")
    assert sum("chat_template" in line for line in sums) == len(list((tmp_path / "out").rglob("*.jinja")))


def test_llama_alone_keeps_its_ends(tmp_path: Path) -> None:
    publishers.write_decoder(tmp_path / "llama", model_type="llama")
    _llama_tokenizer(tmp_path / "llama")
    ids = {"bos_token_id": 256, "eos_token_id": [257, 258]}
    change(tmp_path / "llama" / "config.json", **ids)
    (tmp_path / "llama" / "generation_config.json").write_text(json.dumps({**ids, "temperature": 0.6}))
    convert("import", "--llm", tmp_path / "llama", "--output", tmp_path / "ckpt")
    convert("export", "--checkpoint", tmp_path / "ckpt", "--output", tmp_path / "out", "--format", "llm")
    assert read(tmp_path / "out" / "generation_config.json") == {**ids, "temperature": 0.6}
    config = read(tmp_path / "out" / "config.json")
    assert {key: config[key] for key in ids} == ids
    assert read(tmp_path / "out" / "tokenizer_config.json") == read(tmp_path / "llama" / "tokenizer_config.json")
    assert not (tmp_path / "out" / "chat_template.jinja").exists()


def _llama_tokenizer(folder: Path) -> None:
    values = read(folder / "tokenizer.json")
    for token, name in zip(values["added_tokens"], ("<|begin_of_text|>", "<|eot_id|>", "<|eom_id|>"), strict=True):
        token["content"] = name
    (folder / "tokenizer.json").write_text(json.dumps(values))
    config = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>", "chat_template": TOOLS}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def test_a_decoder_that_gets_a_tower_ends_its_turns(
    good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The publisher's template knows no pictures: the package's replaces it, is logged, and ends turns alike."""
    shutil.copytree(good / "llm", tmp_path / "llm")
    _in_config(tmp_path / "llm")
    (tmp_path / "llm" / "generation_config.json").write_text(json.dumps({"eos_token_id": 256, **SAMPLING}))
    convert("import", "--llm", tmp_path / "llm", "--vision", good / "vit", "--output", tmp_path / "ckpt")
    assert "chat template (tokenizer_config.json) knows no pictures" in capsys.readouterr().err
    convert("export", "--checkpoint", tmp_path / "ckpt", "--output", tmp_path / "hf", "--format", "internvl")
    assert (tmp_path / "hf" / "chat_template.jinja").read_text() == DEFAULT_TEMPLATE.read_text()
    assert "chat_template" not in read(tmp_path / "hf" / "tokenizer_config.json")
    assert read(tmp_path / "hf" / "generation_config.json") == {**SAMPLING, "eos_token_id": [258, 256]}


def test_a_trained_decoder_ends_its_turns(good: Path, tmp_path: Path) -> None:
    """A base model ends texts only; what was trained on turns must stop after one."""
    shutil.copytree(good / "llm", tmp_path / "llm")
    (tmp_path / "llm" / "generation_config.json").write_text(json.dumps({"eos_token_id": 256}))
    convert("import", "--llm", tmp_path / "llm", "--output", tmp_path / "ckpt")
    state, tensors = checkpoint.read_state(tmp_path / "ckpt"), checkpoint.read_tensors(tmp_path / "ckpt")
    weights = {name: tensors[name] for name in tensors}
    for step, ends in ((0, 256), (7, [258, 256])):
        root, folder = tmp_path / f"step{step}", tmp_path / f"hf{step}"
        state = dataclasses.replace(state, iteration=step)
        checkpoint.write_tensors(root, step, weights, state, tmp_path / "ckpt/iter_0000000/tokenizer")
        convert("export", "--checkpoint", root, "--output", folder, "--format", "llm")
        assert read(folder / "generation_config.json")["eos_token_id"] == ends
        assert read(folder / "config.json")["eos_token_id"] == ends


def test_pictures_stand_where_the_config_says(good: Path, tmp_path: Path) -> None:
    shutil.copytree(good / "ivl", tmp_path / "ivl")
    publishers.write_tokenizer(tmp_path / "ivl")
    without, checkpoint_model = open_model(tmp_path / "ivl"), open_model(good / "ivl_ckpt")
    assert image_token(without, checkpoint_model) == image_token(checkpoint_model) == 261
    blind = dataclasses.replace(without, image_token_id=None)
    assert image_token(blind, checkpoint_model) == 261
    with pytest.raises(CheckpointError, match=f"{tmp_path / 'ivl'}: no tokenizer there has <IMG_CONTEXT>"):
        image_token(blind)


@pytest.mark.parametrize("name", ["chat_template.jinja", "tokenizer_config.json", "chat_template.json"])
def test_a_template_that_knows_pictures_stays(name: str, good: Path, tmp_path: Path) -> None:
    shutil.copytree(good / "ivl", tmp_path / "ivl")
    if name.endswith(".jinja"):
        (tmp_path / "ivl" / name).write_text(SEES)
    else:
        change(tmp_path / "ivl" / name, chat_template=SEES)
    convert("import", "--model", tmp_path / "ivl", "--output", tmp_path / "ckpt")
    # where training looks for it
    assert (tmp_path / "ckpt/iter_0000000/tokenizer/chat_template.jinja").read_text() == SEES
    convert("export", "--checkpoint", tmp_path / "ckpt", "--output", tmp_path / "hf", "--format", "internvl")
    assert (tmp_path / "hf" / "chat_template.jinja").read_text() == SEES
    assert not (tmp_path / "hf" / "chat_template.json").exists()


def test_the_token_of_pictures_is_the_one_in_the_config(
    good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(good / "ivl", tmp_path / "shift")
    publishers.write_tokenizer(tmp_path / "shift", extra=("<a>", *PICTURES))
    convert("import", "--model", tmp_path / "shift", "--output", tmp_path / "ckpt", expect=1)
    error = capsys.readouterr().err
    assert "<IMG_CONTEXT> is 262, but" in error
    assert f"{tmp_path / 'shift' / 'config.json'} says image_token_id=261" in error
    # the fix that the message names
    convert("import", "--model", tmp_path / "shift", "--output", tmp_path / "ckpt", "--tokenizer", good / "ivl")
    publishers.write_tokenizer(tmp_path / "shift")
    convert("import", "--model", tmp_path / "shift", "--output", tmp_path / "other", expect=1)
    assert "<IMG_CONTEXT> is missing, but" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (("<a>", *PICTURES), "'<IMG_CONTEXT>' is 262, but 261 in the model's own tokenizer"),
        (
            (*PICTURES, *(f"<x{number}>" for number in range(50))),
            "highest id is 312, but the model's vocabulary has 307",
        ),
    ],
)
def test_another_models_tokenizer_is_not_exported(
    extra: tuple[str, ...], message: str, good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    publishers.write_tokenizer(tmp_path / "tokenizer", extra=extra)
    export = [
        "export",
        "--checkpoint",
        good / "ivl_ckpt",
        "--format",
        "internvl",
        "--tokenizer",
        tmp_path / "tokenizer",
    ]
    convert(*export, "--output", tmp_path / "hf", expect=1)
    assert message in capsys.readouterr().err
    assert not (tmp_path / "hf").exists()


def test_tokens_without_rows_are_not_imported(good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    publishers.write_tokenizer(tmp_path / "big", extra=tuple(f"<x{number}>" for number in range(100)))
    flags = ["--llm", good / "llm", "--tokenizer", tmp_path / "big"]
    convert("import", *flags, "--output", tmp_path / "ckpt", expect=1)
    assert "its highest id is 358, but the model's vocabulary has 307 rows" in capsys.readouterr().err
    # tokens that were added get rows together with those of the package
    convert("import", *flags, "--vision", good / "vit", "--output", tmp_path / "ckpt")
    assert checkpoint.read_state(tmp_path / "ckpt").stage.model.vocab_size == 376


def test_a_tokenizer_of_another_order_is_not_imported(
    good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(good / "llm", tmp_path / "other")
    values = read(tmp_path / "other" / "tokenizer.json")
    vocabulary = values["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (tmp_path / "other" / "tokenizer.json").write_text(json.dumps(values))
    flags = ["--llm", good / "llm", "--tokenizer", tmp_path / "other"]
    convert("import", *flags, "--output", tmp_path / "ckpt", expect=1)
    assert "(2 tokens differ)" in capsys.readouterr().err


BAD = {
    "tokenizer.json": [
        (b"{}", "holds no model with a vocabulary"),
        (b'{"model": null}', "holds no model with a vocabulary"),
        (b'{"model": {"vocab": {"a": "b"}}}', "holds no model with a vocabulary"),
        (b'{"model": {"vocab": {"a": 0}}, "added_tokens": [{"content": "<a>"}]}', "damaged list of added tokens"),
        (b'{"model": {"vocab": {"a": 0}}, "added_tokens": null}', "damaged list of added tokens"),
    ],
    "tokenizer_config.json": [(b"{", "not readable JSON"), (b'{"chat_template": 3}', "chat_template is no text")],
    "chat_template.jinja": [(b"\xff\xfe{", "no text in UTF-8")],
    "generation_config.json": [(b"[]", "JSON object"), (b'{"eos_token_id": "</s>"}', "is no id of a token")],
}


@pytest.mark.parametrize("sees", [False, True])
@pytest.mark.parametrize(
    ("name", "number"), [(name, number) for name, cases in BAD.items() for number in range(len(cases))]
)
def test_a_damaged_file_is_named(
    name: str, number: int, sees: bool, good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content, message = BAD[name][number]
    shutil.copytree(good / "llm", tmp_path / "llm")
    (tmp_path / "llm" / name).write_bytes(content)
    flags = ["--vision", good / "vit"] if sees else []
    convert("import", "--llm", tmp_path / "llm", *flags, "--output", tmp_path / "ckpt", expect=1)
    error = capsys.readouterr().err
    assert message in error
    assert str(tmp_path / "llm" / name) in error
    assert not (tmp_path / "ckpt").exists()


def test_verify_names_a_damaged_tokenizer(good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(good / "llm", tmp_path / "llm")
    (tmp_path / "llm" / "tokenizer.json").write_text('{"model": null}')
    convert("verify", good / "llm", tmp_path / "llm", expect=1)
    assert f"{tmp_path / 'llm' / 'tokenizer.json'}: holds no model" in capsys.readouterr().err


def test_a_sentencepiece_model_is_exported_with_its_own_ids_only(tmp_path: Path) -> None:
    """What a model was trained with is no tokenizer.json: the folder that is named is held against it."""
    import io

    from sentencepiece import SentencePieceTrainer

    from megatron_vita.convert.token_ids import check_same_as_trained, read_tokens
    from tests.data.kit import tokenizer_folder

    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(["The digit is in the picture."] * 50), model_writer=model, vocab_size=300,
        hard_vocab_limit=False, minloglevel=2, byte_fallback=True, model_type="bpe",
        normalization_rule_name="identity", remove_extra_whitespaces=False,
    )  # fmt: skip
    trained = tmp_path / "t.model"
    trained.write_bytes(model.getvalue())
    (tmp_path / "same").mkdir()
    (tmp_path / "same" / "tokenizer.json").write_text(_as_tokenizer_json(trained))
    check_same_as_trained(read_tokens(tmp_path / "same"), str(trained))
    tokens = read_tokens(tokenizer_folder(tmp_path / "other"))
    with pytest.raises(CheckpointError, match=r"other ids than with .*t\.model"):
        check_same_as_trained(tokens, str(trained))
    with pytest.raises(CheckpointError, match="no tokenizer"):
        check_same_as_trained(tokens, str(tmp_path / "gone.model"))
    check_same_as_trained(tokens, str(tmp_path / "other"))


def _as_tokenizer_json(model: Path) -> str:
    """A SentencePiece BPE as Llama 2's publishers converted it, with the special tokens behind its pieces."""
    from sentencepiece import SentencePieceProcessor
    from tokenizers import AddedToken, Tokenizer, models, normalizers

    pieces = SentencePieceProcessor(model_file=str(model))
    vocab = {pieces.id_to_piece(one): one for one in range(pieces.vocab_size())}
    pairs = [(piece[:at], piece[at:]) for piece in vocab for at in range(1, len(piece))]
    merges = [(a, b) for a, b in pairs if a in vocab and b in vocab and not (a + b).startswith("<")]
    tokenizer: Any = Tokenizer(models.BPE(vocab, merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    names = [*CHAT_TOKENS, *VITA_TOKENS]
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    return tokenizer.to_str()
