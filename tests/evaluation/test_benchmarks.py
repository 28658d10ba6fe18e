"""Benchmarks from files in their publishers' layouts: the right question, gold answer, options, category and media."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_vita.data.media.image import read_image
from megatron_vita.data.sample import Image, MediaFile, Text, Video
from megatron_vita.errors import ConfigError, DataError
from megatron_vita.evaluation.benchmarks import BENCHMARKS, STYLES, benchmark_set, read_benchmark
from megatron_vita.evaluation.benchmarks.videos import MVBENCH
from megatron_vita.evaluation.questions import Question, data_file, read_questions
from megatron_vita.evaluation.tasks import TASKS
from tests.evaluation import published
from tests.evaluation.published import BLUE, RED, WIDE
from tests.scripts import ROOT

Written = list[str | bytes]
"""Texts of a prompt, and in their places the bytes of pictures, or the path of a video."""

LETTER = "Answer with the option's letter from the given choices directly."
PHRASE = "Answer the question using a single word or phrase."
DIRECTLY = "Answer this question using the text in the image directly without any other context."
SELECT = (
    "Select the best answer to the following multiple-choice question based on the video. "
    "Respond with only the letter (A, B, C, or D) of the correct option.\n"
)
WATCH = (
    "Carefully watch the video and pay attention to the cause and sequence of events, the detail and movement of "
    "objects, and the action and pose of persons. Based on your observations, select the best option that accurately "
    "addresses the question.\n"
)


def read(name: str, write: Callable[[Path], None], folder: Path, **more: Any) -> list[Question]:
    """Write a benchmark's files and read them."""
    write(folder / "root")
    return read_benchmark(name, folder / "root", work=folder / "work", **more)


def written(question: Question, root: Path) -> Written:
    """What the question says and shows, in order."""
    (message,) = question.sample.messages
    out: Written = []
    for part in message.parts:
        if isinstance(part, Text):
            out.append(part.text)
        elif isinstance(part, Image):
            out.append(read_image(question.sample.images[part.index]).data)
        else:
            assert isinstance(part, Video)
            out.append(
                Path(str(question.sample.videos[part.index].path)).relative_to(root / "root").as_posix().encode()
            )
    return out


def held(folder: Path) -> bytes:
    """What is in the one file of pictures."""
    (file,) = (folder / "work").glob("*.pictures")
    return file.read_bytes()


