"""Faults of training runs in their short form; `make faults` tries all cases."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.run import OF_RUNS


@pytest.mark.slow
@pytest.mark.parametrize("kind", OF_RUNS)
def test_nothing_unsafe_comes_of(tmp_path: Path, kind: str) -> None:
    outcomes = OF_RUNS[kind](tmp_path, True)
    assert outcomes
    assert not [one for one in outcomes if one.unsafe]
