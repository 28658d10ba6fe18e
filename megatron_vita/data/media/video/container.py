"""Checks that a video file is complete, by its container's outermost boxes: few short reads, no decoder.

A decoder plays what there is of a truncated clip, or its first half again; a dataset must know. Sources: ISO/IEC
14496-12 (MP4, MOV), RFC 9559 and RFC 8794 (Matroska, WebM), the RIFF specification (AVI). Other containers (MPEG-TS,
FLV, raw streams) do not say how long they are.
"""

from __future__ import annotations

from megatron_vita.data.media.window import Window
from megatron_vita.data.rejects import reject

_MEDIA_BOXES = (b"moov", b"mdat", b"moof")
_MOST_BOXES = 1 << 17
_EBML, _SEGMENT = b"\x1a\x45\xdf\xa3", b"\x18\x53\x80\x67"
_PLAYLISTS = (b"#EXT", b"ffconcat", b"<", b"v=0", b"[")
"""How playlists begin (HLS, concat, DASH, SDP): they name further files, and a dataset's must stay in its folder."""


def check_container(window: Window) -> None:
    """Reject a file that is no container of pictures, or whose boxes end beyond the file.

    Raises:
        DataError: video_broken.
    """
    head = window.head[:64]
    if not head:
        raise reject("video_broken", "the file is empty.")
    if head.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(_PLAYLISTS):
        raise reject("video_broken", "a playlist of other files, no video. Give the video itself.")
    if head[4:8] in (b"ftyp", b"moov", b"mdat", b"free", b"wide", b"skip"):
        whole = _boxes_end_inside(window)
    elif head[:4] == _EBML:
        whole = _segment_ends_inside(window)
    elif head[:4] == b"RIFF" and head[8:12] == b"AVI ":
        whole = int.from_bytes(head[4:8], "little") + 8 <= window.size + 1  # the padding byte is often left out
    else:
        return
    if not whole:
        raise reject("video_broken", "the file ends before the video does. Fetch it again or drop the sample.")


def _boxes_end_inside(window: Window) -> bool:
    place = 0
    for _ in range(_MOST_BOXES):
        box = window.read(place, 16)
        if len(box) < 8:
            return True  # trailing bytes, if any, are no box
        size, kind = int.from_bytes(box[:4], "big"), box[4:8]
        if size == 0:  # to the end of the file
            return True
        if size == 1:
            size = int.from_bytes(box[8:16], "big")
        if size < 8:
            return True  # junk: the decoder's to judge
        place += size
        if place > window.size:
            return kind not in _MEDIA_BOXES
    return True


def _segment_ends_inside(window: Window) -> bool:
    size, width = _variable(window.read(4, 8))
    place = 4 + width + size
    if window.read(place, 4) != _SEGMENT:
        return True  # something stands between: the decoder's to judge
    size, width = _variable(window.read(place + 4, 8))
    unknown = size == (1 << 7 * width) - 1  # written as a stream
    return unknown or place + 4 + width + size <= window.size


def _variable(data: bytes) -> tuple[int, int]:
    """(value, bytes) of an EBML variable-length size; all bits set means unknown."""
    width = 9 - data[0].bit_length() if data and data[0] else 8
    return int.from_bytes(data[:width], "big") & ((1 << 7 * width) - 1), width
