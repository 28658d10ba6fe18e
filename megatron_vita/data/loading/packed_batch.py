"""The packed sequence of one forward pass: described from the tables alone, its token slices, and its tiles decoded."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from megatron_vita.data.example import IGNORE_INDEX, MediaItem, TileSlot
from megatron_vita.data.media.tiling import render_tiles
from megatron_vita.data.shards.format import starts
from megatron_vita.data.shards.reader import ShardSet
from megatron_vita.errors import DataError, VitaError
from megatron_vita.layout import Int64, SequenceLayout

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PackedSequence:
    """Packs joined for one forward pass: the position of every pack, sample and tile. The same on every rank."""

    length: int
    """Tokens, padding included: s."""
    packs: tuple[int, ...]
    """Pack ids, in order of position."""
    pack_starts: Int64
    """Position of each pack's first token, and of the padding; `[packs + 1]`."""
    documents: tuple[int, ...]
    """Spans of attention: samples with reset, else packs; the padding is the last one."""
    sample_ids: Int64
    """Sample numbers, in order of position, `[samples]`."""
    sample_starts: Int64
    """Position of each sample's first token, and one past the last sample; `[samples + 1]`."""
    tile_ids: Int64
    """Tile numbers (of the tiles file), in order of position, `[tiles]`."""
    first_token: Int64
    """Position of each tile's first context token, `[tiles]`."""


def build_packed_sequence(shards: ShardSet, packs: Sequence[int], *, seq_length: int, reset: bool) -> PackedSequence:
    """Join packs end to end and pad the rest of `len(packs) * seq_length` with one document of its own.

    Args:
        shards: the set.
        packs: pack ids.
        seq_length: tokens that each pack takes, its padding included.
        reset: every sample is a document; otherwise every pack.
    """
    samples = np.concatenate([_arange(shards.pack_samples(pack)) for pack in packs])
    sample_lengths = shards.samples["length"][samples]
    sample_starts = starts(sample_lengths)
    pack_lengths = np.array([shards.pack_length(pack) for pack in packs], dtype=np.int64)
    pack_starts = starts(pack_lengths)
    length = seq_length * len(packs)
    padding = length - int(pack_starts[-1])
    documents = (sample_lengths if reset else pack_lengths).tolist()
    tile_ids = [_arange(shards.pack_tiles(pack)) for pack in packs]
    first_token = [
        shards.tiles(shards.pack_tiles(pack))["first_token"] + start
        for pack, start in zip(packs, pack_starts[:-1], strict=True)
    ]
    return PackedSequence(
        length=length,
        packs=tuple(packs),
        pack_starts=pack_starts,
        documents=(*documents, padding) if padding else tuple(documents),
        sample_ids=samples,
        sample_starts=sample_starts,
        tile_ids=np.concatenate(tile_ids),
        first_token=np.concatenate(first_token),
    )