FIRST: list[tuple[str, Callable[[Path], None], int, Written, tuple[str, ...], tuple[str, ...], dict[str, Any]]] = [
    (
        "mmbench", published.mmbench_tsv, 3,
        [RED, "\nHint: Look\nclosely\nQuestion: Which\tcolour?\nOptions:\nA. red\nB. blue\nAnswer with the letter."],
        ("A",), ("red", "blue"),
        {"id": "7", "category": "colour", "l2_category": "perception", "split": "dev", "circle": 7},
    ),
    (
        "mmbench", published.mmbench_parquet, 1,
        [RED, "\nQuestion: Which colour?\nOptions:\nA. red\nB. blue\nAnswer with the letter."], ("A",), ("red", "blue"),
        {"id": "7", "category": "colour", "l2_category": "perception", "split": "dev", "circle": 7},
    ),
    (
        "ai2d", published.ai2d_tsv, 1,
        [WIDE, "\nQuestion: What eats what?\nOptions:\nA. cat\nB. dog\nC. fox\nAnswer with the letter."],
        ("C",), ("cat", "dog", "fox"), {"id": "1", "category": "foodChains"},
    ),
    (
        "ai2d", published.ai2d_parquet, 1,
        [WIDE, "\nQuestion: What eats what?\nOptions:\nA. cat\nB. dog\nC. fox\nAnswer with the letter."],
        ("C",), ("cat", "dog", "fox"), {},
    ),
    (
        "ocrbench", published.ocrbench_tsv, 1,
        [RED, f"\nwhat is written in the image?\n{DIRECTLY}"],
        ("CENTRE", "Centre"), (), {"id": "0", "category": "Regular Text Recognition"},
    ),
    (
        "ocrbench", published.ocrbench_parquet, 1,
        [RED, f"\nwhat is written in the image?\n{DIRECTLY}"],
        ("CENTRE", "Centre"), (), {"category": "Regular Text Recognition", "dataset": "IIIT5K"},
    ),
    (
        "chartqa", published.chartqa_tsv, 1, [RED, f"\nHow many?\n{PHRASE}"],
        ("14",), (), {"id": "0", "category": "test_human"},
    ),
    (
        "chartqa", published.chartqa_parquet, 1, [RED, f"\nHow many?\n{PHRASE}"],
        ("14",), (), {"category": "human_test"},
    ),
    (
        "docvqa", published.docvqa_tsv, 2, [RED, f"\nWho signed?\n{PHRASE}"],
        ("J. Doe", "Doe"), (), {"id": "1"},
    ),
    (
        "docvqa", published.docvqa_parquet, 2, [RED, f"\nWho signed?\n{PHRASE}"],
        ("J. Doe", "Doe"), (), {"id": "337", "docId": "0", "category": "handwritten"},
    ),
    (
        "mmmu", published.mmmu_tsv, 2,
        [
            "Question: Compare ", RED, "\n with ", BLUE, "\n.\nOptions:\nA. like ", RED,
            f"\n\nB. unlike\n{LETTER}",
        ],
        ("B",), ("like <image 1>", "unlike"),
        {"id": "validation_Art_Theory_1", "category": "Art_Theory", "split": "validation"},
    ),
    (
        "mmmu", published.mmmu_parquet, 2,
        [
            "Question: Compare ", RED, "\n with ", BLUE, "\n.\nOptions:\nA. like ", RED,
            f"\n\nB. unlike\n{LETTER}",
        ],
        ("B",), ("like <image 1>", "unlike"), {"id": "validation_Art_Theory_1", "category": "Art_Theory"},
    ),
    (
        "longvideobench", published.longvideobench, 1,
        [b"videos/v1.mp4", f"And then?\nA. one\nB. two\nC. three\n{LETTER}Offer a very short reply."],
        ("B",), ("one", "two", "three"),
        {"id": "v1_0", "category": "T2E", "topic": "Lab", "duration": 600},
    ),
    (
        "longvideobench", published.longvideobench_parquet, 1,
        [b"videos/v1.mp4", f"And then?\nA. one\nB. two\nC. three\n{LETTER}Offer a very short reply."],
        ("B",), ("one", "two", "three"),
        {"id": "v1_0", "category": "T2E", "topic": "Lab", "duration": 600},
    ),
    (
        "videomme", published.videomme, 2,
        [
            b"data/fFjv93ACGo8.mp4",
            (f"\nThese are the frames of a video. {SELECT}Question: How many?\n"
            "A. One.\nB. Two.\nC. Three.\nD. Four.\nOffer a very short reply."),
        ],
        ("C",), ("One.", "Two.", "Three.", "Four."),
        {
            "id": "001-1", "category": "Knowledge", "sub_category": "Law", "task_type": "Counting Problem",
            "duration": "short",
        },
    ),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "write", "count", "prompt", "golds", "options", "fields"),
    FIRST,
    ids=[write.__name__ for _, write, *_ in FIRST],  # type: ignore[attr-defined]
)
def test_the_first_question(
    name: str,
    write: Callable[[Path], None],
    count: int,
    prompt: Written,
    golds: tuple[str, ...],
    options: tuple[str, ...],
    fields: dict[str, Any],
    tmp_path: Path,
) -> None:
    questions = read(name, write, tmp_path)
    assert len(questions) == count
    first = questions[0]
    assert written(first, tmp_path) == prompt
    assert (first.golds, first.expected, first.options) == (golds, golds[0], options)
    assert dict(first.fields) == fields
    assert first.task == BENCHMARKS[name].task
    for question in questions:
        question.sample.check()
        gold = TASKS[question.task](question.expected, question)
        assert gold.value == 1, "the gold answer is right"
        assert TASKS[question.task]("", question).value == 0
        assert all(file.data is None for file in (*question.sample.images, *question.sample.videos)), "in no memory"
    (again,) = read_benchmark(name, tmp_path / "root", work=tmp_path / "work", limit=1)
    assert (again.line, again.golds, written(again, tmp_path)) == (first.line, golds, prompt)


def test_every_benchmark_is_tried_in_every_style(tmp_path: Path) -> None:
    tried = {name: write for name, write, *_ in FIRST} | {"mvbench": published.mvbench}
    assert set(tried) == set(BENCHMARKS)
    for name, write in tried.items():
        write(tmp_path / name)
        prompts = set()
        for style in STYLES:
            question = read_benchmark(name, tmp_path / name, work=tmp_path / "work", style=style)[0]
            texts = [part.text for part in question.sample.messages[0].parts if isinstance(part, Text)]
            prompts.add((*texts,))
        assert len(prompts) >= 2, f"{name}: styles differ"


