"""Named random seeds, derived from the run's seed; the same on every rank and in every parallel layout."""

from __future__ import annotations

import hashlib

import torch


def derive(seed: int, *names: str | int) -> int:
    """Derive a 63-bit seed from the run's seed and a name, by SHA-256.

    Example: `derive(seed, "weights", "decoder.layers.3.mlp.linear_fc2.weight")`.
    """
    text = "\x1f".join(str(part) for part in (seed, *names))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator(seed: int, *names: str | int) -> torch.Generator:
    """A CPU generator seeded with `derive(seed, *names)`."""
    return torch.Generator().manual_seed(derive(seed, *names))
