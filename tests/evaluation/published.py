"""Small files in the layouts of benchmarks' publishers. What stands in them is made up."""

from __future__ import annotations

import base64
import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tests.inference.tiny import picture

RED, BLUE, WIDE = (picture(*size, seed=number) for number, size in enumerate(((16, 16), (20, 16), (40, 16))))
"""Three pictures of different sizes."""


def coded(data: bytes) -> str:
    return base64.b64encode(data).decode()


def struct(data: bytes) -> dict[str, Any]:
    """A picture as Hugging Face writes it."""
    return {"bytes": data, "path": "somewhere.png"}


def tsv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """As pandas writes it: what needs quotes has them; null is empty."""
    path.parent.mkdir(parents=True, exist_ok=True)
    names = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", encoding="utf-8", newline="") as stream:
        table = csv.writer(stream, delimiter="\t", lineterminator="\n")
        table.writerow(names)
        table.writerows([row.get(name, "") for name in names] for row in rows)


def parquet(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist([dict(row) for row in rows]), path)


def empty(*paths: Path) -> None:
    """Files that are only there: reading a benchmark opens no video."""
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")


def mmbench_tsv(root: Path) -> None:
    base = {"question": "Which\tcolour?", "A": "red", "B": "blue", "answer": "A", "category": "colour", "split": "dev"}
    base |= {"l2-category": "perception", "source": "made up", "comment": ""}
    tsv(
        root / "MMBench_DEV_EN.tsv",
        [
            {"index": 7, "hint": "Look\nclosely", **base, "C": "nan", "D": "", "image": coded(RED)},
            {"index": 1_000_007, **base, "A": "blue", "B": "red", "answer": "B", "image": "7"},
            {"index": 8, **base, "C": "green", "D": "none", "answer": "D", "image": coded(BLUE)},
        ],
    )


def mmbench_parquet(root: Path) -> None:
    row = {"index": 7, "question": "Which colour?", "hint": "nan", "A": "red", "B": "blue", "C": "nan", "D": "nan"}
    row |= {"answer": "A", "category": "colour", "image": struct(RED), "L2-category": "perception", "split": "dev"}
    parquet(root / "en/dev-00000-of-00001.parquet", [row])


def ai2d_tsv(root: Path) -> None:
    row = {"index": 1, "question": "What eats what?", "A": "cat", "B": "dog", "C": "fox", "answer": "C"}
    tsv(root / "AI2D_TEST.tsv", [row | {"category": "foodChains", "image": coded(WIDE)}])


def ai2d_parquet(root: Path) -> None:
    row = {"question": "What eats what?", "options": ["cat", "dog", "fox"], "answer": "2", "image": struct(WIDE)}
    parquet(root / "data/test-00000-of-00001.parquet", [row])


def ocrbench_tsv(root: Path) -> None:
    row = {"index": 0, "question": "what is written in the image?", "answer": "['CENTRE', 'Centre']"}
    tsv(root / "OCRBench.tsv", [row | {"category": "Regular Text Recognition", "image": coded(RED)}])


def ocrbench_parquet(root: Path) -> None:
    row = {"dataset": "IIIT5K", "question": "what is written in the image?", "answer": ["CENTRE", "Centre"]}
    row |= {"question_type": "Regular Text Recognition", "image": struct(RED)}
    parquet(root / "data/test-00000-of-00001.parquet", [row])


def chartqa_tsv(root: Path) -> None:
    row = {"index": 0, "question": "How many?", "answer": "14", "split": "test_human", "image": coded(RED)}
    tsv(root / "ChartQA_TEST.tsv", [row])


def chartqa_parquet(root: Path) -> None:
    row = {"type": "human_test", "question": "How many?", "answer": "14", "image": struct(RED)}
    parquet(root / "data/test-00000-of-00001.parquet", [row])


def docvqa_tsv(root: Path) -> None:
    row = {"question": "Who signed?", "answer": "['J. Doe', 'Doe']"}
    tsv(
        root / "DocVQA_VAL.tsv",
        [{"index": 1, **row, "image": coded(RED)}, {"index": 2, **row, "image": "1"}],
    )


def docvqa_parquet(root: Path) -> None:
    row = {"questionId": "337", "question": "Who signed?", "question_types": ["handwritten", "form"]}
    row |= {"image": struct(RED), "docId": 279, "ucsf_document_id": "x", "answers": ["J. Doe", "Doe"]}
    for shard in (0, 1):
        parquet(root / f"DocVQA/validation-{shard:05}-of-00002.parquet", [row | {"docId": shard}])


def mmmu_tsv(root: Path) -> None:
    row = {"index": 1, "id": "validation_Art_Theory_1", "question": "Compare <image 1> with <image 2>.", "answer": "B"}
    row |= {"A": "like <image 1>", "B": "unlike", "category": "Art_Theory", "split": "validation"}
    row |= {"image": repr([coded(RED), coded(BLUE)]), "image_path": "['a.png', 'b.png']"}
    tsv(
        root / "MMMU_DEV_VAL.tsv",
        [
            {**row, "id": "dev_Art_Theory_1", "split": "dev"},
            {**row, "index": 2},
            {
                **row, "index": 3, "id": "validation_Math_2", "question": "How long is it?", "A": "", "B": "",
                "answer": "['5', 'five']", "image": coded(WIDE), "image_path": "c.png", "category": "Math",
            },
        ],
    )  # fmt: skip


