"""A set depends on mix, settings, seed and data alone: compiled in two places that share nothing else, it is the same
to the byte, rejects and all."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_vita.data.compile.messages import portable
from megatron_vita.data.compile.run import Options, run
from megatron_vita.data.media.names import natural_key
from megatron_vita.data.shards.reader import ShardSet
from megatron_vita.data.sources import load_mix
from megatron_vita.data.sources.media_store.store import open_store
from megatron_vita.data.spec import PreprocessSpec
from tests.data.kit import picture, tokenizer_folder

ROOT = Path(__file__).parents[3]
ELSEWHERE = """
import os
os.cpu_count = lambda: 7
scandir, listdir = os.scandir, os.listdir

class Backwards:
    def __init__(self, entries):
        self.entries = iter(sorted(entries, key=lambda entry: entry.name, reverse=True))
    def __enter__(self): return self
    def __exit__(self, *_): pass
    def close(self): pass
    def __iter__(self): return self
    def __next__(self): return next(self.entries)

os.scandir = lambda *path: Backwards(scandir(*path))
os.listdir = lambda *path: sorted(listdir(*path), reverse=True)
"""
"""Another machine: other processors, folders listed in another order."""


def turns(question: str) -> list[dict[str, str]]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": "seven"}]


def lines(path: Path, records: list[Any]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def publish(root: Path) -> None:
    """Records of every container and kind of medium: some sound, some broken in each way that has a message."""
    media = root / "media"
    (media / "deep/a").mkdir(parents=True)
    (media / "deep/b").mkdir()
    (media / "clip").mkdir()
    good, cut = picture(20, 30), picture(30, 30)[:-20]
    pictures = {
        "good.png": good, "caf\u00e9.png": good, "cut.png": cut, "text.jpg": b"no picture", "empty.png": b"",
        "head.png": good[:20], "film.mp4": b"no film" * 9, "deep/a/twice.mp4": b"x", "deep/b/twice.mp4": b"y",
        "cut.mp4": b"\0\0\0\x18ftypisom\0\0\2\0isomiso2" + b"\0" * 99, "list.avi": b"RIFF" + b"\0" * 60,
        "bad.gif": b"GIF89a" + b"\0" * 5, "bad.tiff": b"II*\0" + b"\xff" * 30, "bad.bmp": b"BM" + b"\7" * 60,
        "bad.webp": b"RIFF\x40\0\0\0WEBPVP8 " + b"\1" * 50,
        **{f"clip/{n}.png": picture(16, 16, seed=n) for n in (1, 2, 10)}, "clip/01.png": picture(16, 16, seed=77),
    }  # fmt: skip
    for name, data in pictures.items():
        (media / name).write_bytes(data)
    (media / "broken_clip").mkdir()
    (media / "broken_clip/1.png").write_bytes(b"no picture")
    (media / "link.png").symlink_to("good.png")
    (media / "out.png").symlink_to(root / "tok/tokenizer.json")
    members = {"in/good.png": good, "in/cut.png": cut, "in/../up.png": good, "in/f/1.png": good, "in/g/1.png": cut}
    tarred = io.BytesIO()
    with tarfile.open(fileobj=tarred, mode="w:gz") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
        link = tarfile.TarInfo("in/link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "good.png"
        archive.addfile(link)
    (media / "pack1.tar.gz").write_bytes(tarred.getvalue())
    for name, method in (("pack2.zip", zipfile.ZIP_DEFLATED), ("pack02.zip", zipfile.ZIP_STORED)):
        with zipfile.ZipFile(media / name, "w", method) as zipped:
            zipped.writestr("z/good.png", good)
            zipped.writestr("z/differs.png", picture(20, 20, seed=len(name)))
            zipped.writestr("z/cut.png", cut)
    names = [*pictures, "link.png", "out.png", "../r.jsonl", "none.png", "deep", *members, "in/link.png", "z/good.png",
             "z/differs.png", "z/cut.png", "https://x/y.png", "data:;base64,!", "a\0b.png", "\ud800.png"]  # fmt: skip
    films = ["film.mp4", "cut.mp4", "list.avi", "clip", "broken_clip", "in/f", "in/g", "none.mp4", "text.jpg", "deep"]
    lines(root / "pictures.jsonl", [{"image": name, "conversations": turns("<image>")} for name in names])
    lines(root / "films.jsonl", [{"video": name, "conversations": turns("<video>")} for name in films])
    ids = ["twice", "film", "clip", "none", "f"]
    lines(root / "ids.jsonl", [{"video": name, "conversations": turns("<video>")} for name in ids])
    with (root / "pictures.jsonl").open("a") as stream:
        stream.write('{oops\n{"image": "good.png"}\n"text"\n')
    rows = [[{"bytes": data, "path": None}] for data in (good, cut, b"no picture", b"")]
    texts = [[{"user": f"q{n}", "assistant": "a"}] for n in range(4)]
    pq.write_table(pa.table({"images": rows, "texts": texts}), root / "rows.parquet", row_group_size=2)
    with tarfile.open(root / "web.tar", "w") as archive:
        for name, data in (("1.png", good), ("1.txt", b"red"), ("2.png", cut), ("2.txt", b"blue"), ("3.txt", b"\xff")):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    with zipfile.ZipFile(root / "many.zip", "w") as zipped:
        zipped.writestr("a.json", json.dumps({"messages": [{"role": "user", "content": "q"}]}))
        zipped.writestr("b.json", json.dumps({"text": "words " * 9}))
        zipped.writestr("c.json", "{oops")
    for folder in ("x", "y"):
        (root / folder).mkdir()
        lines(root / folder / "t-0.jsonl", [{"text": f"{folder} {n} words"} for n in range(20)])
    llava = {"source": "llava", "media_root": "${WHERE}/media", "archives": ["*.zip", "*.tar.gz"]}
    mix: dict[str, Any] = {
        "pictures": {**llava, "data_paths": ["${WHERE}/pictures.jsonl"]},
        "films": {**llava, "data_paths": ["${WHERE}/films.jsonl"]},
        "ids": {"source": "sharegemini", "media_root": "${WHERE}/media", "data_paths": ["${WHERE}/ids.jsonl"]},
        "rows": {"source": "the_cauldron", "data_paths": ["${WHERE}/rows.parquet"]},
        "web": {"source": "webdataset", "data_paths": ["${WHERE}/web.tar"]},
        "many": {"source": "long_vita", "data_paths": ["${WHERE}/many.zip"]},
        "texts": {"data_paths": ["${WHERE}/[xy]/t-*.jsonl"], "ratio": 0.3},
    }
    (root / "mix.yaml").write_text(json.dumps({"dataset": mix}))
    # the same mix as somebody may write it for one machine
    (root / "absolute.yaml").write_text(json.dumps({"dataset": mix}).replace("${WHERE}", str(root)))


def compile_set(where: Path, mix: Path, output: Path, cwd: Path, workers: int, **environment: str) -> None:
    flags = {"data-config": mix, "tokenizer": where / "tok", "output": output, "seq-length": 96, "image-size": 16,
             "patch-size": 4, "max-tiles": 4, "workers": workers, "max-rejected": 1}  # fmt: skip
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools/preprocess_data.py"), *(f"--{key}={value}" for key, value in flags.items())],
        capture_output=True, text=True, timeout=300, cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT), "WHERE": str(where), **environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def content(prefix: Path) -> dict[str, bytes]:
    return {path.name.removeprefix(prefix.name): path.read_bytes() for path in prefix.parent.glob(f"{prefix.name}.*")}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`here` and `there` hold the same data and nothing else that is the same."""
    root = tmp_path_factory.mktemp("world")
    here, there = root / "here", root / "over/a longer way/there"
    here.mkdir()
    tokenizer_folder(here / "tok")
    publish(here)
    shutil.copytree(here, there, symlinks=True)
    (there / "media/out.png").unlink()
    (there / "media/out.png").symlink_to(there / "tok/tokenizer.json")
    (there / "absolute.yaml").write_text((here / "absolute.yaml").read_text().replace(str(here), str(there)))
    for number, path in enumerate(sorted(there.rglob("*"))):
        os.utime(path, (10**9 + number, 10**9 + number), follow_symlinks=False)
    for folder in ("machine", "tmp", "home"):
        (root / folder).mkdir()
    (root / "machine/sitecustomize.py").write_text(ELSEWHERE)
    (root / "link").symlink_to(there)
    return root


