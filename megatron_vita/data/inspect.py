"""What is in a shard set, for people: a sample as text with its loss mask, its pictures, and statistics."""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from megatron_vita.data.example import IGNORE_INDEX
from megatron_vita.data.rows import read_tiles
from megatron_vita.data.shards import ShardSet
from megatron_vita.data.tokenizer import VitaTokenizer
from megatron_vita.errors import ConfigError

LOSS = ("⟦", "⟧")
"""Brackets around what carries loss."""
_FOLD = 4
"""A special token that stands this often in a row is written once, with its count."""


def find_tokenizer(shards: ShardSet) -> VitaTokenizer | None:
    """The tokenizer of a set, if it lies near: in the set's folder or the two above it, or one folder below these."""
    folder = shards.prefix.resolve().parent
    for place in (folder, folder.parent, folder.parent.parent):
        for file in sorted([*place.glob("tokenizer.json"), *place.glob("*/tokenizer.json"), *place.glob("*.model")]):
            try:
                tokenizer = VitaTokenizer.load(file.parent if file.suffix == ".json" else file)
            except ConfigError:
                continue
            if tokenizer.sha256 == shards.manifest.tokenizer.sha256:
                return tokenizer
    return None


def sample_text(shards: ShardSet, sample: int, tokenizer: VitaTokenizer | None) -> str:
    """A sample as the model reads it: special tokens by name, what carries loss in `LOSS` brackets.

    A bracketed token is one that the model is taught to write (labels are shifted: its label stands one token before).
    Without a tokenizer the ids are shown.
    """
    tokens, labels = _sample_arrays(shards, sample)
    taught = np.concatenate([[False], labels[:-1] != IGNORE_INDEX])
    out = []
    for masked, group in groupby(range(len(tokens)), key=lambda index: bool(taught[index])):
        ids = [int(tokens[index]) for index in group]
        text = _decode(ids, tokenizer)
        out.append(f"{LOSS[0]}{text}{LOSS[1]}" if masked else text)
    return "".join(out)


def sample_report(shards: ShardSet, sample: int, tokenizer: VitaTokenizer | None) -> str:
    """Where a sample comes from, its numbers, its text and the table of its tiles."""
    _, labels = _sample_arrays(shards, sample)
    record = shards.samples[sample]
    source = shards.manifest.sources[int(record["source"])]
    pack = shards.pack_of_sample(sample)
    lines = [
        f"sample {sample} of {shards.num_samples}: {source.name}, record {record['line']}; pack {pack}",
        f"{record['length']} tokens, {int((labels != IGNORE_INDEX).sum())} with loss, {record['tiles']} tiles",
        "",
        sample_text(shards, sample, tokenizer),
    ]
    tiles = shards.tiles(_tiles_of(shards, sample))
    if len(tiles):
        start = _offset(shards, sample)
        lines += ["", f"{'tile':>6} {'tokens':>15} {'media':>8} {'picture':>12} {'place':>12}"]
        lines += [_tile_line(index, tile, start) for index, tile in enumerate(tiles)]
    return "\n".join(lines)


def statistics(shards: ShardSet) -> str:
    """The whole set as a page of text: totals, lengths, tiles, sources."""
    manifest, totals = shards.manifest, shards.manifest.totals
    pictures = _pictures(shards)
    frames = int(pictures["frame"].sum()) if len(pictures) else 0
    lines = [
        f"{shards.prefix}: format {manifest.format_version}, digest {manifest.digest[:16]}",
        f"packed to {manifest.seq_length} tokens, layout {manifest.layout}, {manifest.packing['fill']:.2%} full",
        f"{totals['packs']} packs, {totals['samples']} samples, {totals['tokens']} tokens",
        f"{totals['labels']} tokens carry loss ({totals['labels'] / totals['tokens']:.1%})",
        f"{totals['tiles']} tiles ({manifest.image['size']} px), {len(pictures) - frames} pictures, {frames} frames",
        f"{totals['read']} records read, {totals['rejected']} rejected",
        "",
        "tokens of a sample   " + _summary(shards.samples["length"]),
        *_histogram(shards.samples["length"]),
        "",
        "tiles of a sample    " + _summary(shards.samples["tiles"]),
        *_histogram(shards.samples["tiles"]),
        "",
        f"{'source':<24} {'read':>9} {'used':>9} {'rejected':>9} {'truncated':>9} {'tokens':>12} {'tiles':>9}",
    ]
    for source in manifest.sources:
        refused = ", ".join(f"{code} {number}" for code, number in sorted(source.rejected.items()))
        lines.append(
            f"{source.name:<24} {source.read:>9} {source.used:>9} {sum(source.rejected.values()):>9} "
            f"{source.truncated:>9} {source.tokens:>12} {source.tiles:>9}  {refused}".rstrip()
        )
    return "\n".join(lines)


