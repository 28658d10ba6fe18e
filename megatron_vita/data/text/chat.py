"""Converts a Sample to an Example: ids with expanded placeholders, shifted labels, a slot for each tile.

`internvl` (the layout of stock transformers' InternVL processor): a picture is `<img>`, its context tokens with the
thumbnail's last, `</img>` and the template's newline; a video is `Frame1: <img>...</img>` and a newline for each frame.
One newline that the data has right behind a picture is absorbed by the template's. `long_vita` (the layout of the
released weights): `<img>` thumbnail `</img>`, then for each row a newline and `<patch>` tiles; a frame is
`<vid>...</vid>`; the template's newline is left out and the data's kept.

Between two special tokens all text is tokenised in one piece, as stock transformers does. The ids of a turn's header
must be the first ids of header and answer together, which `clean_answer` makes so; a record in which they are not is
rejected.
"""

from __future__ import annotations

import dataclasses
from array import array
from collections.abc import Sequence
from itertools import groupby

import numpy as np
import numpy.typing as npt

from megatron_vita.data.example import IGNORE_INDEX, Example, MediaItem, TileSlot
from megatron_vita.data.media.tiling import plan_tiles
from megatron_vita.data.rejects import counted, reject
from megatron_vita.data.sample import Document, Message, Sample, Text, clean_answer
from megatron_vita.data.spec import PreprocessSpec
from megatron_vita.data.text import chat_tokenizer as names
from megatron_vita.data.text.chat_tokenizer import ChatTokenizer
from megatron_vita.data.text.template import SkeletonPart, shape_of


def build_example(
    sample: Sample,
    images: Sequence[MediaItem],
    videos: Sequence[Sequence[MediaItem]],
    *,
    tokenizer: ChatTokenizer,
    spec: PreprocessSpec,
    generation_prompt: bool = False,
) -> Example:
    """Render one conversation.

    Args:
        sample: its turns.
        images: one item for each of sample.images.
        videos: the sampled frames of each of sample.videos.
        tokenizer: ids and chat template.
        spec: layout, tiling, tokens a tile.
        generation_prompt: end with the header of an answer to come (the last turn is then the user's); no labels.

    Returns:
        The Example. Loss lies on the answers that are learnt, their `<|im_end|>` and the newline behind it.

    Raises:
        DataError: the turns or media break `Sample.check`, or the last turn is not what generation_prompt asks for.
        ConfigError: the tokenizer lacks a special token of the layout.
    """
    sample.check()
    if (len(images), len(videos)) != (len(sample.images), len(sample.videos)):
        raise reject(
            "media_count",
            f"{sample.id}: {counted(len(images), 'picture')} and {counted(len(videos), 'video')} were read.",
        )
    if (sample.messages[-1].role != "assistant") != generation_prompt:
        wanted = "a user's turn to answer" if generation_prompt else "an answer to learn from"
        raise reject("bad_order" if generation_prompt else "no_answer", f"{sample.id}: it must end with {wanted}.")
    writer = _Writer(tokenizer, spec, sample.id)
    skeleton = _skeleton(sample, tokenizer, generation_prompt, spec.layout)
    writer.ids(tokenizer.beginning(skeleton))
    pieces = iter(skeleton)
    for piece in pieces:
        if piece.kind == "literal":
            writer.text(piece.value)
        elif piece.kind == "token":
            writer.special(piece.value)
        elif piece.kind == "text" and sample.messages[piece.message].role == "assistant":
            message = sample.messages[piece.message]
            parts = message.parts
            writer.answer("".join(part.text for part in parts if isinstance(part, Text)), learnt=message.learnt)
            for _ in range(len(parts) - 1 + 2):  # its other parts, `<|im_end|>` and the newline: written by answer()
                next(pieces)
        elif piece.kind == "text":
            writer.text(_user_text(sample.messages[piece.message], piece.part, spec.layout))
        else:
            part = sample.messages[piece.message].parts[piece.part]
            assert not isinstance(part, Text)
            if piece.kind == "image":
                writer.image(images[part.index])
            else:
                writer.video(videos[part.index])
    return writer.example(labelled=not generation_prompt)


