"""Every kind of tokenizer: the ids of a conversation are stock transformers', or the tokenizer is refused by name."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from megatron_vita.convert.tokenizer_files import copy_for_export, read_tokens, with_vision_tokens
from megatron_vita.data.sample import Document
from megatron_vita.data.spec import PreprocessSpec
from megatron_vita.data.text.chat import build_document, build_example
from megatron_vita.data.text.tokenizer import VitaTokenizer
from megatron_vita.errors import CheckpointError
from tests.data.text.kinds import KINDS, Kind
from tests.data.text.stock import Stock
from tests.data.text.test_chat import conversations, until_question

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
