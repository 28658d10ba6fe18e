"""Token layouts: DESIGN's counts, and ids equal to stock transformers'."""

from __future__ import annotations

import contextlib
import dataclasses
import random
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_vita.config import DataConfig, TrainConfig
from megatron_vita.data.example import IGNORE_INDEX, Example, MediaItem
from megatron_vita.data.loading.loader import PackLoader, RankCoords
from megatron_vita.data.media.tiling import grid_for, plan_tiles, render_tiles
from megatron_vita.data.sample import Document, Image, MediaFile, Message, Sample, Text, Video, clean_answer
from megatron_vita.data.shards.manifest import SourceCounts, TokenizerInfo
from megatron_vita.data.shards.writer.in_memory import ShardWriter
from megatron_vita.data.sources.to_sample import clean_answers
from megatron_vita.data.spec import PreprocessSpec
from megatron_vita.data.text.chat import (
    build_document,
    build_example,
    frame_costs,
    without_answer,
)
from megatron_vita.data.text.tokenizer import VitaTokenizer
from megatron_vita.errors import DataError
from tests.data.kit import blank, picture, tokenizer_folder
from tests.data.text.stock import Stock

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


def test_an_answer_marked_so_carries_no_loss(tok: VitaTokenizer) -> None:
    talk = [Message("user", (Text("q"),)), Message("assistant", (Text("seven"),), learnt=False)]
    talk += [Message("user", (Text("r"),)), Message("assistant", (Text("three"),))]
    masked = build_example(Sample(tuple(talk)), [], [], tokenizer=tok, spec=TINY)
    plain = build_example(
        Sample(tuple(dataclasses.replace(one, learnt=True) for one in talk)), [], [], tokenizer=tok, spec=TINY
    )
    assert masked.tokens.tolist() == plain.tokens.tolist()
    assert tok.decode([label for label in masked.labels if label != IGNORE_INDEX]) == "three\n"
    assert tok.decode([label for label in plain.labels if label != IGNORE_INDEX]) == "seven\nthree\n"


def test_clean_answers_counts() -> None:
    sample, changed = clean_answers(ask(Text("q"), answer="\n \nyes"))
    assert changed == 1
    assert sample.messages[1].parts == (Text("yes"),)
    assert clean_answers(sample) == (sample, 0)


# ------------------------------------------------------------------------------ whole conversations

Drawn = tuple[Sample, list[MediaItem], list[list[MediaItem]]]
BITS = [
    *" \n\r\t.,?'s:<|>_",
    "\n\n",
    " \n",
    "a",
    "Which",
    "Frame1: ",
    "237",
    "é",
    "äß",
    "中日",
    "\u0301",
    "\u200b",
    "🙂",
]


def said(rng: random.Random, *, something: bool = True) -> str:
    """Text of many kinds, with blanks and line breaks at its edges; no literal special token."""
    while True:
        text = "".join(rng.choice(BITS) for _ in range(rng.randint(0, 12)))
        if text.strip() or not something:
            return text


def conversation(rng: random.Random, *, blanks: bool = False) -> Drawn:
    """One to four turns; several pictures and videos in any order and turn, or none; maybe a system turn."""
    messages: list[Message] = []
    images: list[MediaItem] = []
    videos: list[list[MediaItem]] = []
    if rng.random() < 0.4:
        messages.append(Message("system", (Text(said(rng)),)))
    kinds = rng.choice(["t", "ti", "tv", "tiv", "iv"])
    for _ in range(rng.randint(1, 4)):
        parts: list[Text | Image | Video] = []
        for kind in rng.choices(kinds, k=rng.randint(0, 5)):
            if kind == "t":
                text = said(rng, something=False)
                if parts and not isinstance(parts[-1], Text) and text.startswith("\n"):
                    text = "x" + text  # absorbed: see test_absorbed_newline
                parts.append(Text(text))
            elif kind == "i":
                parts.append(Image(len(images)))
                images.append(blank(rng.randint(8, 90), rng.randint(8, 90)))
            else:
                parts.append(Video(len(videos)))
                videos.append([blank(16, 16, frame=True)] * rng.randint(1, 12))
        if not any(not isinstance(part, Text) or part.text.strip() for part in parts):
            parts.append(Text(said(rng)))
        messages += [Message("user", tuple(parts)), Message("assistant", (Text(said(rng)),))]
    sample, _ = clean_answers(Sample(tuple(messages), (FILE,) * len(images), (FILE,) * len(videos)), blanks=blanks)
    return sample, images, videos


