"""Intermediate shards: the Examples that one process made of one chunk of records, in one file, written atomically.

A picture that lies on disk already, as a file or as a region of one, is stored as a reference to that region; only what
exists nowhere else (video frames, bytes of parquet rows and of data URIs) is written.

    [tokens labels (media) of each Example]  tables of EXAMPLE, SLOT, MEDIUM  JSON {paths, rejects, notes}  footer
"""

from __future__ import annotations

import contextlib
import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_vita.data.example import IGNORE_INDEX, Example
from megatron_vita.errors import DataError

EXAMPLE = np.dtype(
    [
        ("line", "<i8"),
        ("start", "<i8"),  # of its tokens in the file; its labels follow
        ("tokens", "<i4"),
        ("labelled", "<i4"),
        ("tiles", "<i4"),
        ("media", "<i4"),
        ("bytes", "<i8"),  # of all its media
        ("shortened", "<i4"),
        ("cleaned", "<i4"),
        ("dropped", "<i4"),
    ]
)
SLOT = np.dtype([(name, "<i4") for name in ("first_token", "media", "row", "col", "rows", "cols", "thumbnail")])
MEDIUM = np.dtype(
    [
        ("width", "<i4"),
        ("height", "<i4"),
        ("frame", "<i4"),
        ("path", "<i4"),  # number of the file that holds it; -1: this one
        ("offset", "<i8"),
        ("size", "<i8"),
        ("stamp", "<i8"),  # of the file when it was looked at; -1: not needed
        ("crc32", "<i8"),  # where it is known already, else -1
    ]
)
_FOOTER = np.dtype([("magic", "S8"), ("tables", "<i8"), *((name, "<i8") for name in ("examples", "slots", "media"))])
_MAGIC = b"VITASPL3"


@dataclass(frozen=True, slots=True)
class Region:
    """Bytes that lie in a file already."""

    path: str
    offset: int
    size: int
    stamp: int = -1
    """Modification time in nanoseconds when it was looked at; -1: the checksum says more."""
    crc32: int = -1
    """Checksum, where it is known."""


Body = bytes | Region
"""What a set will hold for one medium."""


