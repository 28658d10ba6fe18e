"""One seed, and from it a number for every purpose: drawn by name, so that no layout changes what anybody draws."""

from __future__ import annotations

import hashlib

import torch


def derive(seed: int, *names: str | int) -> int:
    """A seed for one purpose: a 63-bit hash of the run's seed and the purpose's name.

    `derive(seed, "weights", "decoder.layers.3.mlp.linear_fc2.weight")` is the same on every rank and in every layout.
    """
    text = "\x1f".join(str(part) for part in (seed, *names))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator(seed: int, *names: str | int) -> torch.Generator:
    """A CPU random generator seeded by `derive`."""
    return torch.Generator().manual_seed(derive(seed, *names))
