"""The rooms' order: what each part of the package may import. Read from the sources, nothing is imported."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1] / "megatron_vita"

_EVERYBODY = {"errors", "log", "__version__"}
MAY_IMPORT = {
    "errors": set(),
    "log": set(),
    "files": set(),
    "config": set(),
    "device": {"config"},
    "seed": {"config", "device"},
    "layout": {"config"},
    "data": {"files", "config", "layout"},
    "parallel": {"config", "layout", "device", "seed"},
    "models": {"config", "layout", "device", "seed", "parallel"},
    "planning": {"config"},
    "checkpoint": {"files", "config", "device", "data.spec", "parallel", "seed"},
    "convert": {
        "files",
        "config",
        "layout",
        "device",
        "data.spec",
        "data.text.tokenizer",
        "parallel",
        "models",
        "checkpoint",
    },
    "training": {"files", "config", "layout", "device", "seed", "data", "parallel", "models", "checkpoint", "convert"},
    "checks": {"files", "config", "layout", "device", "seed", "data", "parallel", "models", "training"},
    "inference": {"files", "config", "layout", "device", "seed", "data", "parallel", "models", "checkpoint", "convert"},
}
"""Imports go downward only; `training`, `inference` and `convert` never import one another, save that the first two may
import `convert`."""

FILES = sorted(ROOT.rglob("*.py"))


def imports_of(path: Path) -> set[str]:
    """Dotted names that a file imports, at any depth of its code."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide which room is meant"
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


def room_of(path: Path) -> str:
    """The room a file belongs to: the folder or module right below the package."""
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_downward(path: Path) -> None:
    room = room_of(path)
    if room == "__init__":
        return
    allowed = MAY_IMPORT[room] | _EVERYBODY | {room}
    for name in imports_of(path):
        if not name.startswith("megatron_vita."):
            continue
        target = name.removeprefix("megatron_vita.")
        assert any(target == room or target.startswith(room + ".") for room in allowed), (
            f"{room} must not import {name}"
        )


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_heavy_libraries_stay_in_their_rooms(path: Path) -> None:
    room, names = room_of(path), imports_of(path)
    if room in ("config", "errors", "layout", "planning"):
        assert not any(name.split(".")[0] == "torch" for name in names), f"{room} must not import torch"
    if room == "data":
        core = {name for name in names if name.startswith("megatron.")}
        assert all("indexed_dataset" in name for name in core), (
            f"data may use megatron-core's IndexedDataset alone: {core}"
        )
        assert not any(name.startswith("torch.distributed") for name in names), "data knows no other process"
    if room == "models":
        assert not any(name.startswith("megatron_vita.data") for name in names), "models know no Batch"


def test_init_files_only_hand_names_on() -> None:
    for path in ROOT.rglob("__init__.py"):
        body = ast.parse(path.read_text(encoding="utf-8")).body
        allowed = (ast.Import, ast.ImportFrom, ast.Assign, ast.AnnAssign)
        for node in body:
            docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
            assert docstring or isinstance(node, allowed), f"{path}:{node.lineno} does something"


def device_questions(source: str) -> list[int]:
    """Lines on which a source names an accelerator or a backend, or asks by itself where a tensor lies."""
    words = re.compile(r"(cuda|nccl|gloo|mps|xpu|hpu)(:\d+)?")
    attributes = {"cuda", "is_cuda", "is_cpu", "is_mps", "mps", "xpu", "accelerator"}
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            asks = words.fullmatch(node.value) is not None
        elif isinstance(node, ast.Attribute):
            asks = node.attr in attributes
        elif isinstance(node, ast.Compare):  # x.device.type == "cpu", device != "cpu"
            sides = (node.left, *node.comparators)
            asks = any(isinstance(one, ast.Constant) and one.value == "cpu" for one in sides)
            asks |= any(ast.unparse(one).endswith("device.type") for one in sides)
        elif isinstance(node, ast.Match):
            asks = ast.unparse(node.subject).endswith("device.type")
        elif isinstance(node, ast.ImportFrom):
            asks = node.module == "torch" and any(one.name in attributes for one in node.names)
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
    ],
)  # fmt: skip
def test_questions_about_the_device_are_found(line: str) -> None:
    assert device_questions(line)


def test_what_names_no_accelerator_is_no_question() -> None:
    assert not device_questions("x.to(place); x.cpu(); torch.device('cpu'); map(location='cpu'); x.device; dtype.type")


def test_one_module_names_devices_and_backends() -> None:
    scripts = [path for folder in ("tools", "examples") for path in (ROOT.parent / folder).rglob("*.py")]
    for path in [*FILES, *scripts, ROOT.parent / "pretrain_vita.py"]:
        lines = [] if path == ROOT / "device.py" else device_questions(path.read_text(encoding="utf-8"))
        assert not lines, f"{path}, lines {lines}: names a device or backend; ask megatron_vita.device"


_TAKES_ANY_ERROR = {
    "checkpoint/inert.py": "what a stranger's pickle asks for, memory too, is its own fault",
    "checkpoint/pickles.py": "the same",
    "checks/fused.py": "an error is a verdict, and is printed with its type",
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
