"""Rejected records: the share at which a run is refused, what its last lines say, and what --resume tries again."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from megatron_vita.data.compile import run as preprocess
from megatron_vita.data.compile.rejected import by_code, too_many, total, warnings
from megatron_vita.data.compile.run import Options, run
from megatron_vita.data.rejects import counted
from megatron_vita.data.shards.manifest import SourceCounts
from megatron_vita.data.shards.writer import plan
from megatron_vita.data.sources.readers import packed
from megatron_vita.data.spec import PreprocessSpec
from megatron_vita.errors import DataError
from tests.data.compile.test_resume import DATA, compiled, content, killed
from tests.data.kit import picture, tokenizer_folder
from tests.scripts import load_script

SPEC = PreprocessSpec(image_size=16, patch_size=4, max_tiles=4, max_frames=4)

__all__ = ["compiled"]


@pytest.fixture(autouse=True)
def _small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preprocess, "CHUNK", 4)
    monkeypatch.setattr(plan, "RANGE_BYTES", 2000)


def world(root: Path, sources: dict[str, tuple[int, int]]) -> Path:
    """A mix of sources: name -> (records, of which the last so many lack their picture)."""
    tokenizer_folder(root / "tok")
    talk = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "seven"}]
    for name, (count, missing) in sources.items():
        records = [{"image": f"{name}{n}.png", "conversations": talk} for n in range(count)]
        (root / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        for number in range(count - missing):
            (root / f"{name}{number}.png").write_bytes(picture(16, 16, seed=number))
    entries = {name: {"source": "llava", "data_paths": [str(root / f"{name}.jsonl")]} for name in sources}
    (root / "mix.yaml").write_text(json.dumps({"dataset": entries}))
    return root


def options(root: Path, **changes: Any) -> Options:
    given = {"data_config": f"{root}/mix.yaml", "tokenizer": f"{root}/tok", "output": f"{root}/out/set"}
    return Options(**{**given, "seq_length": 64, "spec": SPEC, "progress": False, **changes})


def fetch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).write_bytes(picture(16, 16, seed=len(name)))


# --------------------------------------------------------------------------------------------------- limits, last lines


def counts(name: str, read: int, **rejected: int) -> SourceCounts:
    return SourceCounts(name=name, read=read, used=read - sum(rejected.values()), rejected=rejected)


def test_the_share_counts_source_by_source() -> None:
    large, small = counts("large", 1000, bad_json=1), counts("small", 10, media_missing=5)
    worse, few = counts("worse", 10, media_missing=6), counts("few", 3, bad_json=3)
    sources = [large, small, worse, few]
    assert too_many(sources, None) == [worse]  # half is allowed; three records are too few to judge
    assert too_many(sources, 0.5) == [worse, few]
    assert too_many(sources, 0.0) == sources
    assert too_many(sources, 1.0) == []


def test_what_is_said_at_the_end() -> None:
    assert total([counts("a", 5)]) == "rejected: none"
    sources = [counts("a", 100, bad_json=5), counts("b", 100, bad_json=6), counts("c", 10, bad_role=1, media_missing=2)]
    assert warnings(sources) == [
        "warning: c: 3 of 10 records are rejected (2 media_missing, 1 bad_role)",
        "warning: b: 6 of 100 records are rejected (6 bad_json)",
    ]
    assert total(sources) == "rejected: 14 of 210 records (11 bad_json, 2 media_missing, 1 bad_role)"
    assert by_code({}) == "none"
    assert len(warnings([counts(str(n), 2, bad_json=1) for n in range(50)])) == 21


@pytest.mark.slow
@pytest.mark.parametrize("missing", [0, 1, 3])
def test_the_last_lines_of_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str], missing: int) -> None:
    root = world(tmp_path, {"a": (20, missing), "b": (20, 0)})
    tool = load_script("tools/preprocess_data.py")
    flags = {"data-config": root / "mix.yaml", "tokenizer": root / "tok", "output": root / "set", "seq-length": 64,
             "image-size": 16, "patch-size": 4, "workers": 1}  # fmt: skip
    for again in ([], ["--resume"]):
        assert tool.main([f"--{name}={value}" for name, value in flags.items()] + again) == 0
        lines = capsys.readouterr().out.splitlines()
        said = f"rejected: {missing} of 40 records ({missing} media_missing)" if missing else "rejected: none"
        assert lines[-2] == said
        assert lines[-1].startswith("wrote ")
        warned = [line for line in lines if line.startswith("warning")]
        assert warned == (["warning: a: 3 of 20 records are rejected (3 media_missing)"] if missing == 3 else [])


@pytest.mark.slow
def test_a_refused_run_keeps_its_rejects_and_goes_on(tmp_path: Path, compiled: list[tuple[str, int]]) -> None:
    root = world(tmp_path, {"a": (10, 6), "b": (30, 0)})
    said = r"a: 6 of 10 records are rejected \(6 media_missing\), more than --max-rejected 0.5 allows"
    with pytest.raises(DataError, match=said) as caught:
        run(options(root))
    assert not list((root / "out").glob("set*"))
    listed = root / "out/.set.work/rejects.jsonl"
    assert str(listed) in str(caught.value)
    assert [json.loads(line)["line"] for line in listed.read_text().splitlines()] == [5, 6, 7, 8, 9, 10]
    compiled.clear()
    with pytest.raises(DataError, match=r"more than --max-rejected 0.1 allows"):
        run(options(root, resume=True, max_rejected=0.1))
    assert run(options(root, resume=True, max_rejected=0.6)).totals["rejected"] == 6
    assert not compiled  # the chunks are kept (what is retried is done in a process of its own)


# --------------------------------------------------------------------------------------------------------- retried


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("place", ["compile.record:Compiler.compile", "shards.writer.packs:PackWriter.write"])
def test_an_interrupted_run_takes_media_that_were_fetched(tmp_path: Path, place: str, workers: int) -> None:
    root = world(tmp_path, {"a": (20, 3)})
    (root / "a2.png").unlink()
    (root / "a3.png").write_bytes(picture(16, 16, seed=3)[:-9])
    killed(lambda: run(options(root)), f"{DATA}.{place}", 14 if "compile" in place else 2, "before")
    fetch(root, "a2.png", "a3.png", "a17.png")
    manifest = run(options(root, resume=True, workers=workers))
    assert dict(manifest.sources[0].rejected) == {"media_missing": 2}
    made = content(root / "out/set")
    run(options(root, output=f"{root}/fresh/set"))
    assert content(root / "fresh/set") == made


@pytest.mark.slow
def test_what_was_not_fetched_costs_nothing(tmp_path: Path, compiled: list[tuple[str, int]]) -> None:
    root = world(tmp_path, {"a": (20, 3)})
    killed(lambda: run(options(root)), f"{DATA}.shards.writer.packs:PackWriter.write", 2, "before")
    assert len(list((root / "out/.set.work/done").iterdir())) == 1
    assert run(options(root, resume=True)).totals["rejected"] == 3
    assert not compiled


@pytest.mark.slow
def test_a_finished_set_takes_media_that_were_fetched(tmp_path: Path, compiled: list[tuple[str, int]]) -> None:
    root = world(tmp_path, {"a": (20, 3), "b": (20, 0)})
    before = run(options(root))
    assert run(options(root, resume=True)).digest == before.digest  # nothing has come: kept
    fetch(root, "a18.png")
    compiled.clear()
    manifest = run(options(root, resume=True))
    assert dict(manifest.sources[0].rejected) == {"media_missing": 2}
    assert sorted(compiled) == [("a", 18), ("a", 19), ("a", 20)]
    made = content(root / "out/set")
    run(options(root, output=f"{root}/fresh/set"))
    assert content(root / "fresh/set") == made


def test_records_that_are_wrong_by_themselves_are_not_retried(tmp_path: Path) -> None:
    root = world(tmp_path, {"a": (20, 0)})
    with (root / "a.jsonl").open("a") as stream:
        stream.write("{oops\n")
    first = run(options(root))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preprocess, "_chunks", None)  # not even listed
        assert run(options(root, resume=True)).digest == first.digest


def test_only_a_count_of_one_is_singular() -> None:
    assert [counted(count, "record") for count in (0, 1, 2)] == ["0 records", "1 record", "2 records"]
    assert [counted(count, "book has", "books have") for count in (1, 7)] == ["1 book has", "7 books have"]


def test_packed_shards_that_share_a_ratio_are_unpacked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = world(tmp_path, {"a": (8, 0), "b": (8, 0)})
    for name in "ab":
        (root / f"s-{name}.jsonl.gz").write_bytes(gzip.compress((root / f"{name}.jsonl").read_bytes()))
    entry = {"source": "llava", "ratio": 0.5, "data_paths": [f"{root}/s-*.jsonl.gz"], "media_root": str(root)}
    (root / "mix.yaml").write_text(json.dumps({"dataset": {"s": entry}}))
    unpacked: list[Path] = []
    unpack = packed.unpack

    def counted(path: Path, *rest: Any, **more: Any) -> Any:
        unpacked.append(path)
        return unpack(path, *rest, **more)

    monkeypatch.setattr(packed, "unpack", counted)
    assert run(options(root)).totals["read"] == 8
    assert sorted(path.name for path in unpacked) == ["s-a.jsonl.gz", "s-b.jsonl.gz"]
