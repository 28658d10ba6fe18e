"""Every open dataset on disk as its publisher ships it, in small, with a promise of what comes of each record."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tests.data.fixtures_generic import GENERIC
from tests.data.fixtures_kit import Promise
from tests.data.fixtures_pictures import PICTURES, pictures_of_others
from tests.data.fixtures_texts import TEXTS
from tests.data.fixtures_videos import VIDEOS, hound_frames


@dataclass(frozen=True)
class Published:
    """All datasets under one root, where examples/long_vita_14b/mixes look for them."""

    root: Path
    files: dict[Path, Promise]
    """Of the datasets that have a publisher."""


def publish_everything(root: Path) -> Published:
    """Lay out every dataset. Set DATASETS to the root, and the example mixes find them."""
    pictures_of_others(root)
    hound_frames(root)
    promises = [promise for make in (*PICTURES, *VIDEOS, *TEXTS) for promise in make(root)]
    return Published(root, {promise.path: promise for promise in promises})


def make_generic(root: Path) -> list[Promise]:
    """One file or more of each form that users bring."""
    return [promise for make in GENERIC for promise in make(root / make.__name__)]
