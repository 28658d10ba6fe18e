"""A summary of results: one row for each part of an evaluation."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from megatron_vita.evaluation.report.buckets import BUCKETS, by_bucket
from megatron_vita.evaluation.results import Part, part_of
from megatron_vita.evaluation.score import DEPTH_BANDS, Tally, depth_band


def summarise(results: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row for each (model, set of questions, zero tiles, most frames), in order of appearance.

    A row is {model, name, task, data, zero_tiles, max_frames, count, right, unreadable, accuracy, low, high,
    unfinished}; `duration` and `category` (name -> tally) where lines carry these fields, and `depth_bands` (a list of
    tallies, first part first) where all carry a `depth`. `task` lists all where there are several.
    """
    groups: dict[Part, list[Mapping[str, Any]]] = {}
    for result in results:
        groups.setdefault(part_of(result), []).append(result)
    rows = []
    for (model, data, zero_tiles, max_frames), members in groups.items():
        tasks = ", ".join(dict.fromkeys(member["task"] for member in members))
        row = {"model": model, "name": members[0]["name"], "task": tasks, "data": data, "zero_tiles": zero_tiles}
        row |= {"max_frames": max_frames} | Tally.of(members).to_dict()
        for bucket in BUCKETS:
            if found := by_bucket(members, bucket):
                row[bucket] = {name: tally.to_dict() for name, tally in found.items()}
        row["unfinished"] = sum(not m["finished"] for m in members)
        depths = [m["fields"].get("depth") for m in members]
        if all(isinstance(depth, (int, float)) and 0 <= depth <= 1 for depth in depths):
            row["depth_bands"] = [
                Tally.of(m for m, d in zip(members, depths, strict=True) if depth_band(float(d)) == band).to_dict()
                for band in range(DEPTH_BANDS)
            ]
        rows.append(row)
    return rows


def table(rows: Iterable[Mapping[str, Any]]) -> str:
    """Summary rows as aligned text for people."""
    cells = [("model", "data", "frames", "tiles", "questions", "accuracy", "95% interval")]
    for row in rows:
        cells.append(
            (
                str(row["name"]),
                str(row["data"]),
                str(row["max_frames"] or ""),
                "zeroed" if row["zero_tiles"] else "seen",
                str(row["count"]) + (f" ({row['unreadable']} unreadable)" if row["unreadable"] else ""),
                f"{row['accuracy']:.1%}",
                f"{row['low']:.1%} to {row['high']:.1%}",
            )
        )
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells
    )
