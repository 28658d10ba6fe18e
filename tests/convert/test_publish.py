"""Conversions that are killed at chosen moments and started again; and the same bytes from any number of workers."""

from __future__ import annotations

import fcntl
import hashlib
import json
import multiprocessing
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from xxhash import xxh3_128

from megatron_vita.checkpoint import journal, streaming
from megatron_vita.convert import cli
from tests.convert import publishers

pytest.importorskip("transformers")


def killed(moment: str, count: int, flags: list[str]) -> None:
    """Run the command in a forked process that is killed when it does something for the `count + 1`th time."""
    process = multiprocessing.get_context("fork").Process(target=_die_at, args=(moment, count, flags))
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL


def _die_at(moment: str, count: int, flags: list[str]) -> None:
    owner, name = {
        "write": (os, "pwritev"),
        "note": (journal.Journal, "add"),
        "publish": (os, "replace"),
        "tidy": (shutil, "rmtree"),
        "end": (journal.Journal, "__exit__"),
    }[moment]
    act, left = getattr(owner, name), [count]

    def hooked(*args: Any, **kwargs: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return act(*args, **kwargs)

    setattr(owner, name, hooked)
    torch.set_num_threads(1)  # the teams of threads of the parent are not there
    os._exit(cli.main(flags))


def tree(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below a folder, hidden ones too."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def places(folder: Path) -> dict[str, tuple[int, int]]:
    """Inode and time of change of every file: those that were not written again keep both."""
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.iterdir() if path.is_file()}


def finished_files(parent: Path) -> dict[str, tuple[int, int]]:
    """The same of those files that a killed conversion below has noted as finished."""
    (noted,) = parent.rglob(".writing-*.journal")
    lines = [json.loads(line) for line in noted.read_text().splitlines()[1:]]
    found = places(noted.with_suffix(""))
    return {one["file"]: found[one["file"]] for one in lines if "file" in one}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return publishers.write_qwen2(tmp_path_factory.mktemp("source") / "llm")


@pytest.fixture
def small_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "FILE_BYTES", 60_000)


def arguments(command: str, source: Path, checkpoint: Path, output: Path, model: Path | None = None) -> list[str]:
    """`model`: what is exported, instead of the checkpoint."""
    if command == "import":
        return ["import", "--llm", str(source), "--output", str(output)]
    flags = ["--checkpoint", str(model or checkpoint), "--format", "llm", "--max-shard-gb", "0.00006"]
    return ["export", *flags, "--output", str(output)]


@pytest.fixture
def checkpoint(source: Path, tmp_path: Path, small_files: None) -> Path:
    assert cli.main(["import", "--llm", str(source), "--output", str(tmp_path / "ckpt")]) == 0
    return tmp_path / "ckpt"


