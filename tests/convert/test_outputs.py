"""Outputs that must not be written, and those that look so and may: found out before any work, with nothing left."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest

from megatron_vita import checkpoint
from megatron_vita.convert import cli, exporter, importer
from tests.convert import publishers
from tests.convert.test_publish import tree

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("made")
    publishers.write_qwen2(root / "llm")
    assert cli.main(["import", "--llm", str(root / "llm"), "--output", str(root / "ckpt")]) == 0
    assert (
        cli.main(["export", "--checkpoint", str(root / "ckpt"), "--format", "llm", "--output", str(root / "hf")]) == 0
    )
    return root


@pytest.fixture
def place(made: Path, tmp_path: Path) -> Path:
    """A folder of one's own with the source, a checkpoint and an export."""
    shutil.copytree(made, tmp_path / "place")
    return tmp_path / "place"


def importing(source: Path, output: Path | str, *more: str) -> list[str]:
    return ["import", "--llm", str(source), "--output", str(output), *more]


def exporting(source: Path, output: Path | str, *more: str) -> list[str]:
    return ["export", "--checkpoint", str(source), "--format", "llm", "--output", str(output), *more]


def refused(flags: list[str], capsys: pytest.CaptureFixture[str], status: int = 2) -> str:
    """The one line of the error."""
    capsys.readouterr()
    assert cli.main(flags) == status
    said = capsys.readouterr()
    assert said.out == ""
    lines = [line for line in said.err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("worked")

    monkeypatch.setattr(exporter, "new_folder", fail)
    monkeypatch.setattr(importer, "write_tensors", fail)


@pytest.mark.parametrize("more", [[], ["--overwrite"]])
def test_an_import_does_not_go_into_the_folder_of_a_run(
    place: Path, more: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    (place / "ckpt/iter_0000000").rename(place / "ckpt/iter_0000002")
    before = tree(place)
    assert "iter_0000002" in refused(importing(place / "llm", place / "ckpt", *more), capsys)
    assert tree(place) == before


@pytest.mark.parametrize("command", ["export", "verify"])
def test_a_damaged_newest_step_is_not_passed_over(
    command: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(place / "ckpt/iter_0000000", place / "ckpt/iter_0000002")
    file = place / "ckpt/iter_0000002/__0_0.distcp"
    file.write_bytes(file.read_bytes()[:-1])
    flags = exporting(place / "ckpt", place / "out") if command == "export" else ["verify", *[str(place / "ckpt")] * 2]
    error = refused(flags, capsys, status=1)
    assert str(file) in error
    assert str(place / "ckpt/iter_0000000") in error
    assert not (place / "out").exists()
    older = str(place / "ckpt/iter_0000000")
    assert cli.main([older if flag == str(place / "ckpt") else flag for flag in flags]) == 0


@pytest.mark.parametrize("more", [[], ["--overwrite"]])
@pytest.mark.parametrize(
    ("source", "output"),
    [("llm", "llm"), ("llm", "llm/out"), ("link", "llm"), ("llm", "link/out"), ("llm", "llm/../llm")],
)
def test_an_output_in_the_source(
    source: str, output: str, more: list[str], place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (place / "link").symlink_to("llm")
    before = tree(place)
    for flags in (importing, exporting):
        error = refused(flags(place / source, f"{place}/{output}", *more), capsys)
        assert "which is read" in error or "--overwrite" in error
    with_tokenizer = ["--tokenizer", str(place / source), *more]
    assert "which is read" in refused(exporting(place / "ckpt", place / "llm/out", *with_tokenizer), capsys)
    assert "which is read" in refused(importing(place / "hf", place / "llm/out", *with_tokenizer), capsys)
    assert tree(place) == before


def test_an_output_that_holds_the_source(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.move(place / "ckpt", place / "hf/ckpt")
    before = tree(place)
    assert "hf: holds ckpt/" in refused(exporting(place / "hf/ckpt", place / "hf", "--overwrite"), capsys)
    assert "exists" in refused(exporting(place / "hf/ckpt", place / "hf"), capsys)
    shutil.move(place / "llm", place / "hf/ckpt/iter_0000000/llm")
    inside = place / "hf/ckpt/iter_0000000/llm"
    assert "is read" in refused(importing(inside, place / "hf/ckpt", "--overwrite"), capsys)
    shutil.move(inside, place / "llm")
    assert tree(place) == before


def test_an_import_beside_its_source(place: Path) -> None:
    assert cli.main(importing(place / "llm", place)) == 0
    assert cli.main(["verify", str(place / "llm"), str(place / "iter_0000000")]) == 0


@pytest.mark.parametrize("foreign", ["NOTES.txt", "deeper/x", "link"])
def test_overwrite_deletes_nothing_foreign(foreign: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for folder, flags in (
        (place / "hf", exporting(place / "ckpt", place / "hf")),
        (place / "ckpt/iter_0000000", importing(place / "llm", place / "ckpt")),
    ):
        path = folder / foreign
        path.parent.mkdir(exist_ok=True)
        path.symlink_to("nowhere") if foreign == "link" else path.write_text("mine")
        before = tree(place)
        assert foreign in refused([*flags, "--overwrite"], capsys)
        assert tree(place) == before
        path.unlink()
        assert cli.main([*flags, "--overwrite"]) == 0


@pytest.mark.parametrize("name", ["XXH128SUMS", "integrity.json"])
def test_overwrite_takes_only_what_was_written_here(name: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "llm" / "x").mkdir()
    for mark in (place / "hf/XXH128SUMS", place / "ckpt/iter_0000000/integrity.json"):
        if mark.name == name:
            mark.unlink()
    flags = (
        importing(place / "llm", place / "ckpt") if name == "integrity.json" else exporting(place / "llm", place / "hf")
    )
    before = tree(place)
    assert f"no valid {name}" in refused([*flags, "--overwrite"], capsys)
    assert tree(place) == before


def test_a_link_is_followed(place: Path) -> None:
    (place / "disk").mkdir()
    (place / "link").symlink_to("disk/empty")
    for _ in range(2):  # to nothing, and to an empty folder
        assert cli.main(exporting(place / "ckpt", place / "link")) == 0
        assert (place / "link").is_symlink()
        assert sorted(path.name for path in place.iterdir()) == ["ckpt", "disk", "hf", "link", "llm"]
        assert os.listdir(place / "disk") == ["empty"]
        shutil.rmtree(place / "disk/empty")
        (place / "disk/empty").mkdir()
    assert cli.main(importing(place / "llm", place / "link")) == 0
    assert (place / "disk/empty/iter_0000000/integrity.json").is_file()


def test_what_cannot_be_renamed_is_refused_before_any_work(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (place / "here/sub").mkdir(parents=True)
    with monkeypatch.context() as patch:
        no_work(patch)
        patch.chdir(place / "here")
        for name in (".", "sub/..", str(place / "here"), ".."):
            assert "current directory" in refused(exporting(place / "ckpt", name), capsys)
        patch.chdir(place)
        patch.setattr(os.path, "ismount", lambda path: Path(path) == place / "here/sub")
        assert "mount point" in refused(exporting(place / "ckpt", "here/sub"), capsys)
    monkeypatch.chdir(place / "here")
    assert cli.main(exporting(place / "ckpt", "sub/../sub")) == 0
    assert "# sub" in (place / "here/sub/README.md").read_text()
    assert cli.main(importing(place / "llm", ".")) == 0  # writes ./iter_0000000 and renames nothing else


@pytest.mark.parametrize("flags", [importing, exporting])
def test_names_that_cannot_be_written_are_refused_before_any_work(
    flags: Any, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    no_work(monkeypatch)
    source = place / ("llm" if flags is importing else "ckpt")
    (place / "file").write_text("")
    (place / "circle").symlink_to("circle")
    before = tree(place)
    long = "x" * (250 if flags is exporting else 300)
    for output, says in (
        (place / long, "File name too long"),
        (place / ("x" * 300) / "x", "File name too long"),
        (place / "file", "is a file"),
        (place / "file/x", "Not a directory"),
        (place / "circle", "cannot be written"),
        (place / "circle/x", "cannot be written"),
    ):
        assert says in refused(flags(source, output), capsys), output
    with monkeypatch.context() as patch:
        patch.setattr(os, "access", lambda path, _: Path(path) != place)
        assert f"nothing can be written in {place}" in refused(flags(source, place / "a/b"), capsys)
    assert tree(place) == before


@pytest.mark.parametrize("flags", [importing, exporting])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS])
def test_a_folder_that_cannot_be_begun(
    flags: Any, number: int, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    act = Path.open

    def failing(path: Path, *arguments: Any, **named: Any) -> Any:
        if path.name.endswith(".lock"):
            raise OSError(number, os.strerror(number))
        return act(path, *arguments, **named)

    monkeypatch.setattr(Path, "open", failing)
    source = place / ("llm" if flags is importing else "ckpt")
    before = sorted(place.iterdir())
    assert os.strerror(number) in refused(flags(source, place / "a/b/c"), capsys, 1)
    assert sorted(place.iterdir()) == before


def test_a_full_scratch_disk(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    publishers.write_intern_vit(place / "vit", remote=True)
    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    monkeypatch.setattr(importer, "write_tensors", None)
    act = shutil.copyfile

    def failing(source: Path, target: Path) -> Any:
        if str(target).startswith(str(tmp_path / "scratch")):
            raise OSError(errno.ENOSPC, "No space left on device", str(target))
        return act(source, target)

    monkeypatch.setattr(shutil, "copyfile", failing)
    error = refused(importing(place / "llm", place / "out", "--vision", str(place / "vit")), capsys, 1)
    assert "No space left on device" in error
    assert "TMPDIR" in error
    assert str(tmp_path / "scratch") in error
    assert not (place / "out").exists()
    assert not os.listdir(tmp_path / "scratch")


@pytest.mark.parametrize(
    ("error", "status", "says"),
    [
        (KeyboardInterrupt(), 130, "interrupted. Nothing was published"),
        (OSError(errno.EIO, "Input/output error", "/x"), 1, "'/x'"),
    ],
)
def test_no_traceback(
    error: BaseException,
    status: int,
    says: str,
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(exporter, "write_safetensors", fail)
    assert says in refused(exporting(place / "ckpt", place / "out"), capsys, status)
    assert not list(place.glob(".writing-*"))
    assert checkpoint.resolve(place / "ckpt")