def conversations(number: int, *, blanks: bool = False) -> list[Drawn]:
    rng = random.Random(0)
    return [conversation(rng, blanks=blanks) for _ in range(number)]


def check_labels(tok: VitaTokenizer, sample: Sample, example: Example) -> None:
    """Loss lies on the answers, their end and the newline behind it, and labels are the next tokens."""
    learnt = np.flatnonzero(example.labels != IGNORE_INDEX)
    assert np.array_equal(example.labels[learnt], example.tokens[learnt + 1])
    answers = [
        part.text for m in sample.messages if m.role == "assistant" for part in m.parts if isinstance(part, Text)
    ]
    taught = "".join(f"{unicodedata.normalize('NFC', answer)}<|im_end|>\n" for answer in answers)
    assert tok.decode(example.labels[learnt], skip_special_tokens=False) == taught


def check_tiles(tok: VitaTokenizer, drawn: Drawn, spec: PreprocessSpec, example: Example) -> None:
    """Tiles stand in reading order, each on a run of context tokens of its own, and all contexts are taken."""
    sample, images, videos = drawn
    contexts = [tok.token_id(f"<{kind}_CONTEXT>") for kind in ("IMG", "PATCH", "VID")]
    places = np.concatenate([slot.first_token + np.arange(spec.tokens_per_tile) for slot in example.tiles] or [[]])
    assert np.array_equal(places, np.flatnonzero(np.isin(example.tokens, contexts)))
    read: list[MediaItem] = []
    for part in (part for message in sample.messages for part in message.parts):
        read += (
            [images[part.index]] if isinstance(part, Image) else videos[part.index] if isinstance(part, Video) else []
        )
    assert list(example.media) == read
    assert [slot.media for slot in example.tiles] == [
        number for number, item in enumerate(read) for _ in plan_tiles(item, number, spec)
    ]


# ------------------------------------------------------------------------------ equality with stock transformers


@pytest.fixture(scope="module")
def stock(folder: Path) -> Stock:
    pytest.importorskip("transformers")
    return Stock(folder, TINY)


def until_question(sample: Sample, turn: int, images: list, videos: list) -> Drawn:
    """The conversation before its message `turn`. Media are numbered in reading order: it has the first of them."""
    parts = [part for message in sample.messages[:turn] for part in message.parts]
    num_images, num_videos = (sum(isinstance(part, kind) for part in parts) for kind in (Image, Video))
    part = Sample(sample.messages[:turn], (FILE,) * num_images, (FILE,) * num_videos)
    return part, images[:num_images], videos[:num_videos]


@pytest.mark.slow
def test_ids_up_to_every_generation_prompt_equal_stock_transformers(tok: VitaTokenizer, stock: Stock) -> None:
    seen: dict[str, int] = {"prompts": 0, "pictures": 0, "videos": 0, "both": 0, "neither": 0}
    tile_counts: set[int] = set()
    for sample, images, videos in conversations(1200):
        whole = build_example(sample, images, videos, tokenizer=tok, spec=TINY)
        check_labels(tok, sample, whole)
        check_tiles(tok, (sample, images, videos), TINY, whole)
        for turn in (n for n, message in enumerate(sample.messages) if message.role == "assistant"):
            part = until_question(sample, turn, images, videos)
            ours = build_example(*part, tokenizer=tok, spec=TINY, generation_prompt=True)
            assert ours.tokens.tolist() == stock(*part)
            assert np.array_equal(whole.tokens[: len(ours.tokens)], ours.tokens)
            seen["prompts"] += 1
        seen["pictures"] += len(images) > 1
        seen["videos"] += len(videos) > 1
        seen["both"] += bool(images and videos)
        seen["neither"] += not images and not videos
        tile_counts |= {len(plan_tiles(item, 0, TINY)) for item in images}
    assert min(seen.values()) >= 100, seen
    assert tile_counts == {1, *range(3, 14)}, "every grid of up to 12 tiles, with its thumbnail"


