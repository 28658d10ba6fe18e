"""What a set is told besides its samples, and the rules that every Example of it must keep."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_vita.data.example import IGNORE_INDEX, Example, MediaItem
from megatron_vita.data.shards.format import REFERENCE
from megatron_vita.data.shards.manifest import TokenizerInfo
from megatron_vita.data.spec import PreprocessSpec
from megatron_vita.errors import DataError


@dataclass(frozen=True, kw_only=True, slots=True)
class SetInfo:
    """What the manifest says besides what was counted."""

    spec: PreprocessSpec
    """How the pictures were cut."""
    seq_length: int
    """Most tokens of a pack."""
    tokenizer: TokenizerInfo
    """Which tokenizer made the ids, and the id that pads."""
    template_sha256: str
    """Digest of the chat template."""
    media: str = "embed"
    """`embed` or `reference`."""
    packing: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Further facts for the manifest's packing block (`seed`, `inputs`)."""


def check_example(example: Example, info: SetInfo, where: str) -> None:
    """Prove that an Example keeps the format's rules.

    Raises:
        DataError: saying which it breaks.
    """
    length = len(example.tokens)
    if not length or len(example.labels) != length or example.labels[-1] != IGNORE_INDEX:
        raise DataError(
            f"{where}: {length} tokens, {len(example.labels)} labels; an Example has as many labels as tokens and "
            f"its last label is {IGNORE_INDEX}."
        )
    if int(example.tokens.min()) < 0 or int(example.tokens.max()) >= info.tokenizer.vocab_size:
        raise DataError(f"{where}: token ids must lie in 0..{info.tokenizer.vocab_size - 1} (the vocabulary).")
    firsts = [slot.first_token for slot in example.tiles]
    ends = [first + info.spec.tokens_per_tile for first in firsts]
    if ends and (firsts[0] < 0 or ends[-1] > length or any(a > b for a, b in zip(ends, firsts[1:], strict=False))):
        raise DataError(f"{where}: its tiles overlap, are out of order, or lie outside its {length} tokens.")
    if any(not 0 <= slot.media < len(example.media) for slot in example.tiles):
        raise DataError(f"{where}: a tile refers to a picture beyond its {len(example.media)}.")


def reference_record(item: MediaItem, path: Path, folder: Path, offset: int | None = None) -> bytes:
    """What stands in a set of `--media reference` for a picture that stays where it is.

    Args:
        item: the picture.
        path: the file that holds it.
        folder: the set's; paths are relative to it.
        offset: where in the file it begins, if it is not the whole file.
    """
    record: dict[str, Any] = {
        "path": os.path.relpath(path, folder),
        "bytes": len(item.data),
        "width": item.width,
        "height": item.height,
        "sha256": hashlib.sha256(item.data).hexdigest(),
    }
    if offset is not None:
        record["offset"] = offset
    return REFERENCE + json.dumps(record, ensure_ascii=False).encode("utf-8", "surrogateescape")
