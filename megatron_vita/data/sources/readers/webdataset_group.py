"""Combines the members of one WebDataset key into a record."""

from __future__ import annotations

import re
from typing import Any, BinaryIO

from megatron_vita.data.media.names import IMAGE_SUFFIXES, VIDEO_SUFFIXES, natural_key
from megatron_vita.data.rejects import counted, reject
from megatron_vita.data.sample import MediaFile
from megatron_vita.data.sources.fields import IMAGE_NAMES, VIDEO_NAMES, is_address, is_embedded, listed, plain
from megatron_vita.data.sources.media_store import Archive
from megatron_vita.data.sources.media_store.members import REJECTED, Member
from megatron_vita.data.sources.readers.base import Record
from megatron_vita.data.sources.readers.json_files import read_range
from megatron_vita.errors import DataError

_CAPTIONS = ("txt", "text", "caption")
_METADATA = ("cls", "cls2", "class", "count", "index", "inx", "id", "key", "url")
"""Extensions that tell where a sample comes from, or a number of it."""
_ANNOTATIONS = (
    "seg", "segm", "segmentation", "mask", "masks", "matte", "depth", "disp", "disparity", "flow", "normal", "normals",
    "sem", "semantic", "inst", "instance", "panoptic", "label", "labels", "gt", "edge", "edges", "canny", "pose",
    "parsing", "heatmap",
)  # fmt: skip
"""A picture whose extension begins so (`k.seg.png`) says something about the picture `k.jpg`, and is no second one."""
_TALKS = ("messages", "conversations", "items", "texts", "questions", "question", "query", "instruction", "chatml")
"""Fields of the json member that hold a conversation."""
_NUMBERED = re.compile(r"^\d+_")
_NUMBER = re.compile(r"^([a-z_-]*)(\d+)(?:[._-].*)?$")
_MOST_CAPTION = 16 << 20


