"""Lint: what is missing, and what would be trained twice."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_vita.data.sources.lint import Report, lint
from megatron_vita.errors import ConfigError
from megatron_vita.files import readable_size
from tests.data.fixtures import Published, publish_everything
from tests.data.fixtures_kit import put
from tests.data.sources.test_readers import zip_of
from tests.scripts import load_script

STAGES = Path(__file__).parents[3] / "examples" / "long_vita_14b" / "mixes"
RECORD = b'{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}\n'


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Published:
    return publish_everything(tmp_path_factory.mktemp("datasets"))


def look(folder: Path, **groups: Any) -> Report:
    (folder / "mix.yaml").write_text(json.dumps({"dataset": groups}))
    return lint(folder / "mix.yaml")


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3, 4])
def test_the_example_mixes_are_right(published: Published, monkeypatch: pytest.MonkeyPatch, stage: int) -> None:
    monkeypatch.setenv("DATASETS", str(published.root))
    report = lint(STAGES / f"stage{stage}.yaml")
    assert (report.wrong, report.notes) == ([], [])
    assert len(report.groups) == {1: 7, 2: 24, 3: 42, 4: 43}[stage]
    if stage == 2:
        assert "OpenHermes: ratio 1, at most 300000 of each, `openhermes`, 1 file (" in str(report)
        assert "ALLaVA: ratio 1, `allava`, 6 files (" in str(report)
        assert ", 3 archives (" in str(report)


def test_everything_missing_is_one_line_a_dataset_that_says_where_it_comes_from(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("DATASETS", str(tmp_path))
    report = lint(STAGES / "stage4.yaml")
    assert len(report.wrong) == 31
    assert "nothing is wrong" not in str(report)
    by_name = {line.partition(": ")[0]: line for line in report.wrong}
    for name, words in {
        "the_cauldron": ["29 files missing below", "(chart2text/train-*.parquet, ", " and 26 more)",
                         "get them from HuggingFaceM4/the_cauldron on the Hugging Face hub"],
        "lima": [f"{tmp_path}/GAIR/lima/train.jsonl: no such data file", "gated: accept its terms"],
        "Movie": ["to be built by: python tools/datasets/movienet.py", "its media: *.tar, 240P/*.tar"],
        "Comic-9K": ["images.tar.gz.aa to .ae"],
        "VideoGPT-plus_Training_Dataset": ["11 files missing", "instruction_tuning/webvid/*.tgz"],
        "Share14/ShareGemini_cap": ["2 files missing", "WebVid and Kinetics-400"],
        "ALLaVA, ALLaVA-text": ["7 files missing", "allava_laion/image_chunks/*.zip", "image_191-task_1k.zip"],
        ", ".join(f"lmms-lab/LLaVA-Video-178K_{part}" for part in ("0_30_s_cap", "0_30_s_qa", "1_2_m_cap"))
        + " and 6 more": ["39 files missing", "*_videos_N.tar.gz", "train_300k/chunk_N.tar.gz"],
    }.items():  # fmt: skip
        for word in words:
            assert word in by_name[name], (word, by_name[name])
    assert "{folder}" not in str(report)
    assert "Correct the path, or fetch the dataset.;" not in str(report)


def test_files_that_appear_twice(tmp_path: Path) -> None:
    one = put(tmp_path / "org/one/a.jsonl", RECORD * 3)
    copy = put(tmp_path / "other/copy.jsonl", RECORD * 3)
    (tmp_path / "link.jsonl").symlink_to(one)
    report = look(
        tmp_path, a={"data_paths": [str(one), str(copy)]}, b={"data_paths": [str(tmp_path / "link.jsonl")]},
    )  # fmt: skip
    assert len(report.wrong) == 2
    assert f"{one} appears 2 times: in a, b." in report.wrong[0]
    assert "the same content at both ends" in report.wrong[1]
    twin = put(tmp_path / "jsonl/org/one/a.parquet", b"x")
    report = look(tmp_path, a={"data_paths": [str(one), str(twin)]})
    assert (len(report.wrong), len(report.notes)) == (0, 1)


def test_twins_of_a_publisher(tmp_path: Path) -> None:
    folder = tmp_path / "lmms-lab/LLaVA-Video-178K/0_30_s_nextqa"
    files = [put(folder / name, name.encode()) for name in ("0_30_s_nextqa_oe_qa_processed.json", "oe-0-of-1.parquet")]
    report = look(tmp_path, a={"source": "llava_video", "data_paths": list(map(str, files))})
    assert len(report.wrong) == 1
    assert "hold the same records" in report.wrong[0]
    assert "oe-0-of-1.parquet is no name of" in report.notes[0]


@pytest.mark.parametrize("form", ["{}/train-00000-of-00001.parquet", "{}.jsonl"])
@pytest.mark.parametrize(
    ("cauldron", "onevision", "twice"),
    [
        ("ai2d", "ai2d(cauldron,llava_format)", 1),
        ("ai2d", "ai2d(gpt4v)", 0),
        ("textcaps", "textcaps", 1),
        ("tabmwp", "TabMWP(MathV360K)", 0),
        ("clevr_math", "CLEVR-Math(MathV360K)", 1),
        ("clevr", "CLEVR-Math(MathV360K)", 0),
    ],
)
def test_subsets_of_two_collections(tmp_path: Path, form: str, cauldron: str, onevision: str, twice: int) -> None:
    paths = [f"the_cauldron/{form.format(cauldron)}", f"LLaVA-OneVision-Data/{form.format(onevision)}"]
    for path in paths:
        put(tmp_path / path, path.encode())
    groups = {str(n): {"data_paths": [f"{tmp_path}/{path}"]} for n, path in enumerate(paths)}
    assert len(look(tmp_path, **groups).wrong) == twice


def test_subsets_taken_from_other_publishers(tmp_path: Path) -> None:
    paths = ["LLaVA-OneVision-Data/sharegpt4v(sam).jsonl", "Lin-Chen/ShareGPT4V/share-captioner.json"]
    for path in paths:
        put(tmp_path / path, path.encode())
    report = look(tmp_path, a={"data_paths": [f"{tmp_path}/{path}" for path in paths]})
    assert "sharegpt4v(sam) is in" in report.wrong[0]


def test_archives_with_a_gap(tmp_path: Path) -> None:
    root = tmp_path / "FreedomIntelligence/ALLaVA-4V"
    for number in (0, 1, 3):
        put(root / f"allava_laion/image_chunks/images_{number}.zip", b"x" * 1500)
    file = put(root / "allava_laion/ALLaVA-Caption-LAION-4V.json", RECORD)
    report = look(tmp_path, a={"source": "allava", "data_paths": [str(file)]})
    assert len(report.wrong) == 1
    assert "images_1.zip is followed by images_3.zip" in report.wrong[0]
    assert f"3 archives ({readable_size(4500)})" in report.groups[0]
    comic = tmp_path / "VITA-MLLM/Comic-9K"
    for part in ("aa", "ac"):
        put(comic / f"images.tar.gz.{part}", b"x")
    report = look(tmp_path, a={"source": "comic9k", "data_paths": [str(put(comic / "summary.jsonl", b"{}"))]})
    assert "images.tar.gz.aa is followed by images.tar.gz.ac" in report.wrong[0]


def test_a_zip_in_volumes(tmp_path: Path) -> None:
    root = tmp_path / "lmms-lab/M4-Instruct-Data"
    for name in ("dreamsim_split.zip", "dreamsim_split.z01"):
        put(root / name, b"x")
    report = look(
        tmp_path, a={"source": "m4_image", "data_paths": [str(put(root / "m4_instruct_annotations.json", RECORD))]}
    )
    assert len(report.wrong) == 1
    assert "zip -s 0 dreamsim_split.zip --out dreamsim.zip" in report.wrong[0]


def test_media_that_lie_elsewhere(tmp_path: Path) -> None:
    talk = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "a"}]
    records = [{"image": f"docvqa/{n}.png", "conversations": talk} for n in range(20)]
    file = put(
        tmp_path / "lmms-lab/LLaVA-OneVision-Mid-Data/ureader_tr/ureader_tr_processed.json",
        json.dumps(records).encode(),
    )
    group = {"source": "ov_mid", "data_paths": [str(file)]}
    (wrong,) = look(tmp_path, a=group).wrong
    assert "docvqa/0.png and so on: none under" in wrong
    assert "no archive *_images_*.tar.gz" in wrong
    put(tmp_path / "pictures/docvqa/3.png", b"x")
    assert look(tmp_path, a=group | {"media_root": str(tmp_path / "pictures")}).wrong == []


def test_a_mix_in_the_references_own_form(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys that steer nothing, groups of ratio 0 whose files nobody has, comments, a path that is not there."""
    monkeypatch.chdir(tmp_path)
    put(tmp_path / "datasets/jsonl/GAIR/lima/train.jsonl", RECORD)
    (tmp_path / "published.yaml").write_text(
        """
xlsx_sample_num: 2

dataset:

  LLaVA:
    ratio: 0
    data_paths:
      #- datasets/jsonl/liuhaotian/LLaVA-Pretrain/blip_laion_cc_sbu_558k.jsonl
      - datasets/jsonl/liuhaotian/LLaVA-Instruct-150K/llava_v1_5_mix665k.jsonl

  Movie:
    ratio: 0
    data_paths:

  lima:
    ratio: 1.0
    num: 999999999
    data_paths:
      - datasets/jsonl/GAIR/lima/train.jsonl
      - datasets/jsonl/GAIR/lima/tran.jsonl
"""
    )
    report = lint(tmp_path / "published.yaml")
    (wrong,) = report.wrong
    assert wrong.startswith("lima: datasets/jsonl/GAIR/lima/tran.jsonl: no such data file.")
    assert wrong.endswith("Did you mean datasets/jsonl/GAIR/lima/train.jsonl?")
    assert report.groups == [
        f"lima: ratio 1, at most 999999999 of each, form detected from the records, 1 file ({readable_size(88)})"
    ]


