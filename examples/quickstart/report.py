"""Plot the results of a quickstart run: loss, needle heat map, accuracy after each stage, a page of answers.

    python examples/quickstart/report.py --run DIR [--save DIR] [--results DIR ...] [--data DIR] [--output DIR]

Reads the ledgers `DIR/save/<stage>/ledger.jsonl` and every `results.jsonl` that tools/evaluate.py left under
`DIR/eval` (or the folders given with --results), and writes into `DIR/report`:

    loss.png      training loss over the steps of all stages
    needle.png    final model: accuracy by number of frames and depth of the marked frame, and with its tiles zeroed
    longer.png    final model: accuracy and prefill time by number of frames, far beyond the trained length
    answers.png   held-out pictures and videos with question, answer and verdict, drawn at random
    report.md     these and the table of accuracy after each stage
    accuracy.json the table's numbers

What a run has not produced yet is left out and said so.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import av
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from PIL import Image

from megatron_vita.evaluation.report.plots import (
    COLOURS,
    GREY,
    MARKERS,
    Panel,
    draw_heat_map,
    length_axis,
    plain,
    plot_accuracy,
)
from megatron_vita.evaluation.score import DEPTH_BANDS, RIGHT, UNREADABLE, Tally, depth_band, wilson

GREEN, RED = "#00795A", "#C04000"
"""Verdict colours: apart in lightness too, and always beside a sign, so that no reader depends on hue."""
SEED = 7
LONG = "long_needle"
"""What the names of sets beyond the trained length begin with."""
TRAINED_FRAMES = 64
"""Of the longest videos that were trained on."""

Result = Mapping[str, Any]


# ---------------------------------------------------------------------------------------------------- reading


def natural(text: str) -> list[Any]:
    """Sort key under which stage10 follows stage9."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", text) if part]


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The complete lines of a JSONL file; an incomplete last line is ignored."""
    text = path.read_text(encoding="utf-8")
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines() if line.strip()]


def read_ledgers(save: Path) -> dict[str, list[dict[str, Any]]]:
    """Stage name -> ledger lines, stages in natural order of their folders."""
    paths = sorted(save.glob("*/ledger.jsonl"), key=lambda path: natural(path.parent.name))
    return {path.parent.name: read_lines(path) for path in paths}


def read_results(folders: Iterable[Path]) -> list[dict[str, Any]]:
    """All result lines under the folders; a line that appears twice (same model, data, line, settings) counts once."""
    found = {}
    for folder in folders:
        for path in sorted(folder.rglob("results.jsonl")):
            for line in read_lines(path):
                found[line["name"], kind_of(line), line["line"], line["zero_tiles"], scaling_of(line)] = line
    return list(found.values())


def kind_of(result: Result) -> str:
    """Name of an evaluation set: its file's name without `eval_`."""
    return Path(result["data"]).stem.removeprefix("eval_")


def scaling_of(result: Result) -> str:
    """How positions were scaled for a question; "" as in training."""
    scaling = result.get("overrides", {}).get("rope_scaling")
    return f"{scaling['rope_type']} ×{scaling['factor']:g}".replace("yarn", "YaRN") if scaling else ""


def stages_of(results: Iterable[Result]) -> list[str]:
    """Models in natural order of their names."""
    return sorted({result["name"] for result in results}, key=natural)


# ---------------------------------------------------------------------------------------------------- loss


def smooth(losses: npt.NDArray[np.float64], span: float) -> npt.NDArray[np.float64]:
    """Exponential moving average of the logarithm, without the pull of its start; `span` in steps."""
    decay, mean, weight, out = 1 - 1 / span, 0.0, 0.0, np.empty(len(losses))
    for step, value in enumerate(np.log(losses)):
        mean, weight = decay * mean + (1 - decay) * value, decay * weight + (1 - decay)
        out[step] = mean / weight
    return np.exp(out)


