"""Media in archives through both phases of the compiler: the set is, byte for byte, that of the same data unpacked."""

from __future__ import annotations

import io
import json
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_vita.data.compile.run import Options, run
from megatron_vita.data.shards.manifest import Manifest
from megatron_vita.data.shards.reader import ShardSet
from megatron_vita.data.spec import PreprocessSpec
from tests.data.fixtures_kit import clip
from tests.data.kit import picture, tokenizer_folder
from tests.data.sources.test_readers import PACK, tar_of, zip_of

SPEC = PreprocessSpec(image_size=16, patch_size=4, max_tiles=4, max_frames=4)
Files = dict[str, bytes]


def _lay_out(root: Path, files: Files) -> None:
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)


def _parts(root: Path, files: Files) -> None:
    whole = PACK["gz"](tar_of(files))
    for number in range(3):
        cut = len(whole) // 3 + 1
        (root / f"media.tar.gz.a{'abc'[number]}").write_bytes(whole[number * cut : (number + 1) * cut])


def _several(root: Path, files: Files) -> None:
    names = sorted(files)
    for number in range(3):
        some = {name: files[name] for name in names[number::3]}
        (root / f"part{number}.zip").write_bytes(zip_of(some))


PACKED: dict[str, Callable[[Path, Files], object]] = {
    "zip": lambda root, files: (root / "media.zip").write_bytes(zip_of(files)),
    "stored zip": lambda root, files: (root / "media.zip").write_bytes(zip_of(files, zipfile.ZIP_STORED)),
    "three zips": _several,
    "tar": lambda root, files: (root / "media.tar").write_bytes(tar_of(files)),
    "tar.gz": lambda root, files: (root / "media.tar.gz").write_bytes(PACK["gz"](tar_of(files))),
    "split tar.gz": _parts,
}


