"""Readers, mappers, fixes, the table and mixes: every form of the open datasets, and what is wrong with some."""

from __future__ import annotations

import base64
import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_vita.data.rejects import CODES
from megatron_vita.data.sample import Document, Image, Sample, Text, Video
from megatron_vita.data.sources import detect_row, load_mix, load_table, read_samples, record_to_sample
from megatron_vita.data.sources.fixes import find_fix
from megatron_vita.data.sources.media_store.store import MediaRule, open_store
from megatron_vita.errors import ConfigError, DataError
from tests.data.fixtures_kit import put_zip
from tests.data.kit import picture

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8), lambda c: st.lists(c, max_size=3), max_leaves=6
)


# ---------------------------------------------------------------------------------------------------- mappers


def convert(record: Any, row: str | None = None, root: Path | None = None) -> Sample | Document:
    chosen = load_table()[row] if row else detect_row(record, "test")
    return record_to_sample(record, chosen, store=open_store(MediaRule(root=root)), source="s", line=1)[0]


def talk(sample: Sample | Document) -> list[tuple[str, str]]:
    assert isinstance(sample, Sample)
    marks = {Image: "[i{}]", Video: "[v{}]"}
    return [
        (m.role, "".join(p.text if isinstance(p, Text) else marks[type(p)].format(p.index) for p in m.parts))
        for m in sample.messages
    ]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name in ("a.png", "b.png", "v.mp4"):
        (tmp_path / name).write_bytes(b"x")
    return tmp_path