def picture_sheet(shards: ShardSet, tile_ids: Sequence[int], path: Path) -> int:
    """Write tiles, exactly as the tower gets them, as a PNG sheet with a caption each; those that fail are crossed out.

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
    shown = size * max(1, 128 // size)
    cols = min(len(ids), 8)
    gap, caption = 6, 14
    sheet = Image.new(
        "RGB", (gap + cols * (shown + gap), gap + -(-len(ids) // cols) * (shown + caption + gap)), (255, 255, 255)
    )
    draw = ImageDraw.Draw(sheet)
    for index, (tile, record, owner) in enumerate(zip(pixels.numpy(), records, owners.tolist(), strict=True)):
        left, top = gap + index % cols * (shown + gap), gap + index // cols * (shown + caption + gap)
        picture = Image.fromarray(np.ascontiguousarray(tile.transpose(1, 2, 0)))
        sheet.paste(picture.resize((shown, shown), Image.Resampling.NEAREST), (left, top))
        draw.text((left, top + shown + 1), f"{owner}: {_place(record)}", fill=(0, 0, 0))
        if owner in failed:
            draw.line((left, top, left + shown, top + shown), fill=(220, 0, 0), width=3)
            draw.line((left, top + shown, left + shown, top), fill=(220, 0, 0), width=3)
    sheet.save(path, "PNG")
    return len(ids)


def sheet_tiles(shards: ShardSet, sample: int | None, most: int = 64) -> list[int]:
    """Tiles for a sheet: all of one sample (up to 512), or the first of up to `most` samples spread over the set."""
    if sample is not None:
        return list(_tiles_of(shards, sample))[:512]
    with_tiles = np.flatnonzero(shards.samples["tiles"])
    chosen = with_tiles[np.linspace(0, len(with_tiles) - 1, min(most, len(with_tiles))).astype(np.int64)]
    return [_tiles_of(shards, int(one)).start for one in chosen]


def plot_statistics(shards: ShardSet, path: Path) -> None:
    """Write lengths, tiles, how full the packs are, and the sources as one PNG.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError("--plot needs matplotlib. Install it: pip install matplotlib.") from None

    figure = Figure(figsize=(11, 7), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 2).reshape(-1)
    fill = [shards.pack_length(pack) / shards.manifest.seq_length for pack in range(len(shards))]
    for axis, values, title in (
        (axes[0], shards.samples["length"], "tokens of a sample"),
        (axes[1], shards.samples["tiles"], "tiles of a sample"),
        (axes[2], fill, "part of a pack that is tokens"),
    ):
        axis.hist(values, bins=40, color="#3b6ea5")
        axis.set_title(title)
        axis.set_yscale("log")
    names = [source.name for source in shards.manifest.sources]
    axes[3].barh(names, [source.tokens for source in shards.manifest.sources], color="#3b6ea5")
    axes[3].set_title("tokens of a source")
    figure.savefig(path, dpi=110)


