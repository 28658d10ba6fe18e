"""integrity.json: what a finished checkpoint consists of, to the byte. Written last; without it there is no checkpoint.

    {"format_version": 3,
     "files": {"run.json": {"bytes": n, "xxh3_128": hex},
               "__0_0.distcp": {"bytes": n, "pieces": [[length, hex], ...]}, ...},
     "digest": XXH3 (128 bits) of the canonical JSON of "files"}

A tensor file is a row of pieces, each a part of one tensor with a digest of its own, that together are exactly the
file: so whoever reads one piece can verify it, and no rank has to hash what it does not read. All other files are small
and are verified when the checkpoint is opened. Digests find damage; they are no signature, so the pickled part is read
by a reader that runs nothing besides (metadata.py). Version 2, which is still read, had plain values in a pickle,
common.pt, where version 3 has common.json.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_vita.checkpoint.streams import digest_of, unreadable
from megatron_vita.errors import CheckpointError, DamagedError
from megatron_vita.files import XXH3, new_digest, sync

INTEGRITY_FILE = "integrity.json"
_VERSION = 3
_READABLE = (2, _VERSION)
MAX_BYTES = 512 << 20
"""Of a file that is read whole: with 200,000 pieces, as 512 ranks may write, `.metadata` has 27 MB and this file 9."""
_REMEDY = "Use an older step: without this folder a run goes on from the one before."

PieceDigests = Mapping[str, Sequence[tuple[int, str]]]
"""(length in bytes, digest) of each piece of each tensor file, in file order."""


class Integrity:
    """The parsed integrity.json of one folder."""

    def __init__(self, folder: Path, files: Mapping[str, Any], version: int) -> None:
        self.folder = folder
        self.version = version
        """Of the format."""
        self.files = files
        self._pieces: dict[tuple[str, int], tuple[int, str]] = {}
        for name, entry in files.items():
            offset = 0
            for length, digest in entry.get("pieces", ()):
                self._pieces[name, offset] = (length, digest)
                offset += length

    @classmethod
    def read(cls, folder: Path, *, check: bool = True) -> Integrity:
        """Parse integrity.json, compare every file's size with it, and verify all files but those of tensors.

        Args:
            check: look at the other files. Of many ranks one does it for all.

        Raises:
            CheckpointError: no integrity.json (so no checkpoint), or of a newer release.
            DamagedError: a file is missing or is not what was written.
        """
        path = folder / INTEGRITY_FILE
        try:
            values = json.loads(_content(path))
            files, digest, version = values["files"], values["digest"], values["format_version"]
        except FileNotFoundError:
            raise DamagedError(f"{folder}: no {INTEGRITY_FILE}, so it is no finished checkpoint. {_REMEDY}") from None
        except OSError as error:
            raise unreadable(path, error) from None
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise DamagedError(f"{path}: damaged ({error}). {_REMEDY}") from None
        if type(version) is not int or version not in _READABLE:
            raise CheckpointError(
                f"{path}: format version {str(version)[:20]} is not known, {_READABLE[0]} and {_VERSION} are. Use the "
                "release that wrote it."
            )
        if _canonical(files) != digest:
            raise DamagedError(f"{path}: damaged (its own digest does not match). {_REMEDY}")
        if not isinstance(files, dict) or not all(map(_describes_a_file, files.values())):
            raise CheckpointError(f"{path}: does not describe files. Do not use this checkpoint.")
        for name in files:
            if Path(name).is_absolute() or ".." in Path(name).parts:
                raise CheckpointError(f"{path}: names a file outside the folder, {name!r}. Do not use this checkpoint.")
        found = cls(folder, files, version)
        if check:
            found._check_files()
        return found

    def _check_files(self) -> None:
        for name, entry in self.files.items():
            file = self.folder / name
            size = file.stat().st_size if file.is_file() else None
            if size != entry["bytes"]:
                there = "is missing" if size is None else f"has {size} bytes"
                raise DamagedError(f"{file}: {there}, {entry['bytes']} were written. {_REMEDY}")
            if "pieces" not in entry:
                self.read_file(name)

    def read_file(self, name: str) -> bytes:
        """Content of a small file, verified.

        Raises:
            CheckpointError: not part of the checkpoint.
            DamagedError: its digest does not match.
        """
        path = self.folder / name
        entry = self.files.get(name)
        if entry is None or XXH3 not in entry:
            raise CheckpointError(f"{path}: not listed in {INTEGRITY_FILE}. Use another checkpoint.")
        try:
            content = _content(path)
        except OSError as error:
            raise unreadable(path, error) from None
        if _digest(content) != entry[XXH3]:
            raise DamagedError(f"{path}: its content has changed since it was written. {_REMEDY}")
        return content

    def check_piece(self, file: str, offset: int, length: int, digest: str | None, what: str) -> None:
        """Verify one piece: its length before it is read, its digest too once it has been hashed.

        Args:
            digest: of what was read, or none before.
            what: names the piece's tensor in the error.
        """
        known = self._pieces.get((file, offset), (-1, ""))
        if known != (length, known[1] if digest is None else digest):
            raise DamagedError(
                f"{self.folder / file}: the part that holds {what} has changed since it was written. {_REMEDY}"
            )

    def check_all(self, advance: Callable[[int], object] = lambda count: None) -> None:
        """Hash every byte of the folder.

        Args:
            advance: is told the bytes that have been hashed, piece by piece.

        Raises:
            DamagedError: naming the first file and offset that differ.
        """
        for name, entry in self.files.items():
            offset = 0
            for length, expected in entry.get("pieces") or [[entry["bytes"], entry.get(XXH3)]]:
                if digest_of(self.folder / name, offset, length) != expected:
                    raise DamagedError(f"{self.folder / name}: damaged at byte {offset}. {_REMEDY}")
                offset += length
                advance(length)


def write_integrity(folder: Path, pieces: PieceDigests) -> None:
    """Write integrity.json over everything in `folder`, the very last file of a checkpoint, and wait for the disk.

    Args:
        folder: the checkpoint, complete but for this file.
        pieces: digests of the pieces of each tensor file, as its writer saw them, who has synced it. Other files are
            hashed and synced here.

    Raises:
        OSError: no space.
    """
    files: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        if not path.is_file():
            continue
        name = path.relative_to(folder).as_posix()
        size = path.stat().st_size
        if name in pieces:
            assert size == sum(length for length, _ in pieces[name]), f"{name}: its pieces do not make up the file"
            files[name] = {"bytes": size, "pieces": [list(piece) for piece in pieces[name]]}
        else:
            files[name] = {"bytes": size, XXH3: digest_of(path, 0, size)}
            sync(path)
    values = {"format_version": _VERSION, "files": files, "digest": _canonical(files)}
    (folder / INTEGRITY_FILE).write_text(json.dumps(values) + "\n", encoding="utf-8")
    for path in (folder / INTEGRITY_FILE, *(one for one in folder.rglob("*") if one.is_dir()), folder):
        sync(path)


def _content(path: Path) -> bytes:
    if path.stat().st_size > MAX_BYTES:
        raise CheckpointError(f"{path}: is larger than {MAX_BYTES >> 20} MiB, as none is. Do not use this checkpoint.")
    return path.read_bytes()


def _describes_a_file(entry: Any) -> bool:
    """Whether an entry says a size, and either one digest or those of pieces that make up the file."""

    def is_size(value: Any) -> bool:
        return type(value) is int and value >= 0

    if not isinstance(entry, dict) or not is_size(entry.get("bytes")):
        return False
    if "pieces" not in entry:
        return isinstance(entry.get(XXH3), str)
    pieces = entry["pieces"]
    if not isinstance(pieces, list) or not all(
        isinstance(one, list) and len(one) == 2 and is_size(one[0]) and isinstance(one[1], str) for one in pieces
    ):
        return False
    return sum(length for length, _ in pieces) == entry["bytes"]


def _canonical(files: Any) -> str:
    return _digest(json.dumps(files, sort_keys=True, separators=(",", ":")).encode())


def _digest(content: bytes) -> str:
    digest = new_digest()
    digest.update(content)
    return digest.hexdigest()


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder is a finished checkpoint, as far as its last file tells; nothing of it is read."""
    return (folder / INTEGRITY_FILE).is_file()


def fingerprint(folder: Path) -> str:
    """SHA-256 of a checkpoint's integrity file, which holds the digests of all its tensors: changes when they do."""
    return hashlib.sha256((folder / INTEGRITY_FILE).read_bytes()).hexdigest()