Q, A = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
QA = [("user", "q"), ("assistant", "a")]
TEXT_FORMS: list[tuple[str | None, Any, list[tuple[str, str]]]] = [
    (None, {"messages": [{"role": "system", "content": "s"}, Q, A]}, [("system", "s"), *QA]),
    (None, {"messages": [{"role": "system", "content": " "}, Q, A]}, QA),
    (None, {"conversations": [Q, A], "messages": []}, QA),
    (None, [Q, A], QA),
    ("long_vita", [{"messages": [Q, A]}], QA),
    (None, {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, QA),
    (None, {"items": [{"from": "user", "value": "q"}, {"from": "chatgpt", "value": "a"}]}, QA),
    (None, {"instruction": "q", "input": "", "output": "a"}, QA),
    (None, {"instruction": "q", "input": "x", "output": "a"}, [("user", "q\n\nx"), ("assistant", "a")]),
    (None, {"instruction": "q", "output": "a", "system": "s", "history": [["h", "g"]]},
     [("system", "s"), ("user", "h"), ("assistant", "g"), *QA]),
    (None, {"conversations": ["q", "a", "left over"]}, QA),
    (None, {"texts": [{"user": "q", "assistant": "Answer: a", "source": "z"}]}, QA),
    ("dolly", {"instruction": "q", "context": "c", "response": "a"}, [("user", "q\n\nc"), ("assistant", "a")]),
    ("goat", {"instruction": "q", "input": "q again", "output": 12}, [("user", "q"), ("assistant", "12")]),
    ("atlas_math", {"instruction": "q", "input": "1+2", "output": 3.0}, [("user", "q\n\n1+2"), ("assistant", "3")]),
    ("longalign", {"messages": [Q, {"role": "assistant", "content": "\u200ba"}, Q]}, QA),
    ("long_context_qa", {"context": "c", "questions": ["q", "r"], "answers": ["a", "b"]},
     [("user", "c\n\nq"), ("assistant", "a"), ("user", "r"), ("assistant", "b")]),
    ("long_data_collections", {"text": "no", "prompt": "q ", "completion": " a"}, QA),
    ("sharegpt4v", {"conversations": [{"from": "gpt", "value": "hi"}, {"from": "human", "value": "q"},
                                      {"from": "gpt", "value": "a"}]}, QA),
    (None, {"messages": [Q, {"role": "assistant", "content": "\n \n a"}]}, [("user", "q"), ("assistant", " a")]),
]  # fmt: skip


@pytest.mark.parametrize(("row", "record", "wanted"), TEXT_FORMS)
def test_text_forms(row: str | None, record: Any, wanted: list[tuple[str, str]]) -> None:
    assert talk(convert(record, row)) == wanted


def test_plain_text_becomes_a_document() -> None:
    assert convert({"text": "once <image>", "meta": 1}) == Document("once <image>", "s", 1)


def human(text: str, answer: str = "a") -> list[dict[str, str]]:
    return [{"from": "human", "value": text}, {"from": "gpt", "value": answer}]


def test_media_forms(root: Path) -> None:
    sample = convert({"image": "a.png", "conversations": human("<image>\nq <video>", "an <image>")}, root=root)
    assert talk(sample) == [("user", "[i0]\nq <video>"), ("assistant", "an <image>")]
    assert isinstance(sample, Sample)
    assert sample.images[0].path == str((root / "a.png").resolve())
    both = {"messages": [{"role": "user", "content": "x<video>y<image><image>"}, A]}
    both |= {"images": ["a.png", "b.png"], "videos": ["v.mp4"]}
    assert talk(convert(both, root=root))[0] == ("user", "x[v0]y[i0][i1]")
    struct = {"image": {"bytes": b"png", "path": "nowhere.png"}, "conversations": human("<image>")}
    prompted = convert(struct, "llava_recap")
    assert talk(prompted)[0] == ("user", "[i0]\nPlease describe this image in detail.")
    assert isinstance(prompted, Sample)
    assert prompted.images[0].data == b"png"
    cauldron = {"images": [{"bytes": b"1", "path": None}, {"bytes": b"2"}], "texts": [{"user": "q", "assistant": "a"}]}
    assert talk(convert(cauldron)) == [("user", "[i0]\n[i1]\nq"), ("assistant", "a")]
    hound = {"video": "v.mp4", "conversations": human("<image>\nq")}
    assert talk(convert([hound], "llava_video", root))[0] == ("user", "[v0]\nq")
    assert talk(convert({"image": None, "conversations": human("q")}, "onevision")) == QA


def test_openai_parts(root: Path) -> None:
    url = "data:image/png;base64," + base64.b64encode(picture(4, 4)).decode()
    parts = [
        {"type": "text", "text": "Left <image>:"},
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "image", "image": f"file://{root}/a.png"},
        {"type": "video", "video": "v.mp4"},
        {"type": "input_text", "text": "Name it."},
    ]
    sample = convert(
        {"messages": [{"role": "developer", "content": "s"}, {"role": "user", "content": parts}, A]}, root=root
    )
    assert talk(sample)[:2] == [("system", "s"), ("user", "Left <image>:[i0][i1][v0]Name it.")]
    assert isinstance(sample, Sample)
    assert sample.images[0].data == picture(4, 4)


