"""Plots of results. matplotlib is imported when something is drawn: an evaluation runs without it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_vita.evaluation.report.tables import total_of
from megatron_vita.evaluation.score import Tally, wilson

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#444444", "#999933")
"""Okabe and Ito's, apart for colour-blind readers too; markers differ besides."""
MARKERS = "os^Dv<>P"
GREY = "#555555"

Curves = Mapping[str, Sequence[tuple[int, Tally]]]
"""Label -> (length, answers counted), ascending."""


@dataclass(frozen=True, slots=True)
class Panel:
    """One grid of a heat map."""

    title: str
    columns: Sequence[str]
    """Names of the columns."""
    cells: Mapping[tuple[int, int], Tally]
    """(row, column) -> answers counted."""


def draw_heat_map(
    panels: Sequence[Panel],
    rows: Sequence[str],
    path: Path,
    *,
    title: str,
    x: str,
    y: str,
    chance: float | None = None,
) -> None:
    """Accuracy as colour and number in a cell of each row and column, below it right answers of questions.

    Args:
        panels: side by side, with the same rows.
        rows: names of the rows, top first.
        path: PNG to write.
        title: of the picture.
        x: what the columns are.
        y: what the rows are.
        chance: accuracy of a guess, marked in the colour bar.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

    widths = [len(panel.columns) for panel in panels]
    tall = len(rows) > 6  # then cells are flat, and their second line goes
    height = 1.75 + len(rows) * (0.42 if tall else 0.63)
    figure = Figure(figsize=(3.1 + (1.0 if tall else 1.25) * sum(widths) + 0.5 * len(widths), height), dpi=150)
    figure.set_layout_engine("constrained")
    grid = figure.subplots(1, len(panels), width_ratios=widths, sharey=True, squeeze=False)[0]
    image: Any = None
    for axes, panel in zip(grid, panels, strict=True):
        shares = np.full((len(rows), len(panel.columns)), np.nan)
        for place, tally in panel.cells.items():
            shares[place] = tally.accuracy
        image = axes.imshow(shares, vmin=0, vmax=1, cmap=colormaps["cividis"], aspect="auto")
        for (row, column), tally in panel.cells.items():
            ink = "black" if tally.accuracy > 0.55 else "white"
            style: dict[str, Any] = {"ha": "center", "va": "center", "color": ink}
            said = f"{tally.score:.3g} of {tally.count}"
            if tall:
                axes.text(column, row, f"{tally.accuracy:.0%}", fontsize=10, **style)
            else:
                axes.text(column, row - 0.08, f"{tally.accuracy:.0%}", fontsize=13, **style)
                axes.text(column, row + 0.24, said, fontsize=8, **style)
        axes.set_xticks(range(len(panel.columns)), [_with_total(panel, place) for place in range(len(panel.columns))])
        axes.set_xlabel(x)
        axes.set_title(panel.title, fontsize=11)
        axes.tick_params(length=0)
        axes.set_xticks(np.arange(1, len(panel.columns)) - 0.5, minor=True)
        axes.set_yticks(np.arange(1, len(rows)) - 0.5, minor=True)
        axes.grid(which="minor", color="white", linewidth=2)
        axes.tick_params(which="minor", length=0)
        for spine in axes.spines.values():
            spine.set_visible(False)
    grid[0].set_yticks(range(len(rows)), rows)
    grid[0].set_ylabel(y)
    bar = figure.colorbar(image, ax=list(grid), format=FuncFormatter(lambda value, _: f"{value:.0%}"), pad=0.02)
    bar.set_label("accuracy")
    if chance is not None:
        bar.ax.axhline(chance, color="white", linewidth=1.5)
        bar.set_label(f"accuracy (white line: chance, {chance:.0%})")
    bar.outline.set_visible(False)
    figure.suptitle(title, fontsize=13, x=0.01, ha="left")
    figure.savefig(path)


def _with_total(panel: Panel, column: int) -> str:
    """A column's name, and below it the accuracy of all its rows."""
    total = total_of(tally for (_, its), tally in panel.cells.items() if its == column)
    return f"{panel.columns[column]}\n(all: {total.accuracy:.1%})"


