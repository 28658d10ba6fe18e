"""Streamed text is the decoded text for any ids, any tokenizer and any stop strings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import chain, product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_vita.convert.tokenizer_files import with_vision_tokens
from megatron_vita.data.text.tokenizer import VitaTokenizer
from megatron_vita.inference.detokenize import TextStream
from tests.data.text.kinds import KINDS

LLAMA_STEPS = [
    {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
    {"type": "ByteFallback"},
    {"type": "Fuse"},
]
DECODERS: dict[str, Any] = {
    "none": None,
    "byte level": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
    "Llama": {
        "type": "Sequence",
        "decoders": [*LLAMA_STEPS, {"type": "Strip", "content": " ", "start": 1, "stop": 0}],
    },
    "Gemma": {"type": "Sequence", "decoders": LLAMA_STEPS},
    "Metaspace": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True},
}
USUAL = [
    ("Qwen2.5", "byte level"),
    ("Llama 2", "Llama"),
    ("Gemma", "Gemma"),
    ("words that are not special", "byte level"),
]
SENTENCE_PIECE = "SentencePiece"
BLANKS: dict[str, dict[str, bool]] = {
    "one is dropped": {},
    "all are dropped": {"add_dummy_prefix": False},
    "none is dropped": {"add_dummy_prefix": False, "remove_extra_whitespaces": False},
    "behind words": {"treat_whitespace_as_suffix": True},
}
"""What SentencePiece does with blanks at the beginning of a text."""
TEXTS = st.text("aé中🙂 \n▁\ufffd.", max_size=12) | st.text(max_size=6)


@lru_cache(maxsize=4)
def tokenizer_of(kind: str, decoder: str) -> VitaTokenizer:
    with TemporaryDirectory() as name:
        root = Path(name)
        if kind == SENTENCE_PIECE:
            import sentencepiece

            with (root / "t.model").open("wb") as model:
                sentencepiece.SentencePieceTrainer.train(
                    sentence_iterator=iter(["Hello the user assistant answers yes", "no and yes the picture"] * 20),
                    model_writer=model,
                    vocab_size=330,
                    byte_fallback=True,
                    hard_vocab_limit=False,
                    minloglevel=2,
                    **BLANKS[decoder],
                )
            return VitaTokenizer.load(root / "t.model")
        one = KINDS[kind]
        replace(one, parts={**one.parts, "decoder": DECODERS[decoder]}).write(root / "published")
        (root / "imported").mkdir()
        with_vision_tokens(root / "published", root / "imported")
        return VitaTokenizer.load(root / "imported")


def ids_of(tokenizer: VitaTokenizer) -> st.SearchStrategy[list[int]]:
    """Ids of texts, single bytes, special tokens and ids that no tokenizer has."""
    texts = TEXTS.map(tokenizer.encode)
    single = st.integers(0, tokenizer.vocab_size + 2).map(lambda one: [one])
    special = st.sampled_from(sorted(tokenizer.special_tokens.values())).map(lambda one: [one] * 2)
    runs = st.lists(st.integers(0, min(tokenizer.vocab_size - 1, 262)), max_size=5)  # bytes come first
    return st.lists(texts | single | special | runs, max_size=6).map(lambda parts: [*chain(*parts)])


def first_stop(text: str, stop: Sequence[str]) -> tuple[str, str | None]:
    """The text up to the stop string that ends first, found character by character."""
    for end in range(len(text) + 1):
        if found := [one for one in stop if text[:end].endswith(one)]:
            longest = max(found, key=len)
            return text[: end - len(longest)], longest
    return text, None


def check(tokenizer: VitaTokenizer, ids: Sequence[int], stop: Sequence[str]) -> None:
    stream = TextStream(tokenizer, stop)
    shown = ""
    wanted, stopped = first_stop(tokenizer.decode(ids), stop)
    for one in ids:
        shown += stream.append(one)
        assert wanted.startswith(shown)
    shown += stream.finish()
    assert shown == wanted
    assert stream.stopped == stopped
    if stopped is not None:
        assert stream.append(0) + stream.finish() == ""


def check_any(tokenizer: VitaTokenizer, data: st.DataObject) -> None:
    ids = data.draw(ids_of(tokenizer))
    text = tokenizer.decode(ids)
    cuts = st.tuples(st.integers(0, len(text)), st.integers(1, 5)).map(lambda cut: text[cut[0] : cut[0] + cut[1]])
    check(tokenizer, ids, ())
    check(tokenizer, ids, data.draw(st.lists((cuts | TEXTS).filter(bool), max_size=3)))


@settings(deadline=None, max_examples=100)
@given(st.data())
@pytest.mark.parametrize(("kind", "decoder"), USUAL)
def test_pieces_are_the_text_of_the_whole(kind: str, decoder: str, data: st.DataObject) -> None:
    check_any(tokenizer_of(kind, decoder), data)


@pytest.mark.slow
@settings(deadline=None, max_examples=15)
@given(st.data())
@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("kind", [name for name, kind in KINDS.items() if not kind.refused])
def test_pieces_of_published_tokenizers(kind: str, decoder: str, data: st.DataObject) -> None:
    check_any(tokenizer_of(kind, decoder), data)


@settings(deadline=None, max_examples=100)
@given(st.data())
@pytest.mark.parametrize("blanks", BLANKS)
def test_pieces_of_sentencepiece(blanks: str, data: st.DataObject) -> None:
    pytest.importorskip("sentencepiece")
    check_any(tokenizer_of(SENTENCE_PIECE, blanks), data)


@pytest.mark.parametrize("blanks", BLANKS)
def test_blanks_between_words_are_no_blanks_at_the_beginning(blanks: str) -> None:
    pytest.importorskip("sentencepiece")
    tokenizer = tokenizer_of(SENTENCE_PIECE, blanks)
    names = [tokenizer._backend.token(one) for one in range(tokenizer.vocab_size)]
    for ids in product([names.index(one) for one in ("▁", "s", "<0xC3>", "<0xA9>")], repeat=5):
        check(tokenizer, ids, ())


@pytest.fixture
def bytes_first() -> VitaTokenizer:
    """Ids of a byte-level tokenizer whose first 256 are bytes."""
    return tokenizer_of("Qwen2.5", "byte level")


def test_no_character_is_shown_in_halves(bytes_first: VitaTokenizer) -> None:
    ids = bytes_first.encode("é🙂")
    assert len(ids) == 6, "every token is one byte"
    stream = TextStream(bytes_first, ())
    assert [stream.append(one) for one in ids] == ["", "é", "", "", "", "🙂"]
    assert stream.append(ids[0]) == ""
    assert stream.append(bytes_first.encode("a")[0]) == "\ufffda"
    assert stream.append(ids[2]) == ""
    assert stream.finish() == "\ufffd"


def test_a_stop_string_may_cross_tokens_or_end_inside_one(bytes_first: VitaTokenizer) -> None:
    ids = bytes_first.encode("user assistant user")
    assert [bytes_first.decode([one]) for one in ids] == ["user", " assistant", " user"]
    stream = TextStream(bytes_first, ["tea", "r assist"])
    assert [stream.append(one) for one in ids] == ["use", "", ""]
    assert stream.stopped == "r assist"
    assert stream.finish() == ""
    inside = TextStream(bytes_first, ["sis"])
    assert [inside.append(one) for one in ids] == ["user", " as", ""]


def test_what_only_began_like_a_stop_string_comes_at_the_end(bytes_first: VitaTokenizer) -> None:
    stream = TextStream(bytes_first, ["user?"])
    assert [stream.append(one) for one in bytes_first.encode("a user")] == ["a", " "]
    assert stream.finish() == "user"
    assert stream.stopped is None


def test_stop_strings_count_only_behind_the_least_tokens(bytes_first: VitaTokenizer) -> None:
    (ids,) = bytes_first.encode("x")
    for least in range(5):
        stream = TextStream(bytes_first, ["xx"], min_tokens=least)
        shown = "".join(stream.append(ids) for _ in range(8))
        assert stream.stopped == "xx"
        assert len(shown) == max(0, least - 1), "the string may begin before them, and ends behind them"


@pytest.mark.parametrize("what", ["Hello", "é", "\ufffd", "<|im_end|>"])
def test_each_token_costs_the_same(bytes_first: VitaTokenizer, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded = 0
    decode = bytes_first.decode

    def counted(ids: Sequence[int]) -> str:
        nonlocal decoded
        decoded += len(ids)
        return decode(ids)

    broken = bytes_first.encode("🙂")[:1]
    ids = {"\ufffd": broken, "<|im_end|>": [bytes_first.eos_id]}.get(what, bytes_first.encode(what))
    monkeypatch.setattr(bytes_first, "decode", counted)
    stream = TextStream(bytes_first, ["no such text"])
    count = 500
    for one in ids * count:
        stream.append(one)
    stream.finish()
    assert decoded <= 8 * count * len(ids)
