"""Which checkpoint a path means, and folders that are replaced by a process that is killed at every moment of it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_vita.checkpoint import folder as folders
from megatron_vita.checkpoint.integrity import write_integrity
from megatron_vita.checkpoint.retention import prune
from megatron_vita.errors import CheckpointError


def write_step(root: Path, iteration: int, content: str = "weights") -> Path:
    """A finished checkpoint as far as folders go."""
    return _filled(folders.step_folder(root, iteration), content)


def _filled(folder: Path, content: str) -> Path:
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(content)
    write_integrity(folder, {})
    return folder


def test_the_newest_finished_step_is_meant(tmp_path: Path) -> None:
    old, new = write_step(tmp_path, 2), write_step(tmp_path, 10)
    folders.step_folder(tmp_path, 11).mkdir()  # no integrity.json: it does not exist
    assert folders.finished(tmp_path) == [new, old]
    assert folders.resolve(tmp_path) == folders.latest(tmp_path) == new
    assert folders.resolve(old) == old


@pytest.mark.parametrize("name", ["run.json", "integrity.json"])
def test_a_damaged_newest_step_is_refused_by_name_and_passed_over_only_by_training(tmp_path: Path, name: str) -> None:
    oldest, old, new = (write_step(tmp_path, step) for step in (1, 2, 3))
    for folder in (old, new):
        (folder / name).write_bytes((folder / name).read_bytes()[:-3])
    with pytest.raises(CheckpointError, match=rf"{new / name}: .* intact one is {oldest}"):
        folders.resolve(tmp_path)
    assert folders.latest(tmp_path) == oldest
    shutil.rmtree(oldest)
    with pytest.raises(CheckpointError, match=rf"{new / name}: "):
        folders.resolve(tmp_path)


def test_a_step_that_is_set_aside_is_a_step_no_more_and_takes_no_other_folders_name(tmp_path: Path) -> None:
    old = write_step(tmp_path, 1)
    for name in ("iter_0000002.damaged", "iter_0000002.damaged.2"):
        new = write_step(tmp_path, 2)
        assert folders.set_aside(new) == tmp_path / name
        assert (tmp_path / name / "run.json").read_text() == "weights"
    assert folders.steps(tmp_path) == [old]


class Killed(BaseException):
    """What no handler of errors catches."""


def die_at(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """From the `count + 1`th change of a folder's entries on every further one fails: a killed process makes none."""
    left = [count]

    def hooked(act: Callable[..., Any]) -> Callable[..., Any]:
        def change(*args: Any, **kwargs: Any) -> Any:
            left[0] -= 1
            if left[0] < 0:
                raise Killed
            return act(*args, **kwargs)

        return change

    for owner, name in ((os, "replace"), (shutil, "rmtree"), (Path, "write_bytes")):
        monkeypatch.setattr(owner, name, hooked(getattr(owner, name)))


@pytest.mark.parametrize("count", range(6))
def test_a_replaced_step_is_never_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    write_step(tmp_path, 3, "old")
    with monkeypatch.context() as patch:
        _filled(folders.staging_folder(tmp_path, 3), "new")
        die_at(patch, count)
        try:
            folders.publish(tmp_path, 3)
        except Killed:
            pass
        else:
            assert count == 5  # two renames, the old folder's end, the hint's text and its name
    folders.start_staging(tmp_path, 4)
    assert folders.resolve(tmp_path) == folders.step_folder(tmp_path, 3)
    assert (folders.step_folder(tmp_path, 3) / "run.json").read_text() == ("old" if count < 2 else "new")
    assert not list(tmp_path.glob(".replaced-*"))


def test_what_cannot_take_the_place_leaves_the_old_folder_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    final = write_step(tmp_path, 3, "old")
    staging = _filled(tmp_path / ".writing-iter_0000003", "new")
    act = os.replace

    def failing(source: Path, target: Path) -> None:
        if Path(source) == staging:
            raise OSError("no")
        act(source, target)

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(OSError, match="no"):
        folders.take_place(staging, final)
    assert (final / "run.json").read_text() == "old"


def test_a_hugging_face_folder_is_told_from_an_empty_one(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no finished checkpoint") as empty:
        folders.resolve(tmp_path)
    assert "import" not in str(empty.value)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"is a Hugging Face folder.*tools/convert_ckpt.py import"):
        folders.resolve(tmp_path)


@pytest.mark.parametrize(
    ("keep_last", "keep_every", "verified", "left"),
    [
        (0, 0, 70, {10, 20, 30, 40, 50, 60, 70}),
        (3, 0, 70, {50, 60, 70}),
        (2, 30, 70, {30, 60, 70}),
        (1, 0, 30, {30, 70}),  # newer ones may be damaged
        (9, 0, 70, {10, 20, 30, 40, 50, 60, 70}),
    ],
)
def test_older_steps_go_and_the_newest_verified_one_never(
    tmp_path: Path, keep_last: int, keep_every: int, verified: int, left: set[int]
) -> None:
    for step in range(10, 80, 10):
        write_step(tmp_path, step)
    aside = folders.set_aside(write_step(tmp_path, 5))
    prune(tmp_path, keep_last=keep_last, keep_every=keep_every, verified=verified)
    assert {int(step.name[5:]) for step in folders.steps(tmp_path)} == left
    assert aside.is_dir()


@pytest.mark.parametrize("count", range(3))
def test_a_deletion_that_is_killed_leaves_no_half_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    old, new = write_step(tmp_path, 1), write_step(tmp_path, 2)
    with monkeypatch.context() as patch:
        die_at(patch, count)
        try:
            prune(tmp_path, keep_last=1, keep_every=0, verified=2)
        except Killed:
            pass
        else:
            assert count == 2  # a rename, and the end of what was renamed
    assert folders.steps(tmp_path) == ([new] if count else [new, old])
    folders.start_staging(tmp_path, 3)
    assert not list(tmp_path.glob(".deleting-*"))


def test_what_cannot_be_deleted_is_left_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    old, new = write_step(tmp_path, 1), write_step(tmp_path, 2)

    def refused(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "replace", refused)
    prune(tmp_path, keep_last=1, keep_every=0, verified=2)
    assert folders.steps(tmp_path) == [new, old]
    assert f"{old}: could not be deleted" in caplog.text


@pytest.mark.parametrize(
    ("given", "name"), [("my.json", "tokenizer.json"), ("spm.model", "tokenizer.model"), ("vocab", "tokenizer.model")]
)
def test_a_tokenizer_that_is_one_file_is_copied(tmp_path: Path, given: str, name: str) -> None:
    (tmp_path / given).write_text("words")
    (tmp_path / "step").mkdir()
    folders.copy_tokenizer(tmp_path / given, tmp_path / "step")
    assert {path.name: path.read_text() for path in (tmp_path / "step/tokenizer").iterdir()} == {name: "words"}
