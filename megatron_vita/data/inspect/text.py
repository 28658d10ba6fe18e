"""What is in a shard set, for people: a sample as text with its loss mask, a pack, and statistics. (Pictures are
drawn by inspect/pictures.py, the HTML page by inspect/page.py.)"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_vita.data.example import IGNORE_INDEX
from megatron_vita.data.loading.balance import assign_packs
from megatron_vita.data.loading.sampler import PackOrder
from megatron_vita.data.rejects import counted
from megatron_vita.data.shards.reader import ShardSet
from megatron_vita.data.text.tokenizer import VitaTokenizer
from megatron_vita.errors import ConfigError
from megatron_vita.layout import Int64

LOSS = ("⟦", "⟧")
"""Brackets around what carries loss."""
_FOLD = 4
"""A special token that is repeated so often is written once, with its count."""
_RANKS, _STEPS = 8, 200
"""Data-parallel ranks that `balance` assigns packs to, and the most steps it looks at."""


@dataclass(frozen=True, slots=True)
class Run:
    """A stretch of a sample's text."""

    text: str
    special: bool
    """A special token of the layout, by name."""
    taught: bool
    """The model is taught to write it: it carries loss (its label stands one token before)."""


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


def sample_runs(shards: ShardSet, sample: int, tokenizer: VitaTokenizer | None) -> Iterator[Run]:
    """A sample as the model reads it, cut where loss or the kind of token changes. Without a tokenizer: the ids."""
    tokens, labels = _sample_arrays(shards, sample)
    taught = np.concatenate([[False], labels[:-1] != IGNORE_INDEX])
    named = set(tokenizer.special_tokens.values()) if tokenizer else set()

    def kind(index: int) -> tuple[bool, int]:
        """Learnt or not; the special token or -1."""
        return bool(taught[index]), int(tokens[index]) if int(tokens[index]) in named else -1

    for (learnt, token), group in groupby(range(len(tokens)), key=kind):
        ids = [int(tokens[index]) for index in group]
        if tokenizer is None:
            yield Run(" ".join(map(str, ids)) + " ", False, learnt)
        elif token < 0:
            yield Run(tokenizer.decode(ids, skip_special_tokens=False), False, learnt)
        else:
            name, times = tokenizer.decode([token], skip_special_tokens=False), len(ids)
            yield Run(f"{name}×{times}" if times >= _FOLD else name * times, True, learnt)


def sample_text(shards: ShardSet, sample: int, tokenizer: VitaTokenizer | None) -> str:
    """A sample as the model reads it: special tokens by name, what carries loss in `LOSS` brackets.

    Without a tokenizer the ids are shown.
    """
    out = []
    for taught, runs in groupby(sample_runs(shards, sample, tokenizer), key=lambda run: run.taught):
        text = "".join(run.text for run in runs)
        out.append(f"{LOSS[0]}{text}{LOSS[1]}" if taught else text)
    return "".join(out)


def sample_title(shards: ShardSet, sample: int) -> tuple[str, str]:
    """Where a sample comes from, and its numbers."""
    record = shards.samples[sample]
    source = shards.manifest.sources[int(record["source"])]
    where = f"{source.name}, record {record['line']}; pack {shards.pack_of_sample(sample)}"
    return (
        f"sample {sample} of {shards.num_samples}: {where}",
        f"{record['length']} tokens, {record['labels']} with loss, {record['tiles']} tiles",
    )


def sample_report(shards: ShardSet, sample: int, tokenizer: VitaTokenizer | None) -> str:
    """Where a sample comes from, its numbers, its text and the table of its tiles."""
    lines = [*sample_title(shards, sample), "", sample_text(shards, sample, tokenizer)]
    tiles = shards.tiles(tiles_of(shards, sample))
    if len(tiles):
        start = _offset(shards, sample)
        lines += ["", f"{'tile':>6} {'tokens':>15} {'media':>8} {'picture':>12} {'place':>12}"]
        lines += [_tile_line(index, tile, start) for index, tile in enumerate(tiles)]
    return "\n".join(lines)


