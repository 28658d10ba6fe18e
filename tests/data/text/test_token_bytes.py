"""The bytes of single tokens are those of the text."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from megatron_vita.data.text.tokenizer import IM_END
from tests.inference.test_detokenize import USUAL, tokenizer_of

TEXTS = st.text("aé中🙂 \n.", max_size=12) | st.text(max_size=6)


@pytest.mark.parametrize(("kind", "decoder"), USUAL)
@given(text=TEXTS)
@example("a 🙂é\ufffd")
def test_bytes_of_all_tokens_are_the_text(kind: str, decoder: str, text: str) -> None:
    tokenizer = tokenizer_of(kind, decoder)
    spelt = b"".join(map(tokenizer.token_bytes, tokenizer.encode(text)))
    assert spelt == tokenizer.decode([*tokenizer.anchor, *tokenizer.encode(text)]).removeprefix("a").encode()


@pytest.mark.parametrize(("kind", "decoder"), USUAL)
def test_special_tokens_have_their_names_and_unknown_ids_nothing(kind: str, decoder: str) -> None:
    tokenizer = tokenizer_of(kind, decoder)
    assert tokenizer.token_bytes(tokenizer.eos_id) == IM_END.encode()
    assert tokenizer.token_bytes(tokenizer.vocab_size + 5) == b""
