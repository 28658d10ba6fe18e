"""Faults of saving and loading in their short form; `make faults` tries all cases."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.faults.calls import watching
from tests.faults.run import OF_SAVES
from tests.faults.steps import SECOND, World
from tests.ranks import run_ranks


@pytest.mark.slow
@pytest.mark.parametrize("kind", OF_SAVES)
def test_nothing_unsafe_comes_of(tmp_path: Path, kind: str) -> None:
    outcomes = OF_SAVES[kind](tmp_path, True)
    assert outcomes
    assert not [one for one in outcomes if one.unsafe]


def _every_byte_is_seen(world: World) -> None:
    trainer, root = world.at_second(), world.folder / "seen"
    with watching(root) as calls:
        world.save(trainer, root, SECOND)
    folder = root / f"iter_{SECOND:07d}"
    lie = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    assert calls.written >= lie
    opened = {os.path.basename(path) for name, path in calls.made if name in ("open", "rename", "replace")}
    assert {path.name for path in folder.rglob("*") if path.is_file()} <= opened


def test_no_write_of_a_save_goes_by_unseen(tmp_path: Path) -> None:
    """Otherwise no fault would be tried there."""
    run_ranks(1, _every_byte_is_seen, World(tmp_path, 1))
