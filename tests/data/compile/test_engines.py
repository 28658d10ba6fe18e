"""Who does the work does not matter, and neither does one who dies of it."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from megatron_vita.data.compile import run as preprocess
from megatron_vita.data.compile.engines import Executor, InProcess, LocalExecutor, RayExecutor, open_executor
from megatron_vita.data.compile.job import ChunkJob, ChunkTask
from megatron_vita.data.compile.record import Compiler
from megatron_vita.data.compile.run import Options, run
from megatron_vita.data.shards.writer.packs import PackJob
from megatron_vita.data.spec import PreprocessSpec
from megatron_vita.errors import ConfigError, DataError
from tests.data.kit import picture, tokenizer_folder

SPEC = PreprocessSpec(image_size=16, patch_size=4, max_tiles=4)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("world")
    tokenizer_folder(root / "tok")
    turns = [{"from": "human", "value": "<image>\nWhich"}, {"from": "gpt", "value": "seven"}]
    records = []
    for number in range(1, 25):
        (root / f"{number}.png").write_bytes(picture(16, 16, seed=number))
        records.append({"image": f"{number}.png", "conversations": turns})
    (root / "images.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    group = {"data_paths": [str(root / "images.jsonl")], "media_root": str(root)}
    (root / "mix.yaml").write_text(json.dumps({"dataset": {"images": group}}))
    return root


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preprocess, "CHUNK", 6)


def options(world: Path, prefix: Path, **changes: Any) -> Options:
    given = {"data_config": str(world / "mix.yaml"), "tokenizer": str(world / "tok"), "output": str(prefix)}
    return Options(**{**given, "seq_length": 64, "spec": SPEC, "progress": False, **changes})


def content(prefix: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in prefix.parent.glob(f"{prefix.name}.*")}


@pytest.fixture(scope="module")
def ray_cluster() -> Iterator[None]:
    """A cluster of this machine, reachable from it alone, for all tests here."""
    if importlib.util.find_spec("ray") is None:
        pytest.skip("not installed: ray")
    with RayExecutor(2):
        yield


# -------------------------------------------------------------------------------------------------- engines alone


@dataclass(frozen=True)
class Sums:
    """Squares a number; some numbers end the process or fail."""

    folder: Path
    patience: int = 2

    def open(self) -> Callable[[int], int]:
        return self.run

    def run(self, task: int) -> int:
        (self.folder / f"{task}-{len(list(self.folder.glob(f'{task}-*')))}").touch()
        if task == 5:
            os._exit(11)
        if task == 7 and not (self.folder / "7-1").exists():
            os.kill(os.getpid(), 9)
        if task == 99:
            raise DataError("ninety-nine")
        if task == 98:
            raise KeyError("a defect")
        return task * task

    def died(self, task: int, deaths: int) -> int:
        if deaths > self.patience:
            raise DataError(f"{task} kills")
        return -5 if task == 5 and deaths == 2 else task


def _engine(name: str) -> Executor:
    return RayExecutor(2) if name == "ray" else LocalExecutor(2)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["local", "ray"])
def test_a_task_that_kills_its_process_is_known_and_the_others_are_done_once(
    name: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if name == "ray":
        request.getfixturevalue("ray_cluster")
    with _engine(name) as engine:
        done = dict(engine.map(Sums(tmp_path), range(12)))
        (tmp_path / "more").mkdir()
        assert dict(engine.map(Sums(tmp_path / "more"), [3])) == {3: 9}  # the same processes, another job
    assert done == {n: n * n for n in range(12) if n != 5} | {-5: 25}
    assert {len(list(tmp_path.glob(f"{n}-*"))) for n in range(12) if n not in (5, 7)} == {1}
    assert (len(list(tmp_path.glob("5-*"))), len(list(tmp_path.glob("7-*")))) == (2, 2)


def test_errors_come_back_as_they_are_and_defects_with_their_traceback(tmp_path: Path) -> None:
    with LocalExecutor(2) as engine:
        with pytest.raises(DataError, match=r"^ninety-nine$"):
            list(engine.map(Sums(tmp_path), [1, 99, 2]))
        with pytest.raises(RuntimeError, match=r"(?s)in a worker process.*KeyError: 'a defect'"):
            list(engine.map(Sums(tmp_path), [98]))
        with pytest.raises(DataError, match="5 kills"):
            list(engine.map(Sums(tmp_path, patience=0), [5]))


def test_engines_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(open_executor("local", 1), InProcess)
    assert isinstance(open_executor("local", 3), LocalExecutor)
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match="needs ray: pip install"):
        open_executor("ray", 2)


# ------------------------------------------------------------------------------------------------ the whole compiler


@pytest.fixture(scope="module")
def plain(world: Path) -> dict[str, bytes]:
    run(options(world, world / "plain" / "set"))
    return content(world / "plain" / "set")


@pytest.mark.slow
def test_a_ray_cluster_writes_the_same_bytes(
    world: Path, plain: dict[str, bytes], ray_cluster: None, tmp_path: Path
) -> None:
    import ray

    assert [node["NodeManagerAddress"] for node in ray.nodes()] == ["127.0.0.1"]
    run(options(world, tmp_path / "set", engine="ray", workers=2))
    assert content(tmp_path / "set") == plain


class Deadly(ChunkJob):
    """A decoder that takes its process along at the records that DEADLY names, in every process."""

    def open(self) -> Callable[[ChunkTask], None]:
        if Compiler.compile is not deadly:
            Compiler.compile = deadly  # type: ignore[method-assign]
        return super().open()


_compile = Compiler.compile


def deadly(self: Compiler, record: Any, file: Any, line: int) -> Any:
    if str(line) in os.environ["DEADLY"].split():
        os._exit(11)
    return _compile(self, record, file, line)


@pytest.mark.slow
def test_records_that_kill_their_process_are_refused_and_no_other(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preprocess, "ChunkJob", Deadly)
    monkeypatch.setenv("DEADLY", "3 5 20")
    manifest = run(options(world, tmp_path / "set", workers=2))
    assert dict(manifest.sources[0].rejected) == {"media_crash": 3}
    rejects = [json.loads(line) for line in (tmp_path / "set.rejects.jsonl").read_text().splitlines()]
    assert [reject["line"] for reject in rejects] == [3, 5, 20]
    assert manifest.totals["samples"] == 21


@pytest.mark.slow
def test_a_crash_of_the_only_process_is_survived_with_resume(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preprocess, "ChunkJob", Deadly)
    monkeypatch.setenv("DEADLY", "5")
    for expected in (11, 0):
        process = os.fork()
        if not process:
            try:
                run(options(world, tmp_path / "set", resume=True))
            except BaseException:
                os._exit(1)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == expected
    rejects = [json.loads(line)["line"] for line in (tmp_path / "set.rejects.jsonl").read_text().splitlines()]
    assert rejects == [5]


class Doomed(ChunkJob):
    """Processes that die before they read a record."""

    def open(self) -> Callable[[ChunkTask], None]:
        os._exit(9)


def test_processes_that_never_begin_end_the_run(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preprocess, "ChunkJob", Doomed)
    with pytest.raises(DataError, match="killed before they read a record"):
        run(options(world, tmp_path / "set", workers=2))


@dataclass(frozen=True)
class Fragile(PackJob):
    """The process that writes is killed, once or always."""

    always: bool = False

    def open(self) -> Callable[[int], None]:
        write = super().open()

        def fragile(number: int) -> None:
            if self.always or not (self.work / "died").exists():
                (self.work / "died").touch()
                os._exit(9)
            write(number)

        return fragile


@pytest.mark.slow
@pytest.mark.parametrize("always", [False, True])
def test_a_crash_while_packs_are_written_is_made_good(
    world: Path, plain: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, always: bool
) -> None:
    job = lambda work, tokens: Fragile(work, tokens, always)  # noqa: E731
    monkeypatch.setattr("megatron_vita.data.shards.writer.publish.PackJob", job)
    if always:
        with pytest.raises(DataError, match="killed 3 times at range 0"):
            run(options(world, tmp_path / "set", workers=2))
        monkeypatch.undo()
        monkeypatch.setattr(preprocess, "CHUNK", 6)
        run(options(world, tmp_path / "set", resume=True))
    else:
        run(options(world, tmp_path / "set", workers=2))
    assert content(tmp_path / "set") == plain


# ------------------------------------------------------------------------------------------------------- limits


def test_too_many_refused_records_stop_the_run_and_it_can_go_on(world: Path, tmp_path: Path) -> None:
    lines = (world / "images.jsonl").read_text() + "{oops\n" * 8
    (tmp_path / "more.jsonl").write_text(lines)
    group = {"data_paths": [str(tmp_path / "more.jsonl")], "media_root": str(world)}
    (tmp_path / "more.yaml").write_text(json.dumps({"dataset": {"images": group}}))
    settings = {"data_config": str(tmp_path / "more.yaml")}
    with pytest.raises(DataError, match=r"8 of 32 records are rejected \(8 bad_json\), more than --max-rejected 0.2"):
        run(options(world, tmp_path / "out" / "set", max_rejected=0.2, **settings))
    assert not list((tmp_path / "out").glob("set.*"))
    manifest = run(options(world, tmp_path / "out" / "set", max_rejected=0.25, resume=True, **settings))
    assert manifest.totals["rejected"] == 8


MEMORY = """
import resource, sys
from pathlib import Path
from tests.data.compile.test_engines import options, run
world, prefix, mix = sys.argv[1:]
if __name__ == "__main__":
    run(options(Path(world), Path(prefix), data_config=mix, workers=2))
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.slow
def test_this_process_does_not_grow_with_the_media(world: Path, tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    def peak(pictures: int) -> int:
        """MiB that the parent took."""
        side = 1024
        header = b"BM" + (54 + side * side * 4).to_bytes(4, "little") + bytes(4) + (54).to_bytes(4, "little")
        header += (40).to_bytes(4, "little") + side.to_bytes(4, "little") * 2 + b"\1\0\x20\0" + bytes(24)
        rows = [[{"bytes": header + bytes([n]) * (side * side * 4), "path": None}] for n in range(pictures)]
        texts = [[{"user": "q", "assistant": "a"}]] * pictures
        table = pa.table({"images": rows, "texts": texts})
        pq.write_table(
            table, tmp_path / f"{pictures}.parquet", row_group_size=2, compression="none", use_dictionary=False
        )
        mix = tmp_path / f"{pictures}.yaml"
        mix.write_text(json.dumps({"dataset": {"cauldron": {"data_paths": [str(tmp_path / f"{pictures}.parquet")]}}}))
        script = tmp_path / "script.py"
        script.write_text(MEMORY)
        arguments = [str(world), str(tmp_path / f"out{pictures}" / "set"), str(mix)]
        root = str(Path(__file__).parents[3])
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": root}
        done = subprocess.run(
            [sys.executable, str(script), *arguments], capture_output=True, text=True, timeout=120, env=environment
        )
        assert done.returncode == 0, done.stderr
        assert (tmp_path / f"out{pictures}" / "set.media.bin").stat().st_size > pictures * 4 << 20
        return int(done.stdout) >> 10

    assert peak(24) < peak(2) + 24  # of 88 MiB more