def local_tokens(
    shards: ShardSet, packed: PackedSequence, layout: SequenceLayout, cp_rank: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens, labels and positions inside the document that one context-parallel rank owns; three int64 `[1, s/cp]`.

    No other pack is read; this one whole, for its checksum.
    """
    local = layout.local_positions(cp_rank)
    tokens = np.full(len(local), shards.manifest.tokenizer.pad_id, dtype=np.int64)
    labels = np.full(len(local), IGNORE_INDEX, dtype=np.int64)
    bounds = np.searchsorted(local, packed.pack_starts)
    for pack, start, first, last in zip(packed.packs, packed.pack_starts[:-1], bounds[:-1], bounds[1:], strict=True):
        inside = local[first:last] - start
        tokens[first:last] = shards.tokens(pack, inside)
        labels[first:last] = shards.labels(pack, inside)
    positions = layout.positions_in_document[local]
    return torch.from_numpy(tokens)[None], torch.from_numpy(labels)[None], torch.from_numpy(positions)[None]


def picture_runs(shards: ShardSet, tile_ids: Int64, most: int) -> list[slice]:
    """Cut tiles into runs of about `most` that can be decoded apart from one another: a picture stays in one run.

    Args:
        shards: the set.
        tile_ids: tile numbers, `[n]`; the tiles of one picture side by side.
        most: a run ends where it would grow beyond this many tiles (a picture may have more).

    Returns:
        Slices of `tile_ids`, in order.
    """
    runs: list[slice] = []
    for first, last in pairwise(_picture_bounds(shards.tiles(tile_ids))):
        if runs and last - runs[-1].start <= most:
            runs[-1] = slice(runs[-1].start, last)
        else:
            runs.append(slice(first, last))
    return runs


def read_tiles(shards: ShardSet, tile_ids: Int64) -> tuple[torch.Tensor, list[int]]:
    """Decode tiles: (uint8 `[n, 3, S, S]`, samples that failed), see `read_tiles_into`."""
    pixels = blank_tiles(shards, len(tile_ids))
    return pixels, read_tiles_into(pixels, shards, tile_ids)


def blank_tiles(shards: ShardSet, number: int, allocate: Callable[..., torch.Tensor] = torch.empty) -> torch.Tensor:
    """Zeros to decode tiles into, in memory of `allocate(shape, dtype=)`: uint8 `[number, 3, S, S]`."""
    size = shards.spec.image_size
    return allocate((number, 3, size, size), dtype=torch.uint8).zero_()


def read_tiles_into(pixels: torch.Tensor, shards: ShardSet, tile_ids: Int64, who: str = "") -> list[int]:
    """Decode tiles into a tensor of zeros.

    Args:
        pixels: uint8 `[n, 3, S, S]`, zero.
        shards: the set.
        tile_ids: tile numbers, `[n]`; the tiles of one picture side by side, so that it is decoded once.
        who: begins the message of an error that ends the run.

    Returns:
        Samples with a picture that cannot be decoded, ascending; the tiles of such pictures stay zero.

    Raises:
        VitaError: there is not enough memory.
        RuntimeError: anything else that is no fault of the picture: a defect of this package, a disk that fails.
    """
    failed: set[int] = set()
    records = shards.tiles(tile_ids)
    slots = _slots(records)
    for first, last in pairwise(_picture_bounds(records)):
        try:
            tiles = render_tiles(_media_item(shards, records[first]), slots[first:last], shards.spec)
            pixels[first:last] = torch.from_numpy(tiles)
        except DataError as error:  # the picture's fault: it costs the sample, not the run
            sample, picture = _names(shards, tile_ids[first], records[first])
            failed.add(sample)
            log.warning("sample %d: picture %d fails to decode: %s", sample, picture, error)
        except Exception as error:
            sample, picture = _names(shards, tile_ids[first], records[first])
            where = f"{who}sample {sample}, picture {picture}"
            if isinstance(error, MemoryError):
                raise VitaError(
                    f"{where}: there is not enough memory to decode it. Lower data.num_workers, or start fewer ranks "
                    f"on a machine; tools/inspect_data.py --sample {sample} shows the picture."
                ) from error
            raise RuntimeError(f"{where}: {type(error).__name__}: {error}") from error
    return sorted(failed)


def _names(shards: ShardSet, tile: np.int64, record: np.void) -> tuple[int, int]:
    """The sample and the picture that a tile belongs to."""
    return int(shards.sample_of_tile(np.array([tile]))[0]), int(record["media"])


def _picture_bounds(tiles: npt.NDArray[Any]) -> list[int]:
    """Where each picture's tiles begin among records of the tiles file, and their number."""
    return [0, *(np.flatnonzero(np.diff(tiles["media"])) + 1).tolist(), len(tiles)] if len(tiles) else [0]


def _media_item(shards: ShardSet, tile: np.void) -> MediaItem:
    """The picture that a record of the tiles file was cut from."""
    data = shards.media_bytes(int(tile["media"]))
    return MediaItem(data, int(tile["width"]), int(tile["height"]), bool(tile["frame"]))


def _slots(tiles: npt.NDArray[Any]) -> list[TileSlot]:
    """Records of the tiles file as the renderer takes them (token and media indices are the file's)."""
    columns = ("first_token", "media", "row", "col", "rows", "cols", "thumbnail")
    return [
        TileSlot(token, media, row, col, rows, cols, bool(thumbnail))
        for token, media, row, col, rows, cols, thumbnail in zip(
            *(tiles[name].tolist() for name in columns), strict=True
        )
    ]


def _arange(rows: range) -> Int64:
    return np.arange(rows.start, rows.stop, dtype=np.int64)