def test_the_command_needs_no_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "mix.yaml").write_text(json.dumps({"dataset": {"a": {"data_paths": [f"{tmp_path}/none.jsonl"]}}}))
    tool = load_script("tools/preprocess_data.py")
    assert tool.main(["--data-config", f"{tmp_path}/mix.yaml", "--lint"]) == 1
    put(tmp_path / "none.jsonl", RECORD)
    assert tool.main(["--data-config", f"{tmp_path}/mix.yaml", "--lint"]) == 0
    assert tool.main(["--data-config", f"{tmp_path}/nomix.yaml", "--lint"]) == 2
    with pytest.raises(SystemExit, match="2"):
        tool.main(["--data-config", f"{tmp_path}/mix.yaml"])


def test_no_mix_at_all(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        lint(tmp_path / "none.yaml")
    assert look(tmp_path, a={"ratio": 0, "data_paths": []}).wrong


# -------------------------------------------------------------------------------------- media by name, empty, rejected


@pytest.mark.parametrize("source", ["sharegemini", "m4_video", "llava_hound"])
def test_media_that_are_found_by_name(tmp_path: Path, source: str) -> None:
    talk = [{"from": "human", "value": "<video>"}, {"from": "gpt", "value": "a"}]
    lines = "".join(json.dumps({"id": f"v{n}", "video": f"v{n}", "conversations": talk}) + "\n" for n in range(9))
    group = {
        "source": source,
        "media_root": f"{tmp_path}/m",
        "data_paths": [str(put(tmp_path / "r.jsonl", lines.encode()))],
    }
    put(tmp_path / "m/a/other.mp4", b"x")
    (wrong,) = look(tmp_path, a=group).wrong
    assert f"r.jsonl: v0 and so on: none under {tmp_path}/m by their names" in wrong
    assert "Its media: " in wrong
    assert ("chunk_*.tar.gz" in wrong) == (source != "sharegemini")
    put(tmp_path / "m/deep/er/v3.webm", b"x")
    assert look(tmp_path, a=group).wrong == []


def test_references_in_parts_and_turns_are_looked_for(tmp_path: Path) -> None:
    part = {"type": "image_url", "image_url": {"url": "no.png"}}
    record = {"messages": [{"role": "user", "content": [part]}, {"role": "assistant", "content": "a"}]}
    group = {"source": "openai", "data_paths": [str(put(tmp_path / "r.jsonl", json.dumps(record).encode()))]}
    (wrong,) = look(tmp_path, a=group).wrong
    assert "no.png and so on: none under" in wrong


def test_files_without_a_record(tmp_path: Path) -> None:
    schema = pa.schema([("text", pa.string())])
    pq.write_table(schema.empty_table(), tmp_path / "rows.parquet")
    files = {"nothing.jsonl": b"", "blank.jsonl": b"\n \n", "array.json": b" [ ]\n", "empty.zip": zip_of({})}
    files |= {"packed.jsonl.gz": gzip.compress(b""), "packed.json.gz": gzip.compress(b"[]")}
    for name, data in files.items():
        put(tmp_path / name, data)
    names = [*files, "rows.parquet"]
    report = look(tmp_path, a={"source": "text", "data_paths": [f"{tmp_path}/{name}" for name in names]})
    for name in names:
        assert any(f"{tmp_path}/{name} holds no record" in line for line in report.wrong), name


def test_members_that_are_empty_or_not_read_are_named(tmp_path: Path) -> None:
    put(tmp_path / "r.zip", zip_of({"a.json": b'{"text": "a"}', "b.json": b"", "../c.json": b'{"text": "c"}'}))
    tarred = io.BytesIO()
    with tarfile.open(fileobj=tarred, mode="w") as out:
        out.addfile(tarfile.TarInfo("1.txt"))
        for name in ("2.json", "3.json", "4.json", "5.json"):
            link = tarfile.TarInfo(name)
            link.type, link.linkname = tarfile.SYMTYPE, "1.txt"
            out.addfile(link)
    put(tmp_path / "w.tar", tarred.getvalue())
    wrong = look(tmp_path, a={"source": "text", "data_paths": [f"{tmp_path}/r.zip"]}).wrong
    assert any(f"{tmp_path}/r.zip: b.json is empty" in line for line in wrong)
    assert any("not read: c.json (its name in the archive is absolute or leaves the folder)" in line for line in wrong)
    wrong = look(tmp_path, a={"source": "webdataset", "data_paths": [f"{tmp_path}/w.tar"]}).wrong
    assert any("2.json (it is a link, and links in archives are not followed), 3.json" in line for line in wrong)
    assert any("and 1 more" in line for line in wrong)


def test_media_that_are_empty_files_are_named(tmp_path: Path) -> None:
    put(tmp_path / "m/a.png", b"")
    put(tmp_path / "m/b.png", b"x")
    talk = [{"from": "human", "value": "<image>q"}, {"from": "gpt", "value": "a"}]
    lines = [json.dumps({"image": name, "conversations": talk}) for name in ("a.png", "b.png")]
    put(tmp_path / "r.jsonl", "\n".join(lines).encode())
    mix = {"source": "llava", "data_paths": [f"{tmp_path}/r.jsonl"], "media_root": f"{tmp_path}/m"}
    (wrong,) = look(tmp_path, a=mix).wrong
    assert "r.jsonl: its first records name empty files: a.png" in wrong


def test_patterns_of_folders(tmp_path: Path) -> None:
    put(tmp_path / "x1/a.jsonl", RECORD)
    put(tmp_path / "x2/a.jsonl", RECORD + RECORD)
    (wrong,) = look(tmp_path, a={"data_paths": [f"{tmp_path}/x*"]}).wrong
    assert f"{tmp_path}/x* names folders ({tmp_path}/x1) and no files. For instance {tmp_path}/x*/*.json." in wrong
    (wrong,) = look(tmp_path, a={"data_paths": [f"{tmp_path}/x1"]}).wrong
    assert f"{tmp_path}/x1 is a folder. Name its files" in wrong
