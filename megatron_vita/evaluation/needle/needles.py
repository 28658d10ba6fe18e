"""Needles: what is hidden, what is asked about it, and the answer. Generated, or from a file of the user's."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from megatron_vita.data.sample import MediaFile
from megatron_vita.errors import ConfigError
from megatron_vita.evaluation.needle.drawing import draw_number, drawn
from megatron_vita.evaluation.needle.grid import Grid

Kind = Literal["visual", "text"]
NEEDLE = "needle"
"""Task that judges the answers."""
HIDDEN: dict[Kind, str] = {"visual": "image", "text": "text"}
"""Key of a needles file that holds what is hidden."""
CITIES = (
    "Accra", "Bergen", "Cusco", "Dakar", "Edinburgh", "Fukuoka", "Ghent", "Hanoi", "Izmir", "Jaipur", "Krakow", "Lima",
    "Mombasa", "Nairobi", "Oslo", "Porto", "Quito", "Riga", "Sapporo", "Tunis", "Utrecht", "Valencia", "Windhoek",
    "Yerevan", "Zagreb",
)  # fmt: skip
NUMBER_QUESTION = (
    "One frame of the video is a white page with a number on it. Which number? Answer with the number alone."
)

_NEEDLE, _ORDER = 1, 2
"""Purposes of draws."""


@dataclass(frozen=True, slots=True)
class Needle:
    """Something to be found."""

    question: str
    answer: str
    text: str = ""
    """The sentence that is hidden in a text."""
    image: MediaFile | None = None
    """The picture that is hidden in a video."""


Choose = Callable[[float, int], Needle]
"""(depth, sample) -> the needle of that question."""


def read_needles(path: Path, kind: Kind, *, media_root: Path | None = None) -> list[Needle]:
    """Read a JSON Lines file of {"image" or "text", "question", "answer"}.

    Args:
        path: the file.
        kind: `visual` needles have an `image` (a path), `text` needles a `text`.
        media_root: folder that the images' paths are relative to; by default the file's own. They lie below it.

    Raises:
        ConfigError: naming file and line: a missing file or image, no JSON object, or a key that is missing.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error}). Check --needles.") from None
    root = (media_root or path.parent).resolve()
    found = [
        _needle(line, f"{path}, line {number}", kind, root) for number, line in enumerate(lines, 1) if line.strip()
    ]
    if not found:
        raise ConfigError(f"{path}: no needle in it. Check --needles.")
    return found


def _needle(line: str, where: str, kind: Kind, root: Path) -> Needle:
    try:
        record: Any = json.loads(line)
    except ValueError:
        record = None
    keys = (HIDDEN[kind], "question", "answer")
    if not isinstance(record, dict) or not all(isinstance(record.get(key), str) and record[key] for key in keys):
        raise ConfigError(f"{where}: must be a JSON object with the texts {', '.join(keys)}. Check --needles.")
    if kind == "text":
        return Needle(record["question"], record["answer"], text=" ".join(record["text"].split()))
    image = (root / record["image"]).resolve()
    if not image.is_relative_to(root) or not image.is_file():
        raise ConfigError(f"{where}: no picture {record['image']} below {root}. Check --needles and --media-root.")
    return Needle(record["question"], record["answer"], image=MediaFile(path=str(image)))


def given(needles: list[Needle], grid: Grid) -> Choose:
    """One of `needles`: at a depth each is taken once before any is taken again, in an order that is drawn."""

    def needle(depth: float, sample: int) -> Needle:
        order = grid.draw(depth, 0, _ORDER).permutation(len(needles))
        return needles[order[sample % len(order)]]

    return needle


def numbered_city(grid: Grid) -> Choose:
    """A sentence such as `The secret number of Lima is 504314.`"""

    def needle(depth: float, sample: int) -> Needle:
        draw = grid.draw(depth, sample, _NEEDLE)
        city, number = CITIES[int(draw.integers(len(CITIES)))], str(draw.integers(100_000, 1_000_000))
        question = f"What is the secret number of {city}? Answer with the number alone."
        return Needle(question, number, text=f"The secret number of {city} is {number}.")

    return needle


def numbered_page(grid: Grid, folder: Path) -> Choose:
    """A white page with a number of four digits, drawn once into `folder`."""

    def needle(depth: float, sample: int) -> Needle:
        number = str(grid.draw(depth, sample, _NEEDLE).integers(1000, 10_000))
        page = drawn(folder / f"{number}.png", partial(draw_number, number))
        return Needle(NUMBER_QUESTION, number, image=page)

    return needle
