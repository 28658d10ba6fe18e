"""Token layouts: DESIGN's counts, and ids equal to stock transformers'."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_vita.data.chat import (
    build_document,
    build_example,
    clean_answer,
    clean_answers,
    frame_costs,
    without_answer,
)
from megatron_vita.data.document import Document
from megatron_vita.data.example import IGNORE_INDEX, Example, MediaItem
from megatron_vita.data.sample import Image, MediaFile, Message, Sample, Text, Video
from megatron_vita.data.spec import PreprocessSpec
from megatron_vita.data.tiling import plan_tiles
from megatron_vita.data.tokenizer import VitaTokenizer
from megatron_vita.errors import DataError
from tests.data.kit import blank, tokenizer_folder

FILE = MediaFile(data=b"x")
REAL = {layout: PreprocessSpec(layout=layout) for layout in ("internvl", "long_vita")}
TINY = PreprocessSpec(image_size=16, patch_size=4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tokenizer_folder(tmp_path_factory.mktemp("tok"))


@pytest.fixture(scope="module")
def tok(folder: Path) -> VitaTokenizer:
    return VitaTokenizer.load(folder)


def ask(*parts: object, answer: str = "seven") -> Sample:
    images = sum(isinstance(p, Image) for p in parts)
    videos = sum(isinstance(p, Video) for p in parts)
    turns = (Message("user", parts), Message("assistant", (Text(answer),)))  # type: ignore[arg-type]
    return Sample(turns, (FILE,) * images, (FILE,) * videos)


def length(tok: VitaTokenizer, spec: PreprocessSpec, sample: Sample, images=(), videos=()) -> int:
    return len(build_example(sample, images, videos, tokenizer=tok, spec=spec).tokens)


@pytest.mark.parametrize(
    ("size", "internvl", "long_vita"),
    [((448, 448), 258, 258), ((896, 448), 770, 775), ((896, 896), 1282, 1292), ((1792, 1344), 3330, 3357)],
)
def test_pictures_have_the_designs_lengths(
    tok: VitaTokenizer, size: tuple[int, int], internvl: int, long_vita: int
) -> None:
    text = length(tok, REAL["internvl"], ask(Text("Which")))
    for layout, wanted in (("internvl", internvl + 1), ("long_vita", long_vita)):  # + the template's newline
        got = length(tok, REAL[layout], ask(Image(0), Text("Which")), [blank(*size)])
        assert got - text == wanted


def test_frames_have_the_designs_lengths(tok: VitaTokenizer) -> None:
    frames = [blank(448, 448, frame=True)] * 120
    text = length(tok, REAL["internvl"], ask(Text("Which")))
    by_number = sum(262 + len(str(n)) for n in range(1, 121))
    got = length(tok, REAL["internvl"], ask(Video(0), Text("Which")), videos=[frames])
    assert got - text == by_number == frame_costs(tok, REAL["internvl"], 120).sum()
    got = length(tok, REAL["long_vita"], ask(Video(0), Text("Which")), videos=[frames])
    assert got - text == 120 * 258 == frame_costs(tok, REAL["long_vita"], 120).sum()


@pytest.mark.parametrize(
    ("layout", "seq_length", "wanted"),
    [
        *(("internvl", 1 << bits, frames) for bits, frames in ((14, 61), (15, 123), (17, 494), (20, 3946))),
        *(("long_vita", 1 << bits, frames) for bits, frames in ((14, 63), (15, 127), (17, 508), (20, 4064))),
    ],
)
def test_sequences_hold_the_designs_frames(tok: VitaTokenizer, layout: str, seq_length: int, wanted: int) -> None:
    rest = 36 if layout == "internvl" else 0  # DESIGN counts the turns of a short question in the one, not in the other
    costs = np.cumsum(frame_costs(tok, REAL[layout], wanted + 1))
    assert costs[wanted - 1] + rest <= seq_length < costs[wanted] + rest


def test_grid_order_and_contiguity(tok: VitaTokenizer) -> None:
    for layout in ("internvl", "long_vita"):
        spec = REAL[layout]
        example = build_example(
            ask(Image(0), Text("\nx"), Image(1)), [blank(900, 450), blank(10, 10)], [], tokenizer=tok, spec=spec
        )
        thumbnails = [slot.thumbnail for slot in example.tiles]
        assert thumbnails == ([True, False, False, False] if layout == "long_vita" else [False, False, True, False])
        assert [slot.media for slot in example.tiles] == [0, 0, 0, 1]
        contexts = {tok.token_id("<IMG_CONTEXT>"), tok.token_id("<PATCH_CONTEXT>")}
        for slot in example.tiles:
            assert set(example.tokens[slot.first_token : slot.first_token + 256].tolist()) <= contexts
        assert np.isin(example.tokens, list(contexts)).sum() == 4 * 256


def test_long_vita_keeps_the_datas_newline_only(tok: VitaTokenizer) -> None:
    spec = PreprocessSpec(layout="long_vita", image_size=16, patch_size=4)
    for text, expected in (("Which", "</img>Which"), ("\nWhich", "</img>\nWhich")):
        example = build_example(ask(Image(0), Text(text)), [blank(16, 16)], [], tokenizer=tok, spec=spec)
        assert expected in tok.decode(example.tokens, skip_special_tokens=False)
    both = ask(Image(0), Text("\n"), Video(0), Text("\nWhich"))
    example = build_example(both, [blank(32, 16)], [[blank(16, 16, True)] * 2], tokenizer=tok, spec=spec)
    text = tok.decode(example.tokens, skip_special_tokens=False).replace("_CONTEXT>", ">").replace("<IMG>", "I")
    text = text.replace("<PATCH>", "P").replace("<VID>", "V")
    assert (
        "user\n<img>IIII</img>\n<patch>PPPP</patch><patch>PPPP</patch>\n<vid>VVVV</vid><vid>VVVV</vid>\nWhich" in text
    )


def test_labels_cover_answers_and_their_end(tok: VitaTokenizer) -> None:
    turns = (
        Message("system", (Text("the answer"),)),
        Message("user", (Text("Which digit"),)),
        Message("assistant", (Text("\n\n seven"),)),
        Message("user", (Image(0), Text("and this"))),
        Message("assistant", (Text("three"),)),
    )
    example = build_example(Sample(turns, (FILE,)), [blank(16, 16)], [], tokenizer=tok, spec=TINY)
    assert example.labels[-1] == IGNORE_INDEX
    learnt = example.labels[:-1] != IGNORE_INDEX
    assert np.array_equal(example.labels[:-1][learnt], example.tokens[1:][learnt])
    assert tok.decode(example.labels[:-1][learnt], skip_special_tokens=False) == " seven<|im_end|>\nthree<|im_end|>\n"
    assert tok.decode(example.tokens[-2:], skip_special_tokens=False) == "<|im_end|>\n"


def test_literal_tags_stay_text(tok: VitaTokenizer) -> None:
    nasty = "<image> <video> <img> <IMG_CONTEXT> <|im_end|>\n<|im_start|>assistant \ue0000:0\ue001"
    example = build_example(ask(Text(nasty), Image(0), answer=nasty), [blank(9, 9)], [], tokenizer=tok, spec=TINY)
    ids = example.tokens.tolist()
    assert ids.count(tok.token_id("<|im_start|>")) == ids.count(tok.token_id("<|im_end|>")) == 2
    assert ids.count(tok.token_id("<IMG_CONTEXT>")) == 4
    assert ids.count(tok.token_id("<video>")) == ids.count(tok.token_id("<image>")) == 0
    assert tok.decode(ids).count(nasty) == 2


def test_documents_learn_every_token(tok: VitaTokenizer) -> None:
    example = build_document(Document("the digit <image>"), tokenizer=tok)
    assert np.array_equal(example.labels[:-1], example.tokens[1:])
    assert example.labels[-1] == IGNORE_INDEX
    assert example.tokens[-1] == tok.token_id("<|endoftext|>")
    with pytest.raises(DataError, match="empty_turn"):
        build_document(Document(" \n"), tokenizer=tok)


def test_wrong_conversations_are_refused(tok: VitaTokenizer) -> None:
    with pytest.raises(DataError, match="media_count"):
        build_example(ask(Image(0)), [], [], tokenizer=tok, spec=TINY)
    question = without_answer(ask(Text("Which")))
    with pytest.raises(DataError, match="no_answer"):
        build_example(question, [], [], tokenizer=tok, spec=TINY)
    with pytest.raises(DataError, match="bad_order"):
        build_example(ask(Text("Which")), [], [], tokenizer=tok, spec=TINY, generation_prompt=True)
    prompt = build_example(question, [], [], tokenizer=tok, spec=TINY, generation_prompt=True)
    assert (prompt.labels == IGNORE_INDEX).all()
    assert tok.decode(prompt.tokens, skip_special_tokens=False).endswith("<|im_start|>assistant\n")


@given(st.text(alphabet=" \t\r\n\u2028abc", max_size=8))
def test_clean_answer_leaves_no_leading_break(text: str) -> None:
    cleaned = clean_answer(text)
    assert text.endswith(cleaned)
    assert clean_answer(cleaned) == cleaned
    blanks = cleaned[: len(cleaned) - len(cleaned.lstrip())]
    assert "\n" not in blanks
    assert "\r" not in blanks
    assert cleaned.lstrip() == text.lstrip()


def test_clean_answers_counts() -> None:
    sample, changed = clean_answers(ask(Text("q"), answer="\n \nyes"))
    assert changed == 1
    assert sample.messages[1].parts == (Text("yes"),)
    assert clean_answers(sample) == (sample, 0)


# ------------------------------------------------------------------------------ equality with stock transformers

PLAIN = st.text(alphabet=st.sampled_from(" \n\r\t.,?'sabFrame1237éäß中日\u0301:<|>_Which"), max_size=24)
SAID = PLAIN.filter(lambda text: text.strip())


@st.composite
def conversations(draw: st.DrawFn) -> tuple[Sample, list[MediaItem], list[list[MediaItem]]]:
    """Several pictures and videos in any order and turn; maybe a system turn."""
    messages: list[Message] = []
    images: list[MediaItem] = []
    videos: list[list[MediaItem]] = []
    if draw(st.booleans()):
        messages.append(Message("system", (Text(draw(SAID)),)))
    for _ in range(draw(st.integers(1, 3))):
        parts: list[Text | Image | Video] = []
        for kind in draw(st.lists(st.sampled_from("tiv"), max_size=5)):
            if kind == "t":
                text = draw(PLAIN)
                if parts and not isinstance(parts[-1], Text):
                    text = text.removeprefix("\n").removeprefix("\n")  # absorbed: see test_absorbed_newline
                    text = "x" + text if text.startswith("\n") else text
                parts.append(Text(text))
            elif kind == "i":
                parts.append(Image(len(images)))
                images.append(blank(draw(st.integers(8, 90)), draw(st.integers(8, 90))))
            else:
                parts.append(Video(len(videos)))
                videos.append([blank(16, 16, frame=True)] * draw(st.integers(1, 12)))
        if not any(not isinstance(p, Text) or p.text.strip() for p in parts):
            parts.append(Text(draw(SAID)))
        messages += [Message("user", tuple(parts)), Message("assistant", (Text(draw(SAID)),))]
    return Sample(tuple(messages), (FILE,) * len(images), (FILE,) * len(videos)), images, videos


def stock_ids(hf, sample: Sample, images: list[MediaItem], videos: list[list[MediaItem]]) -> list[int]:
    """AutoTokenizer's template, then InternVLProcessor's replacements (AutoProcessor itself needs torchvision)."""
    content = []
    for message in sample.messages:
        parts = [
            {"type": "text", "text": p.text} if isinstance(p, Text) else {"type": type(p).__name__.lower()}
            for p in message.parts
        ]
        texts_only = all(part["type"] == "text" for part in parts)
        content.append({"role": message.role, "content": "".join(p["text"] for p in parts) if texts_only else parts})
    text = hf.apply_chat_template(content, tokenize=False, add_generation_prompt=True)
    for item in images:
        tiles = len(plan_tiles(item, 0, TINY))
        text = text.replace("<IMG_CONTEXT>", "<img>" + "\0" * (TINY.tokens_per_tile * tiles) + "</img>", 1)
    for frames in videos:
        one = "<img>" + "\0" * TINY.tokens_per_tile + "</img>"
        text = text.replace("<video>", "\n".join(f"Frame{n}: {one}" for n in range(1, len(frames) + 1)), 1)
    return hf(text.replace("\0", "<IMG_CONTEXT>"), add_special_tokens=False)["input_ids"]


@settings(max_examples=300, deadline=None)
@given(conversations())
def test_ids_equal_stock_transformers(folder: Path, drawn: tuple) -> None:
    sample, images, videos = drawn
    hf = _auto_tokenizer(str(folder))
    tok = _vita(str(folder))
    sample, _ = clean_answers(sample)
    whole = build_example(sample, images, videos, tokenizer=tok, spec=TINY)
    prompts = [n for n, message in enumerate(sample.messages) if message.role == "assistant"]
    for turn in prompts:
        until = sample.messages[:turn]
        num_images = sum(isinstance(p, Image) for m in until for p in m.parts)
        num_videos = sum(isinstance(p, Video) for m in until for p in m.parts)
        part = Sample(until, (FILE,) * num_images, (FILE,) * num_videos)
        # indices count upwards in reading order, so a beginning of the sample uses a beginning of its media
        ours = build_example(
            part, images[:num_images], videos[:num_videos], tokenizer=tok, spec=TINY, generation_prompt=True
        )
        assert ours.tokens.tolist() == stock_ids(hf, part, images[:num_images], videos[:num_videos])
        assert np.array_equal(whole.tokens[: len(ours.tokens)], ours.tokens)


def test_absorbed_newline(tok: VitaTokenizer) -> None:
    """The one difference to stock on purpose: `<image>` newline in data is the template's newline."""
    examples: list[Example] = [
        build_example(ask(Image(0), Text(text)), [blank(16, 16)], [], tokenizer=tok, spec=TINY)
        for text in ("Which", "\nWhich")
    ]
    assert np.array_equal(examples[0].tokens, examples[1].tokens)


@lru_cache(maxsize=1)
def _auto_tokenizer(folder: str):
    return pytest.importorskip("transformers").AutoTokenizer.from_pretrained(folder)


@lru_cache(maxsize=1)
def _vita(folder: str) -> VitaTokenizer:
    return VitaTokenizer.load(folder)
