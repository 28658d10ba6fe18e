"""Chooses the reader of a data file."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from megatron_vita.data.sources.media_store import compression_of, is_archive
from megatron_vita.data.sources.readers.archive_json import ArchiveJson
from megatron_vita.data.sources.readers.base import Reader
from megatron_vita.data.sources.readers.json_files import PEEK, JsonArray, JsonLines, json_form
from megatron_vita.data.sources.readers.packed import PackedJson
from megatron_vita.data.sources.readers.parquet import Parquet
from megatron_vita.data.sources.readers.webdataset import WebDataset
from megatron_vita.errors import ConfigError

KINDS: dict[str, str] = {
    "json": "one array of records; may be packed (gz, zst, xz, bz2)",
    "jsonl": "one record a line; may be packed",
    "parquet": "rows",
    "archive_json": "a zip or tar of JSON files",
    "wds": "a tar of samples in WebDataset's form",
}
"""Kinds of readers, beside `auto`."""


def open_reader(path: str | Path, kind: str = "auto", work: Path | None = None) -> Reader:
    """The reader of a file.

    Args:
        path: the data file.
        kind: one of KINDS, or `auto`: by content. An archive is `archive_json` then, never `wds`.
        work: folder for what is kept between runs (what was unpacked); none: a temporary one.

    Raises:
        ConfigError: no such file, or a kind that is not known or not in it.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"{path}: no such data file. Correct `data_paths` in the data mix, or fetch the dataset.")
    if kind not in ("auto", *KINDS):
        raise ConfigError(f"{path}: no reader {kind!r}. Choose auto, {', '.join(KINDS)}.")
    if kind == "wds":
        return WebDataset(path, work)
    status = path.stat()
    found = _kind(path, status.st_size, status.st_mtime_ns)
    if kind == "archive_json" or (kind == "auto" and found == "archive_json"):
        return ArchiveJson(path, work)
    if found == "archive_json":
        raise ConfigError(f"{path}: an archive, not {kind}. Unpack it, or set a `source:` that reads archive_json.")
    if found == "packed":
        return PackedJson(path, kind, work)
    plain: dict[str, type[JsonArray | JsonLines | Parquet]] = {
        "json": JsonArray,
        "jsonl": JsonLines,
        "parquet": Parquet,
    }
    return plain[found if kind == "auto" else kind](path)


@lru_cache(maxsize=1024)
def _kind(path: Path, size: int, time: int) -> str:
    """Kind of a file by its content, cached per size and time: a reader is opened for every chunk of records."""
    if is_archive(path):
        return "archive_json"
    with path.open("rb") as stream:
        head = stream.read(PEEK)
    if compression_of(head) is not None:
        return "packed"
    return "parquet" if head.startswith(b"PAR1") else json_form(head)


def prepare(path: str | Path, kind: str = "auto", work: Path | None = None, *, progress: bool = True) -> None:
    """Unpack what has no random access, once, before processes open the file.

    Args:
        path: the data file.
        kind: see `open_reader`.
        work: folder for what is kept between runs.
        progress: show bars for long ones.

    Raises:
        ConfigError: see `open_reader`.
        DataError: the container is damaged.
    """
    open_reader(path, kind, work).prepare(progress=progress)