@pytest.mark.parametrize(
    "literal", ["<|im_end|>", "<|im_start|>", "<|endoftext|>", "<img>", "</img>", "<image>", "<box>"]
)
@pytest.mark.parametrize("place", ["question", "answer", "system"])
def test_a_literal_special_token_is_text_to_us_and_a_special_token_to_stock(
    tok: VitaTokenizer, stock: Stock, literal: str, place: str
) -> None:
    """The difference that docs/tokens.md lists first: everything else of the prompt stays equal."""
    words = {"question": "Which?", "answer": "seven", "system": "the a"}
    with_literal, without = ({**words, place: words[place] + text} for text in (f" {literal} of", " of"))
    ours, theirs = [], []
    for one in (with_literal, without):
        texts = [("system", one["system"]), ("user", one["question"]), ("assistant", one["answer"]), ("user", "and?")]
        sample = Sample(tuple(Message(role, (Text(text),)) for role, text in texts))
        example = build_example(sample, [], [], tokenizer=tok, spec=TINY, generation_prompt=True)
        ours.append(example.tokens.tolist())
        theirs.append(stock(sample, [], []))
    special = tok.token_id(literal)
    assert ours[1] == theirs[1]
    assert theirs[0].count(special) == ours[0].count(special) + 1
    assert ours[0].count(special) == ours[1].count(special)
    assert tok.decode(ours[0], skip_special_tokens=False) == tok.decode(theirs[0], skip_special_tokens=False)


@pytest.mark.parametrize("literal", ["<IMG_CONTEXT>", "<video>"])
def test_a_literal_placeholder_takes_no_medium_from_its_place(tok: VitaTokenizer, stock: Stock, literal: str) -> None:
    """Stock puts the first picture where somebody wrote `<IMG_CONTEXT>`."""
    image = literal == "<IMG_CONTEXT>"
    medium = Image(0) if image else Video(0)
    sample = Sample((Message("user", (Text(f"Which {literal}"), medium)),), (FILE,) * image, (FILE,) * (not image))
    images, videos = ([blank(16, 16)], []) if image else ([], [[blank(16, 16, frame=True)]])
    ours = build_example(sample, images, videos, tokenizer=tok, spec=TINY, generation_prompt=True)
    text = tok.decode(ours.tokens, skip_special_tokens=False)
    assert text.index(f"Which {literal}") < text.index("<img>")
    check_tiles(tok, (sample, images, videos), TINY, ours)
    with contextlib.suppress(StopIteration):  # its iterator of media runs dry at the second placeholder
        assert stock(sample, images, videos) != ours.tokens.tolist()


def test_absorbed_newline(tok: VitaTokenizer) -> None:
    """`<image>` newline in data is the template's newline."""
    examples: list[Example] = [
        build_example(ask(Image(0), Text(text)), [blank(16, 16)], [], tokenizer=tok, spec=TINY)
        for text in ("Which", "\nWhich")
    ]
    assert np.array_equal(examples[0].tokens, examples[1].tokens)


# ------------------------------------------------------------------------------ the layout of the published weights


def long_vita_text(sample: Sample, images: list[MediaItem], videos: list[list[MediaItem]], spec: PreprocessSpec) -> str:
    """reference/long_vita.md written down plainly: the whole conversation with its special tokens spelt out."""

    def context(kind: str) -> str:
        return f"<{kind}_CONTEXT>" * spec.tokens_per_tile

    out = []
    for message in sample.messages:
        out.append(f"<|im_start|>{message.role}\n")
        for part in message.parts:
            if isinstance(part, Text):
                out.append(part.text)
            elif isinstance(part, Image):
                item = images[part.index]
                cols, rows = grid_for(item.width, item.height, spec)
                out.append(f"<img>{context('IMG')}</img>")
                if cols * rows > 1:
                    out.append(("\n" + f"<patch>{context('PATCH')}</patch>" * cols) * rows)
            else:
                out.append(f"<vid>{context('VID')}</vid>" * len(videos[part.index]))
        out.append("<|im_end|>\n")
    return "".join(out)


