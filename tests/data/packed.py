"""Small shard sets for tests: real PNG pictures, known tokens, any mix."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image

from megatron_vita.data.example import IGNORE_INDEX, Example, MediaItem, TileSlot
from megatron_vita.data.shards.manifest import Manifest, SourceCounts, TokenizerInfo
from megatron_vita.data.shards.writer.in_memory import ShardWriter
from megatron_vita.data.shards.writer.packing import pack
from megatron_vita.data.spec import PreprocessSpec

SPEC = PreprocessSpec(image_size=16, patch_size=4, max_tiles=4)
TOKENIZER = TokenizerInfo(sha256="t" * 64, vocab_size=500, pad_id=7)
SEQ_LENGTH = 96
CONTEXT = 3
"""Id of a context token."""


def png(value: int, side: int = 16) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (side, side), (value % 256, value // 256 % 256, 99)).save(stream, "PNG")
    return stream.getvalue()


def example(rng: np.random.Generator, tiles: int, text: int, value: int) -> Example:
    """`tiles` pictures of one tile each, in one colour that says which, with text between and after them."""
    tokens, slots = [int(rng.integers(10, 500))], []
    for index in range(tiles):
        slots.append(TileSlot(len(tokens), index, 0, 0, 1, 1))
        tokens += [CONTEXT] * SPEC.tokens_per_tile + [int(rng.integers(10, 500))]
    answer = len(tokens)
    tokens += rng.integers(10, 500, text).tolist()
    ids = np.array(tokens, dtype=np.int32)
    labels = np.full(len(ids), IGNORE_INDEX, dtype=np.int32)
    labels[answer - 1 : -1] = ids[answer:]
    media = tuple(MediaItem(png(value + index), 16, 16) for index in range(tiles))
    return Example(ids, labels, tuple(slots), media)


def examples(number: int, *, pictures: bool = True, seed: int = 0) -> list[Example]:
    rng = np.random.default_rng(seed)
    return [
        example(rng, int(rng.integers(0, 4)) if pictures else 0, int(rng.integers(1, 30)), 10 * index)
        for index in range(number)
    ]


def write(prefix: Path, items: list[Example], seq_length: int = SEQ_LENGTH) -> tuple[Manifest, list[list[int]]]:
    packs = pack([len(item.tokens) for item in items], seq_length)
    with ShardWriter(prefix, spec=SPEC, seq_length=seq_length, tokenizer=TOKENIZER, template_sha256="c" * 64) as writer:
        for one in packs:
            writer.add_pack([items[index] for index in one], [(0, index + 1) for index in one])
        manifest = writer.finish([SourceCounts(name="made", files=("made.json",), read=len(items), used=len(items))])
    return manifest, packs
