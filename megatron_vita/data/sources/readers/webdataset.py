"""WebDataset: a tar whose neighbouring members of one key are a sample (`k.jpg`, `k.json`, `k.txt`).

Format: the webdataset library's; the key is a member's path up to the first dot of its last part. Several pictures are
`k.0.jpg`, `k.img0.jpg` or `k.0_name.jpg`, in the order of the json part's `name` list, else in natural order.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from megatron_vita.data.media.names import IMAGE_SUFFIXES, VIDEO_SUFFIXES, natural_key
from megatron_vita.data.rejects import reject
from megatron_vita.data.sample import MediaFile
from megatron_vita.data.sources.media_store import Archive, open_archive
from megatron_vita.data.sources.media_store.members import REFUSED, Member
from megatron_vita.data.sources.media_store.tars import walk
from megatron_vita.data.sources.readers.base import Places, Reader, Record, as_places
from megatron_vita.data.sources.readers.json_files import read_range
from megatron_vita.errors import ConfigError, DataError

_CAPTION = (".txt", ".text", ".caption")
_MEDIA_KEYS = ("image", "images", "video", "videos")
_NUMBERED = re.compile(r"^\d+_")
_MOST_CAPTION = 16 << 20


class WebDataset(Reader):
    """Groups of members (second and third number of a place: where a group's first header begins and the next group's).

    A record is what the json part says, with the pictures and videos of the group as `images` and `videos`; a txt part
    alone is a caption and becomes the answer to the pictures.
    """

    def __init__(self, path: Path, work: Path | None) -> None:
        super().__init__(path)
        self._work = work

    def prepare(self, *, progress: bool = True) -> None:
        self._archive(progress)

    def index(self) -> Places:
        found = array("q")
        key = None
        for member in self._archive().members():
            if member.hidden:
                continue
            new = _split(member.name)[0]
            if new != key:
                if found:
                    found[-1] = member.header
                found.extend((len(found) // 3 + 1, member.header, -1))
                key = new
        if found:
            found[-1] = self._archive().data.stat().st_size
        return as_places(found)

    def read(self, places: Places) -> Iterator[tuple[int, Record | DataError]]:
        archive = self._archive()
        with archive.data.open("rb") as stream:
            for number, start, stop in places.tolist():
                stream.seek(start)
                try:
                    yield number, self._record(list(walk(archive.data, stream, stop)), stream)
                except DataError as error:
                    yield number, error

    def _record(self, members: list[Member], stream: BinaryIO) -> Record:
        parts: dict[str, Member] = {}
        for member in members:
            if member.hidden:
                continue
            part = _split(member.name)[1]
            if member.kind in REFUSED:
                code, why = REFUSED[member.kind]
                raise reject(code, f"{member.name}: {why}.")
            if part in parts:
                raise reject("bad_record", f"{member.name} stands in the group twice.")
            parts[part] = member
        said = _said(parts, stream)
        names = said.pop("name", None) if isinstance(said.get("name"), list) else None
        texts = said.get("texts")
        if isinstance(texts, list) and "messages" not in said and "conversations" not in said and _are_turns(texts):
            said["messages"] = said.pop("texts")
        for key in _MEDIA_KEYS:  # what the files were called before they came into this tar
            said.pop(key, None)
        for field, suffixes in (("images", IMAGE_SUFFIXES), ("videos", VIDEO_SUFFIXES)):
            chosen = [part for part in parts if f".{part}".lower().endswith(suffixes)]
            media = [self._medium(parts[part]) for part in _ordered(chosen, names)]
            if media:
                said[field] = media
        if set(said) <= {"caption", "images", "videos"} and "caption" in said:
            said["messages"] = _captioned(said.pop("caption"), said)
        return said

    def _medium(self, member: Member) -> MediaFile:
        archive = self._archive()
        label = f"{archive.path}: {member.name}"
        return MediaFile(path=str(archive.data), offset=member.offset, size=member.size, label=label)

    def _archive(self, progress: bool = False) -> Archive:
        archive = open_archive(self.path, self._work, progress=progress)
        if archive.zipped:
            raise ConfigError(f"{self.path}: a zip, but WebDataset is a tar. Set another `source:` in the data mix.")
        return archive


def _split(name: str) -> tuple[str, str]:
    """(key, the part's name) of a member: `a/b.0.jpg` is part `0.jpg` of `a/b`."""
    folder, slash, last = name.rpartition("/")
    key, _, part = last.partition(".")
    return folder + slash + key, part


def _said(parts: dict[str, Member], stream: BinaryIO) -> dict[str, Any]:
    for part in ("json", *(name for name in parts if name.lower().endswith(".json"))):
        if part in parts:
            member = parts[part]
            record = read_range(stream, member.offset, member.offset + member.size)
            if isinstance(record, DataError):
                raise record
            return dict(record) if isinstance(record, dict) else {"messages": record}
    for part, member in parts.items():
        if f".{part}".lower().endswith(_CAPTION):
            if member.size > _MOST_CAPTION:
                raise reject("bad_record", f"a caption of {member.size} bytes.")
            stream.seek(member.offset)
            try:
                return {"caption": stream.read(member.size).decode("utf-8-sig")}
            except UnicodeDecodeError as error:
                raise reject("bad_json", f"the caption is not UTF-8 at byte {error.start}.") from None
    raise reject("bad_record", f"no json and no txt among its parts {', '.join(parts) or '(none)'}.")


def _captioned(caption: str, record: dict[str, Any]) -> list[dict[str, str]]:
    tags = "<image>" * len(record.get("images", ())) + "<video>" * len(record.get("videos", ()))
    return [{"role": "user", "content": tags}, {"role": "assistant", "content": caption}]


def _are_turns(texts: list[Any]) -> bool:
    return bool(texts) and all(isinstance(turn, dict) and ({"role", "from"} & turn.keys()) for turn in texts)


def _ordered(parts: list[str], names: list[Any] | None) -> list[str]:
    """Parts in the order of the record's list of names if that names them all, else in natural order."""
    natural = sorted(parts, key=natural_key)
    if not names:
        return natural
    known: dict[str, str] = {}
    for part in reversed(natural):
        bare = _NUMBERED.sub("", part)
        for alias in (part, part.rpartition(".")[0], bare, bare.rpartition(".")[0]):
            known[alias] = part
    for part in natural:  # its own whole name is nobody else's
        known[part] = part
    chosen = [known.get(str(name).rpartition("/")[2]) for name in names]
    if None in chosen or len(set(chosen)) != len(chosen) or len(chosen) != len(parts):
        return natural
    return [part for part in chosen if part is not None]
