"""What all packages rely on about files: nothing half written, one holder of a lock, no Linux taken for granted."""

from __future__ import annotations

import ast
import errno
import hashlib
import importlib.util
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_vita import files

ROOT = Path(__file__).resolve().parents[1]


def in_child(act: Callable[[], object]) -> int:
    """Exit status of a forked process that does it: 0, 1 after an exception, negative after a signal."""
    process = os.fork()
    if not process:
        try:
            act()
            os._exit(0)
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


# ------------------------------------------------------------------------------------------------------- writing


@pytest.mark.parametrize("durable", [True, False])
@pytest.mark.parametrize("content", ["grün\n", b"\xff\0"])
def test_a_file_gets_its_content_at_once(tmp_path: Path, content: str | bytes, durable: bool) -> None:
    path = tmp_path / "file.json"
    for _ in range(2):
        files.write_atomic(path, content, durable=durable)
        assert path.read_bytes() == (content.encode() if isinstance(content, str) else content)
        assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("moment", ["write_bytes", "replace"])
def test_whoever_is_killed_while_writing_leaves_the_old_content(tmp_path: Path, moment: str) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def die(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def act() -> None:
        if moment == "replace":
            os.replace = die  # type: ignore[assignment]
        else:
            Path.write_bytes = die  # type: ignore[assignment,method-assign]
        files.write_atomic(path, "new", durable=True)

    assert in_child(act) == -signal.SIGKILL
    assert path.read_text() == "old"
    files.write_atomic(path, "new")
    assert [one.name for one in tmp_path.iterdir()] == ["file"]


def test_a_full_disk_leaves_the_old_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space") as caught:
        files.write_atomic(path, "new", durable=True)
    assert files.no_room(caught.value)
    assert path.read_text() == "old"


def test_durable_content_is_on_the_disk_before_the_name_and_the_name_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    monkeypatch.setattr(files, "sync", lambda path: done.append(path.name))
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda old, new: (done.append("replace"), replace(old, new)))
    files.write_atomic(tmp_path / "file", "content", durable=True, partial=tmp_path / "other")
    assert done == ["other", "replace", tmp_path.name]


@given(data=st.binary(max_size=40), position=st.integers(0, 9), most=st.integers(1, 9))
def test_writes_at_a_place_go_on_where_the_system_stopped(
    tmp_path_factory: pytest.TempPathFactory, data: bytes, position: int, most: int
) -> None:
    path = tmp_path_factory.mktemp("at") / "file"
    path.write_bytes(b"x" * 60)
    write = os.pwrite
    with pytest.MonkeyPatch.context() as patch, path.open("r+b") as stream:
        patch.setattr(os, "pwrite", lambda number, view, at: write(number, view[:most], at))
        files.write_at(stream.fileno(), data, position)
    assert path.read_bytes() == b"x" * position + data + b"x" * (60 - position - len(data))


# --------------------------------------------------------------------------------------------------------- locks


def test_one_process_at_a_time_holds_a_lock_until_its_end(tmp_path: Path) -> None:
    path = tmp_path / "lock"

    def held() -> bool:
        with files.lock_file(path) as got:
            return got

    with files.lock_file(path) as mine:
        assert mine
        assert in_child(lambda: os._exit(7 if held() else 8)) == 8
    assert in_child(lambda: os._exit(7 if held() else 8)) == 7
    assert in_child(lambda: (held(), os.kill(os.getpid(), signal.SIGKILL))) == -signal.SIGKILL
    assert held()


def test_a_lock_whose_file_was_deleted_meanwhile_is_not_held(tmp_path: Path) -> None:
    """Its holder has finished and deleted it; a third process may hold the new file of that name."""
    path = tmp_path / "lock"
    with path.open("w") as stream:
        assert files.lock(stream)
    with path.open("w") as stream:
        path.unlink()
        assert not files.lock(stream)
        path.touch()
        assert not files.lock(stream, wait=True)


def test_a_file_system_without_locks_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", none)
    with pytest.raises(OSError, match="No locks"), files.lock_file(tmp_path / "lock"):
        pass


# ------------------------------------------------------------------------------------------------ digests, sizes


@given(data=st.binary(max_size=50), block=st.integers(1, 20))
def test_digests_do_not_depend_on_blocks(tmp_path_factory: pytest.TempPathFactory, data: bytes, block: int) -> None:
    path = tmp_path_factory.mktemp("digest") / "file"
    path.write_bytes(data)
    wanted = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "BLOCK_BYTES", block)
        assert files.file_info(path) == wanted
        with files.FollowingDigests({"one": path}) as digests:
            for limit in range(0, len(data) + 1, 7):
                digests.advance("one", limit)
            digests.advance("one", len(data))
            assert digests.result() == {"one": wanted}


def test_a_file_that_is_shorter_than_was_said_has_no_digest(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"0123")
    for name, message in (("file", r"file ends at byte 4, 3 bytes early"), ("gone", "No such file")):
        with files.FollowingDigests({"one": tmp_path / name}) as digests:
            digests.advance("one", 7)
            with pytest.raises(OSError, match=message):
                digests.result()


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1 KB"), (1_550_000, "1.55 MB"), (20e9, "20 GB"), (3e15, "3e+03 TB")],
)
def test_sizes_for_people(count: float, text: str) -> None:
    assert files.readable_size(int(count)) == text


def test_what_is_no_room() -> None:
    codes = [code for code in errno.errorcode if files.no_room(OSError(code, ""))]
    assert sorted(codes) == sorted([errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS])
    assert not files.no_room(ValueError())


# --------------------------------------------------------------------------------------- what macOS does not have