def test_prompts_of_lmms_eval(tmp_path: Path) -> None:
    ends = {
        "ai2d": f"What eats what?\nA. cat\nB. dog\nC. fox\n{LETTER}",
        "mmbench": f"Look\nclosely Which\tcolour? There are several options:\nA. red\nB. blue\n\n{LETTER}",
        "chartqa": f"How many?\n{PHRASE}",
        "mvbench": "Question:What happens?\nOption:\n(A) runs\n(B) sits\n(C) falls\nOnly give the best option.\n",
        "longvideobench": f"And then?\nA. one\nB. two\nC. three\n{LETTER}\n",
    }
    writers = {"mvbench": published.mvbench, **{name: write for name, write, *_ in reversed(FIRST)}}
    for name, end in ends.items():
        question = read(name, writers[name], tmp_path / name, style="lmms_eval")[0]
        assert written(question, tmp_path / name)[-1] == end
        assert not isinstance(question.sample.messages[0].parts[0], Text), "pictures and videos come first"


def test_mmmu_with_all_pictures_in_front(tmp_path: Path) -> None:
    first, second = read("mmmu", published.mmmu_parquet, tmp_path, style="lmms_eval")
    body = "Compare <image 1> with <image 2>.\nA. like <image 1>\nB. unlike\n\n" + LETTER
    assert written(first, tmp_path) == [RED, BLUE, body]
    assert written(second, tmp_path) == [WIDE, f"How long is it?\n\n{PHRASE}"]
    assert second.golds == ("5", "five")
    assert second.fields["category"] == "Math"


def test_rotated_questions_share_picture_and_circle(tmp_path: Path) -> None:
    first, rotated, other = read("mmbench", published.mmbench_tsv, tmp_path)
    assert first.sample.images[0].offset == rotated.sample.images[0].offset != other.sample.images[0].offset
    assert (first.fields["circle"], rotated.fields["circle"], other.fields["circle"]) == (7, 7, 8)
    assert (rotated.golds, rotated.options) == (("B",), ("blue", "red"))
    assert other.options == ("red", "blue", "green", "none")
    assert held(tmp_path) == RED + BLUE, "each picture once"


def test_a_picture_may_stand_in_a_later_row(tmp_path: Path) -> None:
    cells = {5: "9", 7: published.coded(BLUE), 9: published.coded(RED)}
    rows = [{"index": index, "question": "Who?", "answer": "I", "image": cell} for index, cell in cells.items()]
    published.tsv(tmp_path / "DocVQA_VAL.tsv", rows)
    questions = read_benchmark("docvqa", tmp_path, work=tmp_path / "work")
    assert [question.line for question in questions] == [1, 2, 3]
    assert [read_image(question.sample.images[0]).data for question in questions] == [RED, BLUE, RED]


@pytest.mark.parametrize("write", [published.mvbench, published.mvbench_segments])
def test_mvbench_asks_for_parts_unless_they_were_cut(write: Callable[[Path], None], tmp_path: Path) -> None:
    questions = {question.fields["category"]: question for question in read("mvbench", write, tmp_path)}
    assert set(questions) == {"action_sequence", "action_antonym", "episodic_reasoning"}
    parts = {name: (q.sample.videos[0].start, q.sample.videos[0].end) for name, q in questions.items()}
    names = {name: str(q.sample.videos[0].label) for name, q in questions.items()}
    whole = (0.0, None)
    if write is published.mvbench:
        assert parts == {"action_sequence": (2.5, 7.25), "action_antonym": whole, "episodic_reasoning": (1.0, 4.0)}
        assert names["episodic_reasoning"] == "video/tvqa/frames_fps3_hq/show/s01"
        assert questions["episodic_reasoning"].sample.videos[0].frame_rate == 3.0
        assert written(questions["action_sequence"], tmp_path) == [
            f"{WATCH}Question: What happens?\nOptions:\n(A) runs\n(B) sits\n(C) falls",
            b"video/star/Charades_v1_480/AB12.mp4",
            "\nAnswer with the letter.",
        ]
    else:
        assert set(parts.values()) == {whole}
        assert names["action_antonym"] == "ssv2_video_mp4/166583.mp4", "the suffix of its rows is another"
    assert all((q.golds, q.options) == (("B",), ("runs", "sits", "falls")) for q in questions.values())
    assert len(MVBENCH) == 20


