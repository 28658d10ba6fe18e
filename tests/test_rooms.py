"""The packages' order, read from the sources: who imports whom (tests/rooms.py), who asks for a device, which handlers
take any error for a fault of the data, how long files are."""

from __future__ import annotations

import ast
import re

import pytest

from tests.rooms import (
    DOCUMENT,
    ROOMS,
    ROOT,
    floors,
    imports_of,
    may_import,
    modules,
    ours,
    room_of,
    rooms_of_data,
    with_table,
)

MODULES = modules()
FILES = sorted(MODULES.values())

MOST_LINES = 300
LONGER = {"checkpoint/pickles.py"}
"""Files that are longer than MOST_LINES and known to be."""
MOST_FLOORS = 8
"""Of data/, its rooms and its flat files one upon the other; was 16."""
MOST_FLAT = 6
"""Files that lie flat in data/; were 57."""


@pytest.mark.parametrize("name", MODULES)
def test_imports_go_downward(name: str) -> None:
    room = room_of(name)
    if room is None:
        assert name == "__init__", f"{name} is in no room of tests/rooms.py"
        return
    wrong = sorted(target for target in ours(MODULES[name]) if not may_import(room, target))
    assert not wrong, f"{room} must not import {wrong} (tests/rooms.py)"


def test_every_room_stands_on_rooms_below_it() -> None:
    """So the definition has no circle, and a reader of the table meets what a room needs before the room."""
    seen: set[str] = set()
    for room in ROOMS:
        unknown = [one for one in room.on if room_of(one) not in seen]
        assert not unknown, f"{room.name} stands on {unknown}, which is not below it"
        seen.add(room.name)


@pytest.mark.parametrize(
    ("room", "target", "allowed"),
    [
        ("data.loading", "data.shards.reader.ShardSet", True),
        ("data.loading", "data.shards.writer.publish.write_set", False),
        ("data.loading", "data.compile.run.run", False),
        ("data.loading", "data.text.tokenizer.VitaTokenizer", True),
        ("data.loading", "data.text.chat", False),
        ("data.sources", "data.media.image.decode", False),
        ("data.sources.readers", "data.sources.registry.DatasetSpec", False),
        ("data.sources.readers", "data.sources.fields.plain", True),
        ("data.sources.media_store", "data.media.names.natural_key", True),
        ("data.sources.media_store", "data.media.image.decode", False),
        ("data.sources", "data.text.chat.build_example", False),
        ("data.shards", "data.shards.writer.packs", False),
        ("data.shards.writer", "data.shards.format", True),
        ("data.shards.writer", "data.compile.engines", False),
        ("data.media", "data.media.video.open", True),
        ("data", "data.media.image", False),
        ("data.media", "data.sample.Sample", True),
        ("models", "data.spec", False),
        ("convert", "data.spec.PreprocessSpec", True),
        ("convert", "data.sample", False),
        ("training", "inference.engine", False),
        ("models", "errors.ConfigError", True),
    ],
)
def test_the_definition_says(room: str, target: str, allowed: bool) -> None:
    assert may_import(room, target) == allowed


def test_the_document_shows_the_definition() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    assert text == with_table(text), "docs/architecture.md shows other rooms: run `python -m tests.rooms`"


def test_every_path_that_the_document_names_exists() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    for found in set(
        re.findall(r"(?<![\w/.-])(?:data|parallel|models|checks|training|checkpoint|config)/[\w/]+\.py", text)
    ):
        assert (ROOT / found).exists(), f"docs/architecture.md names {found}"


def test_data_has_few_floors_and_few_flat_files() -> None:
    graph = rooms_of_data()
    heights = floors(graph)
    assert max(heights.values()) <= MOST_FLOORS, sorted(heights.items(), key=lambda pair: pair[1])
    flat = [name for name in MODULES if re.fullmatch(r"data\.\w+", name) and MODULES[name].name != "__init__.py"]
    assert len(flat) <= MOST_FLAT, flat


def test_no_modules_import_each_other_in_a_circle() -> None:
    def module(target: str) -> str:
        return target if target in MODULES else target.rpartition(".")[0]

    graph = {
        name: {one for target in ours(path) if (one := module(target)) in MODULES and one != name}
        for name, path in MODULES.items()
    }
    assert max(floors(graph).values()) > 1


