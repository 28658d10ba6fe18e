"""A shard set as one HTML page: statistics, rejected records by code, and samples with their loss and pictures.

The page stands alone: styles, charts (SVG) and pictures (JPEG) are inside, nothing is loaded and no script runs.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Sequence
from html import escape
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from megatron_vita.data.inspect.text import balance, labelled_share, place, sample_runs, sample_title, tiles_of, totals
from megatron_vita.data.loading.packed_batch import read_tiles
from megatron_vita.data.shards.reader import ShardSet
from megatron_vita.data.text.tokenizer import VitaTokenizer

_TILES, _TEXT, _REJECTS = 26, 6000, 200_000
"""Most tiles and characters shown of a sample, most lines read of the rejects."""
_SIDE = 112
"""Pixels of a tile on the page."""

_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:72rem;padding:0 1rem;color:#1c2733}
h1{font-size:1.4rem;margin-bottom:.2rem}h2{font-size:1.1rem;margin-top:2.2rem;border-bottom:1px solid #d5dde5}
table{border-collapse:collapse;font-size:.9rem}
td,th{padding:.2rem .7rem;text-align:right;border-bottom:1px solid #eef2f5}
td:first-child,th:first-child,td.l,th.l{text-align:left}th{color:#5a6b7b;font-weight:600}
.charts{display:flex;flex-wrap:wrap;gap:1rem}svg .t{font-weight:600}
pre{white-space:pre-wrap;overflow-wrap:anywhere;background:#f6f8fa;padding:.8rem;border-radius:6px;font-size:.85rem}
mark{background:#ffe08a;border-radius:2px}.s{color:#8496a8}figure{display:inline-block;margin:0 .4rem .4rem 0}
figcaption{font-size:.7rem;color:#5a6b7b;text-align:center}img{display:block;border-radius:3px}
"""


def page(shards: ShardSet, samples: Sequence[int], tokenizer: VitaTokenizer | None) -> str:
    """The whole page.

    Args:
        shards: the set.
        samples: which samples to show.
        tokenizer: without one, ids are shown.
    """
    title = escape(shards.prefix.name)
    rows = "".join(f"<tr><td>{name}</td><td class=l>{escape(value)}</td></tr>" for name, value in totals(shards))
    lines = "".join(f"<li>{escape(line)}</li>" for line in balance(shards))
    shown = "".join(_sample(shards, sample, tokenizer) for sample in samples)
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{title}</title><style>{_STYLE}</style>"
        f"<h1>{title}</h1><div class=s>{escape(str(shards.prefix))}</div><table>{rows}</table>"
        f"<h2>Sizes</h2><div class=charts>{_charts(shards)}</div>"
        f"<h2>Balance over data-parallel ranks</h2><ul>{lines}</ul>"
        f"<h2>Sources</h2>{_sources(shards)}{_rejects(shards)}"
        f"<h2>Samples</h2><p>What carries loss is <mark>marked</mark>; special tokens are "
        f"<span class=s>&lt;grey&gt;</span>, and their runs folded.</p>{shown}</html>\n"
    )