def pack_report(shards: ShardSet, pack: int) -> str:
    """What lies in one pack: a line for each sample, and how full it is."""
    rows = shards.pack_samples(pack)
    length, seq_length = shards.pack_length(pack), shards.manifest.seq_length
    reset, joint = (int(shards.pack_work(reset=reset)[pack, 0]) for reset in (True, False))
    tiles = counted(len(shards.pack_tiles(pack)), "tile")
    lines = [
        f"pack {pack} of {shards.num_packs}: {counted(len(rows), 'sample')}, {tiles}",
        f"{length} of {seq_length} tokens ({length / seq_length:.2%} full)",
        f"query-key pairs of attention: {reset} with reset per document, {joint} without",
        "",
        f"{'sample':>9} {'begins at':>10} {'tokens':>8} {'with loss':>9} {'tiles':>6} {'of cost':>8}  source",
    ]
    start = 0
    cost = int(shards.samples["cost"][rows.start : rows.stop].sum())
    for sample in rows:
        record = shards.samples[sample]
        name = shards.manifest.sources[int(record["source"])].name
        lines.append(
            f"{sample:>9} {start:>10} {record['length']:>8} {record['labels']:>9} {record['tiles']:>6} "
            f"{record['cost'] / max(1, cost):>8.1%}  "
            f"{name}, record {record['line']}"
        )
        start += int(record["length"])
    return "\n".join(lines)


def statistics(shards: ShardSet) -> str:
    """The whole set as a page of text: totals, lengths, tiles, balance, sources."""
    lines = [
        f"{shards.prefix}",
        *(f"{name:<12} {value}" for name, value in totals(shards)),
        "",
        "tokens of a sample   " + _summary(shards.samples["length"]),
        *_histogram(shards.samples["length"]),
        "",
        "tiles of a sample    " + _summary(shards.samples["tiles"]),
        *_histogram(shards.samples["tiles"]),
        "",
        *balance(shards),
        "",
        f"{'source':<24} {'read':>9} {'used':>9} {'rejected':>9} {'truncated':>9} {'tokens':>12} {'loss':>6} tiles",
    ]
    labelled = labelled_share(shards)
    for index, source in enumerate(shards.manifest.sources):
        codes_text = ", ".join(f"{code} {number}" for code, number in sorted(source.rejected.items()))
        lines.append(
            f"{source.name:<24} {source.read:>9} {source.used:>9} {sum(source.rejected.values()):>9} "
            f"{source.truncated:>9} {source.tokens:>12} {labelled[index]:>6.1%} {source.tiles}  {codes_text}".rstrip()
        )
    return "\n".join(lines)


def totals(shards: ShardSet) -> list[tuple[str, str]]:
    """The set in a few lines: what, and how much."""
    manifest, total = shards.manifest, shards.manifest.totals
    pictures = _pictures(shards)
    frames = int(pictures["frame"].sum()) if len(pictures) else 0
    codes = rejects_by_code(shards)
    codes_text = f" ({', '.join(f'{code} {number}' for code, number in codes.items())})" if codes else ""
    return [
        ("format", f"{manifest.format_version}, layout {manifest.layout}, digest {manifest.digest[:16]}"),
        ("packs", f"{total['packs']} of {manifest.seq_length} tokens, {manifest.packing['fill']:.2%} full"),
        ("samples", f"{total['samples']}"),
        ("tokens", f"{total['tokens']}; {total['labels']} carry loss ({total['labels'] / total['tokens']:.1%})"),
        (
            "media",
            f"{total['tiles']} tiles ({manifest.image['size']} px), {len(pictures) - frames} pictures, {frames} frames",
        ),
        ("records", f"{total['read']} read, {total['rejected']} rejected{codes_text}"),
    ]


def rejects_by_code(shards: ShardSet) -> dict[str, int]:
    """Error code -> records of all sources, most frequent first."""
    counts: Counter[str] = Counter()
    for source in shards.manifest.sources:
        counts.update(source.rejected)
    return dict(sorted(counts.items(), key=lambda pair: (-pair[1], pair[0])))


