"""Conversions that are killed at chosen moments: nothing is half published, and the same command then does all of it.
And the same bytes from any number of workers."""

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
from tqdm import tqdm
from xxhash import xxh3_128

from megatron_vita.checkpoint import offline
from megatron_vita.convert import cli, safetensors_writer
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
        "write": (tqdm, "update"),
        "publish": (os, "replace"),
        "tidy": (shutil, "rmtree"),
        "end": (Path, "unlink"),
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


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return publishers.write_qwen2(tmp_path_factory.mktemp("source") / "llm")


def arguments(command: str, source: Path, checkpoint: Path, output: Path) -> list[str]:
    if command == "import":
        return ["import", "--llm", str(source), "--output", str(output)]
    flags = ["--checkpoint", str(checkpoint), "--format", "llm", "--max-shard-gb", "0.00006"]
    return ["export", *flags, "--output", str(output)]


@pytest.fixture
def checkpoint(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(offline, "_FILE_BYTES", 60_000)
    assert cli.main(["import", "--llm", str(source), "--output", str(tmp_path / "ckpt")]) == 0
    return tmp_path / "ckpt"


@pytest.mark.slow
@pytest.mark.parametrize("command", ["import", "export"])
@pytest.mark.parametrize(("moment", "count"), [("write", 0), ("write", 12), ("publish", 0)])
def test_killed_and_started_again(
    command: str, moment: str, count: int, source: Path, checkpoint: Path, tmp_path: Path
) -> None:
    places = [tmp_path / name / "out" for name in "ab"]
    killed(moment, count, arguments(command, source, checkpoint, places[1]))
    assert not (places[1] / "iter_0000000" if command == "import" else places[1]).exists()
    assert list(places[1].parent.rglob(".writing-*")), "the process was to be killed while it writes"
    for place in places:
        assert cli.main(arguments(command, source, checkpoint, place)) == 0
    assert tree(places[1].parent) == tree(places[0].parent)


MOMENTS = [("publish", 0), ("publish", 1), ("end", 0)]
"""The old folder moves away, the new one takes its name, the lock goes."""


@pytest.mark.slow
@pytest.mark.parametrize("command", ["import", "export"])
@pytest.mark.parametrize(("moment", "count"), MOMENTS)
def test_killed_while_it_replaces(command: str, moment: str, count: int, tmp_path: Path) -> None:
    old, new = (publishers.write_qwen2(tmp_path / name, seed=seed) for name, seed in (("old", 21), ("new", 22)))
    places = [tmp_path / name / "out" for name in "ab"]
    for place in places:
        assert cli.main(arguments(command, old, old, place)) == 0
    flags = [[*arguments(command, new, new, place), "--overwrite"] for place in places]
    killed(moment, count, flags[1])
    final = places[1] / ("iter_0000000" if command == "import" else "")
    assert final.is_dir() or (final.parent / f".replaced-{final.name}").is_dir()
    for one in flags:
        assert cli.main(one) == 0
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


def test_what_another_command_has_left_beside_is_let_alone(source: Path, checkpoint: Path, tmp_path: Path) -> None:
    killed("write", 3, arguments("export", source, checkpoint, tmp_path / "b" / "first"))
    left = tree(tmp_path / "b")
    assert left
    assert cli.main(arguments("export", source, checkpoint, tmp_path / "b" / "second")) == 0
    assert left.items() <= tree(tmp_path / "b").items()
    assert cli.main(arguments("export", source, checkpoint, tmp_path / "b" / "first")) == 0
    assert not list((tmp_path / "b").glob(".writing-*"))


@pytest.mark.parametrize("command", ["import", "export"])
def test_any_number_of_workers_writes_the_same_bytes(
    command: str, source: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(safetensors_writer, "_BLOCK_BYTES", 1000)
    trees = []
    for workers in ("1", "2", "5"):
        output = tmp_path / workers / "out"
        output.parent.mkdir()
        flags = arguments(command, source, checkpoint, output)
        assert cli.main([*flags, "--workers", workers]) == 0
        trees.append(tree(output))
    assert trees[0] == trees[1] == trees[2]
    assert len([name for name in trees[0] if name.endswith((".distcp", ".safetensors"))]) > 3


@pytest.mark.parametrize(
    ("command", "name"), [("import", "out/.writing-iter_0000000.lock"), ("export", ".writing-out.lock")]
)
def test_two_processes_do_not_write_one_folder(
    command: str, name: str, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").mkdir()
    flags = arguments(command, source, source, tmp_path / "out")
    with (tmp_path / name).open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert cli.main(flags) == 2
    assert "another process is writing it" in capsys.readouterr().err
    assert cli.main(flags) == 0  # the lock of a process that was killed is nobody's
    assert not list(tmp_path.rglob("*.lock"))


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
