"""An Example: a Sample turned into token ids, labels and tile slots. Every length is final here."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megatron_vita.data.sample import MediaFile

IGNORE_INDEX = -100
"""Label of a token that carries no loss."""


@dataclass(frozen=True, slots=True)
class MediaItem:
    """One picture or one sampled video frame, as encoded bytes, with what its header says."""

    data: bytes
    """JPEG, PNG or WebP bytes as they were found (frames: re-encoded)."""
    width: int
    """Pixels, after the EXIF orientation is applied."""
    height: int
    """Pixels, after the EXIF orientation is applied."""
    frame: bool = False
    """A video frame: one tile, never cut, no thumbnail."""
    origin: MediaFile | None = None
    """File, or region of a file, that holds exactly `data`; None: nothing on disk does (embedded, made here)."""
    time: float | None = None
    """Of a video frame: seconds into the clip. (Shards do not keep it.)"""
    max_tiles: int | None = None
    """Most tiles of the picture, if it has a number of its own; see `MediaFile`."""


@dataclass(frozen=True, slots=True)
class TileSlot:
    """One tile and where its context tokens stand. A tile's tokens are contiguous."""

    first_token: int
    """Index of its first context token in the Example."""
    media: int
    """Index into `Example.media`."""
    row: int
    """Row in the picture's grid; 0 for a thumbnail."""
    col: int
    """Column in the picture's grid; 0 for a thumbnail."""
    rows: int
    """Rows of the picture's grid."""
    cols: int
    """Columns of the picture's grid."""
    thumbnail: bool = False
    """The whole picture squeezed into one tile, beside its grid tiles."""


@dataclass(frozen=True, slots=True)
class Example:
    """What the packer lays into packs and the model sees."""

    tokens: npt.NDArray[np.int32]
    """`[n]` ids with every placeholder expanded."""
    labels: npt.NDArray[np.int32]
    """`[n]` already shifted: labels[i] is the token after i, or -100. The last one is always -100."""
    tiles: tuple[TileSlot, ...] = ()
    """Tiles in token order."""
    media: tuple[MediaItem, ...] = ()
    """Pictures and frames in token order."""