def labelled_share(shards: ShardSet) -> npt.NDArray[np.float64]:
    """Part of each source's tokens that carries loss, 0..1, `[sources]`."""
    size = len(shards.manifest.sources)
    labels, tokens = (
        np.bincount(shards.samples["source"], weights=shards.samples[name], minlength=size)
        for name in ("labels", "length")
    )
    return labels / np.maximum(tokens, 1)


def balance(shards: ShardSet) -> list[str]:
    """How evenly steps of this set load 8 data-parallel ranks, by global batch, with and without reset; a line each.

    Ratios of sums over up to 200 steps: the most loaded rank's work to the mean rank's.
    """
    lines = []
    for batch in (_RANKS, 8 * _RANKS):
        if shards.num_packs < batch:
            continue
        for reset, name in ((True, "with reset"), (False, "without")):
            order = PackOrder(shards.pack_work(reset), seed=0, digest=shards.manifest.digest, global_batch_size=batch)
            steps = min(shards.num_packs // batch, _STEPS)
            loads = np.stack([_loads(order, order.packs(step * batch)) for step in range(steps)])
            most, mean = loads.max(axis=1).sum(axis=0), loads.mean(axis=1).sum(axis=0)
            ratios = " and ".join(
                f"{high / low:.3f} of the mean's {kind}"
                for high, low, kind in zip(most, mean, ("attention", "tiles"), strict=True)
                if low
            )
            lines.append(f"{batch} packs a step on {_RANKS} ranks, {name}: the most loaded rank has {ratios}")
    return lines or [f"fewer than {_RANKS} packs: there is nothing to balance over {_RANKS} ranks"]


def check_index(flag: str, index: int, size: int) -> int:
    """A sample's or pack's number, if the set has it.

    Raises:
        ConfigError: it has not; the range is named.
    """
    if not 0 <= index < size:
        raise ConfigError(f"{flag} {index}: the set holds {flag.removeprefix('--')}s 0 to {size - 1}.")
    return index


def tiles_of(shards: ShardSet, sample: int) -> range:
    """Numbers of a sample's tiles in the tiles file."""
    tiles = shards.samples["tiles"]
    pack = shards.pack_of_sample(sample)
    first = shards.pack_tiles(pack).start + int(tiles[shards.pack_samples(pack).start : sample].sum())
    return range(first, first + int(tiles[sample]))


def place(tile: np.void) -> str:
    """What part of its picture a tile is."""
    if tile["frame"]:
        return "frame"
    if tile["thumbnail"]:
        return "thumbnail"
    return f"{tile['row'] + 1},{tile['col'] + 1} of {tile['rows']}x{tile['cols']}"


def _loads(order: PackOrder, packs: Int64) -> Int64:
    """Work of each rank in one step, `[ranks, kinds]`."""
    return np.stack([order.work[mine].sum(axis=0) for mine in assign_packs(packs, order.work[packs], _RANKS)])


def _offset(shards: ShardSet, sample: int) -> int:
    """First token of a sample, counted from its pack's start."""
    pack = shards.pack_of_sample(sample)
    before = sample - shards.pack_samples(pack).start
    return int(shards.sample_lengths(pack)[:before].sum())


def _sample_arrays(shards: ShardSet, sample: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
    pack, start = shards.pack_of_sample(sample), _offset(shards, sample)
    inside = slice(start, start + int(shards.samples["length"][sample]))
    return shards.tokens(pack, inside), shards.labels(pack, inside)


def _tile_line(index: int, tile: np.void, start: int) -> str:
    first = int(tile["first_token"]) - start
    tokens = f"{first}..{first + int(tile['tokens']) - 1}"
    size = f"{tile['width']}x{tile['height']}"
    return f"{index:>6} {tokens:>15} {tile['media']:>8} {size:>12} {place(tile):>12}"


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
