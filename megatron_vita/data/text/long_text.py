"""Cuts texts that are far too long for a pack before they are tokenised.

The tokenizers library holds some 200 bytes for every token of a text that it is given.
"""

from __future__ import annotations

import dataclasses

from megatron_vita.data.sample import Document, Sample, Text
from megatron_vita.data.text.tokenizer import VitaTokenizer

SHORT = 1 << 18
"""Texts of at most so many characters are never cut."""
_GROWTH = 1.5
_SURELY = 2
"""So many times the limit, and no token of the first `limit` can hang on what follows."""


def beginnings(sample: Sample | Document, limit: int, tokenizer: VitaTokenizer) -> Sample | Document:
    """The Sample with its longest texts cut to beginnings that are too long for a pack all the same.

    Whatever `--overlong` does with it comes out as from the whole: it is rejected, or the first tokens of a text are
    taken, and those are the same.

    Args:
        sample: what may be too long.
        limit: tokens of a pack.
        tokenizer: whose tokens count.

    Returns:
        The same object, if no text is that long.
    """
    if isinstance(sample, Document):
        text = _beginning(sample.text, limit, tokenizer)
        return sample if text is sample.text else dataclasses.replace(sample, text=text)
    long = max(SHORT, 2 * limit)
    if not any(isinstance(part, Text) and len(part.text) > long for turn in sample.messages for part in turn.parts):
        return sample
    messages = tuple(
        dataclasses.replace(
            turn,
            parts=tuple(
                Text(_beginning(part.text, limit, tokenizer)) if isinstance(part, Text) else part for part in turn.parts
            ),
        )
        for turn in sample.messages
    )
    return dataclasses.replace(sample, messages=messages)


def _beginning(text: str, limit: int, tokenizer: VitaTokenizer) -> str:
    size = max(SHORT, 2 * limit)
    while size < len(text):
        head = text[:size]
        if len(tokenizer.encode(head)) > _SURELY * limit:
            return head
        size = int(size * _GROWTH)
    return text