def test_floors_are_counted_and_circles_named() -> None:
    assert floors({"a": ["b", "c"], "b": ["c"], "c": []}) == {"a": 3, "b": 2, "c": 1}
    with pytest.raises(ValueError, match="a → b → a"):
        floors({"a": ["b"], "b": ["a"]})


def test_files_are_short() -> None:
    lengths = {path.relative_to(ROOT).as_posix(): len(path.read_text(encoding="utf-8").splitlines()) for path in FILES}
    longer = {name for name, length in lengths.items() if length > MOST_LINES}
    assert longer <= LONGER, f"longer than {MOST_LINES} lines: {sorted(longer - LONGER)}"


@pytest.mark.parametrize("name", MODULES)
def test_heavy_libraries_stay_in_their_rooms(name: str) -> None:
    names, room = imports_of(MODULES[name]), name.split(".")[0]
    if room in ("config", "errors", "files", "layout", "planning") or name.startswith(("data.sources", "data.media")):
        assert not any(one.split(".")[0] == "torch" for one in names), f"{name} must not import torch"
    if room == "data":
        core = {one for one in names if one.startswith("megatron.")}
        assert all("indexed_dataset" in one for one in core), f"data may use IndexedDataset alone: {core}"
        assert not any(one.startswith("torch.distributed") for one in names), "data knows no other process"


def test_init_files_only_hand_names_on() -> None:
    for path in ROOT.rglob("__init__.py"):
        body = ast.parse(path.read_text(encoding="utf-8")).body
        allowed = (ast.Import, ast.ImportFrom, ast.Assign, ast.AnnAssign)
        for node in body:
            docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
            assert docstring or isinstance(node, allowed), f"{path}:{node.lineno} does something"


ASKING = ("on_accelerator", "has_accelerator", "compute_capability")
"""Functions of device.py that kernels.py alone calls."""


def device_questions(source: str) -> list[int]:
    """Lines on which a source names an accelerator or a backend, or asks where the program or a tensor lies.

    What is computed with what is asked of kernels.py, and device.py has a function for every other purpose.
    """
    words = re.compile(r"(cuda|nccl|gloo|mps|xpu|hpu)(:\d+)?")
    attributes = {"cuda", "is_cuda", "is_cpu", "is_mps", "mps", "xpu", "accelerator", *ASKING}
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            asks = words.fullmatch(node.value) is not None
        elif isinstance(node, ast.Attribute):
            asks = node.attr in attributes
        elif isinstance(node, ast.Name):
            asks = node.id in ASKING
        elif isinstance(node, ast.Compare):  # x.device.type == "cpu", device != "cpu"
            sides = (node.left, *node.comparators)
            asks = any(isinstance(one, ast.Constant) and one.value == "cpu" for one in sides)
            asks |= any(ast.unparse(one).endswith("device.type") for one in sides)
        elif isinstance(node, ast.Match):
            asks = ast.unparse(node.subject).endswith("device.type")
        elif isinstance(node, ast.ImportFrom):
            asks = any(one.name in ASKING for one in node.names)
            asks |= node.module == "torch" and any(one.name in attributes for one in node.names)
            asks |= node.module is not None and node.module.split(".")[:2] in (["torch", "cuda"], ["torch", "mps"])
        elif isinstance(node, ast.Import):
            asks = any(one.name.startswith(("torch.cuda", "torch.mps", "torch.xpu")) for one in node.names)
        else:
            continue
        if asks:
            found.append(getattr(node, "lineno", 0))
    return found


@pytest.mark.parametrize(
    "line",
    [
        "torch.zeros(1, device='cuda')", "torch.device('cuda:3')", "init(backend='nccl')", "x = {'gloo': 1}",
        "x.is_cuda", "x.cuda()", "torch.cuda.is_available()", "if x.device.type == 'cpu': pass", "d.type != 'cpu'",
        "if 'cuda' == device.type: pass", "q.device.type in kinds", "from torch import cuda", "import torch.cuda as c",
        "from torch.cuda import synchronize", "x.is_cpu", "torch.accelerator.current_device_index()",
        "device.has_accelerator()", "x = on_accelerator(q)", "from megatron_vita.device import on_accelerator",
    ],
)  # fmt: skip
def test_questions_about_the_device_are_found(line: str) -> None:
    assert device_questions(line)