def build_document(document: Document, *, tokenizer: ChatTokenizer) -> Example:
    """Plain text and `<|endoftext|>`; every token but the first is learnt, and but what begins a text.

    Raises:
        DataError: empty_turn, if there is no text.
    """
    if not document.text.strip():
        raise reject("empty_turn", f"{document.id}: the text is empty.")
    beginning, text = tokenizer.beginning(), tokenizer.between(document.text, None, names.END_OF_TEXT)
    tokens = np.array([*beginning, *text, tokenizer.token_id(names.END_OF_TEXT)], dtype=np.int32)
    return Example(tokens, shift_labels(tokens, np.arange(len(tokens)) >= len(beginning)))


def without_answer(sample: Sample) -> Sample:
    """The Sample up to its last question, for `generation_prompt=True`; unchanged if it ends with one already."""
    if sample.messages and sample.messages[-1].role == "assistant":
        return dataclasses.replace(sample, messages=sample.messages[:-1])
    return sample


def shift_labels(tokens: npt.NDArray[np.int32], labelled: npt.NDArray[np.bool_]) -> npt.NDArray[np.int32]:
    """labels[i] = the token after i where that token is learnt, else -100. No other code shifts labels.

    Args:
        tokens: `[n]`.
        labelled: `[n]`, which tokens are to be predicted.
    """
    labels = np.full(len(tokens), IGNORE_INDEX, dtype=np.int32)
    labels[:-1][labelled[1:]] = tokens[1:][labelled[1:]]
    return labels


def frame_label(number: int, time: float | None, spec: PreprocessSpec) -> str:
    """Label before a video frame in `internvl`.

    Args:
        number: of the frame, from 1.
        time: seconds into the clip.
        spec: whether times are written.
    """
    when = f" ({time:.1f}s)" if spec.video_timestamps and time is not None else ""
    return f"Frame{number}{when}: "


def frame_costs(
    tokenizer: ChatTokenizer, spec: PreprocessSpec, frames: int, times: Sequence[float] | None = None
) -> npt.NDArray[np.int64]:
    """Tokens that each frame of a video adds, int64 `[frames]`.

    258 in `long_vita` at the real size, in `internvl` 262 and the digits of its number, and its time where that is
    written. (The newline counted with the first frame stands behind the last.)

    Args:
        tokenizer: counts the labels.
        spec: layout, tokens a tile, whether times are written.
        frames: how many.
        times: seconds into the clip of each; needed where they are written.
    """
    per_tile = spec.tokens_per_tile + 2
    if spec.layout == "long_vita":
        return np.full(frames, per_tile, dtype=np.int64)
    shown = [None] * frames if times is None else times
    texts = ("\n" + frame_label(number, time, spec) for number, time in enumerate(shown, 1))
    labels = (len(tokenizer.between(text, names.IMG_END, names.IMG)) for text in texts)
    return np.fromiter(labels, dtype=np.int64, count=frames) + per_tile


def _skeleton(sample: Sample, tokenizer: ChatTokenizer, generation_prompt: bool, layout: str) -> Sequence[SkeletonPart]:
    pieces = tokenizer.template.skeleton(shape_of(sample.messages), generation_prompt, sample.template_options)
    if layout != "long_vita":
        return pieces
    out: list[SkeletonPart] = []
    for piece in pieces:
        if out and out[-1].kind in ("image", "video") and piece.kind == "literal":
            piece = dataclasses.replace(piece, value=piece.value.removeprefix("\n"))
        out.append(piece)
    return out


def _user_text(message: Message, number: int, layout: str) -> str:
    part = message.parts[number]
    assert isinstance(part, Text)
    behind_medium = number > 0 and not isinstance(message.parts[number - 1], Text)
    # in internvl the template has written a newline behind the medium: one that the data has there is the same one
    return part.text.removeprefix("\n") if behind_medium and layout == "internvl" else part.text


