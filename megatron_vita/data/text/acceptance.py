"""Acceptance check of a tokenizer when it is opened: probe conversations must get the ids of stock transformers.

Stock code renders a conversation to one string and tokenises that; a processor puts the tokens of pictures and videos
into the string before. Here probe conversations go both ways. A tokenizer in which they differ at any position is
refused with the words that differ: what a model was trained on would not be what it is asked with.
"""

from __future__ import annotations

from typing import Any

from megatron_vita.data.example import Example, MediaItem
from megatron_vita.data.rejects import code_of
from megatron_vita.data.sample import Image, MediaFile, Message, Sample, Text, Video
from megatron_vita.data.spec import PreprocessSpec
from megatron_vita.data.text import chat_tokenizer as names
from megatron_vita.data.text.backends import HuggingFace, SentencePiece
from megatron_vita.data.text.chat import build_example
from megatron_vita.data.text.chat_tokenizer import ChatTokenizer
from megatron_vita.errors import ConfigError, DataError

_SPEC = PreprocessSpec(image_size=16, patch_size=4)
_FILE = MediaFile(data=b"x")
_TEXTS = (
    "Which colour is it?", " a blank first", "a blank last ", "two\n\nlines\n", "\ttab", "  two blanks", "It's 3.14",
    "1234567 12 3", "日本語 café", "e\u0301 \u0338", "🙂", "x = {'a': [1, 2]}\n    y", "Yes.", "\u2581", "- <b> </b>",
    "\u3000w\u00a0",
)  # fmt: skip
"""Words, blanks at both ends, line breaks, digits, other scripts, a mark that joins the character before it."""
_ANSWERS = ("Yes.", "12", "red and blue", "été", "日本語", "(a)", "\u0301x", "- a\n- b\n", "▁a", "🙂 ", '"q"', "x")
_BLANKS = (" a", "  a", "\ta", " \t a", "\u00a0a", "\u3000a")


def check(tokenizer: ChatTokenizer, backend: HuggingFace | SentencePiece) -> None:
    """Check a tokenizer with probe conversations, and find whether answers may begin with blanks (`joins_blanks`).

    Raises:
        ConfigError: ids differ; the message names the tokens.
    """
    if backend.behind:
        tokens = " ".join(backend.token(one) for one in backend.behind)
        raise ConfigError(
            f"{tokenizer.path}: its post_processor puts {tokens} behind every text, so that a prompt would end before "
            "its answer. Take it out of tokenizer.json, or take another tokenizer."
        )
    try:
        _try_out(tokenizer, backend)
    except DataError as error:
        raise ConfigError(f"{tokenizer.path}: cannot be used: {error} Take another tokenizer.") from None


def _try_out(tokenizer: ChatTokenizer, backend: HuggingFace | SentencePiece) -> None:
    for answer in _BLANKS:
        try:
            _prompt_and_answer(tokenizer, answer)
        except DataError as error:
            if code_of(error)[0] != "answer_joins":
                raise
            tokenizer.joins_blanks = True
    for number, text in enumerate(_TEXTS):
        answers = tuple(_ANSWERS[(number + shift) % len(_ANSWERS)] for shift in range(3))
        for answer in answers:
            try:
                _prompt_and_answer(tokenizer, answer)
            except DataError as error:
                if code_of(error)[0] != "answer_joins":
                    raise
                raise ConfigError(
                    f"{tokenizer.path}: cannot be used: the beginning of an answer becomes one token with the newline "
                    f"of its turn's header ({error}), so no prompt could end there. Take another tokenizer."
                ) from None
        if isinstance(backend, HuggingFace):
            for generation_prompt in (True, False):
                _compare(tokenizer, backend, _conversation(text, answers, generation_prompt), generation_prompt)


def same_ids(first: ChatTokenizer, second: ChatTokenizer) -> bool:
    """Whether two tokenizers give the same ids to the special tokens of the first and to probe conversations."""
    return first.special_tokens.items() <= second.special_tokens.items() and all(
        _render(first, one).tokens.tolist() == _render(second, one).tokens.tolist()
        for one in (_conversation(text, _ANSWERS[-3:], False) for text in _TEXTS)
    )


def _prompt_and_answer(tokenizer: ChatTokenizer, answer: str) -> None:
    turns = (Message("user", (Text("a"),)), Message("assistant", (Text(answer),)))
    build_example(Sample(turns), [], [], tokenizer=tokenizer, spec=_SPEC)


def _conversation(text: str, answers: tuple[str, ...], generation_prompt: bool) -> Sample:
    said = (Text(text),) if text.strip() else ()
    turns = [
        Message("system", (Text(f"{text}."),)),
        Message("user", (Image(0), Text(f"w{text}"), Video(0), Image(1), *said)),
        Message("assistant", (Text(answers[0]),)),
        Message("user", (Text(text),)),
        Message("assistant", (Text(answers[1]),)),
        Message("user", (Text(f"a {text}"),)),
        Message("assistant", (Text(answers[2]),)),
    ]
    return Sample(tuple(turns[:-1] if generation_prompt else turns), (_FILE, _FILE), (_FILE,))


def _render(tokenizer: ChatTokenizer, sample: Sample, generation_prompt: bool = False) -> Example:
    images, frames = [MediaItem(b"", 16, 16), MediaItem(b"", 32, 16)], [MediaItem(b"", 16, 16, frame=True)] * 2
    return build_example(sample, images, [frames], tokenizer=tokenizer, spec=_SPEC, generation_prompt=generation_prompt)


def _compare(tokenizer: ChatTokenizer, backend: HuggingFace, sample: Sample, generation_prompt: bool) -> None:
    example = _render(tokenizer, sample, generation_prompt)
    text = tokenizer.template.render([_plain(message) for message in sample.messages], generation_prompt)
    begun = tokenizer.writes_beginning(text)
    tile = names.IMG_CONTEXT * _SPEC.tokens_per_tile
    clip = "\n".join(f"Frame{number}: {names.IMG}{tile}{names.IMG_END}" for number in (1, 2))
    for tiles in (1, 3):
        text = text.replace(names.IMG_CONTEXT, f"{names.IMG}\ue000{tiles}{names.IMG_END}", 1)
    text = text.replace(names.VIDEO, clip, 1)
    for tiles in (1, 3):
        text = text.replace(f"\ue000{tiles}", tile * tiles, 1)
    own, stock = example.tokens.tolist(), backend.parse(text, affixes=not begun)
    if own != stock:
        place = next((i for i, (a, b) in enumerate(zip(own, stock, strict=False)) if a != b), min(len(own), len(stock)))
        here, there = (" ".join(map(backend.token, ids[max(place - 4, 0) : place + 4])) for ids in (own, stock))
        raise ConfigError(
            f"{tokenizer.path}: cannot be used: the same conversation becomes other ids in stock transformers, at "
            f"position {place}: {there!r} there, {here!r} here. Look at the flags of its added tokens (single_word, "
            "normalized, lstrip, rstrip), its normalizer, and whether the chat template trims or inspects texts; or "
            "take another tokenizer."
        )


def _plain(message: Message) -> dict[str, Any]:
    """A turn as transformers' chat templates get it."""
    parts = [
        {"type": "text", "text": p.text} if isinstance(p, Text) else {"type": type(p).__name__.lower()}
        for p in message.parts
    ]
    texts = [part.text for part in message.parts if isinstance(part, Text)]
    return {"role": message.role, "content": "".join(texts) if len(texts) == len(parts) else parts}