@pytest.mark.slow
@pytest.mark.parametrize("mix", ["mix.yaml", "absolute.yaml"])
def test_two_places_make_one_set(world: Path, tmp_path: Path, mix: str) -> None:
    here, there = world / "here", world / "over/a longer way/there"
    compile_set(here, here / mix, here / "out/set", here, 1, PYTHONHASHSEED="1", LC_ALL="C.utf8")
    moved = tmp_path / "another.yaml"
    shutil.copy(there / mix, moved)
    compile_set(
        world / "link" if mix == "mix.yaml" else there, moved, tmp_path / "far/away/set", tmp_path, 2,
        PYTHONHASHSEED="2", LC_ALL="C", LANG="C", PYTHONCOERCECLOCALE="0", PYTHONUTF8="0", HOME=str(world / "home"),
        USER="nobody", LOGNAME="nobody", TMPDIR=str(world / "tmp"), PYTHONPATH=f"{ROOT}:{world / 'machine'}",
        TZ="Asia/Tokyo",
    )  # fmt: skip
    first, second = content(here / "out/set"), content(tmp_path / "far/away/set")
    rejects = [json.loads(line) for line in first[".rejects.jsonl"].decode().splitlines()]
    assert len({reject["code"] for reject in rejects}) >= 9
    assert second[".rejects.jsonl"].decode().splitlines() == first[".rejects.jsonl"].decode().splitlines()
    assert second == first
    text = first[".rejects.jsonl"] + first[".json"]
    for word in (str(world), "0x7", "unpacked/", str(ROOT)):
        assert word.encode() not in text


