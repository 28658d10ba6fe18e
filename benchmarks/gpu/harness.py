"""Sections of the first hour: each a forked process with a time limit, whose figures are kept as they come."""

from __future__ import annotations

import json
import os
import select
import signal
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from sizes import Size


class Figure(NamedTuple):
    """One measured value."""

    name: str
    value: Any
    """A number, or a text."""
    unit: str = ""
    ok: bool | None = None
    """Whether it keeps its bound; None: it has none."""
    note: str = ""


@dataclass(frozen=True)
class Section:
    """A measurement that does not depend on others."""

    name: str
    limit_s: float
    """Seconds after which it is killed; its figures so far are kept."""
    about: str
    run: Callable[[Size, float], Iterator[Figure]]
    """Called in a process of its own with the size and the seconds that it should stay within; yields figures."""


@dataclass
class Result:
    """What came of a section."""

    name: str
    about: str
    status: str = "ok"
    """`ok`, `failed` (an error, or a figure beyond its bound), `timed out`, `died`, or `no time`."""
    seconds: float = 0.0
    figures: list[Figure] = field(default_factory=list)
    error: str = ""

    def to_json(self) -> dict[str, Any]:
        """For the report."""
        return {**vars(self), "figures": [figure._asdict() for figure in self.figures]}


def run_section(section: Section, size: Size, limit_s: float, log: Path) -> Result:
    """Run a section in a forked process. The caller has not initialised CUDA and has no threads.

    Args:
        section: what to run.
        size: passed on.
        limit_s: at most `section.limit_s`.
        log: file that takes what the process writes.
    """
    result = Result(section.name, section.about)
    if limit_s < min(section.limit_s, size.shortest_s):
        result.status = "no time"
        return result
    began = time.monotonic()
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        _child(section, size, 0.8 * limit_s, writing, log)
    os.close(writing)
    ended = False
    try:
        lines, ended = _read(reading, began + limit_s)
    finally:  # a section that hangs would compute for ever
        os.close(reading)
        if not ended:
            os.killpg(child, signal.SIGKILL)
        _, code = os.waitpid(child, 0)
    for line in lines:
        content = json.loads(line)
        if "error" in content:
            result.error = content["error"]
        else:
            result.figures.append(Figure(**content))
    result.seconds = time.monotonic() - began
    if not ended:
        result.status, result.error = "timed out", f"killed after {limit_s:.0f} s"
    elif code:
        result.status, result.error = "died", f"exit status {code}; the end of {log.name}:\n{_tail(log)}"
    elif result.error or any(figure.ok is False for figure in result.figures):
        result.status = "failed"
    return result


def _child(section: Section, size: Size, within_s: float, writing: int, log: Path) -> None:
    """The forked process: never returns."""
    code = 1
    try:
        os.setsid()  # a group of its own: what it forks is killed with it
        with log.open("w") as file:
            for number in (1, 2):
                os.dup2(file.fileno(), number)

            def tell(content: dict[str, Any]) -> None:
                os.write(writing, (json.dumps(content) + "\n").encode())

            try:
                for figure in section.run(size, within_s):
                    tell(figure._asdict())
            except BaseException:
                tell({"error": traceback.format_exc()})
        code = 0
    finally:
        os._exit(code)


def _read(reading: int, deadline: float) -> tuple[list[str], bool]:
    """Complete lines from a pipe, and whether it was closed before the deadline."""
    text = b""
    waiting = select.poll()  # select.select takes no file number above 1,023
    waiting.register(reading, select.POLLIN)
    while waiting.poll(1000 * max(0.0, deadline - time.monotonic())):
        read = os.read(reading, 65536)
        if not read:
            return text.decode().splitlines(), True
        text += read
    return text[: text.rfind(b"\n") + 1].decode().splitlines(), False


def _tail(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-15:])


def markdown(title: str, header: Sequence[str], results: Sequence[Result]) -> str:
    """The report for people."""
    lines = [f"# {title}", "", *header, ""]
    lines += ["| section | status | seconds |", "| --- | --- | --- |"]
    lines += [f"| {one.name} | {one.status} | {one.seconds:.1f} |" for one in results]
    for one in results:
        lines += ["", f"## {one.name}", "", f"{one.about} **{one.status}**, {one.seconds:.1f} s.", ""]
        if one.figures:
            lines += ["| figure | value | |", "| --- | --- | --- |"]
            lines += [_row(figure) for figure in one.figures]
        if one.error:
            lines += ["", "```", one.error.rstrip(), "```"]
    return "\n".join(lines) + "\n"


def _row(figure: Figure) -> str:
    value = f"{figure.value:,.4g}" if isinstance(figure.value, float) else str(figure.value)
    verdict = {True: "ok", False: "**BEYOND ITS BOUND**", None: ""}[figure.ok]
    remark = ", ".join(filter(None, (verdict, figure.note)))
    return f"| {figure.name} | {value} {figure.unit} | {remark} |".replace("  ", " ")
