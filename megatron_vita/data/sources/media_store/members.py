"""A member of an archive, and the reasons to reject one."""

from __future__ import annotations

from dataclasses import dataclass

TAR, STORED, DEFLATED, FOLDER = range(4)
"""Storage of a member: region of a tar, stored in a zip, deflated in a zip; or a folder of frames."""

REJECTED: dict[int, tuple[str, str]] = {
    16: ("path_escape", "its name in the archive is absolute or leaves the folder"),
    17: ("path_escape", "it is a link, and links in archives are not followed"),
    18: ("media_broken", "it is no file (a device, a pipe or a sparse file)"),
    19: ("media_broken", "it is encrypted. Unpack the archive"),
    20: ("media_broken", "it is packed by a method that is not read in place. Unpack the archive"),
}
"""Why a member is rejected: number in the index -> (error code, what to say)."""
HOSTILE_NAME, LINK, NO_FILE, ENCRYPTED, METHOD = REJECTED


@dataclass(frozen=True, slots=True)
class Member:
    """A file in an archive."""

    name: str
    """Cleaned: relative, no `.` and `..`, parts joined by `/`."""
    kind: int
    """TAR, STORED, DEFLATED, or a number of REJECTED."""
    header: int
    """Offset of its header."""
    offset: int
    """Offset of its data (of its header in a zip, where the data lie behind a header of unknown length)."""
    size: int
    """Bytes of the file."""
    packed: int
    """Bytes it takes in the archive."""
    crc: int
    """CRC-32 of the file; 0 in a tar, which has none."""

    @property
    def hidden(self) -> bool:
        """Whether an operating system made it for itself: dot files, macOS resource forks."""
        return any(part.startswith(".") or part == "__MACOSX" for part in self.name.split("/"))


def clean_name(name: str) -> tuple[str, bool]:
    """(relative name without `.` and `..`, whether the original was relative and without `..`)."""
    parts = name.split("/")
    kept = [part for part in parts if part not in ("", ".", "..")]
    return "/".join(kept), bool(kept) and not name.startswith("/") and ".." not in parts
