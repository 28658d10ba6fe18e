"""A shard set as pictures: a sheet of tiles, and its statistics as a plot."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from megatron_vita.data.inspect.text import place, tiles_of
from megatron_vita.data.loading.packed_batch import read_tiles
from megatron_vita.data.shards.reader import ShardSet
from megatron_vita.errors import ConfigError


def picture_sheet(shards: ShardSet, tile_ids: Sequence[int], path: Path) -> int:
    """Write tiles as the tower gets them (many large ones smaller) as a PNG sheet with a caption each.

    Those that fail to decode are crossed out.

    Returns:
        Number of tiles on the sheet.

    Raises:
        ConfigError: there is no tile to show.
    """
    ids = np.array(tile_ids, dtype=np.int64)
    if not len(ids):
        raise ConfigError("there is no picture to show: choose another --sample.")
    pixels, failed = read_tiles(shards, ids)
    owners = shards.sample_of_tile(ids)
    records = shards.tiles(ids)
    size = shards.spec.image_size
    shown = size * max(1, 128 // size) if len(ids) <= 16 or size <= 224 else 224
    cols = min(len(ids), 8)
    gap, caption = 6, 14
    sheet = Image.new(
        "RGB", (gap + cols * (shown + gap), gap + -(-len(ids) // cols) * (shown + caption + gap)), (255, 255, 255)
    )
    draw = ImageDraw.Draw(sheet)
    for index, (tile, record, owner) in enumerate(zip(pixels.numpy(), records, owners.tolist(), strict=True)):
        left, top = gap + index % cols * (shown + gap), gap + index // cols * (shown + caption + gap)
        picture = Image.fromarray(np.ascontiguousarray(tile.transpose(1, 2, 0)))
        sheet.paste(
            picture.resize((shown, shown), Image.Resampling.NEAREST if shown >= size else Image.Resampling.BILINEAR),
            (left, top),
        )
        draw.text((left, top + shown + 1), f"{owner}: {place(record)}", fill=(0, 0, 0))
        if owner in failed:
            draw.line((left, top, left + shown, top + shown), fill=(220, 0, 0), width=3)
            draw.line((left, top + shown, left + shown, top), fill=(220, 0, 0), width=3)
    sheet.save(path, "PNG")
    return len(ids)


def sheet_tiles(shards: ShardSet, samples: Sequence[int] | None, most: int = 64) -> list[int]:
    """Tiles for a sheet: all of some samples (up to 512), or one of each of `most` samples spread over the set.

    Of several tiles the thumbnail is taken: the whole picture.
    """
    if samples is not None:
        return [tile for sample in samples for tile in tiles_of(shards, sample)][:512]
    with_tiles = np.flatnonzero(shards.samples["tiles"])
    chosen = with_tiles[np.linspace(0, len(with_tiles) - 1, min(most, len(with_tiles))).astype(np.int64)]
    rows = [tiles_of(shards, int(one)) for one in chosen]
    return [one.start + int(np.argmax(shards.tiles(one)["thumbnail"])) for one in rows]


def plot_statistics(shards: ShardSet, path: Path) -> None:
    """Write lengths, tiles, how full the packs are, and the sources as one PNG.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError(
            "--plot needs matplotlib. Install it: pip install matplotlib. (--html needs nothing.)"
        ) from None

    figure = Figure(figsize=(11, 7), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 2).reshape(-1)
    fill = [100 * shards.pack_length(pack) / shards.manifest.seq_length for pack in range(len(shards))]
    for axis, values, x_label, y_label in (
        (axes[0], shards.samples["length"], "length of a sample, tokens", "samples"),
        (axes[1], shards.samples["tiles"], "tiles of a sample", "samples"),
        (axes[2], fill, "part of a pack that is tokens, %", "packs"),
    ):
        axis.hist(values, bins=40, color="#3b6ea5")
        axis.set_xlabel(x_label)
        axis.set_ylabel(y_label)
        axis.set_yscale("log")
    names = [source.name for source in shards.manifest.sources]
    axes[3].barh(names, [source.tokens / 1e6 for source in shards.manifest.sources], color="#3b6ea5")
    axes[3].set_xlabel("tokens of a source, millions")
    figure.suptitle(shards.prefix.name)
    figure.savefig(path, dpi=110)


def check_output(flag: str, path: Path, suffix: str) -> None:
    """Reject, before anything is read, a path at which no such file can be written. Makes its folder.

    Raises:
        ConfigError: naming the flag.
    """
    if path.suffix.lower() != suffix:
        raise ConfigError(f"{flag} {path}: name a {suffix} file, the one kind that is written.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir() or not os.access(path.parent, os.W_OK):
            raise PermissionError("no right to write there, or a folder of that name")
    except OSError as error:
        raise ConfigError(f"{flag} {path}: cannot be written ({error}). Choose another.") from None
