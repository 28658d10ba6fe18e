"""The report of an evaluation: report.md and its plots, from the lines of its results."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from megatron_vita.evaluation.report.buckets import BUCKETS, by_bucket
from megatron_vita.evaluation.report.plots import Curves, Panel, draw_bars, draw_curves, draw_heat_map
from megatron_vita.evaluation.report.tables import Setting, bucket_table, heat_table
from megatron_vita.evaluation.score import UNREADABLE, Tally
from megatron_vita.files import write_atomic

Result = Mapping[str, Any]
_FILES = (".json", ".jsonl", ".parquet")
LENGTHS = {"visual": "frames", "text": "tokens"}
"""Kind of needle -> field of its haystack's length."""


def write_report(output: Path, results: Sequence[Result]) -> bool:
    """Write `output/report.md` and the PNGs that it shows.

    Args:
        output: an existing folder.
        results: lines of an evaluation, those of needles among them.

    Returns:
        Whether plots could be drawn: False, if matplotlib is not installed.
    """
    report = _Report(output, find_spec("matplotlib") is not None)
    names = _names(results)
    plain = [result for result in results if not result["fields"].get("needle")]
    sets = _grouped(plain, lambda result: result["data"])
    titles = _short({data: Path(data).stem if data.endswith(_FILES) else data for data in sets})
    for data, lines in sets.items():
        _write_set(report, titles[data], lines, names)
    needles = [result for result in results if result["fields"].get("needle")]
    for (kind, model), lines in _grouped(needles, lambda r: (r["fields"]["needle"], r["model"])).items():
        _write_needles(report, kind, names[model], lines)
    unreadable = sum(result["verdict"] == UNREADABLE for result in results)
    cut = sum(not result["finished"] for result in results)
    if unreadable:
        report.say(
            f"{unreadable} of {len(results)} questions could not be read and count as wrong (see results.jsonl)."
        )
    if cut:
        report.say(f"{cut} of {len(results)} answers were cut at their longest (--max-new-tokens).")
    if not report.draws:
        report.say("No plots: matplotlib is not installed (pip install 'megatron-vita[evaluate]').")
    report.save()
    return report.draws


class _Report:
    """Paragraphs and plots of report.md."""

    def __init__(self, output: Path, draws: bool) -> None:
        self._output, self.draws = output, draws
        self._paragraphs = ["# Evaluation"]

    def say(self, *paragraphs: str) -> None:
        self._paragraphs += paragraphs

    def draw(self, name: str, about: str, draw: Callable[[Path], None]) -> None:
        """Draw a plot as `NAME.png`, if plots can be drawn."""
        if self.draws:
            file = re.sub(r"[^\w.-]+", "_", name).strip("_") + ".png"
            draw(self._output / file)
            self.say(f"![{about}]({file})")

    def save(self) -> None:
        write_atomic(self._output / "report.md", "\n\n".join(self._paragraphs) + "\n")


def _write_set(report: _Report, title: str, lines: Sequence[Result], names: Mapping[str, str]) -> None:
    """A table for each kind of bucket: rows are models and numbers of frames."""
    models = list(dict.fromkeys(result["model"] for result in lines))
    groups = _grouped(lines, lambda r: (models.index(r["model"]), r["zero_tiles"], r.get("max_frames") or 0))
    swept = any(frames for _, _, frames in groups)
    settings: dict[Setting, list[Result]] = {}
    for (model, zero, frames), found in sorted(groups.items()):
        shown = f"{frames:,} frames" if frames else "frames as trained" if swept else ""
        said = [shown, "tiles zeroed" if zero else ""]
        settings[names[models[model]], ", ".join(filter(None, said))] = found
    used = [bucket for bucket in BUCKETS if any(by_bucket(found, bucket) for found in settings.values())]
    report.say(f"## {title}", f"Task {', '.join(sorted({r['task'] for r in lines}))}; accuracy in percent.")
    for bucket in used or [""]:
        report.say(bucket_table(settings, bucket))
    unclear = sum("extracted" in result and result["extracted"] is None for result in lines)
    if unclear:
        report.say(f"Of {unclear} of {len(lines)} answers no option or value could be inferred; they are wrong.")
    seen = [result for result in lines if not result["zero_tiles"] and result.get("max_frames")]
    if len({result["max_frames"] for result in seen}) > 1:
        curves = _sweeps(seen, names)
        about = f"{title}: accuracy by most frames of a video"
        report.draw(f"sweep_{title}", about, lambda path: draw_curves(curves, path, title=title, x="most frames"))
    if "category" in used and len(settings) == 1:
        (found,) = settings.values()
        bars = by_bucket(found, "category")
        report.draw(f"categories_{title}", f"{title}: accuracy by category", lambda p: draw_bars(bars, p, title=title))