BAD: list[tuple[str, str | None, Any]] = [
    ("media_count", None, {"image": "a.png", "conversations": human("q")}),
    ("media_count", None, {"image": "a.png", "conversations": human("<image><image>")}),
    ("media_count", "llava", {"image": None, "conversations": human("<image>")}),
    ("media_missing", None, {"image": "c.png", "conversations": human("<image>")}),
    ("media_missing", None, {"images": ["a.png", None], "messages": [Q | {"content": "<image><image>"}, A]}),
    ("path_escape", None, {"image": "../../etc/passwd", "conversations": human("<image>")}),
    ("media_remote", None, {"image": "https://example.invalid/a.png", "conversations": human("<image>")}),
    ("bad_role", None, {"messages": [{"role": "tool", "content": "q"}, A]}),
    ("bad_order", None, {"messages": [A, Q]}),
    ("bad_order", None, {"messages": [Q, Q, A]}),
    ("empty_turn", None, {"messages": [{"role": "user", "content": "  "}, A]}),
    ("empty_turn", None, {"messages": [Q, {"role": "assistant", "content": "\n\n"}]}),
    ("bad_record", None, {"messages": [{"role": "user", "content": None}, A]}),
    ("bad_record", "dolly", {"instruction": "q"}),
    ("bad_record", "llava", {"conversations": "text"}),
    ("bad_record", "llava", {"conversations": ["text"]}),
    ("bad_record", "long_context_qa", {"context": "c", "questions": ["q"], "answers": []}),
    ("undeclared_media", "metamath", {"query": "q", "response": "a", "image": "a.png"}),
    ("media_broken", "openai", {"messages": [{"role": "user", "content": [
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,%%%"}}]}, A]}),
    *(("media_missing", row, {"conversations": human(question)})  # every record of these has a picture
      for row in ("llava_recap", "ov_mid") for question in ("<image>\nq", "q")),
    ("media_missing", "docmatix", {"texts": [{"user": "q", "assistant": "a"}], "images": []}),
    ("media_missing", None, {"image": "file://[x", "conversations": human("<image>")}),
    ("bad_record", "openai", {"messages": [{"role": "user", "content": [{"type": {}, "text": "q"}]}, A]}),
    ("bad_record", "alpaca", {"instruction": "q", "output": "a", "history": 1.5}),
    ("bad_record", "alpaca", {"instruction": "q", "output": "a", "history": {"q": "a"}}),
    ("bad_record", "alpaca", {"instruction": "q", "output": "\ud800"}),
    ("bad_record", "alpaca", {"instruction": "q", "output": "a", "system": "x\udfff"}),
    ("bad_record", "text", {"text": "words \ud83d"}),
    ("bad_record", "alpaca", {"instruction": "q", "output": float("nan")}),
    ("bad_record", "alpaca", {"instruction": "q", "input": float("nan"), "output": "a"}),
    ("bad_record", "alpaca", {"instruction": "q", "output": "a", "history": [["q", None]]}),
    ("bad_record", "long_context_qa", {"context": "c", "questions": ["q"], "answers": [None]}),
    ("bad_record", None, {"images": [5], "messages": [Q | {"content": "<image>"}, A]}),
]  # fmt: skip


@pytest.mark.parametrize(("code", "row", "record"), BAD)
def test_bad_records_name_their_reason(root: Path, code: str, row: str | None, record: Any) -> None:
    with pytest.raises(DataError, match=f"^{code}: "):
        convert(record, row, root)


@settings(max_examples=200, deadline=None)
@given(record=st.dictionaries(st.sampled_from(["messages", "conversations", "images", "image", "texts", "text"]), JSON),
       row=st.sampled_from(sorted(load_table())))  # fmt: skip
def test_any_record_is_a_sample_or_a_data_error(record: dict, row: str) -> None:
    code = next(iter(CODES))
    try:
        convert(record, row)
    except DataError as error:
        code = str(error).partition(": ")[0]
    assert code in CODES


def test_forms_that_cannot_be_told() -> None:
    for record in ({"prompt": "a", "text": "b"}, {}, [1], {"question": "q", "answer": "a"}):
        with pytest.raises(ConfigError, match="source"):
            detect_row(record, "mix")
    with pytest.raises(ConfigError, match="no fix"):
        find_fix("strip_prefix")


# ---------------------------------------------------------------------------------------------------- mixes


def write_mix(folder: Path, **groups: Any) -> Path:
    (folder / "mix.yaml").write_text(json.dumps({"dataset": groups}))
    return folder / "mix.yaml"


def test_mix_in_long_vitas_form(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a.jsonl", "b.jsonl", "odd(1,2)+x.jsonl"):
        (tmp_path / name).write_text((json.dumps({"messages": [Q, A]}) + "\n") * 10)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HERE", str(tmp_path))
    mix = write_mix(
        tmp_path,
        one={"ratio": 0.25, "data_paths": ["a.jsonl"]},
        two={"ratio": 2.5, "num": 22, "data_paths": ["${HERE}/a.jsonl", "${HERE}/[b].jsonl", "odd(1,2)+x.jsonl"]},
        off={"ratio": 0, "data_paths": ["not there"]},
    )
    files = load_mix(mix)
    assert [file.name for file in files] == ["one", "two/a.jsonl", "two/b.jsonl", "two/odd(1,2)+x.jsonl"]
    assert files[2].written == "${HERE}/[b].jsonl: b.jsonl"
    assert {file.row.name for file in files} == {"long_vita"}
    offsets = files[0].reader().index()
    chosen = files[0].choose(offsets, seed=1)
    assert len(chosen) == 2
    assert not np.array_equal(chosen, files[0].choose(offsets, seed=5))
    lines = files[1].choose(offsets, seed=1)[:, 0].tolist()
    assert len(lines) == 22
    assert lines[:20] == [*range(1, 11)] * 2
    assert lines[20] < lines[21]


@pytest.mark.parametrize(("ratio", "num"), [(1, None), (0.5, None), (1, 7), (0.1, 7), (3, 40), (0.04, 1), (2.5, 30)])
def test_the_files_of_a_pattern_count_as_one(tmp_path: Path, ratio: float, num: int | None) -> None:
    for name, count in (("a", 3), ("b", 0), ("c", 11), ("d", 2)):
        (tmp_path / f"{name}.jsonl").write_text((json.dumps({"messages": [Q, A]}) + "\n") * count)
    group = {"source": "long_vita", "ratio": ratio, "num": num, "data_paths": [f"{tmp_path}/*.jsonl"]}
    files = load_mix(write_mix(tmp_path, one=group))
    taken = [len(file.choose(file.reader().index(), seed=1)) for file in files]
    assert sum(taken) == min(int(16 * ratio), num or 999)
    assert taken[1] == 0
    assert taken[2] == pytest.approx(sum(taken) * 11 / 16, abs=1)


def test_a_mix_over_other_mixes(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text((json.dumps({"messages": [Q, A]}) + "\n") * 4)
    (tmp_path / "sub").mkdir()
    base = {"dataset": {name: {"data_paths": [f"{tmp_path}/a.jsonl"], "num": 3} for name in ("one", "two")}}
    (tmp_path / "sub" / "base.yaml").write_text(json.dumps(base))
    over = {"include": "sub/base.yaml", "dataset": {"two": {"ratio": 0}, "new": base["dataset"]["one"] | {"num": 1}}}
    (tmp_path / "mix.yaml").write_text(json.dumps(over))
    files = load_mix(tmp_path / "mix.yaml")
    assert [(file.name, file.num) for file in files] == [("one", 3), ("new", 1)]
    (tmp_path / "mix.yaml").write_text(json.dumps(over | {"dataset": {"tow": {"ratio": 0}}}))
    with pytest.raises(ConfigError, match=r"unknown key `tow`.*`two`"):
        load_mix(tmp_path / "mix.yaml")
    (tmp_path / "mix.yaml").write_text(json.dumps({"include": "mix.yaml"}))
    with pytest.raises(ConfigError, match="without end"):
        load_mix(tmp_path / "mix.yaml")


def test_a_group_names_its_own_fields_and_fixes(tmp_path: Path) -> None:
    record = {"ask": "<image>\nq", "say": "a", "image": None}
    (tmp_path / "a.jsonl").write_text(json.dumps(record))
    group = {"source": "pair", "data_paths": [f"{tmp_path}/a.jsonl"], "fields": {"user": "ask", "assistant": "say"}}
    (file,) = load_mix(write_mix(tmp_path, one=group | {"fix": ["strip"]}))
    assert file.row.fields == {"user": "ask", "assistant": "say"}
    sample, _ = record_to_sample(record, file.row, store=open_store(file.media), source="s", line=1)
    assert talk(sample) == [("user", "<image>\nq"), ("assistant", "a")]
    with pytest.raises(ConfigError, match="no fix"):
        load_mix(write_mix(tmp_path, one=group | {"fix": ["strap"]}))


def test_a_mix_as_the_reference_publishes_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for path in ("GAIR/lima/train", "the_cauldron/ai2d", "LLaVA-OneVision-Data/GeoQA+(MathV360K)"):
        (tmp_path / "datasets/jsonl" / path).parent.mkdir(parents=True, exist_ok=True)
        record = {"messages": [{"role": "user", "content": "<image>q"}, A], "images": [f"datasets/{path}.png"]}
        (tmp_path / f"datasets/jsonl/{path}.jsonl").write_text((json.dumps(record) + "\n") * 12)
    (tmp_path / "datasets/GAIR/lima").mkdir(parents=True)
    (tmp_path / "datasets/GAIR/lima/train.png").write_bytes(b"x")
    (tmp_path / "stage.yaml").write_text(
        """
xlsx_sample_num: 5
do_dataset_cast: false

dataset:
  LLaVA:
    ratio: 0
    data_paths:
      #- datasets/jsonl/commented/out.jsonl
      - datasets/jsonl/nobody/has/this.jsonl
  empty:
    num: 0
    data_paths:
  text:
    ratio: 0.5
    num: 5
    data_paths:
      - datasets/jsonl/GAIR/lima/train.jsonl
  pictures:
    ratio: 1.0
    data_paths:
      - datasets/jsonl/the_cauldron/ai2d.jsonl
      - datasets/jsonl/LLaVA-OneVision-Data/GeoQA+(MathV360K).jsonl
"""
    )
    files = load_mix("stage.yaml")
    assert [(one.name, len(one.choose(one.reader().index(), 0))) for one in files] == [
        ("text", 5), ("pictures/ai2d.jsonl", 12), ("pictures/GeoQA+(MathV360K).jsonl", 12),
    ]  # fmt: skip
    _, record = next(iter(files[0].reader().read(files[0].reader().index())))
    store = open_store(files[0].media)
    sample, _ = record_to_sample(record, files[0].row, store=store, source="s", line=1)
    assert isinstance(sample, Sample)
    assert Path(str(sample.images[0].path)).read_bytes() == b"x"


def test_rewritten_paths_and_other_archives(tmp_path: Path) -> None:
    put_zip(tmp_path / "more/pages.zip", {"b/1.png": b"x", "b/2.png": b"y"})
    record = {"messages": [Q | {"content": "<image><image>"}, A], "images": ["Comic/b/1.png", "b/2.png"]}
    (tmp_path / "summary.jsonl").write_text(json.dumps(record))
    group = {"source": "comic9k", "data_paths": [f"{tmp_path}/summary.jsonl"], "archives": ["more/*.zip"]}
    (file,) = load_mix(write_mix(tmp_path, one=group | {"rewrite": {"Comic/": ""}}))
    store = open_store(file.media, tmp_path / "work")
    sample, _ = record_to_sample(record, file.row, store=store, source="s", line=1)
    assert isinstance(sample, Sample)
    assert [str(one.label).partition(": ")[2] for one in sample.images] == ["b/1.png", "b/2.png"]


def test_placeholders_that_a_mix_repairs(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"x")
    orphan = {"image": None, "conversations": human("<image>\nq <image>")}
    double = {"image": "a.png", "conversations": [*human("<image>q<image>"), *human("r<image>")]}
    row = load_table()["llava"]
    store = open_store(MediaRule(root=tmp_path))
    for record, fix, wanted in (
        (orphan, "strip_orphan_placeholder", [("user", "q "), ("assistant", "a")]),
        (double, "dedupe_placeholder", [("user", "[i0]q"), ("assistant", "a"), ("user", "r"), ("assistant", "a")]),
    ):
        with pytest.raises(DataError, match=r"^media_count"):
            record_to_sample(record, row, store=store, source="s", line=1)
        repaired = dataclasses.replace(row, fix=(fix,))
        assert talk(record_to_sample(record, repaired, store=store, source="s", line=1)[0]) == wanted


def test_all_that_is_missing_is_told_at_once(tmp_path: Path) -> None:
    (tmp_path / "long.jsonl").write_text(json.dumps({"messages": [Q, A]}))
    groups = {
        "one": {"data_paths": [f"{tmp_path}/lonk.jsonl", f"{tmp_path}/nowhere/b.json"]},
        "two": {"data_paths": [f"{tmp_path}/long.jsonl"], "media_root": f"{tmp_path}/images"},
        "three": {"data_paths": [f"{tmp_path}/long.jsonl"], "source": "lvis"},
    }
    with pytest.raises(ConfigError) as caught:
        load_mix(write_mix(tmp_path, **groups))
    text = str(caught.value)
    assert "4 things are missing" in text
    assert f"Did you mean {tmp_path}/long.jsonl?" in text
    assert f"{tmp_path} exists, nowhere in it does not" in text
    assert f"media_root {tmp_path}/images is no folder" in text
    assert "three: source `lvis` comes without its media" in text


def test_a_folder_that_looks_like_a_pattern_is_none(tmp_path: Path) -> None:
    for name in ("x[ab](c,d)+e", "xa(c,d)+e", "x[ab]"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "t-1.jsonl").write_text(json.dumps({"messages": [Q, A]}))
    for name in ("x[ab](c,d)+e", "x[ab]"):
        (file,) = load_mix(write_mix(tmp_path, one={"data_paths": [f"{tmp_path}/{name}/t-*.jsonl"]}))
        assert file.path.parent.name == name


@pytest.mark.parametrize(
    ("group", "complaint"),
    [
        ({"data_path": ["a.jsonl"]}, "data_paths"),
        ({"data_paths": ["a.jsonl"], "ration": 1}, "ratio"),
        ({"data_paths": []}, "empty"),
        ({"data_paths": None}, "needs `data_paths`"),
        ({"data_paths": ["a.jsonl"], "archives": "x"}, "list of texts"),
        ({"data_paths": ["a.jsonl"], "source": "allava", "archives": ["x*.zip"]}, "no such archive"),
        ({"data_paths": ["none.jsonl"]}, "no such data file"),
        ({"data_paths": ["."]}, "folder"),
        ({"data_paths": ["a.jsonl"], "ratio": "much"}, "number"),
        ({"data_paths": ["a.jsonl"], "ratio": float("nan")}, "number"),
        ({"data_paths": ["a.jsonl"], "source": "llavva"}, "Did you mean `llava`"),
        ({"data_paths": ["a.jsonl"], "media_root": "nowhere"}, "no folder"),
        ({"data_paths": ["a.jsonl"], "num": 0}, "nothing is left"),
    ],
)
def test_wrong_mixes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, group: dict[str, Any], complaint: str) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": [Q, A]}))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=complaint):
        load_mix(write_mix(tmp_path, one=group))


def test_numbers_left_empty_take_everything_once(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text((json.dumps({"messages": [Q, A]}) + "\n") * 3)
    (file,) = load_mix(write_mix(tmp_path, one={"data_paths": [str(tmp_path / "a.jsonl")], "ratio": None, "num": None}))
    assert file.choose(file.reader().index(), seed=1)[:, 0].tolist() == [1, 2, 3]


def test_read_samples_names_the_bad_record(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": [Q, A], "k": 1}) + "\n{oops\n")
    stream = read_samples(tmp_path / "a.jsonl")
    sample, record = next(stream)
    assert talk(sample) == QA
    assert record["k"] == 1
    with pytest.raises(DataError, match=r"a\.jsonl, record 2: bad_json"):
        next(stream)
