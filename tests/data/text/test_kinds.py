"""Every kind of tokenizer: the ids of a conversation are stock transformers', or the tokenizer is refused by name."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken

from megatron_vita.convert.token_ids import read_tokens
from megatron_vita.convert.tokenizer_files import copy_for_export, with_vision_tokens
from megatron_vita.data.sample import Document, Text
from megatron_vita.data.spec import PreprocessSpec
from megatron_vita.data.text.chat import build_document, build_example
from megatron_vita.data.text.tokenizer import VitaTokenizer
from megatron_vita.errors import CheckpointError, DataError
from tests.data.text.kinds import (
    BYTE_POST,
    CHATML,
    KINDS,
    QWEN2,
    REPLACE,
    Kind,
    byte_level,
    gpt2,
    metaspace,
    sentence_like,
    template,
    unigram,
)
from tests.data.text.stock import Stock
from tests.data.text.test_chat import conversation, conversations, until_question

pytest.importorskip("transformers")
TINY = PreprocessSpec(image_size=16, patch_size=4)


def exported(kind: Kind, root: Path) -> tuple[VitaTokenizer, Stock]:
    """A publisher's tokenizer as training opens it after the import, and as stock code opens it after the export."""
    kind.write(root / "published")
    (root / "imported").mkdir()
    with_vision_tokens(root / "published", root / "imported")
    copy_for_export(read_tokens(root / "imported"), _folder(root / "exported"), vision=True)
    (root / "exported" / "config.json").write_text(json.dumps({"model_type": "internvl"}))
    return VitaTokenizer.load(root / "imported"), Stock(root / "exported", TINY)


def _folder(path: Path) -> Path:
    path.mkdir()
    return path


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, kind in KINDS.items() if not kind.refused])
def test_ids_are_stock_transformers(name: str, tmp_path: Path) -> None:
    tok, stock = exported(KINDS[name], tmp_path)
    assert VitaTokenizer.load(tmp_path / "exported").sha256 == tok.sha256
    for sample, images, videos in conversations(60, blanks=tok.joins_blanks):
        whole = build_example(sample, images, videos, tokenizer=tok, spec=TINY)
        assert whole.tokens.tolist() == stock(sample, images, videos, generation_prompt=False)
        for turn in (n for n, message in enumerate(sample.messages) if message.role == "assistant"):
            part = until_question(sample, turn, images, videos)
            ours = build_example(*part, tokenizer=tok, spec=TINY, generation_prompt=True)
            assert ours.tokens.tolist() == stock(*part)
            assert np.array_equal(whole.tokens[: len(ours.tokens)], ours.tokens)
    for text in ("Hello", " Hello", "a\nb ", "\n"):
        if text.strip():
            tokens = build_document(Document(text), tokenizer=tok).tokens.tolist()
            assert tokens == stock.tokenizer(f"{text}<|endoftext|>")["input_ids"]


@pytest.mark.parametrize("name", [name for name, kind in KINDS.items() if kind.refused])
def test_others_are_refused_by_name(name: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=KINDS[name].refused) as error:
        exported(KINDS[name], tmp_path)
    assert str(tmp_path / "published") in str(error.value)


# ------------------------------------------------------------------------------ tokenizers that nobody has published

BASES = [lambda: byte_level(QWEN2), gpt2, sentence_like, lambda: sentence_like(True), unigram]
STEPS: list[dict[str, Any]] = [
    *({"type": name} for name in ("NFC", "NFD", "NFKC", "Lowercase", "StripAccents")),
    {"type": "Prepend", "prepend": "▁"},
    REPLACE,
    {"type": "Replace", "pattern": {"Regex": r"\s{2,}"}, "content": " "},
    {"type": "Replace", "pattern": {"String": "Yes"}, "content": "no"},
    {"type": "Strip", "strip_left": True, "strip_right": False},
    {"type": "Strip", "strip_left": False, "strip_right": True},
    {
        "type": "BertNormalizer",
        "clean_text": True,
        "handle_chinese_chars": True,
        "strip_accents": None,
        "lowercase": True,
    },
]
FLAGS = st.fixed_dictionaries(
    {name: st.booleans() for name in ("lstrip", "rstrip", "single_word", "normalized", "special")}
)
WORDS_ADDED = st.sampled_from(["Yes", "<think>", " a", "\n\n", "\n", "assistant", "_end|>", "<|", "|>", "é", "a<", "2"])


@st.composite
def any_kind(draw: st.DrawFn) -> Kind:
    special: list[str | AddedToken] = ["<unk>", "<s>", "</s>"]
    for name in CHATML:
        if draw(st.booleans()):
            special.append(AddedToken(name, **draw(FLAGS)) if draw(st.booleans()) else name)
    special += [
        AddedToken(word, **{**draw(FLAGS), "special": False})
        for word in draw(st.lists(WORDS_ADDED, max_size=2, unique=True))
    ]
    steps = draw(st.lists(st.sampled_from(STEPS), max_size=2))
    parts: dict[str, Any] = {"normalizer": {"type": "Sequence", "normalizers": steps} if steps else None}
    base = draw(st.sampled_from(BASES))
    if draw(st.booleans()):
        parts["pre_tokenizer"] = metaspace(
            draw(st.sampled_from(["first", "always", "never"])), split=draw(st.booleans())
        )
    before = draw(st.lists(st.sampled_from(["<s>", "</s>"]), max_size=2))
    parts["post_processor"] = draw(st.sampled_from([None, BYTE_POST, template(*before)]))
    config = {
        "tokenizer_class": draw(
            st.sampled_from(["LlamaTokenizer", "Qwen2Tokenizer", "GPT2Tokenizer", "GemmaTokenizer"])
        ),
        "bos_token": draw(st.sampled_from([None, "<s>", "<|im_start|>", "<none>"])),
        "eos_token": "</s>",
        **draw(st.fixed_dictionaries({name: st.booleans() for name in ("add_bos_token", "add_eos_token", "legacy")})),
    }
    return Kind(base, special, config, parts)


@pytest.mark.slow
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(kind=any_kind(), seed=st.integers(0, 1 << 30))
def test_any_tokenizer_is_stock_or_refused(tmp_path_factory: pytest.TempPathFactory, kind: Kind, seed: int) -> None:
    try:
        tok, stock = exported(kind, tmp_path_factory.mktemp("kind"))
    except CheckpointError as error:
        event(str(error).partition(": ")[2][:60])
        return
    rng = random.Random(seed)
    for _ in range(8):
        sample, images, videos = conversation(rng, blanks=tok.joins_blanks)
        said = "".join(part.text for turn in sample.messages for part in turn.parts if isinstance(part, Text))
        if any(name in said for name in tok.special_tokens):  # text to us, a token to stock code: docs/tokens.md
            continue
        try:
            whole = build_example(sample, images, videos, tokenizer=tok, spec=TINY)
        except DataError as rejected:
            assert str(rejected).startswith(("answer_joins", "tokenizer_failed"))  # noqa: PT017
            continue
        event("equal")
        assert whole.tokens.tolist() == stock(sample, images, videos, generation_prompt=False)
        last = until_question(sample, len(sample.messages) - 1, images, videos)
        ours = build_example(*last, tokenizer=tok, spec=TINY, generation_prompt=True).tokens
        assert ours.tolist() == stock(*last) == whole.tokens[: len(ours)].tolist()
