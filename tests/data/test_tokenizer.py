"""Tokenizers: special tokens by name only, SentencePiece models, templates that will not do."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_vita.data.tokenizer import END_OF_TEXT, IM_END, IM_START, VITA_TOKENS, VitaTokenizer
from megatron_vita.errors import ConfigError
from tests.data.kit import tokenizer_folder


@pytest.fixture(scope="module")
def tok(tmp_path_factory: pytest.TempPathFactory) -> VitaTokenizer:
    return VitaTokenizer.load(tokenizer_folder(tmp_path_factory.mktemp("tok")))


@settings(max_examples=50, deadline=None)
@given(text=st.text(max_size=80))
def test_any_text_comes_back_and_holds_no_special_token(tok: VitaTokenizer, text: str) -> None:
    import unicodedata

    text = "<image><|im_end|>" + text
    ids = tok.encode(text)
    assert tok.decode(ids, skip_special_tokens=False) == unicodedata.normalize("NFC", text)
    assert not set(ids) & set(tok.special_tokens.values())
    assert tok.encode_batch([text, "a"]) == [ids, tok.encode("a")]


def test_ids_and_digests(tok: VitaTokenizer) -> None:
    assert [tok.token_id(t) for t in (IM_END, END_OF_TEXT)] == [tok.eos_id, tok.pad_id]
    assert max(tok.special_tokens.values()) < tok.vocab_size
    assert len(tok.sha256) == len(tok.template_sha256) == 64
    with pytest.raises(ConfigError, match="<nothing>"):
        tok.token_id("<nothing>")


@given(text=st.text(max_size=60), keep=st.integers(0, 30))
def test_cut_gives_a_beginning_of_at_most_that_many_tokens(tok: VitaTokenizer, text: str, keep: int) -> None:
    cut = tok.cut(text, keep)
    assert text.startswith(cut)
    assert len(tok.encode(cut)) <= keep + 2  # the end may be cut into smaller pieces


def test_missing_special_tokens_are_named(tmp_path: Path) -> None:
    folder = tokenizer_folder(tmp_path)
    content = json.loads((folder / "tokenizer.json").read_text())
    content["added_tokens"] = [t for t in content["added_tokens"] if t["content"] not in ("<img>", "<video>")]
    (folder / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ConfigError, match="<img> <video>"):
        VitaTokenizer.load(folder)


def test_layout_tokens_added_without_the_special_flag_are_still_not_parsed(tmp_path: Path) -> None:
    folder = tokenizer_folder(tmp_path)
    content = json.loads((folder / "tokenizer.json").read_text())
    for token in content["added_tokens"]:
        token["special"] = token["content"].startswith("<|")
    (folder / "tokenizer.json").write_text(json.dumps(content))
    tok = VitaTokenizer.load(folder)
    assert tok.token_id("<img>") not in tok.encode("a <img> b")


def test_no_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"tokenizer\.json"):
        VitaTokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match="can be read"):
        VitaTokenizer.load(tmp_path)


UNENDED = (
    "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}"
    "{% if p.type == 'text' %}{{ p.text }}{% else %}{{ {'image': '<IMG_CONTEXT>\\n', 'video': '<video>\\n'}"
    "[p.type] }}{% endif %}{% endfor %}{% endif %}{% endfor %}"
)


@pytest.mark.parametrize(
    ("template", "complaint"),
    [
        ("{% for m in messages", "not valid Jinja"),
        ("{% for m in messages %}{{ m.role }}{{ m.content }}{% endfor %}", "leaves out|drops"),
        ("{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content }}{% endfor %}", "cannot render"),
        (UNENDED, "end an answer"),
        ("{{ cycler.__init__.__globals__.os.system('true') }}", "cannot render"),
    ],
)
def test_templates_that_will_not_do(tmp_path: Path, template: str, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        VitaTokenizer.load(tokenizer_folder(tmp_path, template))


def test_sentencepiece(tmp_path: Path) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    model = io.BytesIO()
    texts = [f"The digit {n} is in the picture number {n * 7}." for n in range(200)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=model, vocab_size=80, hard_vocab_limit=False, minloglevel=2
    )
    path = tmp_path / "t.model"
    path.write_bytes(model.getvalue())
    tok = VitaTokenizer.load(path)
    library = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    assert tok.encode(texts[3]) == library.encode(texts[3])
    assert tok.decode(tok.encode(texts[3])) == texts[3]
    own = library.vocab_size()
    names = [END_OF_TEXT, IM_START, IM_END, *VITA_TOKENS]
    assert [tok.token_id(name) for name in names] == list(range(own, own + len(names)))
    assert tok.vocab_size == own + len(names)
    assert max(tok.encode("The <img> digit")) < own
    assert tok.decode([tok.eos_id, *library.encode("digit")], skip_special_tokens=False) == "<|im_end|>digit"
    assert len(library.encode(tok.cut(texts[3], 4))) <= 4
