"""The manifest of a shard set: what was packed, from what, with which settings, and the digest of every file."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_vita.config import IMAGE_NORMS
from megatron_vita.data.example import IGNORE_INDEX, Example, MediaItem
from megatron_vita.data.shards.format import REFERENCE
from megatron_vita.data.spec import PreprocessSpec
from megatron_vita.errors import ConfigError, DataError

FORMAT_VERSION = 3
RESAMPLE = "bicubic"
"""The one filter that tiles are resized with (what the published image processors use)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenizerInfo:
    """Which tokenizer made the ids."""

    sha256: str
    """Digest of the tokenizer's files."""
    vocab_size: int
    """Ids are below this."""
    pad_id: int = 0
    """Id that pads a packed sequence; it carries no label and no document attends to it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceCounts:
    """One dataset's part of the set. `read` = `used` + all of `rejected`."""

    name: str
    files: tuple[str, ...] = ()
    """Files as the data mix names them."""
    read: int = 0
    """Records offered (after ratio and num)."""
    used: int = 0
    """Records that became Examples in a pack."""
    rejected: Mapping[str, int] = field(default_factory=dict)
    """Error code -> records; each has a line in the rejects file."""
    truncated: int = 0
    """Records that were used, but shortened."""
    tokens: int = 0
    """Tokens of its Examples."""
    tiles: int = 0
    """Tiles of its Examples."""
    cleaned: int = 0
    """Answers of its Examples that lost leading line breaks."""
    dropped: int = 0
    """Turns of its Examples that the repairs of its table row removed (`drop_bad_role` and others)."""
    tags_as_text: int = 0
    """Records whose questions spell `<image>` or `<video>` without such a medium, in a source that may have some. (Not
    written down where it is 0.)"""
    key: str = ""
    """Digest of the data file, its form and all settings that decide its Examples: a set with the same key holds
    Examples that need not be compiled again."""


@dataclass(frozen=True, slots=True)
class Reject:
    """One record that is not in the set, and why: a line of the rejects file."""

    source: str
    """Name of the dataset in the mix."""
    line: int
    """Record number inside its file, from 1."""
    code: str
    """Error code, one word."""
    message: str
    """What was wrong, for people; begins with the file."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """Everything a reader must know before it opens a shard. `PREFIX.json` is this, in canonical JSON."""

    format_version: int = FORMAT_VERSION
    seq_length: int
    """Most tokens of a pack."""
    layout: str
    """Token layout of pictures and videos."""
    tokenizer: TokenizerInfo
    template_sha256: str
    """Digest of the chat template."""
    image: Mapping[str, Any]
    """size, patch, tokens_per_tile, mean, std, min_tiles, max_tiles, resample; and norm, the name of mean and std."""
    video: Mapping[str, Any]
    """max_frames, max_fps, timestamps; decoder, its name and version, where the set has media."""
    packing: Mapping[str, Any]
    """policy, seed, fill."""
    media: str
    """`embed`: the bytes are in the set; `reference`: pictures are paths; `none`: no media and tiles files."""
    sources: tuple[SourceCounts, ...]
    totals: Mapping[str, int]
    """packs, samples, tokens, labels (that carry loss), tiles, media, read, rejected, truncated, cleaned, dropped."""
    files: Mapping[str, Mapping[str, Any]]
    """Suffix behind the prefix (`tokens.bin`) -> bytes, sha256. The prefix itself is not part of the digest."""
    digest: str
    """SHA-256 of all of the above: names this set in checkpoints and seeds its order."""

    @property
    def spec(self) -> PreprocessSpec:
        """The settings that cut the pictures into tiles."""
        return PreprocessSpec(
            layout=self.layout,
            image_size=self.image["size"],
            patch_size=self.image["patch"],
            min_tiles=self.image["min_tiles"],
            max_tiles=self.image["max_tiles"],
            image_norm=self.image["norm"],
            max_frames=self.video["max_frames"],
            max_fps=self.video["max_fps"],
            video_timestamps=self.video.get("timestamps", False),
        )

    @property
    def tokens_per_tile(self) -> int:
        """Context tokens of one tile."""
        return int(self.image["tokens_per_tile"])

    def dumps(self) -> str:
        """Canonical JSON: the same manifest gives the same bytes."""
        return _canonical(self._values())

    def _values(self) -> dict[str, Any]:
        values = dataclasses.asdict(self)
        for source in values["sources"]:
            if not source["tags_as_text"]:
                del source["tags_as_text"]
        return values

    def sealed(self) -> Manifest:
        """The manifest with its digest computed."""
        values = self._values()
        values.pop("digest")
        return dataclasses.replace(self, digest=hashlib.sha256(_canonical(values).encode()).hexdigest())


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
    video_decoder: str = ""
    """Name and version of what decoded the videos."""
    packing: Mapping[str, Any] = field(default_factory=dict)
    """Further facts for the manifest's packing block (`seed`, `inputs`)."""


def image_block(spec: PreprocessSpec) -> dict[str, Any]:
    """The manifest's `image` block for some settings."""
    mean, std = IMAGE_NORMS[spec.image_norm]
    return {
        "size": spec.image_size,
        "patch": spec.patch_size,
        "tokens_per_tile": spec.tokens_per_tile,
        "mean": list(mean),
        "std": list(std),
        "norm": spec.image_norm,
        "min_tiles": spec.min_tiles,
        "max_tiles": spec.max_tiles,
        "resample": RESAMPLE,
    }


def load_manifest(prefix: str | Path) -> Manifest:
    """Read `PREFIX.json` and prove it whole.

    Raises:
        ConfigError: there is no such shard set.
        DataError: the manifest is damaged, edited, or of another format version.
    """
    path = Path(f"{prefix}.json")
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        raise ConfigError(
            f"no packed shards at {prefix}: {path} does not exist. Give what preprocess_data.py got as --output."
        ) from None
    except OSError as error:
        raise DataError(f"cannot read {path}: {error}") from None
    damaged = f"{path} is damaged or was edited by hand. Preprocess again, or restore it from its backup"
    try:
        values = json.loads(text)
        version = values["format_version"]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{damaged} ({error}).") from None
    if version != FORMAT_VERSION:
        raise DataError(
            f"{path} has format version {version}, this program reads {FORMAT_VERSION}. "
            "Preprocess again, or use the release that wrote it."
        )
    try:
        values["tokenizer"] = TokenizerInfo(**values["tokenizer"])
        values["sources"] = tuple(
            SourceCounts(**{**source, "files": tuple(source["files"])}) for source in values["sources"]
        )
        manifest = Manifest(**values)
        intact = manifest.sealed().digest == manifest.digest and manifest.dumps().encode() == text
    except (KeyError, TypeError) as error:
        raise DataError(f"{damaged} ({error}).") from None
    if not intact:
        raise DataError(f"{damaged} (its digest does not match).")
    return manifest


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


def _canonical(values: Any) -> str:
    return json.dumps(values, indent=1, sort_keys=True, ensure_ascii=False) + "\n"