def test_messages_of_other_libraries_lose_what_is_of_this_machine(tmp_path: Path) -> None:
    (tmp_path / "media").mkdir()
    lines(tmp_path / "r.jsonl", [{"text": "a"}])
    entry = {"data_paths": [f"{tmp_path}/r.jsonl"], "media_root": f"{tmp_path}/media", "source": "text"}
    (tmp_path / "mix.yaml").write_text(json.dumps({"dataset": {"a": entry}}))
    (file,) = load_mix(tmp_path / "mix.yaml")
    for said, wanted in {
        f"cannot identify image file <_io.BytesIO object at 0x7f12ab>: {tmp_path}/media/a/b.png": "cannot identify "
        "image file <_io.BytesIO object>: a/b.png",
        f"[Errno 5] no: '{tmp_path}/media/a b.png'": "[Errno 5] no: 'a b.png'",
        f"in {tmp_path}/r.jsonl, in {tmp_path}/other/x and {tmp_path}/media": "in r.jsonl, in other/x and ",
        f"{tmp_path}/.set.work/sources/unpacked/abc-123: ends": "an unpacked copy: ends",
        f"/data{tmp_path}/media/x and {tmp_path}/media2/x": f"/data{tmp_path}/media/x and media2/x",
        f"[10:11:12] reader.cc: subfile,,start,0,:{tmp_path}/media/x [mov @ 0x55d0]": "reader.cc: "
        "subfile,,start,0,:x [mov]",
    }.items():
        assert portable(said, file, tmp_path / ".set.work") == wanted


def test_no_two_names_have_one_place_in_an_order() -> None:
    names = ["a1", "a01", "a001", "a1b2", "a01b2", "\u00b2", "1\u00b2", "a" + "1" * 5000, "", "a", "10", "9"]
    ordered = sorted(names, key=natural_key)
    assert len({repr(natural_key(name)) for name in names}) == len(names)
    assert ordered.index("9") < ordered.index("10")
    assert ordered.index("a1") < ordered.index("a" + "1" * 5000)


def test_the_rate_of_frames_is_the_datasets_wherever_they_lie(tmp_path: Path) -> None:
    folder = tmp_path / "ShareGPTVideo/frames/clip"
    folder.mkdir(parents=True)
    for number in range(8):
        (folder / f"{number}.png").write_bytes(picture(16, 16, seed=number))
    lines(tmp_path / "r.jsonl", [{"video": "clip", "conversations": turns("<video>")}])
    for source, changes, rate in (("llava", {}, 1.0), ("llava_hound", {}, 2.0), ("llava", {"frame_rate": 4}, 4.0)):
        entry = {"data_paths": [f"{tmp_path}/r.jsonl"], "media_root": str(folder.parent), "source": source, **changes}
        (tmp_path / "mix.yaml").write_text(json.dumps({"dataset": {"a": entry}}))
        (file,) = load_mix(tmp_path / "mix.yaml")
        assert open_store(file.media).find("clip").frame_rate == rate


def test_references_of_a_set_below_a_link_lead_to_the_pictures(world: Path, tmp_path: Path) -> None:
    (tmp_path / "deep/er").mkdir(parents=True)
    (tmp_path / "deep/link").symlink_to(tmp_path / "deep/er")
    (tmp_path / "short").symlink_to(tmp_path / "deep/er")
    (tmp_path / "good.png").write_bytes(picture(20, 30))
    lines(tmp_path / "r.jsonl", [{"image": "good.png", "conversations": turns("<image>")}])
    (tmp_path / "mix.yaml").write_text(json.dumps({"dataset": {"a": {"data_paths": [f"{tmp_path}/r.jsonl"]}}}))
    settings: dict[str, Any] = {
        "data_config": f"{tmp_path}/mix.yaml",
        "tokenizer": f"{world}/here/tok",
        "seq_length": 96,
    }
    spec = PreprocessSpec(image_size=16, patch_size=4)
    run(Options(**settings, output=f"{tmp_path}/short/set", spec=spec, media="reference", progress=False))
    assert ShardSet(tmp_path / "short/set").media_bytes(0) == picture(20, 30)