def _sweeps(lines: Sequence[Result], names: Mapping[str, str]) -> Curves:
    """Label -> (most frames, answers counted): a curve for each model; of one model also for each duration."""
    models = _grouped(lines, lambda r: r["model"])
    curves = {names[model]: _by_length(found, lambda r: r["max_frames"]) for model, found in models.items()}
    if len(curves) > 1:
        return curves
    (found,) = models.values()
    durations = list(by_bucket(found, "duration"))
    by_frames = _grouped(found, lambda r: r["max_frames"])
    for name in durations:
        points = [(frames, by_bucket(some, "duration").get(name)) for frames, some in sorted(by_frames.items())]
        curves[name] = [(frames, tally) for frames, tally in points if tally is not None]
    return {"all": curves.pop(next(iter(curves))), **curves} if durations else curves


def _by_length(lines: Iterable[Result], length: Callable[[Result], int]) -> list[tuple[int, Tally]]:
    return [(key, Tally.of(found)) for key, found in sorted(_grouped(lines, length).items())]


def _write_needles(report: _Report, kind: str, model: str, lines: Sequence[Result]) -> None:
    """Heat map of depth by length, as table and plot."""
    field = LENGTHS[kind]
    depths = sorted({result["fields"]["depth"] for result in lines})
    rows = [f"{depth:.1%}".replace(".0%", "%") for depth in depths]
    panels = []
    report.say(f"## Needle, {kind}: {model}", "In a cell: accuracy (right answers / questions, 95% Wilson interval).")
    both = sorted(_grouped(lines, lambda r: r["zero_tiles"]).items())
    for zero, found in both:
        lengths = sorted({result["fields"][field] for result in found})
        columns = [f"{length:,}" for length in lengths]
        cells = {
            (depths.index(depth), lengths.index(length)): Tally.of(some)
            for (depth, length), some in _grouped(found, lambda r: (r["fields"]["depth"], r["fields"][field])).items()
        }
        title = "tiles zeroed" if zero else f"{field} seen" if len(both) > 1 else ""
        panels.append(Panel(title, columns, cells))
        if zero:
            report.say("With all tiles zeroed:")
        named = {(rows[row], columns[column]): tally for (row, column), tally in cells.items()}
        report.say(heat_table(named, rows, columns, f"depth \\ {field}"))
    report.draw(
        f"needle_{kind}_{model}",
        f"accuracy by {field} and depth",
        lambda path: draw_heat_map(
            panels, rows, path, title=f"{kind.capitalize()} needle: {model}", x=field, y="depth of the needle"
        ),
    )


def _grouped(results: Iterable[Result], key: Callable[[Result], Any]) -> dict[Any, list[Result]]:
    """Results by a key, in order of appearance."""
    groups: dict[Any, list[Result]] = {}
    for result in results:
        groups.setdefault(key(result), []).append(result)
    return groups


def _names(results: Iterable[Result]) -> dict[str, str]:
    """Path -> name of each model; the path itself where two have one name."""
    return _short({result["model"]: result["name"] for result in results})


def _short(names: Mapping[str, str]) -> dict[str, str]:
    """Path -> its short name, or the path itself where another has the same one."""
    return {path: name if list(names.values()).count(name) == 1 else path for path, name in names.items()}