class Group:
    """The members of one key."""

    def __init__(self, archive: Archive, members: list[Member], stream: BinaryIO) -> None:
        self._archive, self._stream = archive, stream
        self._key = split_name(members[0].name)[0]
        self._parts: dict[str, Member] = {}
        for member in sorted(members, key=lambda one: natural_key(one.name)):
            part = split_name(member.name)[1]
            if member.kind in REJECTED:
                code, why = REJECTED[member.kind]
                raise reject(code, f"{member.name}: {why}.")
            if part in self._parts:
                raise self._contradiction(f"{member.name} stands in the tar twice.")
            self._parts[part] = member

    def record(self) -> Record:
        """Combine the members into a record.

        Raises:
            DataError: it says nothing, contradicts itself, or its pictures are not there.
        """
        said, caption = self._json(), self._caption()
        names = [str(name) for name in said.pop("name")] if isinstance(said.get("name"), list) else []
        texts = said.get("texts")
        if isinstance(texts, list) and "messages" not in said and "conversations" not in said and _are_turns(texts):
            said["messages"] = said.pop("texts")
        unread = dict(self._parts)
        for field, known, suffixes in (
            ("images", IMAGE_NAMES, IMAGE_SUFFIXES),
            ("videos", VIDEO_NAMES, VIDEO_SUFFIXES),
        ):
            parts = [part for part in self._parts if f".{part}".endswith(suffixes)]
            media = self._media(said, field, known, parts, names)
            for part in media:
                del unread[part]
            if media:
                said[field] = [self._medium(part) for part in media]
        for part in unread:
            if _suffix(part) not in ("json", *_CAPTIONS, *_METADATA):
                said[f".{part}"] = self._medium(part)
        self._add_conversation(said, caption)
        return said

    def _json(self) -> dict[str, Any]:
        """Merge the fields of the json members."""
        said: dict[str, Any] = {}
        for part in sorted((one for one in self._parts if _suffix(one) == "json"), key=len):
            member = self._parts[part]
            record = read_range(self._stream, member.offset, member.offset + member.size)
            if isinstance(record, DataError):
                raise record
            for name, value in record.items() if isinstance(record, dict) else (("messages", record),):
                if said.setdefault(name, value) != value:
                    raise self._contradiction(f"its json members say different things of `{name}`.")
        return said

    def _caption(self) -> str | None:
        """The caption in the text members."""
        texts: dict[str, str] = {}
        for part, member in self._parts.items():
            if _suffix(part) not in _CAPTIONS:
                continue
            if member.size > _MOST_CAPTION:
                raise reject("bad_record", f"a caption of {member.size} bytes.")
            self._stream.seek(member.offset)
            try:
                text = self._stream.read(member.size).decode("utf-8-sig")
            except UnicodeDecodeError as error:
                raise reject("bad_json", f"the caption is not UTF-8 at byte {error.start}.") from None
            texts.setdefault(text.strip(), text)
        full = [text for stripped, text in texts.items() if stripped]
        if len(full) > 1:
            raise self._contradiction("its text members say different things; which is the caption?")
        return full[0] if full else next(iter(texts.values()), None)

    def _media(
        self, said: dict[str, Any], field: str, known: tuple[str, ...], parts: list[str], names: list[str]
    ) -> list[str]:
        """The group's members of a kind in order, in place of what the json member calls them."""
        fields = [key for key in said if plain(key) in known and listed(said[key])]
        held = [key for key in fields if all(map(is_embedded, listed(said[key])))]
        if held and parts:
            raise self._contradiction(f"{field} are members of it, and others stand in `{held[0]}` of its json.")
        if held:
            return []
        called = {key: [str(one) for one in listed(said.pop(key)) if not is_address(one)] for key in fields}
        called = {key: files for key, files in called.items() if files}  # as they were before they came into this tar
        names = [self._called(name) for name in (names or next(iter(called.values()), []))]
        marked = [part for part in parts if re.split(r"[^a-z]+", part)[0] in _ANNOTATIONS]
        parts = [part for part in parts if part not in marked or any(name in _aliases(part) for name in names)]
        for key, files in called.items():
            if not parts:
                raise reject("media_missing", f"{self._key}: its json names {files[0]}, which is not in the tar.")
            if len(files) != len(parts):
                raise self._contradiction(
                    f"`{key}` of its json names {counted(len(files), field[:-1])}, the tar has {', '.join(parts)}."
                )
        return self._ordered(field, parts, names)

    def _ordered(self, field: str, parts: list[str], names: list[str]) -> list[str]:
        """Members in the order of the names that the json member lists, else of their numbers."""
        known: dict[str, str] = {}
        for part in sorted(parts, key=natural_key, reverse=True):
            known.update(dict.fromkeys(_aliases(part), part))
        known.update({part: part for part in parts})  # its own whole name is nobody else's
        chosen = [known[name] for name in names if name in known]
        if chosen and sorted(chosen) == sorted(parts):
            return chosen
        if chosen:
            raise self._contradiction(f"its json lists {', '.join(names)}, the tar has {', '.join(parts)}.")
        if len(parts) < 2:
            return parts
        numbers = {part: found for part in parts if (found := _NUMBER.match(part.rpartition(".")[0]))}
        prefixes = {found[1] for found in numbers.values()}
        if len(prefixes) != 1 or len({int(found[2]) for found in numbers.values()}) != len(parts):
            raise self._contradiction(
                f"it has {len(parts)} {field} ({', '.join(parts)}), and nothing tells their order. Number them "
                "(k.0.jpg, k.1.jpg), or list them as `name` in its json."
            )
        return sorted(parts, key=lambda part: int(numbers[part][2]))

    def _add_conversation(self, said: dict[str, Any], caption: str | None) -> None:
        """Convert a caption to a conversation, and check that nothing contradicts it."""
        has_media = bool(said.get("images") or said.get("videos"))
        talks = [name for name in _TALKS if said.get(name)]
        if talks:
            if caption is not None and caption.strip() not in _texts_in([said[name] for name in talks]):
                raise self._contradiction("its json holds a conversation, and its text member says something else.")
            return
        for name in ("caption", "text"):
            text = said.get(name)
            if not isinstance(text, str) or not text.strip():
                continue
            if caption is not None and caption.strip() and caption.strip() != text.strip():
                raise self._contradiction(f"`{name}` of its json and its text member say different things.")
            caption = caption if caption is not None and caption.strip() else text
            del said[name]
        if not has_media and not any(key.startswith(".") for key in said):
            self._explain(said)
            if caption is not None:
                raise reject("media_missing", f"{self._key} has a caption, but no picture or video.")
        if caption is None:
            raise reject("bad_record", f"no conversation and no caption among its members {', '.join(self._parts)}.")
        tags = "<image>" * len(said.get("images", ())) + "<video>" * len(said.get("videos", ()))
        said["messages"] = [{"role": "user", "content": tags}, {"role": "assistant", "content": caption}]

    def _explain(self, said: dict[str, Any]) -> None:
        """img2dataset writes down why a download failed."""
        status = said.get("status")
        if isinstance(status, str) and status != "success":
            why = said.get("error_message") or "no reason given"
            raise reject("media_missing", f"{self._key}: its download failed ({status}: {why}).")

    def _contradiction(self, what: str) -> DataError:
        return reject("bad_record", f"the members of {self._key} contradict one another: {what}")

    def _called(self, name: str) -> str:
        """What a list calls a member, without folder and key."""
        last = name.rpartition("/")[2].lower()
        return last.removeprefix(f"{self._key.rpartition('/')[2].lower()}.")

    def _medium(self, part: str) -> MediaFile:
        member, archive = self._parts[part], self._archive
        label = f"{archive.path}: {member.name}"
        return MediaFile(path=str(archive.data), offset=member.offset, size=member.size, label=label)


def split_name(name: str) -> tuple[str, str]:
    """(key, extension in lower case) of a member: `a/b.0.JPG` is part `0.jpg` of `a/b`."""
    folder, slash, last = name.rpartition("/")
    key, _, part = last.partition(".")
    return folder + slash + key, part.lower()


def _suffix(part: str) -> str:
    return part.rpartition(".")[2]


def _aliases(part: str) -> tuple[str, ...]:
    """What a list may call a member: with and without its number, with and without its suffix."""
    bare = _NUMBERED.sub("", part)
    return part, part.rpartition(".")[0], bare, bare.rpartition(".")[0]


def _texts_in(value: Any) -> set[str]:
    """Every text in a value."""
    if isinstance(value, str):
        return {value.strip()}
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return {text for one in inner for text in _texts_in(one)}


def _are_turns(texts: list[Any]) -> bool:
    return bool(texts) and all(isinstance(turn, dict) and ({"role", "from"} & turn.keys()) for turn in texts)