class ChunkWriter:
    """Writes one intermediate shard under a temporary name; `publish` gives it its own."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
        self._stream = self._partial.open("wb")
        self._examples: list[tuple[int, ...]] = []
        self._slots: list[tuple[int, ...]] = []
        self._media: list[tuple[int, ...]] = []
        self._paths: dict[str, int] = {}
        self._rejects: list[tuple[int, str, str]] = []
        self._notes: Counter[str] = Counter()

    def add(
        self,
        line: int,
        example: Example,
        bodies: Sequence[Body],
        *,
        shortened: bool = False,
        cleaned: int = 0,
        dropped: int = 0,
    ) -> int:
        """Append an Example; `bodies` are the bytes of its media, or where they lie. Returns its number in the file."""
        start = place = self._stream.tell()
        tokens = np.ascontiguousarray(example.tokens, dtype="<i4")
        labels = np.ascontiguousarray(example.labels, dtype="<i4")
        self._stream.write(tokens.data)
        self._stream.write(labels.data)
        place += tokens.nbytes + labels.nbytes
        total = 0
        for item, body in zip(example.media, bodies, strict=True):
            shape = (item.width, item.height, int(item.frame))
            if isinstance(body, Region):
                path = self._paths.setdefault(body.path, len(self._paths))
                self._media.append((*shape, path, body.offset, body.size, body.stamp, body.crc32))
                total += body.size
            else:
                self._stream.write(body)
                self._media.append((*shape, -1, place, len(body), -1, -1))
                place += len(body)
                total += len(body)
        self._slots += [(s.first_token, s.media, s.row, s.col, s.rows, s.cols, s.thumbnail) for s in example.tiles]
        counts = (len(tokens), int(np.count_nonzero(labels != IGNORE_INDEX)), len(example.tiles), len(bodies))
        self._examples.append((line, start, *counts, total, int(shortened), cleaned, dropped))
        return len(self._examples) - 1

    def reject(self, line: int, code: str, message: str) -> None:
        """Append a rejected record."""
        self._rejects.append((line, code, message))

    def note(self, what: str) -> None:
        """Count a note for the report at the end of the run."""
        self._notes[what] += 1

    def publish(self) -> None:
        """Write the tables and give the file its name. From here on it survives a power failure too."""
        tables = self._stream.tell()
        text = json.dumps({"paths": list(self._paths), "rejects": self._rejects, "notes": self._notes})
        for rows, dtype in ((self._examples, EXAMPLE), (self._slots, SLOT), (self._media, MEDIUM)):
            self._stream.write(np.array(rows, dtype=dtype).tobytes())
        self._stream.write(text.encode())
        footer = (_MAGIC, tables, len(self._examples), len(self._slots), len(self._media))
        self._stream.write(np.array([footer], dtype=_FOOTER).tobytes())
        self._stream.flush()
        os.fsync(self._stream.fileno())
        self._stream.close()
        self._partial.replace(self._path)

    def abort(self) -> None:
        """Remove what was written."""
        with contextlib.suppress(OSError):  # what a full disk does not take
            self._stream.close()
        self._partial.unlink(missing_ok=True)


class ChunkFile:
    """Reads one intermediate shard: its tables at once, its Examples on demand."""

    def __init__(self, path: Path) -> None:
        """Open an intermediate shard.

        Raises:
            DataError: it is missing or damaged.
        """
        self._descriptor = -1
        try:
            self._descriptor = os.open(path, os.O_RDONLY)
            size = os.fstat(self._descriptor).st_size - _FOOTER.itemsize
            footer = np.frombuffer(os.pread(self._descriptor, _FOOTER.itemsize, size), dtype=_FOOTER)[0]
            if footer["magic"] != _MAGIC:
                raise ValueError("no footer")
            tables = os.pread(self._descriptor, size - int(footer["tables"]), int(footer["tables"]))
            place = 0
            found = []
            for dtype, name in ((EXAMPLE, "examples"), (SLOT, "slots"), (MEDIUM, "media")):
                found.append(np.frombuffer(tables, dtype=dtype, count=int(footer[name]), offset=place))
                place += found[-1].nbytes
            text = json.loads(tables[place:])
        except OSError as error:
            self.close()
            raise DataError(
                f"{path} cannot be read ({error.strerror}). Repair that, and run again with --resume."
            ) from None
        except (ValueError, IndexError) as error:
            self.close()
            raise DataError(f"{path} is damaged ({error}). Run again without --resume.") from None
        self.path = path
        self.examples, self.slots, self.media = found
        self.paths: list[str] = text["paths"]
        self.rejects: list[tuple[int, str, str]] = [tuple(one) for one in text["rejects"]]
        self.notes: dict[str, int] = text["notes"]
        self._slot_ends = np.cumsum(self.examples["tiles"]).tolist()
        self._media_ends = np.cumsum(self.examples["media"]).tolist()

    def close(self) -> None:
        """Let go of the file."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __del__(self) -> None:
        self.close()

    def read(self, offset: int, size: int) -> bytes:
        """Bytes of the file."""
        data = os.pread(self._descriptor, size, offset)
        if len(data) != size:
            raise DataError(f"{self.path} ends early. Run again without --resume.")
        return data

    def tokens_and_labels(self, index: int) -> tuple[bytes, bytes]:
        """Both of one Example, as little-endian int32."""
        size = 4 * int(self.examples["tokens"][index])
        data = self.read(int(self.examples["start"][index]), 2 * size)
        return data[:size], data[size:]

    def slots_of(self, index: int) -> npt.NDArray[Any]:
        """Tiles of one Example (`SLOT`)."""
        end = self._slot_ends[index]
        return self.slots[end - int(self.examples["tiles"][index]) : end]

    def media_of(self, index: int) -> npt.NDArray[Any]:
        """Media of one Example (`MEDIUM`)."""
        end = self._media_ends[index]
        return self.media[end - int(self.examples["media"][index]) : end]
