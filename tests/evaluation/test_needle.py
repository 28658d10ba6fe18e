"""Needles: where they are hidden, how long their haystacks are, and that nothing is written twice."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import count
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from megatron_vita.data.media.video.open import open_video
from megatron_vita.data.sample import MediaFile, Text
from megatron_vita.data.spec import PreprocessSpec
from megatron_vita.data.text.tokenizer import VitaTokenizer
from megatron_vita.errors import ConfigError
from megatron_vita.evaluation.needle.grid import Grid, depths_of, place
from megatron_vita.evaluation.needle.needles import Needle, numbered_city, numbered_page, read_needles
from megatron_vita.evaluation.needle.needles import given as given_needles
from megatron_vita.evaluation.needle.sets import text_sets, visual_sets
from megatron_vita.evaluation.needle.text import TextNeedles, costs_of, prose
from megatron_vita.evaluation.needle.visual import Haystack, VisualNeedles, open_haystack
from megatron_vita.evaluation.questions import Question
from megatron_vita.evaluation.tasks import TASKS
from megatron_vita.inference import answer_key
from megatron_vita.inference.answer_key import MediaKeys
from tests.data.kit import tokenizer_folder
from tests.inference.tiny import write_media

SAMPLES = st.builds(
    Grid,
    depths=st.lists(st.floats(0, 1), min_size=1, max_size=4).map(depths_of),
    samples=st.integers(1, 3),
    seed=st.integers(0, 9),
)
HIDDEN = MediaFile(path="needle.png")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> VitaTokenizer:
    return VitaTokenizer.load(tokenizer_folder(tmp_path_factory.mktemp("text") / "tokenizer"))


def pictures(many: int) -> Haystack:
    return Haystack(many, lambda number: MediaFile(path=f"{number}.png"))


# ------------------------------------------------------------------------------------------------------- the grid


@pytest.mark.parametrize(
    ("values", "depths"),
    [
        ([2], (0, 1)),
        ([5], (0, 0.25, 0.5, 0.75, 1)),
        ([4], (0, 0.3333, 0.6667, 1)),
        ([0.5], (0.5,)),
        ([1], (1,)),
        ([0], (0,)),
        ([1, 0, 0.5, 0.5], (0, 0.5, 1)),
    ],
)
def test_depths(values: list[float], depths: tuple[float, ...]) -> None:
    assert depths_of(values) == depths


@pytest.mark.parametrize("values", [[], [1.5], [-0.1], [0, 2], [2.5], [float("nan")], [float("inf")]])
def test_depths_that_cannot_be(values: list[float]) -> None:
    with pytest.raises(ConfigError, match=r"--depths"):
        depths_of(values)


@given(st.floats(0, 1), st.integers(1, 5000))
def test_the_nearest_place(depth: float, length: int) -> None:
    index = place(depth, length)
    assert 0 <= index < length
    assert abs(index - depth * (length - 1)) <= 0.5


@given(SAMPLES)
def test_no_two_questions_have_one_line(grid: Grid) -> None:
    lines = [grid.line(*cell) for cell in grid]
    assert len(set(lines)) == len(lines)
    assert min(lines) >= 1


def test_every_cell_is_asked_every_sample() -> None:
    grid = Grid(depths=(0, 0.5, 1), samples=2, seed=1)
    assert [grid.cell(index) for index in range(len(grid))] == [(0, 0), (0.5, 0), (1, 0), (0, 1), (0.5, 1), (1, 1)]
    assert list(grid) == [grid.cell(index) for index in range(len(grid))]
    with pytest.raises(IndexError):
        grid.cell(6)
    with pytest.raises(ConfigError, match=r"--samples 0"):
        Grid(depths=(0,), samples=0, seed=1)
    with pytest.raises(ConfigError, match=r"--seed -1"):
        Grid(depths=(0,), samples=1, seed=-1)


# --------------------------------------------------------------------------------------------------------- visual


@given(SAMPLES, st.integers(2, 40), st.integers(1, 50))
def test_a_clip_is_a_run_of_the_haystack_around_its_needle(grid: Grid, frames: int, many: int) -> None:
    def needle(depth: float, sample: int) -> Needle:
        return Needle("Which?", str(sample), image=HIDDEN)

    for index, question in enumerate(VisualNeedles(grid, frames, pictures(many), needle)):
        depth, sample = grid.cell(index)
        (video,) = question.sample.videos
        clip = list(video.frames)
        assert len(clip) == frames
        assert clip.pop(place(depth, frames)) == HIDDEN
        first = int(str(clip[0].path).removesuffix(".png"))
        assert [frame.path for frame in clip] == [f"{(first + number) % many}.png" for number in range(frames - 1)]
        assert (question.expected, question.line) == (str(sample), grid.line(depth, sample))
        assert question.fields == {"needle": "visual", "frames": frames, "depth": depth, "sample": sample}
        question.sample.check()


def test_questions_of_a_depth_draw_by_themselves_and_lengths_draw_alike() -> None:
    def needle(depth: float, sample: int) -> Needle:
        return Needle("Which?", "7", image=HIDDEN)

    grid = Grid(depths=(0, 1), samples=2, seed=3)
    short, long = (VisualNeedles(grid, frames, pictures(1000), needle) for frames in (20, 40))
    clips = [[frame for frame in question.sample.videos[0].frames if frame != HIDDEN] for question in short]
    assert len({str(clip) for clip in clips}) == 4
    for clip, longer in zip(clips, long, strict=True):
        assert [frame for frame in longer.sample.videos[0].frames if frame != HIDDEN][:19] == clip


def test_generated_pictures_are_drawn_once_and_show_what_is_asked(tmp_path: Path) -> None:
    grid = Grid(depths=(0.5,), samples=2, seed=1)
    sets = visual_sets([4, 3, 4], grid, tmp_path)
    assert [(one.name, one.max_frames) for one in sets] == [
        ("needle visual 3 frames", 3),
        ("needle visual 4 frames", 4),
    ]
    assert not list(tmp_path.iterdir()), "nothing is drawn before a set is read"
    questions = [question for one in sets for question in one.read(None)]
    files = sorted(tmp_path.rglob("*.png"))
    assert len(files) == 2 * 3 + 2, "three scenes and a page for each sample; the shorter clip has two of the scenes"
    stamps = [path.stat().st_mtime_ns for path in files]
    again = [question for one in visual_sets([3, 4], grid, tmp_path) for question in one.read(None)]
    assert again == questions
    assert [path.stat().st_mtime_ns for path in files] == stamps
    assert len(sets[0].read(1)) == 1
    assert isinstance(sets[0].read(10**9), VisualNeedles), "all are not made at once, either"
    page = Image.open(tmp_path / f"numbers/{questions[0].expected}.png").convert("L")
    assert page.getpixel((3, 3)) == 255, "a white page"
    assert page.resize((1, 1), Image.Resampling.BOX).getpixel((0, 0)) in range(150, 254), "with something on it"
    with open_video(questions[0].sample.videos[0], limits=None) as video:
        assert len(video.plan(PreprocessSpec(), 3)) == 3, "every frame is sampled at one frame a second"


def test_frames_that_clips_share_are_digested_once(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[MediaFile] = []
    monkeypatch.setattr(answer_key, "_content", lambda file: str(seen.append(file) or file.path))
    keys = MediaKeys()
    questions = VisualNeedles(
        Grid(depths=(0, 0.5, 1), samples=1, seed=1), 9, pictures(6), lambda *_: Needle("?", "7", image=HIDDEN)
    )
    digests = [keys.key(question.sample.videos[0]) for question in questions]
    assert len(seen) == 7
    assert len(set(digests)) == 3


def test_a_video_becomes_frames_once(tmp_path: Path) -> None:
    video = write_media(tmp_path)["video"]
    found = open_haystack(video, tmp_path / "out", 3, 1)
    assert found.count == 3
    paths = sorted(path for path in (tmp_path / "out").rglob("*") if path.is_file())
    assert [found.frame(number).path for number in range(3)] == [str(path) for path in paths]
    stamps = [path.stat().st_mtime_ns for path in paths]
    assert open_haystack(video, tmp_path / "out", 3, 1).count == 3
    assert [path.stat().st_mtime_ns for path in paths] == stamps
    assert not list(tmp_path.rglob("*.partial"))


def test_a_folder_of_frames_is_used_where_it_lies(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("2.png", "10.png", "1.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    found = open_haystack(tmp_path, tmp_path / "out", 8, 1)
    assert [Path(str(found.frame(number).path)).name for number in range(found.count)] == ["1.png", "2.png", "10.png"]
    assert not (tmp_path / "out").exists()
    assert "3 frames; clips of up to 8 repeat them" in caplog.text


@pytest.mark.parametrize("make", [lambda path: None, Path.mkdir], ids=["missing", "empty"])
def test_a_haystack_without_frames(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / "hay")
    with pytest.raises(ConfigError, match=r"Check --haystack"):
        open_haystack(tmp_path / "hay", tmp_path / "out", 8, 1)


# ----------------------------------------------------------------------------------------------------------- text

PROSE = prose(None, 3)


@given(SAMPLES, st.integers(40, 600))
def test_a_text_has_as_many_tokens_as_asked_but_for_a_sentence(
    tokenizer: VitaTokenizer, grid: Grid, tokens: int
) -> None:
    costs = costs_of(PROSE[:40], tokenizer)
    questions = TextNeedles(grid, tokens, PROSE[:40], numbered_city(grid), tokenizer, costs)
    for index, question in enumerate(questions):
        depth, _ = grid.cell(index)
        text, asked = text_of(question).rsplit("\n", 1)
        length = len(tokenizer.encode(" " + text))
        assert tokens - costs.max() < length <= tokens
        needle = numbered_city(grid)(*grid.cell(index))
        assert text.count(needle.text) == 1
        assert asked == needle.question
        assert needle.answer == question.expected
        before = len(tokenizer.encode(" " + text[: text.index(needle.text)].rstrip())) if depth else 0
        room = length - int(costs_of([needle.text], tokenizer)[0])
        assert abs(before - depth * room) <= costs.max(), "at the sentence that is nearest to the depth"


def text_of(question: Question) -> str:
    (part,) = question.sample.messages[0].parts
    assert isinstance(part, Text)
    return part.text


def test_depths_of_a_text_by_hand(tokenizer: VitaTokenizer) -> None:
    """Three sentences of one length and a needle: before the first, between them, behind the last."""
    costs = costs_of(["the"] * 3, tokenizer)
    grid = Grid(depths=(0, 0.4, 0.6, 1), samples=1, seed=1)
    needle = Needle("Who?", "you", text="it is you")
    tokens = int(costs.sum() + costs_of([needle.text], tokenizer)[0])
    questions = TextNeedles(grid, tokens, ["the"] * 3, lambda *_: needle, tokenizer, costs)
    assert [text_of(question) for question in questions] == [
        "it is you the the the\nWho?",
        "the it is you the the\nWho?",
        "the the it is you the\nWho?",
        "the the the it is you\nWho?",
    ]
    (short,) = TextNeedles(
        Grid(depths=(1,), samples=1, seed=1), tokens - 1, ["the"] * 3, lambda *_: needle, tokenizer, costs
    )
    assert text_of(short) == "the the it is you\nWho?"


def test_a_needle_longer_than_its_text(tokenizer: VitaTokenizer) -> None:
    grid = Grid(depths=(1,), samples=1, seed=1)
    with pytest.raises(ConfigError, match=r"--lengths 3: the needle .* alone has"):
        TextNeedles(grid, 3, PROSE, numbered_city(grid), tokenizer, costs_of(PROSE, tokenizer))


def test_prose(tmp_path: Path) -> None:
    assert len(set(PROSE)) == len(PROSE) == 4096
    assert prose(None, 3) == PROSE
    assert prose(None, 4) != PROSE
    assert not any(character.isdigit() for character in "".join(PROSE)), "no number but the needle's"
    (tmp_path / "a.txt").write_text("One, two. Three?\n\nFour  five!  " + "word " * 130)
    assert [len(sentence.split()) for sentence in prose(tmp_path / "a.txt", 1)] == [2, 1, 2, 60, 60, 10]
    (tmp_path / "b.txt").write_text(" \n")
    (tmp_path / "c.txt").write_bytes(b"\xff\xfe")
    for name in ("b.txt", "c.txt", "none.txt"):
        with pytest.raises(ConfigError, match=f"{name}.*Check --haystack"):
            prose(tmp_path / name, 1)


def test_lengths_are_checked_before_anything_is_read(tmp_path: Path) -> None:
    grid = Grid(depths=(1,), samples=1, seed=1)
    with pytest.raises(ConfigError, match=r"--frames 8 1: .* from 2 on"):
        visual_sets([8, 1], grid, tmp_path)
    with pytest.raises(ConfigError, match=r"--lengths 0: .* from 1 on"):
        text_sets([0], grid, ["none"])
    (one,) = text_sets([64], grid, [str(tmp_path / "none")])
    with pytest.raises(ConfigError, match="none"):
        one.read(None)


# -------------------------------------------------------------------------------------------------------- needles


def test_needles_of_a_file(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    lines = [{"image": "a.png", "question": "Which?", "answer": "7"}] * 2
    (tmp_path / "n.jsonl").write_text("\n\n".join(map(json.dumps, lines)))
    needles = read_needles(tmp_path / "n.jsonl", "visual")
    assert needles == [Needle("Which?", "7", image=MediaFile(path=str((tmp_path / "a.png").resolve())))] * 2
    (tmp_path / "t.jsonl").write_text('{"text": "It is\\n\u2028 seven.", "question": "Which?", "answer": "7"}')
    assert read_needles(tmp_path / "t.jsonl", "text") == [Needle("Which?", "7", text="It is seven.")]
    fewer = given_needles([Needle("?", str(number)) for number in range(3)], Grid(depths=(0,), samples=7, seed=2))
    drawn = [fewer(0, sample).answer for sample in range(7)]
    assert drawn[:3] == drawn[3:6] == [*drawn[:3]]
    assert sorted(drawn[:3]) == ["0", "1", "2"], "each once before any again"
    orders = {tuple(fewer(depth / 10, sample).answer for sample in range(3)) for depth in range(11)}
    assert len(orders) > 2, "every depth has its own order"


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("", "no needle in it"),
        ("{", "line 1: must be a JSON object with the texts image, question, answer"),
        ("[]", "line 1"),
        ('{"image": "a.png", "question": "Which?"}', "line 1"),
        ('{"image": "a.png", "question": "Which?", "answer": 7}', "line 1"),
        ('{"image": "none.png", "question": "Which?", "answer": "7"}', "line 1: no picture none.png below"),
        ('{"image": "../a.png", "question": "Which?", "answer": "7"}', "line 1: no picture"),
    ],
)
def test_bad_needles_name_their_line(tmp_path: Path, line: str, says: str) -> None:
    (tmp_path / "in").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "in/n.jsonl").write_text(line)
    with pytest.raises(ConfigError, match=says):
        read_needles(tmp_path / "in/n.jsonl", "visual")


def test_needles_that_are_no_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="Check --needles"):
        read_needles(tmp_path / "none.jsonl", "visual")


def test_generated_needles_depend_on_the_seed_and_the_sample_alone(tmp_path: Path) -> None:
    wanted: list[tuple[tuple[float, ...], int, int]] = [((0,), 2, 1), ((0, 1), 5, 1), ((0,), 2, 2)]
    grids = [Grid(depths=depths, samples=samples, seed=seed) for depths, samples, seed in wanted]
    for make in (numbered_city, lambda grid: numbered_page(grid, tmp_path)):
        first, longer, other = ([make(grid)(0, sample) for sample in range(2)] for grid in grids)
        assert first == longer != other
        assert first[0] != first[1]
    assert numbered_city(grids[0])(0, 1).answer in numbered_city(grids[0])(0, 1).text


@pytest.mark.parametrize(
    ("answer", "gold", "found"),
    [
        ("7305", "7305", 1),
        (" The number is 7305.", "7305", 1),
        ("7,305", "7305", 1),
        ("7305", "7,305", 1),
        ("**7305**", "7305", 1),
        ("173052", "7305", 0),
        ("7305.5", "7305", 0),
        ("0.7305", "7305", 0),
        ("a7305", "7305", 0),
        ("the RED   fox.", "red fox", 1),
        ("red foxes", "red fox", 0),
        ("", "7", 0),
        ("7, 305", "7305", 0),
        ("C++ it is", "C++", 1),
    ],
)
def test_a_needle_is_found_as_a_whole_word(answer: str, gold: str, found: float) -> None:
    numbers = count(1)
    assert TASKS["needle"](answer, Question(None, gold, next(numbers), {})).value == found  # type: ignore[arg-type]
