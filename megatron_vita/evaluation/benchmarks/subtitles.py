"""Subtitles of Video-MME (SubRip) and LongVideoBench (JSON) as lines of text."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from megatron_vita.errors import DataError

_MOST = 16 << 20
"""Bytes of the largest file of subtitles."""
_TAG = re.compile(r"<[^<>]*>")
_TIMES = re.compile(r"^\s*\d+:\d\d:\d\d[,.]\d+\s*-->")


def read_subtitles(path: Path) -> list[str]:
    """The texts of a file of subtitles in order, markup removed, lines that repeat the last one left out.

    Args:
        path: `.srt`; or `.json`: a list of {"line"} or {"text"}, with the times beside.

    Raises:
        DataError: it cannot be read, or is neither.
    """
    try:
        with path.open("rb") as stream:
            data = stream.read(_MOST + 1)
        if len(data) > _MOST:
            raise ValueError(f"more than {_MOST} bytes")
        content = data.decode("utf-8-sig")
        found = _json(json.loads(content)) if path.suffix == ".json" else _srt(content)
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: no subtitles ({error}). Fetch the file again.") from None
    lines = (" ".join(_TAG.sub("", line).split()) for line in found)
    kept: list[str] = []
    for line in lines:
        if line and line != (kept[-1] if kept else ""):
            kept.append(line)
    return kept


def _srt(content: str) -> list[str]:
    blocks: list[str] = []
    block: list[str] = []
    lines = content.splitlines()
    for number, line in enumerate(lines):
        behind = lines[number + 1] if number + 1 < len(lines) else ""
        if _TIMES.match(line) or (line.strip().isdigit() and _TIMES.match(behind)):
            if block:
                blocks.append(" ".join(block))
            block = []
        else:
            block.append(line)
    return [*blocks, " ".join(block)]


def _json(entries: Any) -> list[str]:
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise ValueError("a list of objects is expected")
    return [str(entry.get("line", entry.get("text", ""))) for entry in entries]
