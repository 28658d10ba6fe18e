"""The rooms' order: what each part of the package may import. Read from the sources, nothing is imported."""

from __future__ import annotations

import ast
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


def test_one_module_names_devices_and_backends() -> None:
    words = {"cuda", "nccl", "gloo", "cuda:0"}
    for path in FILES:
        if path == ROOT / "device.py":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            named = isinstance(node, ast.Constant) and node.value in words
            assert not named, f"{path}:{node.lineno} names a device or backend; ask megatron_vita.device"


def test_entry_script_is_short() -> None:
    lines = (ROOT.parent / "pretrain_vita.py").read_text(encoding="utf-8").splitlines()
    assert len(lines) < 40