class _Writer:
    """Collects ids, labels and tiles. Text is held back until a special token ends it, then tokenised in one piece."""

    def __init__(self, tokenizer: ChatTokenizer, spec: PreprocessSpec, where: str) -> None:
        self._tokenizer, self._spec, self._where = tokenizer, spec, where
        self._pending: list[tuple[str, bool]] = []  # (text, learnt)
        self._last: str | None = None  # the special token behind which it stands
        self._ids = array("i")
        self._labelled: list[tuple[int, bool]] = []  # runs of (tokens, learnt)
        self._length = 0
        self._tiles: list[TileSlot] = []
        self._media: list[MediaItem] = []
        self._contexts: dict[str, array[int]] = {}  # context token -> those of a tile

    def text(self, text: str, *, learnt: bool = False) -> None:
        if text:
            self._pending.append((text, learnt))

    def special(self, token: str, *, learnt: bool = False) -> None:
        if self._pending:
            self._flush(token)
        self.ids((self._tokenizer.token_id(token),), learnt=learnt)
        self._last = token

    def answer(self, text: str, *, learnt: bool) -> None:
        """Write an answer, `<|im_end|>` and a newline, with labels unless the data marks the answer as not learnt."""
        self.text(clean_answer(text, blanks=self._tokenizer.joins_blanks), learnt=learnt)
        self.special(names.IM_END, learnt=learnt)
        self.text("\n", learnt=learnt)

    def image(self, item: MediaItem) -> None:
        slots = plan_tiles(item, len(self._media), self._spec)
        self._media.append(item)
        if self._spec.layout == "internvl":
            self.special(names.IMG)
            for slot in slots:
                self._tile(slot, names.IMG_CONTEXT)
            self.special(names.IMG_END)
            return
        whole, *grid = slots
        self._wrapped(whole, names.IMG, names.IMG_CONTEXT, names.IMG_END)
        for slot in grid:
            if slot.col == 0:
                self.text("\n")
            self._wrapped(slot, names.PATCH, names.PATCH_CONTEXT, names.PATCH_END)

    def video(self, frames: Sequence[MediaItem]) -> None:
        for number, item in enumerate(frames, 1):
            (slot,) = plan_tiles(item, len(self._media), self._spec)
            self._media.append(item)
            if self._spec.layout == "internvl":
                self.text(("\n" if number > 1 else "") + frame_label(number, item.time, self._spec))
                self._wrapped(slot, names.IMG, names.IMG_CONTEXT, names.IMG_END)
            else:
                self._wrapped(slot, names.VID, names.VID_CONTEXT, names.VID_END)

    def example(self, *, labelled: bool) -> Example:
        self._flush(None)
        tokens = np.array(self._ids, dtype=np.int32)
        mask = np.repeat([one and labelled for _, one in self._labelled], [count for count, _ in self._labelled])
        return Example(tokens, shift_labels(tokens, mask), tuple(self._tiles), tuple(self._media))

    def ids(self, ids: Sequence[int], *, learnt: bool = False) -> None:
        self._ids.extend(ids)
        self._labelled.append((len(ids), learnt))
        self._length += len(ids)

    def _flush(self, right: str | None) -> None:
        """Tokenise the text since the last special token, up to the next one, or to the end.

        Raises:
            DataError: answer_joins. No token may be half learnt: the header alone is the prompt of a chat.
        """
        if not self._pending:
            return
        pending, self._pending = self._pending, []
        text = "".join(one for one, _ in pending)
        ids = self._tokenizer.between(text, self._last, right)
        if len({learnt for _, learnt in pending}) == 1:
            self.ids(ids, learnt=pending[0][1])
            return
        head, at = "", 0
        for learnt, run in groupby(pending, lambda one: one[1]):
            head += "".join(one for one, _ in run)
            before = ids if len(head) == len(text) else self._tokenizer.between(head, self._last)
            if ids[: len(before)] != before:
                raise reject(
                    "answer_joins", f"{self._where}: {text[len(head) :][:20]!r} joins {head[-20:]!r} before it."
                )
            self.ids(ids[at : len(before)], learnt=learnt)
            at = len(before)

    def _wrapped(self, slot: TileSlot, start: str, context: str, end: str) -> None:
        self.special(start)
        self._tile(slot, context)
        self.special(end)

    def _tile(self, slot: TileSlot, context: str) -> None:
        row = slot.media, slot.row, slot.col, slot.rows, slot.cols, slot.thumbnail
        self._tiles.append(TileSlot(self._length, *row))  # dataclasses.replace takes four times as long
        if context not in self._contexts:
            self._contexts[context] = array("i", [self._tokenizer.token_id(context)]) * self._spec.tokens_per_tile
        self.ids(self._contexts[context])