def mmmu_parquet(root: Path) -> None:
    row = {"id": "validation_Art_Theory_1", "question": "Compare <image 1> with <image 2>.", "subfield": "Ideas"}
    row |= {"options": "['like <image 1>', 'unlike']", "answer": "B", "question_type": "multiple-choice"}
    row |= {"image_1": struct(RED), "image_2": struct(BLUE), "image_3": None}
    other = {"id": "validation_Math_2", "question": "How long is it?", "options": "[]", "answer": "['5', 'five']"}
    other |= {"question_type": "open", "image_1": struct(WIDE), "image_2": None, "image_3": None, "subfield": "Sums"}
    parquet(root / "Art_Theory/validation-00000-of-00001.parquet", [row])
    parquet(root / "Math/validation-00000-of-00001.parquet", [other])


def mvbench(root: Path) -> None:
    """As OpenGVLab/MVBench unpacks."""
    rows: dict[str, dict[str, Any]] = {
        "action_sequence": {"video": "AB12.mp4", "start": 2.5, "end": 7.25},
        "action_antonym": {"video": "166583.webm"},
        "episodic_reasoning": {"video": "show/s01", "start": 1, "end": 4, "fps": 3},
    }
    for name, row in rows.items():
        row |= {"question": "What happens?", "candidates": ["runs", "sits", "falls"], "answer": "sits"}
        path = root / f"json/{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps([row]))
    empty(root / "video/star/Charades_v1_480/AB12.mp4", root / "video/ssv2_video/166583.webm")
    for number in (1, 2, 3):
        frame = root / f"video/tvqa/frames_fps3_hq/show/s01/{number:05}.jpg"
        frame.parent.mkdir(parents=True, exist_ok=True)
        frame.write_bytes(RED)


def mvbench_segments(root: Path) -> None:
    """As lmms-eval has it (revision `video`): cut already."""
    mvbench(root)
    for folder, kept, name in (
        ("star", "Charades_segment", "AB12.mp4"),
        ("ssv2_video_mp4", "", "166583.mp4"),
        ("tvqa", "video_fps3_hq_segment/show", "s01.mp4"),
    ):
        empty(root / folder / kept / name)
    (root / "video").rename(root / "elsewhere")


def longvideobench(root: Path) -> None:
    row = {
        "id": "v1_0", "video_id": "v1", "video_path": "v1.mp4", "subtitle_path": "v1_en.json", "question": "And then?",
        "candidates": ["one", "two", "three"], "correct_choice": 1, "question_category": "T2E", "topic_category": "Lab",
        "level": "L1", "duration_group": 600, "starting_timestamp_for_subtitles": 0, "duration": 190.5, "position": [3],
    }  # fmt: skip
    root.mkdir(parents=True, exist_ok=True)
    (root / "lvb_val.json").write_text(json.dumps([row]))
    spoken = [
        {"start": "00:00:01.000", "end": "00:00:02.000", "line": "Hello"},
        {"timestamp": [2.0, 3.0], "text": "you"},
    ]
    (root / "subtitles").mkdir()
    (root / "subtitles/v1_en.json").write_text(json.dumps(spoken))
    empty(root / "videos/v1.mp4")


def longvideobench_parquet(root: Path) -> None:
    longvideobench(root)
    row = json.loads((root / "lvb_val.json").read_text())[0]
    row |= {f"option{number}": one for number, one in enumerate([*row.pop("candidates"), "N/A", "N/A"])}
    (root / "lvb_val.json").unlink()
    parquet(root / "validation-00000-of-00001.parquet", [row])


def videomme(root: Path) -> None:
    row = {
        "video_id": "001", "duration": "short", "domain": "Knowledge", "sub_category": "Law", "videoID": "fFjv93ACGo8",
        "question_id": "001-1", "task_type": "Counting Problem", "question": "How many?", "answer": "C", "url": "x",
        "options": ["A. One.", "B. Two.", "C. Three.", "D. Four."],
    }  # fmt: skip
    parquet(root / "videomme/test-00000-of-00001.parquet", [row, row | {"videoID": "silent", "duration": "long"}])
    (root / "subtitle").mkdir()
    (root / "subtitle/fFjv93ACGo8.srt").write_text(
        '1\n00:00:01,000 --> 00:00:02,000\n<font color="white" size=".72c">Good evening</font>\n\n'
        "2\n00:00:02,000 --> 00:00:03,000\nGood evening\n\n3\n00:00:03,500 --> 00:00:05,000\n12\nmonths\n\n"
    )
    empty(root / "data/fFjv93ACGo8.mp4", root / "data/silent.mkv")