@pytest.mark.slow
@pytest.mark.parametrize("command", ["import", "export"])
@pytest.mark.parametrize("workers", [[], ["--workers", "1"]], ids=["all cores", "one worker"])
@pytest.mark.parametrize(("moment", "count"), [("write", 0), ("write", 25), ("note", 0), ("note", 3), ("publish", 0)])
def test_killed_and_started_again(
    command: str,
    moment: str,
    count: int,
    workers: list[str],
    source: Path,
    checkpoint: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    output = tmp_path / "b" / "out"
    flags = [*arguments(command, source, checkpoint, output), *workers]
    killed(moment, count, flags)
    final = output / "iter_0000000" if command == "import" else output
    assert not final.exists()
    finished = finished_files(tmp_path / "b")
    assert cli.main(flags) == 0
    kept = capfd.readouterr().err.count("is kept")
    assert (kept > 0) == (count > 0 or moment == "publish"), kept
    assert kept == len(finished)
    assert finished.items() <= places(final).items(), "a finished file was written again"
    assert cli.main(arguments(command, source, checkpoint, tmp_path / "a" / "out")) == 0
    assert tree(tmp_path / "b") == tree(tmp_path / "a")


REPLACING = {
    "import": [("publish", 0), ("publish", 1), ("tidy", 0), ("publish", 2), ("end", 0)],
    "export": [("publish", 0), ("publish", 1), ("tidy", 0), ("end", 0)],
}
"""The old folder moves away, the new one takes its name, the old one is deleted, (the hint follows,) the journal too.
"""


@pytest.mark.slow
@pytest.mark.parametrize(("command", "moment", "count"), [(one, *two) for one in REPLACING for two in REPLACING[one]])
def test_killed_while_it_replaces(
    command: str, moment: str, count: int, checkpoint: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    old, new = (publishers.write_qwen2(tmp_path / name, seed=seed) for name, seed in (("old", 21), ("new", 22)))
    places = [tmp_path / name / "out" for name in "ab"]
    for place in places:
        assert cli.main(arguments(command, old, checkpoint, place, model=old)) == 0
    flags = [arguments(command, new, checkpoint, place, model=new) for place in places]
    killed(moment, count, [*flags[1], "--overwrite"])
    final = places[1] / ("iter_0000000" if command == "import" else "")
    moved = final.parent / f".replaced-{final.name}"
    assert final.is_dir() or moved.is_dir()
    assert cli.main([*flags[1], "--overwrite"]) == 0
    done = (moment, count) not in (("publish", 0), ("publish", 1))
    assert (capfd.readouterr().err.count("is kept") == 0) == done  # nothing is written that has its name already
    assert cli.main([*flags[0], "--overwrite"]) == 0
    assert tree(places[1].parent) == tree(places[0].parent)


@pytest.mark.parametrize("command", ["import", "export"])
def test_a_folder_that_a_killed_process_has_moved_away_is_not_replaced_unasked(
    command: str, source: Path, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "b" / "out"
    flags = arguments(command, source, checkpoint, output)
    assert cli.main(flags) == 0
    before = tree(output)
    killed("publish", 1, [*flags, "--overwrite"])
    assert cli.main(flags) == 2
    assert "moved away" in capsys.readouterr().err
    assert cli.main([*flags, "--overwrite"]) == 0
    assert tree(output) == before


@pytest.mark.slow
@pytest.mark.parametrize("other", [False, True])
@pytest.mark.parametrize(
    ("command", "moment", "count"), [("import", "publish", 1), *[(one, "end", 0) for one in REPLACING]]
)
def test_killed_when_the_folder_has_its_name(
    command: str, moment: str, count: int, other: bool, source: Path, checkpoint: Path, tmp_path: Path
) -> None:
    places = [tmp_path / name / "out" for name in "ab"]
    flags = [arguments(command, source, checkpoint, place) for place in places]
    killed(moment, count, flags[1])
    if other:  # another command tidies, too, but does not take the folder for its own
        model = publishers.write_qwen2(tmp_path / "other", seed=9)
        assert cli.main(arguments(command, model, checkpoint, places[1], model=model)) == 2
    else:
        assert cli.main(flags[1]) == 0
    assert cli.main(flags[1]) == 2
    assert cli.main(flags[0]) == 0
    assert tree(places[1].parent) == tree(places[0].parent)


@pytest.mark.parametrize("command", ["import", "export"])
def test_to_finish_takes_no_room(
    command: str, source: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = arguments(command, source, checkpoint, tmp_path / "b" / "out")
    killed("end", 0, flags)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1000, 1000, 0))  # type: ignore[attr-defined]
    assert cli.main(flags) == 0


@pytest.mark.slow
@pytest.mark.parametrize("command", ["import", "export"])
def test_a_folder_with_another_tokenizer_is_another_one(
    command: str, source: Path, checkpoint: Path, tmp_path: Path
) -> None:
    flags = arguments(command, source, checkpoint, tmp_path / "b" / "out")
    killed("end", 0, flags)
    tokenizer = publishers.write_qwen2(tmp_path / "tokenizer")
    content = json.loads((tokenizer / "tokenizer_config.json").read_text())
    (tokenizer / "tokenizer_config.json").write_text(json.dumps({**content, "model_max_length": 77}))
    assert cli.main([*flags, "--tokenizer", str(tokenizer)]) == 2
    killed("end", 0, [*flags, "--overwrite"])
    assert cli.main([*flags, "--overwrite", "--tokenizer", str(tokenizer)]) == 0
    assert "77" in next((tmp_path / "b").rglob("tokenizer_config.json")).read_text()


def test_a_changed_source_is_not_continued(
    source: Path, checkpoint: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    flags = arguments("import", source, checkpoint, tmp_path / "b")
    killed("note", 3, flags)
    assert (tmp_path / "b" / ".writing-iter_0000000.journal").is_file()
    publishers.write_qwen2(tmp_path / "other", seed=8)
    flags = arguments("import", tmp_path / "other", checkpoint, tmp_path / "b")
    assert cli.main(flags) == 0
    assert "is kept" not in capfd.readouterr().err
    assert cli.main(["verify", str(tmp_path / "other"), str(tmp_path / "b")]) == 0
    assert not list((tmp_path / "b").glob(".writing-*"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "more"),
    [
        ("import", ["--seed", "7"]),
        ("export", ["--dtype", "bfloat16"]),
        ("export", ["--max-shard-gb", "0.00005"]),
        ("export", ["--make-vocab-size-divisible-by", "8"]),
    ],
)
def test_other_settings_are_not_continued(
    command: str, more: list[str], source: Path, checkpoint: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "b").mkdir()
    flags = arguments(command, source, checkpoint, tmp_path / "b" / "out")
    killed("note", 3, flags)
    assert finished_files(tmp_path / "b")
    assert cli.main([*flags, *more]) == 0
    assert "is kept" not in capfd.readouterr().err
    assert not list((tmp_path / "b").rglob(".writing-*"))
    (tmp_path / "a").mkdir()
    assert cli.main([*arguments(command, source, checkpoint, tmp_path / "a" / "out"), *more]) == 0
    assert tree(tmp_path / "b") == tree(tmp_path / "a")


@pytest.mark.parametrize("command", ["import", "export"])
def test_what_another_release_has_written_is_not_continued(
    command: str,
    source: Path,
    checkpoint: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It may have had a defect in what it wrote."""
    flags = arguments(command, source, checkpoint, tmp_path / "b" / "out")
    killed("publish", 0, flags)
    monkeypatch.setattr(journal, "__version__", "another")
    assert cli.main(flags) == 0
    assert "is kept" not in capfd.readouterr().err


def test_what_another_command_has_left_beside_is_let_alone(source: Path, checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    killed("note", 3, arguments("export", source, checkpoint, tmp_path / "b" / "first"))
    left = tree(tmp_path / "b")
    assert cli.main(arguments("export", source, checkpoint, tmp_path / "b" / "second")) == 0
    assert left.items() <= tree(tmp_path / "b").items()
    assert cli.main(arguments("export", source, checkpoint, tmp_path / "b" / "first")) == 0
    assert not list((tmp_path / "b").glob(".writing-*"))


@pytest.mark.parametrize("command", ["import", "export"])
def test_a_finished_file_that_was_changed_is_written_again(
    command: str, source: Path, checkpoint: Path, tmp_path: Path
) -> None:
    output = tmp_path / "b" / "out"
    output.parent.mkdir()
    flags = arguments(command, source, checkpoint, output)
    killed("note", 3, flags)
    staging = next(path for path in (tmp_path / "b").rglob(".writing-*") if path.is_dir())
    first = staging / min(finished_files(tmp_path / "b"))
    content = bytearray(first.read_bytes())
    content[len(content) // 2] ^= 1
    first.write_bytes(content)
    assert cli.main(flags) == 0
    assert cli.main(["verify", str(source), str(output)]) == 0


@pytest.mark.parametrize("command", ["import", "export"])
def test_any_number_of_workers_writes_the_same_bytes(
    command: str, source: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streaming, "BLOCK_BYTES", 1000)
    trees = []
    for workers in ("1", "2", "5"):
        output = tmp_path / workers / "out"
        output.parent.mkdir()
        flags = arguments(command, source, checkpoint, output)
        assert cli.main([*flags, "--workers", workers]) == 0
        trees.append(tree(output))
    assert trees[0] == trees[1] == trees[2]
    assert len([name for name in trees[0] if name.endswith((".distcp", ".safetensors"))]) > 3


def test_two_processes_do_not_write_one_folder(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:

    (tmp_path / "b").mkdir()
    with (tmp_path / "b" / ".writing-iter_0000000.journal").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert cli.main(["import", "--llm", str(source), "--output", str(tmp_path / "b")]) == 2
    assert "another process is writing it" in capsys.readouterr().err


def test_the_lock_of_a_journal_that_was_just_deleted_is_none(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lock, path = fcntl.flock, tmp_path / "b" / ".writing-iter_0000000.journal"

    def late(file: Any, how: int) -> None:
        path.unlink()  # the other process ends between our open and our lock
        lock(file, how)

    monkeypatch.setattr(fcntl, "flock", late)
    assert cli.main(["import", "--llm", str(source), "--output", str(tmp_path / "b")]) == 2
    assert "another process is writing it" in capsys.readouterr().err


def test_the_report_names_what_became_of_every_tensor(source: Path, checkpoint: Path, tmp_path: Path) -> None:
    report = json.loads((checkpoint / "iter_0000000" / "conversion.json").read_text())
    stored = publishers.tensors_of(source)
    total = sum(one.nbytes for one in stored.values())
    assert report["source"] == {"tensors": len(stored), "bytes": total, "used_bytes": total}
    parts = [name for names in report["tensors"].values() for name in names]
    assert sorted(parts) == sorted(stored)
    assert report["tensors"]["language_model.decoder.layers.0.self_attention.linear_qkv.bias"] == [
        f"model.layers.0.self_attn.{part}_proj.bias" for part in "qkv"
    ]
    assert report["left_out"] == report["made_up"] == {}


def test_digests_of_an_exported_folder_check(source: Path, checkpoint: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    assert cli.main(arguments("export", source, checkpoint, output)) == 0
    listed = dict(line.split("  ")[::-1] for line in (output / "XXH128SUMS").read_text().splitlines())
    others = [path for path in output.iterdir() if path.name != "XXH128SUMS"]
    assert listed == {path.name: xxh3_128(path.read_bytes()).hexdigest() for path in others}
