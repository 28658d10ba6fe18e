"""Builders: what the makers of MovieNet-Summary and Comic-9K share. A record is written, or rejected with a reason."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_vita import log
from megatron_vita.data.rejects import code_of, counted
from megatron_vita.errors import DataError, VitaError

SUMMARY, REJECTS = "summary.jsonl", "summary.rejects.jsonl"


@dataclass
class Built:
    """What a builder wrote."""

    read: int = 0
    written: int = 0
    images: int = 0
    """Pictures that the written records name; frames of folders are not counted."""
    rejected: Counter[str] = field(default_factory=Counter)
    """Error code -> records. `read` is what is written and what is rejected."""
    unsorted: int = 0
    """Books whose pages are not in the order of their names; written as they are."""


def write_records(
    output: Path, records: Iterable[tuple[int, Callable[[], dict[str, Any]]]], built: Built | None = None
) -> Built:
    """Write summary.jsonl and summary.rejects.jsonl. Both appear when they are whole.

    Args:
        output: folder; made if need be.
        records: (number, what makes the record or raises a DataError) for each.
        built: counts to go on with.
    """
    built = built or Built()
    output.mkdir(parents=True, exist_ok=True)
    partial = {name: output / f".{name}.partial" for name in (SUMMARY, REJECTS)}
    with partial[SUMMARY].open("w", encoding="utf-8") as out, partial[REJECTS].open("w", encoding="utf-8") as rejects:
        for number, make in records:
            built.read += 1
            try:
                made = make()
            except DataError as error:
                code, message = code_of(error)
                built.rejected[code] += 1
                rejects.write(json.dumps({"line": number, "code": code, "message": message}, ensure_ascii=False) + "\n")
                continue
            built.written += 1
            built.images += len(made.get("images", ()))
            out.write(json.dumps(made, ensure_ascii=False) + "\n")
    for name, path in partial.items():
        path.replace(output / name)
    return built


def run(build: Callable[[], Built], output: Path) -> int:
    """Run a builder from its command line: print what was written, or the error; return the exit status."""
    log.configure()
    try:
        built = build()
    except VitaError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_status
    why = ", ".join(f"{count} {code}" for code, count in sorted(built.rejected.items()))
    if built.unsorted:
        print(f"{counted(built.unsorted, 'book has', 'books have')} pages out of the order of their names; written so")
    print(
        f"wrote {output / SUMMARY}: {built.written} of {counted(built.read, 'record')}, "
        f"{counted(built.images, 'picture')}" + (f"; rejected: {why}" if why else "")
    )
    return 0 if built.written else 1
