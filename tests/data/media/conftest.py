"""Clips that several tests read, written once."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for clips of `clips.clip`."""
    return tmp_path_factory.mktemp("numbered")