def spread(shards: ShardSet, number: int) -> list[int]:
    """Samples spread evenly over the set; every other one has pictures, if the set has."""
    everything = np.arange(shards.num_samples)
    with_tiles = np.flatnonzero(shards.samples["tiles"])
    halves = [with_tiles, everything] if len(with_tiles) else [everything]
    chosen = [half[np.linspace(0, len(half) - 1, number // len(halves)).astype(np.int64)] for half in halves]
    return np.unique(np.concatenate(chosen)).tolist()


def _charts(shards: ShardSet) -> str:
    lengths, tiles = shards.samples["length"], shards.samples["tiles"]
    bounds = np.array([shards.pack_samples(pack).start for pack in range(shards.num_packs)])
    fill = 100 * np.add.reduceat(lengths, bounds) / shards.manifest.seq_length
    pairs = shards.pack_work(reset=True)[:, 0] / 1e6
    charts = [
        _histogram("Length of a sample", "tokens (logarithmic)", "samples", lengths, log=True),
        _histogram("Tiles of a sample", "tiles", "samples", tiles),
        _histogram("How full a pack is", "part of the sequence length, %", "packs", fill),
        _histogram("Attention of a pack, with reset", "million query-key pairs", "packs", pairs),
    ]
    return "".join(charts)


def _histogram(
    title: str, x_label: str, y_label: str, values: npt.NDArray[np.generic], *, log: bool = False, bins: int = 30
) -> str:
    """An SVG histogram with both axes labelled."""
    numbers = values.astype(np.float64)
    low, high = float(numbers.min()), float(numbers.max())
    if np.issubdtype(values.dtype, np.integer) and high - low < bins:  # one bar a number
        edges = np.arange(low, high + 2) - 0.5
    elif log and low > 0 and high > low:
        edges = np.geomspace(low, high * (1 + 1e-9), bins + 1)
    else:
        edges = np.linspace(low, high if high > low else low + 1, bins + 1)
    counts = np.histogram(numbers, edges)[0]
    left, top, width, height, most = 56, 28, 270, 130, max(int(counts.max()), 1)
    step = width / len(counts)
    out = [
        f'<svg width="350" height="215" role="img" aria-label="{escape(title)}" font-size="11" fill="#5a6b7b">',
        f"<text class=t x={left} y=16>{escape(title)}</text>",
    ]
    for index, count in enumerate(counts.tolist()):
        bar = height * count / most
        x, y = left + index * step, top + height - bar
        out.append(
            f'<rect x="{x:.1f}" y="{y:.1f}" width="{max(step - 1, 1):.1f}" height="{bar:.1f}" fill="#3b6ea5">'
            f"<title>{_number(edges[index])} to {_number(edges[index + 1])}: {count}</title></rect>"
        )
    base = top + height
    out.append(f'<path d="M{left} {top}V{base}H{left + width}" stroke="#9aa9b7" fill="none"/>')
    for part in (0, 0.5, 1):
        out.append(f"<text x={left - 5} y={base - height * part + 4:.0f} text-anchor=end>{_number(most * part)}</text>")
    centred = edges[1] - edges[0] == 1 and (edges[0] % 1)  # one bar a number: name the numbers, not the edges
    for part in (0, 0.5, 1):
        index = round(part * (len(edges) - (2 if centred else 1)))
        value = edges[index] + (0.5 if centred else 0)
        x = left + (index + (0.5 if centred else 0)) * step
        out.append(f"<text x={x:.0f} y={base + 15} text-anchor=middle>{_number(value)}</text>")
    out.append(f"<text x={left + width / 2:.0f} y={base + 34} text-anchor=middle>{escape(x_label)}</text>")
    out.append(
        f'<text transform="translate(11 {top + height / 2:.0f}) rotate(-90)" text-anchor=middle>{y_label}</text></svg>'
    )
    return "".join(out)


def _number(value: float) -> str:
    """Short: 12, 0.5, 3.2k, 1.5M."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1e3 if unit == 'k' else size):.3g}{unit}"
    return f"{value:.0f}" if abs(value) >= 100 or value == int(value) else f"{value:.3g}"


def _sources(shards: ShardSet) -> str:
    labelled, total = labelled_share(shards), max(shards.manifest.totals["tokens"], 1)
    heads = ("source", "read", "used", "rejected", "shortened", "tokens", "of all", "with loss", "tiles")
    rows = []
    for index, source in enumerate(shards.manifest.sources):
        cells = (
            escape(source.name), source.read, source.used, sum(source.rejected.values()), source.truncated,
            source.tokens, f"{source.tokens / total:.1%}", f"{labelled[index]:.1%}", source.tiles,
        )  # fmt: skip
        rows.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    return f"<table><tr>{''.join(f'<th>{head}</th>' for head in heads)}</tr>{''.join(rows)}</table>"


def _rejects(shards: ShardSet) -> str:
    """Rejected records by source and error code, with one message each; empty where nothing was rejected."""
    if not shards.manifest.totals["rejected"]:
        return ""
    counts: dict[tuple[str, str], int] = {}
    messages: dict[tuple[str, str], str] = {}
    with Path(f"{shards.prefix}.rejects.jsonl").open(encoding="utf-8", errors="replace") as stream:
        for _, line in zip(range(_REJECTS), stream, strict=False):
            entry = json.loads(line)
            key = (entry["code"], entry["source"])
            counts[key] = counts.get(key, 0) + 1
            messages.setdefault(key, entry["message"])
    rows = "".join(
        f"<tr><td>{escape(code)}</td><td class=l>{escape(source)}</td><td>{count}</td>"
        f"<td class=l>{escape(messages[code, source][:160])}</td></tr>"
        for (code, source), count in sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))
    )
    return (
        "<h2>Rejected records</h2><table><tr><th>reason</th><th class=l>source</th><th>records</th>"
        f"<th class=l>the first one</th></tr>{rows}</table>"
    )


def _sample(shards: ShardSet, sample: int, tokenizer: VitaTokenizer | None) -> str:
    title, numbers = sample_title(shards, sample)
    text, left = [], _TEXT
    for run in sample_runs(shards, sample, tokenizer):
        shown = escape(run.text[: max(left, 0)])
        left -= len(run.text)
        shown = f"<span class=s>{shown}</span>" if run.special else shown
        text.append(f"<mark>{shown}</mark>" if run.taught else shown)
        if left < 0:
            text.append(" <span class=s>… and more</span>")
            break
    head = f"<h3>{escape(title)}</h3><div class=s>{escape(numbers)}</div>"
    return f"{head}{_tiles(shards, sample)}<pre>{''.join(text)}</pre>"


def _tiles(shards: ShardSet, sample: int) -> str:
    rows = tiles_of(shards, sample)[:_TILES]
    if not len(rows):
        return ""
    ids = np.arange(rows.start, rows.stop, dtype=np.int64)
    pixels, failed = read_tiles(shards, ids)
    out = []
    for tile, record in zip(pixels.numpy(), shards.tiles(ids), strict=True):
        picture = Image.fromarray(np.ascontiguousarray(tile.transpose(1, 2, 0))).resize((_SIDE, _SIDE))
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG", quality=85)
        data = base64.b64encode(buffer.getvalue()).decode()
        caption = f"{place(record)}{', fails to decode' if failed and not tile.any() else ''}"
        out.append(
            f'<figure><img width="{_SIDE}" height="{_SIDE}" alt="" src="data:image/jpeg;base64,{data}">'
            f"<figcaption>{caption}</figcaption></figure>"
        )
    more = int(shards.samples["tiles"][sample]) - len(rows)
    return f"<div>{''.join(out)}{f'and {more} more' if more else ''}</div>"
