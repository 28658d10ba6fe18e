"""What a benchmark prints of one measurement."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Figure:
    """One measured number and its bar."""

    name: str
    measured: str
    bar: str = ""
    kept: bool | None = None
    """None: not judged."""

    def line(self) -> str:
        """For the table."""
        verdict = {True: ": kept", False: ": MISSED", None: ""}[self.kept]
        bar = f"bar {self.bar}{verdict}" if self.bar else ""
        return f"{self.name:66} {self.measured:44} {bar}".rstrip()
