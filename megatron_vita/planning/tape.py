"""Live bytes along a sequence of allocations: what all estimates of activation memory are made with."""

from __future__ import annotations

from collections.abc import Iterable


class Tape:
    """Tensors that live at a point of a step, by name, in bytes."""

    def __init__(self, **live: float) -> None:
        self._live: dict[str, float] = {}
        self.now = 0.0
        """Bytes that live."""
        self.peak = 0.0
        """Most that lived together since `restart`."""
        self.new(**live)

    def new(self, **sizes: float) -> None:
        """Allocate tensors, one after the other.

        Raises:
            ValueError: a tensor of that name lives already.
        """
        for name, size in sizes.items():
            if name in self._live:
                raise ValueError(f"{name} lives already")
            self._live[name] = size
            self.now += size
        self.peak = max(self.peak, self.now)

    def free(self, *names: str) -> None:
        """Free tensors; names that do not live are ignored: not every layout keeps every tensor."""
        for name in names:
            self.now -= self._live.pop(name, 0.0)

    def keep(self, names: Iterable[str]) -> None:
        """Free all others."""
        self.free(*(set(self._live) - set(names)))

    def brief(self, size: float) -> None:
        """Allocate something and free it at once."""
        self.peak = max(self.peak, self.now + size)

    def restart(self) -> None:
        """Forget the peak so far."""
        self.peak = self.now