def check_picture_path(flag: str, path: Path) -> None:
    """Refuse, before anything is read, a path under which no PNG can be written; its folder is made.

    Raises:
        ConfigError: naming the flag.
    """
    if path.suffix.lower() != ".png":
        raise ConfigError(f"{flag} {path}: name a .png file, the one kind that is written.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir() or not os.access(path.parent, os.W_OK):
            raise PermissionError("no right to write there, or a folder of that name")
    except OSError as error:
        raise ConfigError(f"{flag} {path}: cannot be written ({error}). Choose another.") from None


def check_sample(shards: ShardSet, sample: int) -> int:
    """The sample, if the set has it.

    Raises:
        ConfigError: it has not; the range is named.
    """
    if not 0 <= sample < shards.num_samples:
        raise ConfigError(f"--sample {sample}: the set holds samples 0 to {shards.num_samples - 1}.")
    return sample


def _offset(shards: ShardSet, sample: int) -> int:
    """First token of a sample, counted from its pack's start."""
    pack = shards.pack_of_sample(sample)
    before = sample - shards.pack_samples(pack).start
    return int(shards.sample_lengths(pack)[:before].sum())


def _sample_arrays(shards: ShardSet, sample: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
    pack, start = shards.pack_of_sample(sample), _offset(shards, sample)
    inside = slice(start, start + int(shards.samples["length"][sample]))
    return shards.tokens(pack, inside), shards.labels(pack, inside)


def _tiles_of(shards: ShardSet, sample: int) -> range:
    tiles = shards.samples["tiles"]
    pack = shards.pack_of_sample(sample)
    first = shards.pack_tiles(pack).start + int(tiles[shards.pack_samples(pack).start : sample].sum())
    return range(first, first + int(tiles[sample]))


def _decode(ids: list[int], tokenizer: VitaTokenizer | None) -> str:
    """Text in which runs of one special token are folded."""
    if tokenizer is None:
        return " ".join(map(str, ids)) + " "
    special = set(tokenizer.special_tokens.values())
    out: list[str] = []
    plain: list[int] = []
    for token, run in groupby(ids):
        count = len(list(run))
        if token in special and count >= _FOLD:
            out += [tokenizer.decode(plain, skip_special_tokens=False)] if plain else []
            plain = []
            out.append(f"{tokenizer.decode([token], skip_special_tokens=False)}×{count}")
        else:
            plain += [token] * count
    return "".join([*out, tokenizer.decode(plain, skip_special_tokens=False) if plain else ""])


def _place(tile: np.void) -> str:
    if tile["frame"]:
        return "frame"
    if tile["thumbnail"]:
        return "thumbnail"
    return f"{tile['row'] + 1},{tile['col'] + 1} of {tile['rows']}x{tile['cols']}"


def _tile_line(index: int, tile: np.void, start: int) -> str:
    first = int(tile["first_token"]) - start
    tokens = f"{first}..{first + int(tile['tokens']) - 1}"
    size = f"{tile['width']}x{tile['height']}"
    return f"{index:>6} {tokens:>15} {tile['media']:>8} {size:>12} {_place(tile):>12}"


def _pictures(shards: ShardSet) -> npt.NDArray[Any]:
    """One record of the tiles file for each picture or frame."""
    tiles = shards.tiles(range(shards.num_tiles))
    return tiles[np.unique(tiles["media"], return_index=True)[1]]


def _summary(values: npt.NDArray[np.int64]) -> str:
    low, middle, high = np.quantile(values, (0.05, 0.5, 0.95)).astype(int)
    return f"mean {values.mean():.1f}, 5% {low}, median {middle}, 95% {high}, most {values.max()}"


def _histogram(values: npt.NDArray[np.int64], bins: int = 10, width: int = 40) -> list[str]:
    """Bars of text, one a bin."""
    edges = np.unique(np.linspace(values.min(), values.max() + 1, bins + 1).astype(np.int64))
    counts, _ = np.histogram(values, edges)
    most = max(int(counts.max()), 1)
    return [
        f"{low:>9} to {high - 1:<9} {count:>9} {'#' * -(-int(count) * width // most)}"
        for low, high, count in zip(edges[:-1], edges[1:], counts, strict=True)
    ]