def test_subtitles(tmp_path: Path) -> None:
    first, silent = read("videomme", published.videomme, tmp_path / "mme", subtitles=True)
    said = "This video's subtitles are listed below:\nGood evening\n12 months\nSelect the best"
    assert said in str(written(first, tmp_path / "mme")[1]), "no tags, no repetitions, numbers of its own kept"
    assert "listed below:\nNo subtitles available\nSelect" in str(written(silent, tmp_path / "mme")[1])
    (one,) = read("longvideobench", published.longvideobench, tmp_path / "lvb", subtitles=True)
    assert str(written(one, tmp_path / "lvb")[1]).startswith(
        "This video's subtitles are listed below:\nHello\nyou\nAnd then?\nA. one"
    )
    with pytest.raises(ConfigError, match="ai2d has no subtitles"):
        read("ai2d", published.ai2d_tsv, tmp_path, subtitles=True)
    (tmp_path / "lvb/root/subtitles/v1_en.json").write_text("{}")
    with pytest.raises(DataError, match=r"row 1: .*v1_en\.json: no subtitles"):
        read_benchmark("longvideobench", tmp_path / "lvb/root", work=tmp_path, subtitles=True)


def test_categories(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    found = read("mvbench", published.mvbench, tmp_path, categories=["action_antonym"])
    assert [question.fields["category"] for question in found] == ["action_antonym"]
    with pytest.raises(ConfigError, match=r"no question in it of \['dancing'\]; it has \['action_antonym', 'action"):
        read_benchmark("mvbench", tmp_path / "root", work=tmp_path, categories=["dancing"])
    some = read_benchmark("mvbench", tmp_path / "root", work=tmp_path, categories=["dancing", "action_antonym"])
    assert [question.fields["category"] for question in some] == ["action_antonym"]
    assert "mvbench: no question of ['dancing']; it has ['action_antonym'" in caplog.text


def test_a_value_that_is_missing_in_a_table_is_none(tmp_path: Path) -> None:
    talk = '"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "B"}]'
    (tmp_path / "own.jsonl").write_text(f'{{{talk}, "duration": NaN, "category": "x"}}\n')
    assert read_questions(tmp_path / "own.jsonl")[0].fields == {"duration": None, "category": "x"}
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(ConfigError, match=r"^[^ ]*empty\.jsonl: no record can be read .* Is the file empty"):
        read_questions(tmp_path / "empty.jsonl")


def test_a_data_file_may_be_the_root(tmp_path: Path) -> None:
    published.mvbench(tmp_path / "mv")
    file = tmp_path / "mv/json/action_antonym.json"
    (question,) = read_benchmark("mvbench", file, work=tmp_path)
    assert question.sample.videos[0].label == "video/ssv2_video/166583.webm"
    published.mmbench_tsv(tmp_path / "mm")
    other = (tmp_path / "mm/MMBench_DEV_EN.tsv").rename(tmp_path / "mm/MMBench_DEV_CN.tsv")
    assert len(read_benchmark("mmbench", other, work=tmp_path)) == 3


def test_missing_files_say_what_to_download_and_where_it_belongs(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no data file of docvqa \(DocVQA_VAL\.tsv.*Download DocVQA_VAL\.tsv of VLM"):
        read_benchmark("docvqa", tmp_path, work=tmp_path)
    published.videomme(tmp_path / "mme")
    (tmp_path / "mme/data/silent.mkv").unlink()
    with pytest.raises(
        ConfigError,
        match=r"videomme: 1 video missing below .*the first is data/silent\.mp4 \(categories: Knowledge\)\. Download l",
    ):
        read_benchmark("videomme", tmp_path / "mme", work=tmp_path)
    with pytest.raises(ConfigError, match="Did you mean mvbench"):
        read_benchmark("MV-Bench", tmp_path, work=tmp_path)
    with pytest.raises(ConfigError, match="prompt style 'plain' is not known"):
        read_benchmark("mvbench", tmp_path, work=tmp_path, style="plain")  # type: ignore[arg-type]


def _edit(path: Path, **changes: Any) -> None:
    """Change the first row."""
    if path.suffix == ".json":
        rows = json.loads(path.read_text())
        rows[0] |= changes
        path.write_text(json.dumps(rows))
    else:
        rows = pq.read_table(path).to_pylist()
        rows[0] |= changes
        published.parquet(path, rows)


@pytest.mark.parametrize(
    ("name", "write", "file", "changes", "says"),
    [
        ("mvbench", published.mvbench, "json/action_sequence.json", {"answer": "flies"}, "none of its options"),
        ("mvbench", published.mvbench, "json/action_sequence.json", {"start": "1:02"}, "no time in seconds"),
        ("mvbench", published.mvbench, "json/action_sequence.json", {"video": "../" * 9 + "x.mp4"}, "path_escape"),
        ("longvideobench", published.longvideobench, "lvb_val.json", {"correct_choice": 7}, "no number of one of 3"),
        ("mvbench", published.mvbench, "json/action_sequence.json", {"video": ""}, "`video` is missing or empty"),
        ("longvideobench", published.longvideobench, "lvb_val.json", {"question": None}, "`question` is missing"),
        ("videomme", published.videomme, "videomme/test-00000-of-00001.parquet", {"answer": ""}, "no answer"),
        ("videomme", published.videomme, "videomme/test-00000-of-00001.parquet", {"answer": "E"}, "none of its 4"),
        ("chartqa", published.chartqa_parquet, "data/test-00000-of-00001.parquet", {"answer": None}, "no answer"),
        ("ai2d", published.ai2d_parquet, "data/test-00000-of-00001.parquet", {"answer": "9"}, "no number of one of 3"),
        (
            "chartqa", published.chartqa_parquet, "data/test-00000-of-00001.parquet",
            {"image": {"bytes": None, "path": "../../secret.png"}}, "path_escape",
        ),
        (
            "chartqa", published.chartqa_parquet, "data/test-00000-of-00001.parquet",
            {"image": {"bytes": None, "path": "gone.png"}}, "media_missing",
        ),
        (
            "mmmu", published.mmmu_parquet, "Art_Theory/validation-00000-of-00001.parquet", {"image_2": None},
            "asks for picture 2 of 1",
        ),
        (
            "mmmu", published.mmmu_parquet, "Art_Theory/validation-00000-of-00001.parquet", {"options": "['a'"},
            "spells no list",
        ),
    ],
)  # fmt: skip
def test_bad_rows_are_named(
    name: str, write: Callable[[Path], None], file: str, changes: dict[str, Any], says: str, tmp_path: Path
) -> None:
    write(tmp_path)
    _edit(tmp_path / file, **changes)
    with pytest.raises(DataError, match=rf"{Path(file).name}, row 1: .*{says}"):
        read_benchmark(name, tmp_path, work=tmp_path / "work")
    assert not list((tmp_path / "work").glob("*")), "nothing half written is left"


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("index\tquestion\tanswer\timage\n1\tWho?\tI\tnot base 64!\n", "row 1: .*`image` is no base64"),
        (
            "index\tquestion\tanswer\timage\n1\tWho?\tI\t2\n",
            "row 1: its picture is that of row `2`, which does not hold one",
        ),
        ("index\tquestion\tanswer\timage\n1\tWho?\n", "row 1: 2 cells under 4 names"),
        ('index\tquestion\tanswer\timage\n1\t"Who?\tI\t2\n', "no table of tab-separated texts"),
        ("index\tquestion\tanswer\timage\n1\t\udcff\tI\t2\n", "no table of tab-separated texts in UTF-8"),
    ],
)
def test_bad_tables_are_named(content: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "DocVQA_VAL.tsv").write_text(content, encoding="utf-8", errors="surrogateescape")
    with pytest.raises(DataError, match=rf"DocVQA_VAL\.tsv.*{says}"):
        read_benchmark("docvqa", tmp_path, work=tmp_path / "work")


def test_a_picture_that_is_none_is_refused_when_it_is_read(tmp_path: Path) -> None:
    row = {"index": 1, "question": "Who?", "answer": "I", "image": published.coded(b"GIF89a" + bytes(100))}
    published.tsv(tmp_path / "DocVQA_VAL.tsv", [row])
    (question,) = read_benchmark("docvqa", tmp_path, work=tmp_path)
    with pytest.raises(DataError, match=r"media_\w+: DocVQA_VAL\.tsv, row 1"):
        read_image(question.sample.images[0])


def test_the_same_files_give_the_same_questions(tmp_path: Path) -> None:
    first = read("mmbench", published.mmbench_tsv, tmp_path)
    pictures = held(tmp_path)
    assert read_benchmark("mmbench", tmp_path / "root", work=tmp_path / "work") == first
    assert held(tmp_path) == pictures
    read_benchmark("mmbench", tmp_path / "root", work=tmp_path / "work", limit=1)
    assert [read_image(one.sample.images[0]).data for one in first] == [RED, RED, BLUE], "fewer do not overwrite them"
    file = first[0].sample.images[0]
    assert dataclasses.replace(file, path=None) == MediaFile(size=len(RED), label="MMBench_DEV_EN.tsv, row 1")


def test_a_set_reads_when_it_is_asked(tmp_path: Path) -> None:
    ask = benchmark_set("videomme", tmp_path, work=tmp_path / "work", style="lmms_eval", subtitles=True)
    assert ask.name == "videomme with subtitles, prompts of lmms_eval"
    published.videomme(tmp_path)
    assert list(ask.read(1)) == read_benchmark(
        "videomme", tmp_path, work=tmp_path / "work", style="lmms_eval", subtitles=True, limit=1
    )
    assert [one.max_frames for one in ask.sweep([8, 64])] == [8, 64]
    file = tmp_path / "videomme/test-00000-of-00001.parquet"
    assert benchmark_set("videomme", file, work=tmp_path).name == "videomme, test-00000-of-00001.parquet"
    with pytest.raises(ConfigError, match="no benchmark 'vqa'"):
        benchmark_set("vqa", tmp_path, work=tmp_path)


def test_pictures_of_the_users_own_parquet_lie_beside_the_results(tmp_path: Path) -> None:
    talk = [{"role": "user", "content": "<image>\nWhich?"}, {"role": "assistant", "content": "B"}]
    rows = [{"messages": talk, "images": [{"bytes": one, "path": None}]} for one in (RED, BLUE, RED)]
    published.parquet(tmp_path / "own.parquet", rows)
    held = read_questions(tmp_path / "own.parquet")
    kept = list(data_file(str(tmp_path / "own.parquet"), work=tmp_path / "work").read(None))
    assert [read_image(one.sample.images[0]).data for one in held] == [RED, BLUE, RED]
    assert [read_image(one.sample.images[0]).data for one in kept] == [RED, BLUE, RED]
    assert all(one.sample.images[0].data is None for one in kept)
    (file,) = (tmp_path / "work").iterdir()
    assert file.read_bytes() == RED + BLUE


def test_the_document_lists_every_benchmark_and_task() -> None:
    document = (ROOT / "docs/evaluate.md").read_text(encoding="utf-8")
    for name, one in BENCHMARKS.items():
        assert re.search(rf"^\| `{name}` \| .* \| {one.questions:,} \| `{one.task}` \|", document, re.MULTILINE), name
    for task in TASKS:
        assert re.search(rf"^\* `{task}`", document, re.MULTILINE), task


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=12)
    | st.sampled_from(["A", "['a', 'b']"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["bytes", "path", "x"]), inner, max_size=2)
    ),
    max_leaves=4,
)
ROWS: dict[str, dict[str, Any]] = {
    "mmbench": {"index": 7, "question": "Q", "A": "a", "B": "b", "answer": "A", "image": published.coded(RED)},
    "ai2d": {"question": "Q", "options": ["a", "b"], "answer": "1", "image": published.coded(RED)},
    "ocrbench": {"question": "Q", "answer": "['a']", "category": "c", "image": published.coded(RED)},
    "docvqa": {"question": "Q", "answers": ["a"], "question_types": ["t"], "image": published.coded(RED)},
    "mmmu": {"id": "validation_M_1", "question": "<image 1>", "options": "['a', 'b']", "answer": "A",
             "image_1": {"bytes": published.coded(RED)}},
    "longvideobench": {"video_path": "v", "question": "Q", "candidates": ["a"], "correct_choice": 0, "id": 1},
    "videomme": {"videoID": "v", "question": "Q", "options": ["A. a", "B. b"], "answer": "A", "duration": "short"},
    "action_sequence": {"video": "v", "question": "Q", "candidates": ["a", "b"], "answer": "a", "start": 1, "end": 2},
}  # fmt: skip


@given(st.data())
@settings(max_examples=50)
def test_any_row_is_read_or_refused(data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(sorted(ROWS)))
    row = dict(ROWS[kind])
    for key in data.draw(st.lists(st.sampled_from(sorted(row)), max_size=2)):
        row[key] = data.draw(VALUES)
    with TemporaryDirectory() as folder:
        file = Path(folder) / f"{kind}.json"
        file.write_text(json.dumps([row]))
        name = "mvbench" if kind == "action_sequence" else kind
        with contextlib.suppress(ConfigError, DataError):
            for question in read_benchmark(name, file, work=Path(folder) / "work"):
                question.sample.check()
                assert question.golds
                assert all(isinstance(one, str) for one in (*question.golds, *question.options))
