"""How much of a machine a conversion takes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Effort:
    """How a conversion works, as opposed to what it writes: its bytes do not depend on any of this."""

    workers: int | None = None
    """Threads, by default one more than there are cores (streams.default_workers)."""
    durable: bool = False
    """Wait until the disk has everything, which `cp` does not."""
    progress: bool = False
    """Show a bar on standard error."""


USUAL = Effort()