def draw_loss(ledgers: Mapping[str, Sequence[Mapping[str, Any]]], path: Path) -> None:
    """Each step's loss, faint, and its moving average, over the stages one after the other."""
    figure = Figure(figsize=(10, 4.6), dpi=150, layout="constrained")
    axes = figure.subplots()
    start, middles = 0, []
    for number, (stage, lines) in enumerate(ledgers.items()):
        pairs = [(line["iteration"], line["loss"]) for line in lines if line["loss"] is not None]
        last = max((line["iteration"] for line in lines), default=0)
        if pairs:
            steps, losses = (np.asarray(column, dtype=float) for column in zip(*pairs, strict=True))
            losses = np.maximum(losses, 1e-6)  # a loss of 0 has no logarithm
            colour = COLOURS[number % len(COLOURS)]
            axes.plot(start + steps, losses, color=colour, alpha=0.25, linewidth=0.8)
            axes.plot(start + steps, smooth(losses, max(3.0, last / 40)), color=colour, linewidth=2.2)
        if number % 2:
            axes.axvspan(start, start + last, color="#000000", alpha=0.035, linewidth=0)
        if start:
            axes.axvline(start, color=GREY, linewidth=0.8, linestyle=(0, (4, 3)))
        middles.append((start + last / 2, stage, last))
        start += last
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(base=10, subs=(1.0, 2.0, 5.0), numticks=20))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_xlim(0, max(start, 1))
    axes.set_xlabel("optimizer step, counted through all stages")
    axes.set_ylabel("loss per labelled token (log scale)")
    plain(axes)
    for middle, stage, last in middles:
        narrow = last < 0.08 * start  # then only the name fits above it
        axes.text(
            middle, 1.015, stage + ("\n" if narrow else f"\n{last} steps"), transform=axes.get_xaxis_transform(),
            ha="center", va="bottom", fontsize=7.5 if narrow else 9.5, color="#222222", linespacing=1.25,
        )  # fmt: skip
    figure.suptitle("Training loss", fontsize=13, x=0.01, ha="left")
    figure.savefig(path)


# ---------------------------------------------------------------------------------------------------- needle


def needle_cells(results: Iterable[Result]) -> dict[tuple[int, int], Tally]:
    """(frames, depth band) -> answers counted, over the needle sets among the results."""
    cells: dict[tuple[int, int], list[Result]] = {}
    for result in results:
        if kind_of(result).startswith("needle"):
            fields = result["fields"]
            cells.setdefault((fields["frames"], depth_band(fields["depth"])), []).append(result)
    return {key: Tally.of(members) for key, members in cells.items()}


def draw_needle(results: Sequence[Result], name: str, path: Path) -> None:
    """Accuracy of one model by frames and depth; beside it the same questions with every tile zeroed, if asked."""
    panels = []
    for zero, title in ((False, "frames seen"), (True, "tiles zeroed")):
        if cells := needle_cells(r for r in results if r["zero_tiles"] == zero):
            frames = sorted({many for many, _ in cells})
            places = {(band, frames.index(many)): tally for (many, band), tally in cells.items()}
            panels.append(Panel(title, [str(many) for many in frames], places))
    step = 100 // DEPTH_BANDS
    bands = [f"{band * step}–{(band + 1) * step}%" for band in range(DEPTH_BANDS)]
    bands[0] += "\n(first frames)"
    bands[-1] += "\n(last frames)"
    title = f"“Which digit is marked?” after {name}"
    draw_heat_map(panels, bands, path, title=title, x="frames in the video", y="depth of the marked frame", chance=0.1)


# ---------------------------------------------------------------------------------------------------- longer


@dataclass(frozen=True, slots=True)
class LongPoint:
    """The questions about videos of one length."""

    frames: int
    tally: Tally
    tokens: float
    """Of a prompt, on average."""
    seconds: float
    """Of its prefill, the median."""

    @property
    def rate(self) -> float:
        """Tokens of a prompt a second."""
        return self.tokens / self.seconds