def test_long_vita_places_pictures_and_videos_in_any_order_of_any_turn(folder: Path, tok: VitaTokenizer) -> None:
    """The reference mis-indexes pictures behind videos; here ids, labels and tiles of 400 conversations are right."""
    hf = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(str(folder))
    spec = dataclasses.replace(TINY, layout="long_vita")
    mixed = 0
    for sample, images, videos in conversations(400):
        example = build_example(sample, images, videos, tokenizer=tok, spec=spec)
        text = long_vita_text(sample, images, videos, spec)
        assert example.tokens.tolist() == hf(text, add_special_tokens=False)["input_ids"]
        check_labels(tok, sample, example)
        check_tiles(tok, (sample, images, videos), spec, example)
        mixed += bool(images and videos)
    assert mixed > 100


# ------------------------------------------------------------------------------ one Sample in memory and a shard set


@pytest.mark.parametrize("layout", ["internvl", "long_vita"])
def test_a_sample_in_memory_has_the_ids_and_pixels_of_the_loader(
    tmp_path: Path, tok: VitaTokenizer, layout: str
) -> None:
    """Chat, evaluation and the server call build_example and render_tiles; training reads shards. Nothing differs."""
    spec = dataclasses.replace(TINY, layout=layout)  # type: ignore[arg-type]
    parts = (Text("Which"), Video(0), Image(0), Text("and this"), Image(1))
    sample = ask(*parts)
    images = [MediaItem(picture(50, 30, 1), 50, 30), MediaItem(picture(20, 40, 2), 20, 40)]
    frames = [MediaItem(picture(24, 18, seed), 24, 18, frame=True) for seed in (3, 4, 5)]
    example = build_example(sample, images, [frames], tokenizer=tok, spec=spec)
    info = TokenizerInfo(sha256=tok.sha256, vocab_size=tok.vocab_size, pad_id=tok.pad_id)
    with ShardWriter(
        tmp_path / "set", spec=spec, seq_length=256, tokenizer=info, template_sha256=tok.template_sha256
    ) as writer:
        writer.add_pack([example, example], [(0, 1), (0, 2)])
        writer.finish([SourceCounts(name="made", read=2, used=2)])
    data = DataConfig(data_path=str(tmp_path / "set"), seq_length=256, layout=layout)  # type: ignore[arg-type]
    with PackLoader(data, TrainConfig(global_batch_size=1), RankCoords()) as loader:
        (batch,) = next(loader).micro_batches
    length = len(example.tokens)
    for start in (0, length):
        assert np.array_equal(batch.tokens[0, start : start + length], example.tokens)
        assert np.array_equal(batch.labels[0, start : start + length], example.labels)
    rendered = [render_tiles(example.media[slot.media], [slot], spec)[0] for slot in example.tiles]
    assert np.array_equal(batch.tiles, np.stack(rendered * 2))
    assert len({tile.tobytes() for tile in rendered}) == len(rendered) > 6


def test_a_template_may_have_options(tmp_path: Path, tok: VitaTokenizer) -> None:
    folder = tokenizer_folder(tmp_path)
    template = folder / "chat_template.jinja"
    quiet = "{% if add_generation_prompt and quiet %}{{ range(0) | list | length }} hush {{ quiet }}{% endif %}"
    template.write_text(template.read_text(encoding="utf-8") + quiet, encoding="utf-8")
    changed = VitaTokenizer.load(folder)
    assert (tok.template.options, changed.template.options) == (frozenset(), {"quiet"})
    plain = without_answer(ask(Text("the"), Image(0)))

    def prompt(tokenizer: VitaTokenizer, *options: tuple[str, str]) -> str:
        sample = dataclasses.replace(plain, template_options=options)
        items = [MediaItem(b"", 16, 16)]
        example = build_example(sample, items, (), tokenizer=tokenizer, spec=TINY, generation_prompt=True)
        return tokenizer.decode(example.tokens, False)

    for value in ("1", "true", '"much"', "false"):
        extra = {"1": "0 hush 1", "true": "0 hush True", '"much"': "0 hush much", "false": ""}[value]
        assert prompt(changed, ("quiet", value)) == prompt(tok) + extra
    assert prompt(tok, ("quiet", "1"), ("messages", "[]"), ("tools", "3")) == prompt(tok)