def test_what_names_no_accelerator_is_no_question() -> None:
    assert not device_questions("x.to(place); x.cpu(); torch.device('cpu'); map(location='cpu'); x.device; dtype.type")


def test_one_module_names_devices_and_backends() -> None:
    scripts = [path for folder in ("tools", "examples") for path in (ROOT.parent / folder).rglob("*.py")]
    for path in [*FILES, *scripts, ROOT.parent / "pretrain_vita.py"]:
        knows = path == ROOT / "device.py" or path.parent == ROOT / "dryrun"  # which stands in for a device
        lines = [] if knows else device_questions(path.read_text(encoding="utf-8"))
        if path == ROOT / "kernels.py":
            assert len(lines) == 2, f"{path}, lines {lines}: asks where a tensor lies, and what the GPU is"
            continue
        assert not lines, (
            f"{path}, lines {lines}: names a device or asks for it; ask megatron_vita.kernels for the choice"
        )


_TAKES_ANY_ERROR = {
    "checkpoint/inert.py": "what a stranger's pickle asks for, memory too, is its own fault",
    "checkpoint/pickles.py": "the same",
    "checks/fused.py": "an error is a verdict, and is printed with its type",
    "serving/answer.py": "it is raised again, or told to the client as what it is",
    "serving/app.py": "the same",
    "serving/jobs.py": "it is raised again by those who wait for the answer",
    "serving/run.py": "the main thread raises it again",
}
"""Handlers of any Exception that may take a MemoryError for a fault of what was read."""


def blind_handlers(source: str) -> list[int]:
    """Lines of handlers that take any error for a fault of what is read, a want of memory too.

    A handler of Exception is fine if it raises the same again, keeps the traceback or chains the error (`from error`),
    or if a MemoryError was told apart before it.
    """
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("suppress"):
            found += [one.lineno for one in node.args if ast.unparse(one) in ("Exception", "BaseException")]
        if not isinstance(node, ast.Try):
            continue
        told_apart = False
        for handler in node.handlers:
            kinds = ast.unparse(handler.type) if handler.type else "BaseException"
            told_apart |= re.search(r"\bMemoryError\b", kinds) is not None
            if re.search(r"\b(Base)?Exception\b", kinds):
                body = ast.unparse(ast.Module(handler.body, []))
                keeps = re.search(r"^raise$|format_exc\(\)|set_exception\(", body, re.MULTILINE) is not None
                keeps |= handler.name is not None and f" from {handler.name}" in body
                if not (told_apart or keeps):
                    found.append(handler.lineno)
    return found


@pytest.mark.parametrize(
    ("handler", "blind"),
    [
        ("except Exception as e:\n  log(e)", True),
        ("except:\n  pass", True),
        ("except (ValueError, Exception):\n  x = 1", True),
        ("except Exception as e:\n  raise DataError('x') from None", True),
        ("except Exception as e:\n  raise DataError('x') from e", False),
        ("except MemoryError:\n  raise\nexcept Exception:\n  x = 1", False),
        ("except BaseException:\n  close()\n  raise", False),
        ("except Exception:\n  send(traceback.format_exc())", False),
        ("except (OSError, ValueError):\n  pass", False),
    ],
)
def test_blind_handlers_are_found(handler: str, blind: bool) -> None:
    assert bool(blind_handlers(f"try:\n  act()\n{handler}")) == blind


def test_suppressing_everything_is_blind_too() -> None:
    assert blind_handlers("with contextlib.suppress(Exception):\n  act()")
    assert not blind_handlers("with contextlib.suppress(OSError):\n  act()")


def test_no_handler_takes_a_want_of_memory_for_a_fault_of_the_data() -> None:
    for path in FILES:
        name = path.relative_to(ROOT).as_posix()
        lines = [] if name in _TAKES_ANY_ERROR else blind_handlers(path.read_text(encoding="utf-8"))
        assert not lines, f"{name}, lines {lines}: tell MemoryError apart, or chain the error (`from error`)"


def test_entry_script_is_short() -> None:
    lines = (ROOT.parent / "pretrain_vita.py").read_text(encoding="utf-8").splitlines()
    assert len(lines) < 40