def long_curves(results: Iterable[Result]) -> dict[str, list[LongPoint]]:
    """Label -> points by number of frames, over the sets `long_needle_*`; positions as trained first."""
    groups: dict[tuple[str, int], list[Result]] = {}
    for result in results:
        if kind_of(result).startswith(LONG) and result["verdict"] != UNREADABLE:
            groups.setdefault((scaling_of(result), result["fields"]["frames"]), []).append(result)
    curves: dict[str, list[LongPoint]] = {}
    for (scaling, frames), members in sorted(groups.items()):
        tokens, seconds = ([r[key] for r in members] for key in ("prompt_tokens", "prefill_seconds"))
        tally = Tally.of(members)
        point = LongPoint(frames, tally, float(np.mean(tokens)), float(np.median(seconds)))
        curves.setdefault(scaling or "as trained", []).append(point)
    return curves


def draw_longer(curves: Mapping[str, Sequence[LongPoint]], name: str, path: Path) -> None:
    """Accuracy with its 95% Wilson interval, and time and rate of prefill, by number of frames."""
    figure = Figure(figsize=(11.5, 4.7), dpi=150, layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    ticks = sorted({point.frames for points in curves.values() for point in points})
    accuracies = {label: [(point.frames, point.tally) for point in points] for label, points in curves.items()}
    plot_accuracy(left, accuracies, chance=0.1)
    for number, points in enumerate(curves.values()):
        seconds = [point.seconds for point in points]
        style = {"color": COLOURS[number % len(COLOURS)], "marker": MARKERS[number % len(MARKERS)]}
        right.plot([point.frames for point in points], seconds, alpha=0.8, **style)
    right.set_yscale("log")
    times = [point.seconds for points in curves.values() for point in points]
    right.set_ylim(min(times) / 2.2, max(times) * 1.5)
    right.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    right.yaxis.set_minor_formatter(NullFormatter())
    right.set_ylabel("prefill of a prompt, seconds (median)")
    for frames_each in ticks:
        here = [p for points in curves.values() for p in points if p.frames == frames_each]
        rate = sum(p.rate for p in here) / len(here)
        right.annotate(
            f"{here[0].tokens:,.0f} tokens,\n{rate:,.0f} a second", (frames_each, min(p.seconds for p in here)),
            (4, -6), textcoords="offset points", fontsize=7, color=GREY, va="top",
        )  # fmt: skip
    length_axis(right, ticks)
    right.set_xlim(right=ticks[-1] * 1.9)  # room for the last rate
    for axes in (left, right):
        axes.axvspan(axes.get_xlim()[0], TRAINED_FRAMES, color="#000000", alpha=0.06, linewidth=0)
        axes.axvline(TRAINED_FRAMES, color=GREY, linewidth=0.9, linestyle=(0, (4, 3)))
        axes.set_xlabel("frames in the video")
    left.annotate(
        f"longest trained:\n{TRAINED_FRAMES} frames", (TRAINED_FRAMES, 0.3), (4, 0), textcoords="offset points",
        fontsize=8, color=GREY, va="center",
    )  # fmt: skip
    figure.suptitle(f"“Which digit is marked?” beyond the trained length, after {name}", fontsize=13, x=0.01, ha="left")
    figure.savefig(path)


def longer_table(curves: Mapping[str, Sequence[LongPoint]]) -> list[str]:
    """The curves as lines of a Markdown table."""
    rows = [
        "| positions | frames | tokens | questions | accuracy | prefill | tokens/s |",
        "|---|---|---|---|---|---|---|",
    ]
    for label, points in curves.items():
        for point in points:
            low, high = wilson(point.tally.right, point.tally.count)
            share = f"**{point.tally.accuracy:.0%}** ({low:.0%}–{high:.0%})"
            row = f"| {label} | {point.frames:,} | {point.tokens:,.0f} | {point.tally.count} | {share} "
            rows.append(row + f"| {point.seconds:.2f} s | {point.rate:,.0f} |")
    return rows


# ---------------------------------------------------------------------------------------------------- answers


@dataclass(frozen=True, slots=True)
class Shown:
    """One question of answers.png."""

    result: Result
    pictures: list[npt.NDArray[np.uint8]] = field(default_factory=list)
    """One picture, or all frames of a video; each [h, w, 3]."""


def load_shown(result: Result, data: Path) -> Shown:
    """The pixels behind a result line."""
    path = Path(result["data"])
    path = path if path.is_file() else data / path.name
    record = read_lines(path)[result["line"] - 1]
    pictures = [np.asarray(Image.open(path.parent / name).convert("RGB")) for name in record.get("images", [])]
    for name in record.get("videos", []):
        with av.open(str(path.parent / name)) as container:
            pictures += [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    return Shown(result, pictures)


def choose_shown(results: Sequence[Result], kind: str, many: int, data: Path) -> list[Shown]:
    """`many` questions of one set, drawn at random with a fixed seed, in file order."""
    members = sorted((r for r in results if kind_of(r) == kind), key=lambda r: r["line"])
    members = [r for r in members if r["verdict"] != UNREADABLE]
    chosen = np.random.default_rng(SEED).permutation(len(members))[:many]
    return [load_shown(members[i], data) for i in sorted(chosen)]


def montage(frames: Sequence[npt.NDArray[np.uint8]], columns: int) -> npt.NDArray[np.uint8]:
    """Frames in rows of `columns`, two light pixels between them; [h, w, 3]."""
    tall, wide = frames[0].shape[:2]
    rows = -(-len(frames) // columns)
    page = np.full((rows * (tall + 2) - 2, columns * (wide + 2) - 2, 3), 235, dtype=np.uint8)
    for number, frame in enumerate(frames):
        top, left = number // columns * (tall + 2), number % columns * (wide + 2)
        page[top : top + tall, left : left + wide] = frame
    return page


def draw_one(axes: Axes, shown: Shown, title: str) -> None:
    """A picture (or the frames of a video, sixteen in a line) with answer and verdict beneath."""
    result = shown.result
    right = result["verdict"] == RIGHT
    many = len(shown.pictures)
    page = shown.pictures[0] if many == 1 else montage(shown.pictures, min(many, 16))
    axes.imshow(page, interpolation="nearest", cmap="gray")
    axes.set_anchor("S")
    axes.set_xticks([])
    axes.set_yticks([])
    colour = GREEN if right else RED
    for spine in axes.spines.values():
        spine.set_color(colour)
        spine.set_linewidth(2.5)
    said = ("✓ " if right else "✗ ") + clip(result["answer"] or "(nothing)", 16)
    below = [title] if title else []
    if not right:
        below.append(f"should be: {clip(result['expected'], 16)}")
    axes.annotate(
        said, (0.5, 0), (0, -6), xycoords="axes fraction", textcoords="offset points", ha="center", va="top",
        fontsize=10, color=colour, fontweight="bold",
    )  # fmt: skip
    axes.annotate(
        "   ".join(below), (0.5, 0), (0, -20), xycoords="axes fraction", textcoords="offset points", ha="center",
        va="top", fontsize=8.5, color=GREY,
    )  # fmt: skip


def where_marked(result: Result) -> str:
    """Which frame of a needle video is marked, in words; nothing for a picture."""
    frames, depth = (result["fields"].get(key) for key in ("frames", "depth"))
    return "" if frames is None or depth is None else f"marked: frame {round(depth * (frames - 1)) + 1} of {frames}"


def clip(text: str, length: int) -> str:
    """Text on one line, shortened where it would run into its neighbour."""
    flat = " ".join(text.split())
    return flat if len(flat) <= length else flat[: length - 1] + "…"


def draw_answers(results: Sequence[Result], name: str, data: Path, path: Path) -> None:
    """Held-out images and videos with question and answer."""
    seen = [r for r in results if not r["zero_tiles"]]
    needles = sorted({kind_of(r) for r in seen if kind_of(r).startswith("needle")}, key=natural)
    blocks = [
        ("Single scans: “Which digit is this?”", choose_shown(seen, "digits", 16, data), 8, 1.0),
        ("Crops of the photographs: “Is this a flower or a temple?”", choose_shown(seen, "photos", 8, data), 8, 1.25),
    ]
    if needles:
        most = needles[-1]
        blocks.append(
            ("Videos, read line by line: “Which digit is marked?”", choose_shown(seen, most, 6, data), 2, 1.36)
        )
    blocks = [block for block in blocks if block[1]]
    heights = [block[3] * -(-len(block[1]) // block[2]) + 0.42 for block in blocks]
    figure = Figure(figsize=(12, 1.05 + 1.42 * sum(heights)), dpi=130)
    top_inch = 0.62
    figure.text(
        0.02, 1 - 0.22 / figure.get_figheight(), f"Held-out questions and answers after {name}", fontsize=15, va="top"
    )
    figure.text(
        0.98, 1 - 0.24 / figure.get_figheight(), "drawn at random; ✓ right, ✗ wrong (with the right answer)",
        fontsize=9.5, va="top", ha="right", color=GREY,
    )  # fmt: skip
    total = figure.get_figheight()
    for title, shown, columns, height in blocks:
        figure.text(0.02, 1 - (top_inch + 0.1) / total, title, fontsize=11, va="top", fontweight="bold")
        top_inch += 0.42
        rows = -(-len(shown) // columns)
        for number, one in enumerate(shown):
            row, column = divmod(number, columns)
            cell = 0.96 / columns
            picture = height * 1.42 - 0.52  # the rest of the cell is for two lines of text
            bottom = total - top_inch - row * height * 1.42 - picture
            axes = figure.add_axes((0.02 + column * cell + 0.06 * cell, bottom / total, 0.88 * cell, picture / total))
            draw_one(axes, one, where_marked(one.result))
        top_inch += rows * height * 1.42 + 0.42 * 0.42
    figure.savefig(path)


# ---------------------------------------------------------------------------------------------------- table


def accuracy_table(results: Sequence[Result]) -> tuple[str, list[dict[str, Any]]]:
    """Accuracy after each stage, as Markdown and as plain numbers."""
    groups: dict[tuple[str, bool], dict[str, list[Result]]] = {}
    for result in results:
        by_stage = groups.setdefault((kind_of(result), result["zero_tiles"]), {})
        by_stage.setdefault(result["name"], []).append(result)
    stages = stages_of(results)
    rows, numbers = [], []
    for kind, zero in sorted(groups, key=lambda key: (key[1], _length_rank(key[0]), natural(key[0]))):
        by_stage = groups[kind, zero]
        counts = sorted({len(members) for members in by_stage.values()})
        asked = f"{counts[0]}–{counts[-1]}" if len(counts) > 1 else str(counts[0])  # earlier stages may be asked fewer
        cells = []
        for stage in stages:
            if stage not in by_stage:
                cells.append("–")
                continue
            tally = Tally.of(by_stage[stage])
            low, high = wilson(tally.right, tally.count)
            cells.append(f"**{tally.accuracy:.1%}** ({low:.0%}–{high:.0%})")
            numbers.append({"stage": stage, "set": kind, "zero_tiles": zero} | tally.to_dict())
        label = kind.replace("_", " ") + (", tiles zeroed" if zero else "")
        rows.append([("long" if _length_rank(kind) else "short"), label, asked, *cells])
    header = ["context", "held-out set", "questions", *(f"after {stage}" for stage in stages)]
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = [
        "| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |" for row in [header, *rows]
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines), numbers


def _length_rank(kind: str) -> int:
    """0 for single pictures, 1 for videos."""
    return int(kind.startswith(("needle", "frame")))


# ---------------------------------------------------------------------------------------------------- all of it


def write_report(save: Path, results_from: Sequence[Path], data: Path, output: Path) -> list[str]:
    """Write every figure that the run has data for; returns descriptions of those without data."""
    output.mkdir(parents=True, exist_ok=True)
    ledgers = {stage: lines for stage, lines in read_ledgers(save).items() if lines}
    results = read_results(results_from)
    curves = long_curves(results)
    results = [result for result in results if not kind_of(result).startswith(LONG)]
    missing, page = [], ["# What this run did", ""]
    if ledgers:
        draw_loss(ledgers, output / "loss.png")
        page += ["## Loss", "", "![training loss over the stages](loss.png)", ""]
        page += ["| stage | steps | first loss | last loss (mean of last tenth) | time |", "|---|---|---|---|---|"]
        for stage, lines in ledgers.items():
            losses = [line["loss"] for line in lines if line["loss"] is not None] or [float("nan")]
            tail = losses[-max(1, len(losses) // 10) :]
            seconds = sum(line["seconds"] for line in lines)
            page.append(f"| {stage} | {len(lines)} | {losses[0]:.3f} | {sum(tail) / len(tail):.3f} | {seconds:.0f} s |")
        page.append("")
    else:
        missing.append(f"no loss curve: no <stage>/ledger.jsonl under {save}")
    if not results:
        missing.append(f"no accuracies: no results.jsonl under {', '.join(map(str, results_from))}")
    else:
        last = stages_of(results)[-1]
        final = [result for result in results if result["name"] == last]
        text, numbers = accuracy_table(results)
        (output / "accuracy.json").write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")
        print(text)
        page += ["## Accuracy on held-out data", "", "Exact match; in brackets the 95% Wilson interval.", "", text, ""]
        if needle_cells(final):
            draw_needle(final, last, output / "needle.png")
            page += ["## The marked frame", "", "![accuracy by frames and depth](needle.png)", ""]
        else:
            missing.append(f"no needle heat map: {last} was not asked a needle set")
        if curves:
            draw_longer(curves, last, output / "longer.png")
            page += ["## Longer than trained", "", "![accuracy and prefill time by frames](longer.png)", ""]
            page += [f"Training has videos of up to {TRAINED_FRAMES} frames. Two context-parallel ranks answer one"]
            page += [
                "question at a time. YaRN scales positions without further training; `make needle` asks without it too."
            ]
            page += [
                "Prefill is the time from a question to the first token of its answer, decoding the video included."
            ]
            page += ["", *longer_table(curves), ""]
        else:
            missing.append("no curve beyond the trained length: no long_needle set was asked")
        draw_answers(final, last, data, output / "answers.png")
        page += ["## Answers", "", "![pictures, questions and answers](answers.png)", ""]
    page += [f"Left out: {reason}." for reason in missing]
    (output / "report.md").write_text("\n".join(page).rstrip() + "\n", encoding="utf-8")
    return missing


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Draw what a quickstart run did.", allow_abbrev=False)
    parser.add_argument("--run", type=Path, required=True, help="folder of the run")
    parser.add_argument("--save", type=Path, help="folder of the stages, as checkpoint.save (default: RUN/save)")
    parser.add_argument("--results", type=Path, nargs="+", help="folders with results.jsonl (default: RUN/eval)")
    parser.add_argument("--data", type=Path, help="folder of the evaluation files (default: RUN/data)")
    parser.add_argument("--output", type=Path, help="folder to write to (default: RUN/report)")
    args = parser.parse_args(argv)
    if not args.run.is_dir():
        parser.error(f"{args.run}: no such folder")
    output = args.output or args.run / "report"
    save = args.save or args.run / "save"
    missing = write_report(save, args.results or [args.run / "eval"], args.data or args.run / "data", output)
    for reason in missing:
        print(f"left out: {reason}", file=sys.stderr)
    print(f"wrote {output / 'report.md'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
