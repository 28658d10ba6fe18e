"""A run that is killed at any moment goes on with --resume; a mix that grows costs only what is new."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_vita.data.compile import inputs
from megatron_vita.data.compile import run as preprocess
from megatron_vita.data.compile.record import Compiler
from megatron_vita.data.compile.run import Options, run
from megatron_vita.data.media.video.open import decoder_name
from megatron_vita.data.shards.reader import ShardSet
from megatron_vita.data.shards.writer import plan
from megatron_vita.data.spec import PreprocessSpec
from megatron_vita.errors import ConfigError, DataError
from tests.data.kit import picture, tokenizer_folder

SPEC = PreprocessSpec(image_size=16, patch_size=4, max_tiles=4, max_frames=4)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures, frames of videos (in the intermediate shards), text, and a few bad records."""
    root = tmp_path_factory.mktemp("world")
    tokenizer_folder(root / "tok")
    (root / "clip").mkdir()
    for number in range(14):
        (root / f"{number}.png").write_bytes(picture(16 + number, 24, seed=number))
        (root / f"clip/{number}.png").write_bytes(picture(16, 16, seed=number))
    (root / "cut.png").write_bytes(picture(20, 20)[:-9])
    turns = [{"from": "human", "value": "<image>\nWhich"}, {"from": "gpt", "value": "\nseven"}]
    images = [{"image": f"{n}.png", "conversations": turns} for n in range(14)]
    images.insert(5, {"image": "cut.png", "conversations": turns})
    said = [{"role": "user", "content": "<video>\nWhich"}, {"role": "assistant", "content": "three"}]
    files = {
        "images": images,
        "videos": [{"messages": said, "videos": ["clip"]}] * 3,
        "texts": [{"text": f"Some words, number {n}. " * (1 + n % 5)} for n in range(20)],
    }
    for name, records in files.items():
        (root / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    write_mix(root, "mix", images={}, videos={}, texts={"ratio": 0.7})
    write_mix(root, "small", images={"num": 9}, texts={"ratio": 0.3})
    return root


def write_mix(root: Path, name: str, **groups: dict[str, Any]) -> None:
    dataset = {
        key: {"data_paths": [str(root / f"{key}.jsonl")], "media_root": str(root), **group}
        for key, group in groups.items()
    }
    (root / f"{name}.yaml").write_text(json.dumps({"dataset": dataset}))


def options(world: Path, prefix: Path, mix: str = "mix", **changes: Any) -> Options:
    given = {"data_config": str(world / f"{mix}.yaml"), "tokenizer": str(world / "tok"), "output": str(prefix)}
    return Options(**{**given, "seq_length": 160, "spec": SPEC, "progress": False, **changes})


def content(prefix: Path) -> dict[str, bytes]:
    return {path.name.removeprefix(prefix.name): path.read_bytes() for path in prefix.parent.glob(f"{prefix.name}.*")}


@pytest.fixture(scope="module")
def whole(world: Path) -> dict[str, bytes]:
    """The set of a run that nobody disturbed, in one range of packs and with chunks of usual size."""
    run(options(world, world / "whole" / "set"))
    return content(world / "whole" / "set")


@pytest.fixture(autouse=True)
def _small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preprocess, "CHUNK", 4)
    monkeypatch.setattr(plan, "RANGE_BYTES", 3000)


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """(file, line) of every record that is compiled in this process."""
    seen: list[tuple[str, int]] = []
    original = Compiler.compile

    def compile_and_count(self: Compiler, record: Any, file: Any, line: int) -> Any:
        seen.append((file.name, line))
        return original(self, record, file, line)

    monkeypatch.setattr(Compiler, "compile", compile_and_count)
    return seen


def kill(
    world: Path, prefix: Path, place: str, count: int, when: str, *, mix: str = "mix", resume: bool = False
) -> None:
    """Run in a process of its own, which is killed at the n-th call of a function."""
    killed(lambda: run(options(world, prefix, mix, resume=resume)), place, count, when)


def killed(work: Callable[[], object], place: str, count: int, when: str) -> None:
    """Do something in a process of its own, which is killed at the n-th call of a function."""
    process = os.fork()
    if not process:
        try:
            _die_at(place, count, when)
            work()
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == -signal.SIGKILL


