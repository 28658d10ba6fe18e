"""Results as Markdown tables."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from megatron_vita.evaluation.report.buckets import by_bucket
from megatron_vita.evaluation.score import Tally, wilson

WIDE = 8
"""Most buckets that are columns; more of them are rows."""
NONE = "–"
"""A cell without a question."""

Setting = tuple[str, str]
"""(model, setting) of the rows of a table; the setting is empty where there is but one."""


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """An aligned Markdown table; a vertical bar in a cell is escaped. The first column is text, others are numbers."""
    cells = [[" ".join(cell.split()).replace("|", "\\|") for cell in row] for row in [header, *rows]]
    widths = [max(3, *(len(row[place]) for row in cells)) for place in range(len(header))]

    def line(row: Sequence[str]) -> str:
        padded = [c.rjust(w) if place else c.ljust(w) for place, (c, w) in enumerate(zip(row, widths, strict=True))]
        return "| " + " | ".join(padded) + " |"

    rule = "|".join("-" * (width + 1) + (":" if place else "-") for place, width in enumerate(widths))
    return "\n".join([line(cells[0]), f"|{rule}|", *map(line, cells[1:])])


def percent(tally: Tally | None) -> str:
    """Accuracy to a tenth of a percent, as papers print it."""
    return f"{100 * tally.accuracy:.1f}" if tally is not None and tally.count else NONE


def interval(tally: Tally) -> str:
    """The 95% Wilson interval, in percent."""
    low, high = wilson(tally.score, tally.count)
    return f"{100 * low:.1f}–{100 * high:.1f}"


def bucket_table(results: Mapping[Setting, Sequence[Mapping[str, Any]]], bucket: str) -> str:
    """Accuracy in percent: rows are settings (models, frames), columns the buckets and all of them together.

    Where there are more than WIDE buckets, these are the rows. The number of questions in a bucket is a range where the
    settings were not asked alike.

    Args:
        results: lines of each setting.
        bucket: see `by_bucket`; empty: only all together.
    """
    tallies = {setting: by_bucket(lines, bucket) if bucket else {} for setting, lines in results.items()}
    overall = {setting: Tally.of(lines) for setting, lines in results.items()}
    names = _merged([list(found) for found in tallies.values()])
    models = {model for model, _ in results}
    one = models.pop() if len(models) == 1 and all(name for _, name in results) else ""

    def label(setting: Setting) -> str:
        return setting[1] if one else ", ".join(filter(None, setting))

    counts = {name: {found[name].count if name in found else 0 for found in tallies.values()} for name in names}
    asked = {name: _range(found) for name, found in counts.items()}
    totals = _range({tally.count for tally in overall.values()})
    if len(names) <= WIDE:
        header = [one or "model", *names, "overall", "95% interval"]
        rows = [
            [label(s), *(percent(tallies[s].get(name)) for name in names), percent(overall[s]), interval(overall[s])]
            for s in results
        ]
        return markdown(header, [*rows, ["questions", *asked.values(), totals, ""]])
    header = [bucket, "questions", *(label(setting) for setting in results)]
    rows = [[name, asked[name], *(percent(found.get(name)) for found in tallies.values())] for name in names]
    rows.append(["overall", totals, *(percent(tally) for tally in overall.values())])
    rows.append(["95% interval", "", *(interval(tally) for tally in overall.values())])
    return markdown(header, rows)


def heat_table(cells: Mapping[tuple[str, str], Tally], rows: Sequence[str], columns: Sequence[str], corner: str) -> str:
    """A heat map as a table: in a cell the accuracy, right answers of questions, and the 95% Wilson interval.

    Args:
        cells: (row, column) -> answers counted.
        rows: names of the rows, top first.
        columns: names of the columns.
        corner: what rows and columns are.
    """

    def cell(tally: Tally | None) -> str:
        if tally is None or not tally.count:
            return NONE
        low, high = wilson(tally.score, tally.count)
        return f"{tally.accuracy:.0%} ({tally.score:g}/{tally.count}, {100 * low:.0f}–{100 * high:.0f}%)"

    body = [[row, *(cell(cells.get((row, column))) for column in columns)] for row in rows]
    total = [total_of(tally for (_, its), tally in cells.items() if its == column) for column in columns]
    return markdown([corner, *columns], [*body, ["all", *map(cell, total)]])


def total_of(tallies: Iterable[Tally]) -> Tally:
    """Several tallies together."""
    found = list(tallies)
    return Tally(*(sum(getattr(one, name) for one in found) for name in ("count", "right", "unreadable", "score")))


def _range(counts: set[int]) -> str:
    return f"{min(counts)}" if len(counts) == 1 else f"{min(counts)}–{max(counts)}"


def _merged(orders: Sequence[Sequence[str]]) -> list[str]:
    """All names of several lists; their order is that of the longest, and what it lacks follows."""
    return list(dict.fromkeys(name for order in sorted(orders, key=len, reverse=True) for name in order))
