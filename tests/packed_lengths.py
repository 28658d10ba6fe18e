"""Document lengths of packed sequences like those of the training stages, for tests and benchmarks."""

from __future__ import annotations

import numpy as np

MIXES = ("text", "pictures", "videos", "pages and books", "one document")


def packed_documents(mix: str, length: int, *, count: int, seed: int = 0) -> list[tuple[int, ...]]:
    """`count` packed sequences of exactly `length` tokens; the last document of each is cut, or is the padding."""
    generator = np.random.default_rng(seed)
    out = []
    for _ in range(count):
        documents: list[int] = []
        while sum(documents) < length:
            documents.append(_document(mix, length, generator))
        documents[-1] -= sum(documents) - length
        out.append(tuple(documents))
    return out


def _document(mix: str, length: int, generator: np.random.Generator) -> int:
    """Tokens of one document. Pictures: up to 12 tiles and a thumbnail, 256 tokens each, with question and answer;
    videos: 8 to 128 frames of 264 tokens."""
    text = int(min(generator.lognormal(5.0, 1.0) + 20, 4000))
    if mix == "pictures":
        tiles = int(generator.choice([1, 3, 5, 7, 13], p=[0.4, 0.2, 0.15, 0.15, 0.1]))
        return 256 * tiles + 2 + text
    if mix == "videos":
        return int(264 * generator.integers(8, 129)) + text
    if mix == "pages and books":
        return int(generator.choice([800, 3000, 12000, 50000], p=[0.5, 0.3, 0.15, 0.05]) * generator.uniform(0.5, 1.5))
    return length if mix == "one document" else text