def plot_accuracy(
    axes: Axes, curves: Mapping[str, Sequence[tuple[int, Tally]]], *, chance: float | None = None
) -> None:
    """Accuracy with its 95% Wilson interval by a length, on a logarithmic axis of base 2.

    Args:
        axes: to draw into.
        curves: what to draw.
        chance: accuracy of a guess, a dotted line.
    """
    from matplotlib.ticker import FuncFormatter

    for number, (label, points) in enumerate(curves.items()):
        lengths = np.array([length for length, _ in points]) * 1.03 ** (number - (len(curves) - 1) / 2)  # no bar hides
        shares = np.array([tally.accuracy for _, tally in points])
        ends = np.array([wilson(tally.score, tally.count) for _, tally in points])
        axes.errorbar(
            lengths, shares, np.abs(ends - shares[:, None]).T, color=COLOURS[number % len(COLOURS)],
            marker=MARKERS[number % len(MARKERS)], capsize=3, linewidth=1.8, label=label,
        )  # fmt: skip
    if chance is not None:
        axes.axhline(chance, color=GREY, linewidth=0.8, linestyle=(0, (1, 2)))
        axes.annotate(
            "chance", (0, chance), (4, 3), xycoords=axes.get_yaxis_transform(), textcoords="offset points", fontsize=8,
            color=GREY,
        )  # fmt: skip
    axes.set_ylim(0, 1.04)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0%}"))
    axes.set_ylabel("accuracy (bars: 95% Wilson interval)")
    axes.legend(frameon=False, fontsize=9.5, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=min(4, len(curves)))
    length_axis(axes, sorted({length for points in curves.values() for length, _ in points}))


def length_axis(axes: Axes, lengths: Sequence[int]) -> None:
    """A logarithmic axis of base 2 with these lengths; see `plain`."""
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
    axes.set_xlim(lengths[0] / 1.3, lengths[-1] * 1.3)
    plain(axes)


def plain(axes: Axes) -> None:
    """Thin horizontal lines, and no frame above and on the right."""
    axes.grid(axis="y", color="#000000", alpha=0.12, linewidth=0.6)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def draw_curves(curves: Curves, path: Path, *, title: str, x: str) -> None:
    """A picture of `plot_accuracy`.

    Args:
        curves: what to draw.
        path: PNG to write.
        title: of the picture.
        x: what the lengths are.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.6, 4.7), dpi=150, layout="constrained")
    axes = figure.subplots()
    plot_accuracy(axes, curves)
    axes.set_xlabel(x)
    figure.suptitle(title, fontsize=13, x=0.01, ha="left")
    figure.savefig(path)


def draw_bars(bars: Mapping[str, Tally], path: Path, *, title: str) -> None:
    """Accuracy of each category as a bar with its 95% Wilson interval.

    Args:
        bars: name -> answers counted, top first.
        path: PNG to write.
        title: of the picture.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

    figure = Figure(figsize=(7.6, 1.4 + 0.34 * len(bars)), dpi=150, layout="constrained")
    axes = figure.subplots()
    shares = np.array([tally.accuracy for tally in bars.values()])
    ends = np.array([wilson(tally.score, tally.count) for tally in bars.values()])
    errors = np.abs(ends - shares[:, None]).T
    axes.barh(range(len(bars)), shares, xerr=errors, color=COLOURS[0], alpha=0.85, ecolor=GREY, capsize=2.5, height=0.7)
    axes.set_yticks(range(len(bars)), [f"{name} ({tally.count})" for name, tally in bars.items()])
    axes.set_ylim(len(bars) - 0.4, -0.6)
    axes.set_xlim(0, 1)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0%}"))
    axes.set_xlabel("accuracy (bars: 95% Wilson interval; in brackets: questions)")
    axes.grid(axis="x", color="#000000", alpha=0.12, linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.tick_params(axis="y", length=0)
    figure.suptitle(title, fontsize=13, x=0.01, ha="left")
    figure.savefig(path)
