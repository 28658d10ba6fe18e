"""Resources of a conversion."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Effort:
    """Threads, durability and progress of a conversion; the bytes it writes depend on none of them."""

    workers: int | None = None
    """Threads, by default one more than there are cores (streams.default_workers)."""
    durable: bool = False
    """Wait until the disk has everything, which `cp` does not."""
    progress: bool = False
    """Show a bar on standard error."""


USUAL = Effort()