def _said(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _files_and_records() -> tuple[Files, list[dict[str, Any]]]:
    """Pictures, a video, a folder of frames, and records that are rejected each for a reason that media give."""
    files = {f"a/{number}.png": picture(16 + 3 * number, 24, seed=number) for number in range(9)}
    files |= {f"b/clip/{number}.png": picture(16, 16, seed=number) for number in range(6)}
    files |= {"a/cut.png": picture(30, 30)[:-20], "a/junk.jpg": b"no picture", "b/film.mp4": clip(2)}
    records: list[dict[str, Any]] = [
        {"messages": _said("<image>Which", f"\nit is {number}"), "images": [f"a/{number}.png"]} for number in range(9)
    ]
    records += [{"messages": _said("<video>Which", "three"), "videos": [name]} for name in ("b/film.mp4", "b/clip")]
    records.insert(3, {"messages": _said("<image>Which", "a"), "images": ["a/cut.png"]})
    records.insert(7, {"messages": _said("<image>Which", "a"), "images": ["a/junk.jpg"]})
    records.insert(8, {"messages": _said("<image>Which", "a"), "images": ["a/99.png"]})
    records.insert(9, {"messages": _said("<image>Which", "a"), "images": ["../a/0.png"]})
    return files, records


CODES = {"media_truncated": 1, "media_broken": 1, "media_missing": 1, "path_escape": 1}


def _compiled(root: Path, group: dict[str, Any], **changes: Any) -> tuple[Manifest, dict[str, bytes]]:
    """The manifest, and every file of the set but the manifest and the rejects, whose messages name places."""
    tokenizer_folder(root / "tok")
    (root / "mix.json").write_text(json.dumps({"dataset": {"all": group}}))
    options = Options(
        **{"data_config": str(root / "mix.json"), "tokenizer": str(root / "tok"), "output": str(root / "out/set"),
           "seq_length": 160, "spec": SPEC, "workers": 2, "progress": False, **changes}
    )  # fmt: skip
    manifest = run(options)
    ShardSet(root / "out/set").verify()
    skipped = ("set.json", "set.rejects.jsonl")
    return manifest, {path.name: path.read_bytes() for path in (root / "out").iterdir() if path.name not in skipped}


def _group(root: Path, records: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    (root / "all.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return {"source": "long_vita", "data_paths": [str(root / "all.jsonl")], "media_root": str(root), **more}


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> tuple[Manifest, dict[str, bytes]]:
    root = tmp_path_factory.mktemp("unpacked")
    files, records = _files_and_records()
    _lay_out(root, files)
    manifest, content = _compiled(root, _group(root, records))
    assert (manifest.sources[0].used, dict(manifest.sources[0].rejected)) == (11, CODES)
    assert manifest.sources[0].cleaned == 9
    return manifest, content


@pytest.mark.slow
@pytest.mark.parametrize("form", PACKED)
def test_packed_media_make_the_same_set(unpacked: tuple[Manifest, dict[str, bytes]], tmp_path: Path, form: str) -> None:
    files, records = _files_and_records()
    PACKED[form](tmp_path, files)
    manifest, content = _compiled(tmp_path, _group(tmp_path, records, archives=["*"]))
    assert content == unpacked[1]
    (source,), (wanted,) = manifest.sources, unpacked[0].sources
    assert (source.read, source.used, source.rejected) == (wanted.read, wanted.used, wanted.rejected)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["zip", "stored zip", "tar", "tar.gz"])
def test_references_into_archives_read_as_those_to_files(tmp_path: Path, form: str) -> None:
    """With --media reference the set points into a plain archive; what was unpacked for the run alone is embedded."""
    files, records = _files_and_records()
    made: list[tuple[list[bytes], int]] = []
    for name in ("plain", "packed"):
        root = tmp_path / name
        root.mkdir()
        _lay_out(root, files) if name == "plain" else PACKED[form](root, files)
        group = _group(root, records, **({} if name == "plain" else {"archives": ["media.*"]}))
        manifest, _ = _compiled(root, group, media="reference")
        shards = ShardSet(root / "out/set")
        media = [shards.media_bytes(item) for item in range(manifest.totals["media"])]
        made.append((media, (root / "out/set.media.bin").stat().st_size))
        assert manifest.media == "reference"
        assert not (root / "out/.set.work").exists()
    assert made[0][0] == made[1][0]


def test_a_webdataset_makes_the_set_of_its_files_unpacked(tmp_path: Path) -> None:
    records: list[dict[str, Any]] = []
    loose: Files = {}
    groups = io.BytesIO()
    with tarfile.open(fileobj=groups, mode="w") as tar:

        def member(name: str, data: bytes) -> None:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))

        for number in range(8):
            said = _said("<image>Which", f"it is {number}")
            data = picture(20 + 5 * number, 24, seed=number)
            if number == 4:
                data = data[:-9]
            member(f"{number:03d}.png", data)
            member(f"{number:03d}.json", b"{oops" if number == 6 else json.dumps({"messages": said}).encode())
            loose[f"{number:03d}.png"] = data
            records.append({"messages": said, "images": [f"{number:03d}.png"]})
    sets = []
    for name in ("loose", "tar", "tar.gz"):
        root = tmp_path / name
        root.mkdir()
        if name == "loose":
            _lay_out(root, loose)
            lines = [json.dumps(record) for record in records]
            lines[6] = "{oops"
            (root / "all.jsonl").write_text("\n".join(lines) + "\n")
            data_file, source = root / "all.jsonl", "long_vita"
        else:
            data_file, source = root / f"all.{name}", "webdataset"
            data_file.write_bytes(groups.getvalue() if name == "tar" else PACK["gz"](groups.getvalue()))
        # one name in every mix: which records a ratio takes, and their order, hang on it
        group = {"source": source, "data_paths": [str(data_file)], "media_root": str(root)}
        manifest, content = _compiled(root, group)
        counts = manifest.sources[0]
        assert (counts.read, counts.used) == (8, 6)
        assert counts.rejected == {"bad_json": 1, "media_truncated": 1}
        sets.append(content)
    assert sets[0] == sets[1] == sets[2]