def _die_at(place: str, count: int, when: str) -> None:
    module, _, path = place.partition(":")
    *owners, name = path.split(".")
    target: Any = importlib.import_module(module)
    for owner in owners:
        target = getattr(target, owner)
    original, calls = getattr(target, name), 0

    def replaced(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == count and when == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        result = original(*args, **kwargs)
        if calls == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(target, name, replaced)


DATA = "megatron_vita.data"
PLACES = [
    (f"{DATA}.compile.record:Compiler.compile", 1, "before"),
    (f"{DATA}.compile.record:Compiler.compile", 10, "after"),
    (f"{DATA}.shards.writer.intermediate:ChunkWriter.publish", 1, "after"),
    (f"{DATA}.shards.writer.intermediate:ChunkWriter.publish", 5, "before"),
    (f"{DATA}.shards.writer.plan:EntryTable.shuffled", 1, "before"),
    (f"{DATA}.shards.writer.plan:EntryTable._finish", 1, "after"),
    (f"{DATA}.shards.writer.packs:IndexFile.create", 2, "before"),
    (f"{DATA}.shards.writer.packs:PackWriter._tiles", 1, "before"),
    (f"{DATA}.shards.writer.packs:PackWriter.write", 3, "after"),
    (f"{DATA}.shards.writer.publish:_counted", 1, "after"),
    (f"{DATA}.shards.writer.publish:publish", 1, "before"),
    (f"{DATA}.shards.writer.publish:_place", 1, "before"),
    (f"{DATA}.shards.writer.publish:_place", 6, "after"),
    (f"{DATA}.shards.writer.publish:write_atomic", 2, "before"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("place", "count", "when"), PLACES, ids=lambda value: str(value).rpartition(":")[2])
def test_a_killed_run_goes_on_and_writes_the_same_bytes(
    world: Path,
    whole: dict[str, bytes],
    compiled: list[tuple[str, int]],
    tmp_path: Path,
    place: str,
    count: int,
    when: str,
) -> None:
    prefix = tmp_path / "set"
    kill(world, prefix, place, count, when)
    kept = [int(path.name) for path in tmp_path.glob(".set.work/intermediate/*/*") if path.suffix != ".partial"]
    # what was being compiled gets a process of its own, in case that it was the cause
    elsewhere = {int(path.name) for path in tmp_path.glob(".set.work/active/*")} - set(kept)
    manifest = run(options(world, prefix, resume=True))
    assert content(prefix) == whole
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(f"set{suffix}" for suffix in whole)
    sizes = [min(4, source.read - start) for source in manifest.sources for start in range(0, source.read, 4)]
    assert len(compiled) == sum(sizes) - sum(sizes[number] for number in {*kept, *elsewhere})
    assert bool(kept) == ("Compiler" not in place or count > 4)


@pytest.mark.slow
def test_killed_again_and_again_with_two_processes(world: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    prefix = tmp_path / "set"
    for count, place in enumerate(
        [f"{DATA}.compile.record:Compiler.compile"] * 2 + [f"{DATA}.shards.writer.packs:PackWriter.write"] * 2
    ):
        kill(world, prefix, place, 4 - count % 2, "before", resume=True)
    run(options(world, prefix, resume=True, workers=2))
    assert content(prefix) == whole


@pytest.mark.slow
def test_what_a_killed_run_left_is_started_over_without_resume_and_for_other_inputs(
    world: Path, whole: dict[str, bytes], compiled: list[tuple[str, int]], tmp_path: Path
) -> None:
    prefix = tmp_path / "set"
    for changes in ({}, {"resume": True}):
        kill(
            world,
            prefix,
            f"{DATA}.shards.writer.packs:PackWriter.write",
            2,
            "before",
            mix="mix" if not changes else "small",
        )
        compiled.clear()
        manifest = run(options(world, prefix, **changes))
        assert len(compiled) == manifest.totals["read"]
        assert content(prefix) == whole
        prefix = tmp_path / "other"


def test_two_runs_cannot_write_one_set(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def again(*_: object) -> None:
        run(options(world, tmp_path / "set"))

    monkeypatch.setattr(preprocess, "_chunks", again)
    with pytest.raises(ConfigError, match="another run is writing"):
        run(options(world, tmp_path / "set"))


@pytest.mark.slow
def test_a_picture_that_changes_between_the_phases_is_named(world: Path, tmp_path: Path) -> None:
    folder = tmp_path / "media"
    folder.mkdir()
    for path in (*world.glob("*.png"), *world.glob("*.jsonl")):
        shutil.copy(path, folder)
    write_mix(folder, "mix", images={})
    shutil.copytree(world / "tok", folder / "tok")
    kill(folder, tmp_path / "set", f"{DATA}.shards.writer.packs:PackWriter.write", 1, "before")
    changed = bytearray((folder / "3.png").read_bytes())
    changed[-30] ^= 1
    (folder / "3.png").write_bytes(changed)
    with pytest.raises(DataError, match=r"3\.png has changed since"):
        run(options(folder, tmp_path / "set", resume=True))
    assert not (tmp_path / "set.json").exists()
    assert run(options(folder, tmp_path / "set", verify_media="structure")).totals["samples"] == 13  # and it is broken


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("size", [300, 3_000])
def test_a_full_disk_is_named_and_the_run_goes_on(
    world: Path, whole: dict[str, bytes], tmp_path: Path, size: int, workers: int
) -> None:
    prefix = tmp_path / "set"
    script = (
        "import resource, sys; sys.path.insert(0, '.'); from tests.data.compile.test_resume import *; "
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({size}, -1)); "
        "prefix, world = map(Path, sys.argv[1:]); "
        f"run(options(world, prefix, workers={workers}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(prefix), str(world)], capture_output=True, text=True, timeout=120,
        cwd=Path(__file__).parents[3],
    )  # fmt: skip
    wanted = f"DataError: --output {prefix}: cannot be written (File too large). Make room and go on with --resume."
    assert done.stderr.splitlines()[-1].endswith(wanted), done.stderr
    assert [path.name for path in tmp_path.iterdir()] == [".set.work"]
    run(options(world, prefix, resume=True))
    assert content(prefix) == whole


# ------------------------------------------------------------------------------------------------ a mix that grows


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_a_mix_that_grows_compiles_only_what_is_new(
    world: Path, whole: dict[str, bytes], compiled: list[tuple[str, int]], tmp_path: Path, workers: int
) -> None:
    prefix = tmp_path / "set"
    old = run(options(world, prefix, "small"))
    taken = {(old.sources[int(row["source"])].name, int(row["line"])) for row in ShardSet(prefix).samples}
    compiled.clear()
    new = run(options(world, prefix, resume=True, workers=workers))
    assert content(prefix) == whole
    assert (new.totals["cleaned"], old.totals["cleaned"]) == (14, sum(name == "images" for name, _ in taken))
    if workers == 1:
        wanted = {(new.sources[int(row["source"])].name, int(row["line"])) for row in ShardSet(prefix).samples}
        assert set(compiled) == (wanted - taken) | {("images", 6)}  # what was rejected is tried again
        assert len(compiled) == len(set(compiled))


@pytest.mark.slow
def test_other_settings_and_changed_files_take_nothing_from_the_old_set(
    world: Path, compiled: list[tuple[str, int]], tmp_path: Path
) -> None:
    prefix = tmp_path / "set"
    run(options(world, prefix, "small"))
    (tmp_path / "elsewhere").mkdir()
    for picture_file in world.glob("*.png"):
        shutil.copy(picture_file, tmp_path / "elsewhere")
    write_mix(world, "moved", images={"media_root": str(tmp_path / "elsewhere")})
    settings = ({"overlong": "truncate"}, {"seq_length": 161}, {"media": "reference"}, {"mix": "moved"})
    for changes in settings:
        compiled.clear()
        manifest = run(options(world, prefix, resume=True, **changes))
        assert len(compiled) == manifest.totals["read"]


@pytest.mark.slow
def test_the_old_set_stays_whole_until_the_new_one_is_there(
    world: Path, whole: dict[str, bytes], compiled: list[tuple[str, int]], tmp_path: Path
) -> None:
    prefix = tmp_path / "set"
    run(options(world, prefix, "small"))
    before = content(prefix)
    for place in (
        f"{DATA}.shards.writer.intermediate:ChunkWriter.publish",
        f"{DATA}.shards.writer.packs:PackWriter.write",
    ):
        kill(world, prefix, place, 2, "after", resume=True)
        assert content(prefix) == before
        ShardSet(prefix).verify()
    kill(world, prefix, f"{DATA}.shards.writer.publish:_place", 3, "after", resume=True)
    compiled.clear()
    run(options(world, prefix, resume=True))
    assert not compiled
    assert content(prefix) == whole


@pytest.mark.slow
@pytest.mark.parametrize("suffix", ["tokens.bin", "labels.bin", "media.bin"])
def test_a_damaged_old_set_is_not_taken_over(world: Path, whole: dict[str, bytes], tmp_path: Path, suffix: str) -> None:
    prefix = tmp_path / "set"
    run(options(world, prefix, "small"))
    path = Path(f"{prefix}.{suffix}")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)
    with pytest.raises(DataError, match=rf"set\.{suffix} is damaged"):
        run(options(world, prefix, resume=True))
    run(options(world, prefix))
    assert content(prefix) == whole


@pytest.mark.slow
def test_nothing_is_taken_from_a_set_that_another_decoder_made(
    world: Path, tmp_path: Path, compiled: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    prefix = tmp_path / "set"
    given = options(world, prefix, "small", resume=True)
    assert run(given).video["decoder"] == decoder_name("auto")
    first = list(compiled)
    run(given)
    assert compiled == first  # the same decoder: kept
    monkeypatch.setattr(inputs, "decoder_name", lambda backend: "pyav 99.0")
    assert run(given).video["decoder"] == "pyav 99.0"
    assert compiled == [*first, *first]
    if importlib.util.find_spec("decord"):
        monkeypatch.undo()
        assert (
            run(options(world, prefix, "small", resume=True, video_backend="decord")).video["decoder"][:7] == "decord "
        )
        assert run(given).video["decoder"] == decoder_name("auto")


def test_a_decoder_that_is_not_known_is_refused(world: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--video-backend opencv: choose one of auto, pyav, decord"):
        options(world, tmp_path / "set", video_backend="opencv")
