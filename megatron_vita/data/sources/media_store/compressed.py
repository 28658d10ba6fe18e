"""Decompresses gzip, zstd, xz and bzip2 streams, in one file or split (`.aa .ab ...`), block by block."""

from __future__ import annotations

import bz2
import io
import lzma
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from megatron_vita.errors import ConfigError, DataError

BOMB_RATIO = 250
"""A stream may unpack to this many times its size. JSON text packs 10:1, repetitive text 50:1."""
BOMB_FLOOR = 1 << 30
"""Bytes that any stream may unpack to, whatever its ratio."""
MAX_WINDOW = 512 << 20
"""Bytes of memory that unpacking may need (xz dictionaries, zstd windows)."""

_MAGIC = (
    ("gz", re.compile(rb"\x1f\x8b\x08")),
    ("zst", re.compile(rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18")),
    ("xz", re.compile(rb"\xfd7zXZ\0")),
    ("bz2", re.compile(rb"BZh[1-9](1AY&SY|\x17\x72\x45\x38\x50\x90)")),
)
_READ = {"gz": 64 << 10, "zst": 4 << 10, "xz": 64 << 10, "bz2": 64 << 10}
"""Bytes taken in at once. zstd and zlib give all that these hold at once: at worst 128 MiB and 64 MiB."""
_GIVE = 1 << 20
_BAR = 256 << 20
"""Packed bytes from which a progress bar is shown."""
_PART = re.compile(r"\.(aa|0{2,3}|0{1,2}1)$")


def compression_of(head: bytes) -> str | None:
    """`gz`, `zst`, `xz` or `bz2` if a file that begins so is packed."""
    return next((name for name, magic in _MAGIC if magic.match(head)), None)


def parts_of(path: Path) -> list[Path]:
    """All parts of a split file, given its first (`.aa`, `.00`, `.000`, `.01`, `.001`), or the file itself.

    Raises:
        ConfigError: a part between others is missing.
    """
    match = _PART.search(path.name)
    if match is None:
        return [path]
    stem, first = path.name[: match.start()], match.group(1)
    pattern = re.compile(re.escape(stem) + (r"\.([a-z]{2})" if first == "aa" else rf"\.(\d{{{len(first)}}})"))
    found = {got.group(1): one for one in path.parent.iterdir() if (got := pattern.fullmatch(one.name))}
    number = _number(first)
    parts: list[Path] = []
    for suffix in sorted(found):
        if _number(suffix) < number:
            continue
        if _number(suffix) != number + len(parts):
            raise ConfigError(f"{path}: a part between {parts[-1].name} and {found[suffix].name} is missing. Fetch it.")
        parts.append(found[suffix])
    return parts


def read_blocks(parts: Sequence[Path], size: int) -> Iterator[bytes]:
    """The bytes of files one after another, as if they were one."""
    for part in parts:
        with part.open("rb", buffering=0) as stream:
            while block := stream.read(size):
                yield block


def decompress(blocks: Iterable[bytes], form: str) -> Iterator[bytes]:
    """Decompress a stream.

    Args:
        blocks: the packed bytes.
        form: see `compression_of`.

    Raises:
        DataError: it is damaged or ends early.
    """
    decoder: Any = None
    try:
        for block in blocks:
            data = block
            while data:
                if decoder is None:
                    data = data.lstrip(b"\0")  # padding between and behind streams
                    if not data:
                        break
                    decoder = _decoder(form)
                for piece in _decode(decoder, data):
                    if piece:
                        yield piece
                if not decoder.eof:
                    break
                data = decoder.unused_data
                decoder = None
    except _errors() as error:
        raise DataError(f"the packed data is damaged ({error})") from None
    if decoder is not None:
        raise DataError("the packed data ends early")


def peek(path: Path, size: int) -> bytes:
    """The first decompressed bytes of a file or split archive; fewer if it ends or is damaged there.

    Args:
        path: the file, or its first part.
        size: how many bytes.
    """
    parts = parts_of(path)
    out = io.BytesIO()
    for block in read_blocks(parts, 4096):
        form = compression_of(block)
        if form is None:
            return _first(read_blocks(parts, size), size)
        break
    else:
        return b""
    try:
        for piece in decompress(read_blocks(parts, _READ[form]), form):
            out.write(piece)
            if out.tell() >= size:
                break
    except DataError:
        pass
    return out.getvalue()[:size]


def unpack(path: Path, target: Path, *, progress: bool = True) -> None:
    """Unpack a file (all its parts joined) to another, in bounded memory.

    Args:
        path: the file, or the first of its parts.
        target: where to write.
        progress: show a bar if it is long.

    Raises:
        DataError: damaged, ends early, or unpacks to an absurd size.
        ConfigError: a part is missing.
    """
    parts = parts_of(path)
    total = sum(part.stat().st_size for part in parts)
    with parts[0].open("rb") as stream:
        form = compression_of(stream.read(64))
    written = taken = 0
    with (
        target.open("wb") as out,
        tqdm(
            total=total, desc=f"unpack {path.name}", unit="B", unit_scale=True, disable=not progress or total < _BAR
        ) as bar,
    ):

        def blocks() -> Iterator[bytes]:
            nonlocal taken
            for block in read_blocks(parts, _READ[form] if form else _GIVE):
                taken += len(block)
                bar.update(len(block))
                yield block

        try:
            for piece in decompress(blocks(), form) if form else blocks():
                written += len(piece)
                if written > max(BOMB_FLOOR, BOMB_RATIO * taken):
                    raise DataError(
                        f"{taken} packed bytes unpack to more than {written}, beyond {BOMB_RATIO} to 1. If it is "
                        "what it should be, unpack it yourself"
                    )
                out.write(piece)
        except DataError as error:
            raise DataError(f"{path}: {error}. Fetch it again.") from None


def _first(blocks: Iterator[bytes], size: int) -> bytes:
    out = b""
    for block in blocks:
        out += block
        if len(out) >= size:
            break
    return out[:size]


def _decoder(form: str) -> Any:
    if form == "gz":
        return zlib.decompressobj(31)
    if form == "xz":
        return lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=MAX_WINDOW)
    if form == "bz2":
        return bz2.BZ2Decompressor()
    import zstandard

    return zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW).decompressobj()


def _decode(decoder: Any, data: bytes) -> Iterator[bytes]:
    if not hasattr(decoder, "needs_input"):
        yield decoder.decompress(data)
        return
    yield decoder.decompress(data, _GIVE)
    while not decoder.eof and not decoder.needs_input:
        yield decoder.decompress(b"", _GIVE)


def _errors() -> tuple[type[Exception], ...]:
    import zstandard

    return (OSError, EOFError, ValueError, MemoryError, zlib.error, lzma.LZMAError, zstandard.ZstdError)


def _number(suffix: str) -> int:
    if suffix.isdigit():
        return int(suffix)
    return (ord(suffix[0]) - ord("a")) * 26 + ord(suffix[1]) - ord("a")