def test_without_linux_the_next_best_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("fdatasync", "sched_getaffinity"):
        monkeypatch.delattr(os, name, raising=False)
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", synced.append)
    files.sync_data(5)
    assert synced == [5]
    for count, wanted in ((6, 6), (None, 1)):
        monkeypatch.setattr(os, "cpu_count", lambda count=count: count)
        assert files.usable_cores() == wanted


def _names(platform: str, module: str) -> set[str]:
    """Public names that a module of the standard library has on a platform, by mypy's own table (typeshed)."""
    spec = importlib.util.find_spec("mypy")
    assert spec is not None
    assert spec.origin is not None
    folder = Path(spec.origin).parent / "typeshed/stdlib"
    path = folder / f"{module}.pyi"
    path = path if path.exists() else folder / module / "__init__.pyi"

    def defined(body: list[ast.stmt]) -> Iterator[str]:
        for node in body:
            if isinstance(node, ast.If):
                test = ast.unparse(node.test)
                known = "sys.platform" in test or "sys.version_info" in test
                holds = eval(test, {"sys": _Sys(platform)}) if known else True
                yield from defined(node.body if holds else node.orelse)
            elif isinstance(node, ast.FunctionDef | ast.ClassDef):
                yield node.name
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                yield node.target.id
            elif isinstance(node, ast.Assign):
                yield from (target.id for target in node.targets if isinstance(target, ast.Name))
            elif isinstance(node, ast.ImportFrom):
                yield from (alias.asname or alias.name for alias in node.names)

    return set(defined(ast.parse(path.read_text(encoding="utf-8")).body))


class _Sys:
    version_info = sys.version_info

    def __init__(self, platform: str) -> None:
        self.platform = platform


_MODULES = ("os", "fcntl", "mmap", "resource", "select", "signal", "socket", "termios", "time")
_LINUX_ONLY = {module: _names("linux", module) - _names("darwin", module) for module in _MODULES}
_SOURCES = sorted(
    path
    for folder in ("megatron_vita", "tools", "examples", "benchmarks", "tests")
    for path in (ROOT / folder).rglob("*.py")
    if path not in (ROOT / "megatron_vita/files.py", Path(__file__))
)


def linux_only_uses(source: str) -> list[str]:
    """`line: name` of what a source takes for granted that macOS lacks; paths below /proc too, unless their OSError
    is caught."""
    tree = ast.parse(source)
    guarded = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.Try) and any("OSError" in ast.unparse(one.type) for one in node.handlers if one.type)
        for statement in node.body
        for inner in ast.walk(statement)
    }
    modules = {
        alias.asname or alias.name: alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.Import)
        for alias in node.names
    }
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if node.attr in _LINUX_ONLY.get(modules.get(node.value.id, ""), ()):
                found.append(f"{node.lineno}: {node.value.id}.{node.attr}")
        elif isinstance(node, ast.ImportFrom):
            names = _LINUX_ONLY.get(node.module or "", set()) & {alias.name for alias in node.names}
            found += [f"{node.lineno}: {node.module}.{name}" for name in sorted(names)]
        elif (
            isinstance(node, ast.Constant)
            and isinstance(node.value, str)
            and node.value.startswith(("/proc/", "/sys/", "/dev/shm"))
            and id(node) not in guarded
        ):
            found.append(f"{node.lineno}: {node.value}")
    return found


def test_the_table_of_what_macos_lacks_is_real() -> None:
    """And what both have is not in it."""
    assert {"fdatasync", "sched_getaffinity", "posix_fadvise", "copy_file_range", "memfd_create"} <= _LINUX_ONLY["os"]
    assert {"O_TMPFILE", "O_DIRECT", "pidfd_open", "sched_setaffinity", "splice"} <= _LINUX_ONLY["os"]
    assert {"fsync", "pwrite", "preadv", "fork", "O_DIRECTORY", "sendfile"}.isdisjoint(_LINUX_ONLY["os"])
    assert "epoll" in _LINUX_ONLY["select"]
    assert "poll" not in _LINUX_ONLY["select"]
    assert "SIGRTMIN" in _LINUX_ONLY["signal"]
    assert "SIGUSR1" not in _LINUX_ONLY["signal"]
    assert "prlimit" in _LINUX_ONLY["resource"]
    assert "RLIMIT_DATA" not in _LINUX_ONLY["resource"]
    assert "F_SETPIPE_SZ" in _LINUX_ONLY["fcntl"]
    assert "flock" not in _LINUX_ONLY["fcntl"]


@pytest.mark.parametrize(
    "source",
    [
        "import os\nos.fdatasync(1)",
        "import os as o\no.sched_getaffinity(0)",
        "from os import posix_fadvise, path",
        "import signal\nsignal.SIGRTMIN",
        "import os\nf = os.O_TMPFILE | os.O_RDWR",
        "open('/proc/self/status')",
        "try:\n  open('/proc/self/status')\nexcept KeyError:\n  pass",
    ],
)
def test_what_only_linux_has_is_found(source: str) -> None:
    assert len(linux_only_uses(source)) == 1


def test_what_both_have_and_what_is_guarded_is_not() -> None:
    assert not linux_only_uses("import os\nos.fsync(1); os.path.join('/procedure', 'x'); self.fdatasync(2)")
    assert not linux_only_uses("try:\n  open('/proc/self/statm')\nexcept (OSError, ValueError):\n  pass")


@pytest.mark.slow
def test_only_files_asks_for_what_macos_lacks() -> None:
    uses = [f"{path}:{use}" for path in _SOURCES for use in linux_only_uses(path.read_text(encoding="utf-8"))]
    assert not uses, f"{uses}: macOS has none; ask megatron_vita.files, which has a fallback"
