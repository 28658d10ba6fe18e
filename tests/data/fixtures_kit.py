"""What the dataset fixtures are made of: invented media, containers, and a promise of what each record becomes."""

from __future__ import annotations

import io
import json
import tarfile
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import zstandard
from PIL import Image as Pil

ENOUGH = 10
"""Records that a file needs so that a tenth of it is one."""
LATE = ("no_answer", "media_broken", "media_truncated")
"""Codes that only the compiler gives: the record is a Sample before."""


@dataclass(frozen=True)
class Good:
    """A record that is used: (role, text with [i0] and [v0] for media), and the media's bytes."""

    turns: list[tuple[str, str]]
    images: list[bytes] = field(default_factory=list)
    videos: list[bytes | list[bytes]] = field(default_factory=list)
    """File, or the frames of a folder in order."""


Wanted = Good | str
"""What a record becomes: a Good one, or the code it is rejected with."""
Pairs = list[tuple[Any, Wanted]]
"""(record as published, what becomes of it)."""


@dataclass(frozen=True)
class Promise:
    """One published data file."""

    source: str
    """DatasetSpec of the dataset table."""
    path: Path
    wanted: tuple[Wanted, ...]
    """For each record, in order."""
    media_root: Path | None = None
    """What a mix must say, if its row's own rule does not do."""


def qa(question: str = "q", answer: str = "a", **media: Any) -> Good:
    return Good([("user", question), ("assistant", answer)], **media)


def turns(*texts: str, first: str = "human") -> list[dict[str, str]]:
    """`from`/`value` turns that alternate."""
    roles = ("human", "gpt") if first == "human" else ("gpt", "human")
    return [{"from": roles[number % 2], "value": text} for number, text in enumerate(texts)]


def messages(*texts: str) -> list[dict[str, str]]:
    """`role`/`content` turns that alternate."""
    return [{"role": ("user", "assistant")[number % 2], "content": text} for number, text in enumerate(texts)]


def fill(pairs: Pairs, more: Iterable[tuple[Any, Wanted]], count: int = ENOUGH) -> Pairs:
    """Plain records behind the special ones, up to `count`."""
    stream = iter(more)
    return [*pairs, *(next(stream) for _ in range(count - len(pairs)))]


# ----------------------------------------------------------------------------------------------------------- media


@lru_cache(maxsize=512)
def dot(number: int, kind: str = "PNG") -> bytes:
    """A small picture; each number's is another."""
    buffer = io.BytesIO()
    Pil.new("RGB", (8 + number % 3, 8), (number % 256, number // 256 % 256, 77)).save(buffer, kind)
    return buffer.getvalue()


def jpg(number: int) -> bytes:
    return dot(number, "JPEG")


@lru_cache(maxsize=16)
def clip(number: int) -> bytes:
    """A video of three frames."""
    import av

    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=1)
        stream.width, stream.height, stream.pix_fmt = 16, 16, "yuv420p"
        for step in range(3):
            grey = np.full((16, 16), 10 + 20 * number + step, dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(grey, format="gray")))
        container.mux(stream.encode())
    return buffer.getvalue()


def struct(number: int | None, path: str | None = None) -> dict[str, Any] | None:
    """An image column's value, as the datasets library stores it."""
    return None if number is None else {"bytes": dot(number), "path": path}


# ------------------------------------------------------------------------------------------------------- containers


def put(path: Path, data: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def _promise(source: str, path: Path, pairs: Pairs, media_root: Path | None) -> Promise:
    return Promise(source, path, tuple(wanted for _, wanted in pairs), media_root)


def array(path: Path, source: str, pairs: Pairs, media_root: Path | None = None) -> Promise:
    put(path, json.dumps([record for record, _ in pairs], ensure_ascii=False).encode())
    return _promise(source, path, pairs, media_root)


def lines(path: Path, source: str, pairs: Pairs, media_root: Path | None = None) -> Promise:
    text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record, _ in pairs).encode()
    put(path, zstandard.compress(text) if path.suffix == ".zst" else text)
    return _promise(source, path, pairs, media_root)


def parquet(path: Path, source: str, pairs: Pairs, schema: pa.Schema, group: int = 4) -> Promise:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.Table.from_pylist([record for record, _ in pairs], schema=schema)
    pq.write_table(table, path, row_group_size=group)
    return _promise(source, path, pairs, None)


def shards(folder: Path, source: str, pairs: Pairs, schema: pa.Schema, count: int = 1) -> list[Promise]:
    """`train-00000-of-0000N.parquet` and so on."""
    size = -(-len(pairs) // count)
    return [
        parquet(folder / f"train-{n:05}-of-{count:05}.parquet", source, pairs[n * size : (n + 1) * size], schema)
        for n in range(count)
    ]


def put_zip(path: Path, members: Mapping[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


def tar_bytes(members: Mapping[str, bytes], packed: str = "") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=f"w:{packed}") as archive:  # type: ignore[call-overload]
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def put_tar(path: Path, members: Mapping[str, bytes]) -> Path:
    return put(path, tar_bytes(members, "" if path.suffix == ".tar" else "gz"))


def put_split(path: Path, data: bytes, parts: Sequence[str]) -> None:
    """One file cut into `path.aa`, `path.ab` and so on."""
    size = -(-len(data) // len(parts))
    for number, part in enumerate(parts):
        put(path.with_name(f"{path.name}.{part}"), data[number * size : (number + 1) * size])


_TURN = pa.struct([("from", pa.string()), ("value", pa.string())])
_IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
CONVERSATIONS = pa.schema(
    [("id", pa.string()), ("image", _IMAGE), ("conversations", pa.list_(_TURN)), ("data_source", pa.string())]
)
"""LLaVA-ReCap and LLaVA-OneVision."""
_PAIR = pa.struct([("user", pa.string()), ("assistant", pa.string()), ("source", pa.string())])
PAIRS = pa.schema([("images", pa.list_(_IMAGE)), ("texts", pa.list_(_PAIR))])
"""the_cauldron and Docmatix."""
