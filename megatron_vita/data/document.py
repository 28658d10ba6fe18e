"""A Document: plain text for language modelling, where every token is learnt."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Document:
    """What the `text` mapper makes: no turns, no media, labels on all tokens."""

    text: str
    source: str = ""
    """Name of the dataset it came from."""
    line: int = 0
    """Record number inside its file, from 1."""

    @property
    def id(self) -> str:
        """Where the text came from, for messages and ledgers."""
        return f"{self.source}:{self.line}"
