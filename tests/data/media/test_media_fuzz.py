"""Thousands of damaged and hostile media: always an item, or a DataError with a known reason; no crash and no hang.

Every file is made from a number, so that a failing one can be made again: `pytest -k fuzz` names it.
"""

from __future__ import annotations

import io
import random
import signal
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image as Pil

from megatron_vita.data.media.image import decode, read_header, read_image
from megatron_vita.data.media.tiling import plan_tiles, render_tiles
from megatron_vita.data.media.video.open import VideoLimits, open_video
from megatron_vita.data.rejects import CODES
from megatron_vita.data.sample import MediaFile
from megatron_vita.data.spec import PreprocessSpec
from megatron_vita.errors import DataError
from tests.data.kit import picture
from tests.data.videos import write_video

SPEC = PreprocessSpec(image_size=16, patch_size=4, max_tiles=4, max_frames=4)
PICTURES, VIDEOS = 3000, 120
HANG = 120
"""Seconds after which a test counts as hanging; each takes one or two."""

MEDIA_CODES = {code for code in CODES if code.startswith(("media_", "video_"))}


@pytest.fixture(autouse=True)
def no_hang() -> Iterator[None]:
    """A file that some parser does not get through fails its test, instead of holding up all of them."""

    def hangs(*_: object) -> None:
        raise AssertionError(f"not done in {HANG} seconds")

    before = signal.signal(signal.SIGALRM, hangs)
    signal.alarm(HANG)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def seeds() -> list[bytes]:
    """Small whole pictures of every format, plain and with all that a header may hold."""
    exif = Pil.Exif()
    exif[0x0112] = 6
    exif[0x010F] = "Maker"
    out = [picture(40, 30, kind=kind) for kind in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")]
    image = Pil.open(io.BytesIO(out[1]))
    modes = [("JPEG", "CMYK"), ("PNG", "P"), ("PNG", "LA"), ("GIF", "P"), ("BMP", "1"), ("TIFF", "CMYK"), ("PPM", "1")]
    options = [
        ("JPEG", {"exif": exif, "progressive": True}),
        ("JPEG", {"exif": exif.tobytes() + bytes(9000), "icc_profile": bytes(70000)}),
        ("JPEG", {"xmp": b'<x tiff:Orientation="8"/>'}),
        ("MPO", {"save_all": True, "append_images": [image]}),
        ("PNG", {"exif": exif}),
        ("PNG", {"save_all": True, "append_images": [image.rotate(90)]}),
        ("WEBP", {"exif": exif, "lossless": True}),
        ("WEBP", {"save_all": True, "append_images": [image.rotate(180)]}),
        ("GIF", {"save_all": True, "append_images": [image.rotate(180)]}),
        ("TIFF", {"exif": exif, "compression": "tiff_lzw"}),
        ("TIFF", {"compression": "jpeg"}),
        ("TIFF", {"compression": "group4"}),
    ]
    for kind, mode in modes:
        out.append(saved(image.convert(mode), kind))
    for kind, given in options:
        out.append(saved(image.convert("1") if given.get("compression") == "group4" else image, kind, **given))
    return out


def saved(image: Pil.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)  # type: ignore[arg-type]
    return buffer.getvalue()


def damaged(whole: list[bytes], rng: random.Random) -> bytes:
    """One of many ways to spoil a file."""
    data = bytearray(rng.choice(whole))
    for _ in range(rng.randrange(1, 4)):
        size = len(data)
        header = min(size, 400)  # where most decisions fall
        what = rng.randrange(10)
        if not size:
            break
        if what <= 2:
            for _ in range(rng.randrange(1, 9)):
                data[rng.randrange(header if what else size)] ^= 1 << rng.randrange(8)
        elif what == 3:
            data[rng.randrange(header)] = rng.choice((0, 1, 0x7F, 0x80, 0xFF))
        elif what == 4:
            del data[rng.randrange(size) :]
        elif what == 5:
            start = rng.randrange(size)
            del data[start : start + rng.randrange(1, 200)]
        elif what == 6:
            other = rng.choice(whole)
            data[: rng.randrange(header)] = other[: rng.randrange(min(len(other), 400))]
        elif what == 7:
            place = rng.randrange(header)
            data[place : place + 4] = rng.choice((b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", bytes(4), b"\0\0\xff\xff"))
        elif what == 8:
            place = rng.randrange(size)
            data[place:place] = rng.randbytes(rng.randrange(1, 60))
        else:
            data += rng.choice((b"<html>gone</html>", bytes(99), bytes(rng.choice(whole))))
    return repaired(data, rng) if data[:4] == b"\x89PNG" and rng.random() < 0.5 else bytes(data)


def repaired(data: bytearray, rng: random.Random) -> bytes:
    """A PNG whose checksums are right again, so that what stands in the chunks is believed."""
    place = 8
    while place + 12 <= len(data):
        end = place + 8 + int.from_bytes(data[place : place + 4], "big")
        if end + 4 > len(data):
            break
        data[end : end + 4] = zlib.crc32(data[place + 4 : end]).to_bytes(4, "big")
        place = end + 4
    return bytes(data)


def known(error: DataError) -> str:
    code = str(error).partition(":")[0]
    assert code in MEDIA_CODES, error
    return code


@pytest.mark.slow
def test_fuzz_pictures(tmp_path: Path) -> None:
    whole = seeds()
    for data in whole:
        read_image(MediaFile(data=data), verify="decode")
    outcomes: dict[str, int] = {}
    path = tmp_path / "picture.jpg"  # whatever it is
    for number in range(PICTURES):
        rng = random.Random(number)
        data = damaged(whole, rng)
        file = MediaFile(data=data)
        if number % 5 == 0:
            path.write_bytes(b"archive" + data + b"more")
            file = MediaFile(path=str(path), offset=7, size=len(data))
        try:
            header = read_header(data)
            item = read_image(file)
            assert (item.width, item.height) == (header.width, header.height)
            slots = plan_tiles(item, 0, SPEC)
            tiles = render_tiles(item, slots, SPEC)
            assert tiles.shape == (len(slots), 3, 16, 16)
            assert decode(item).size == (item.width, item.height), number
            outcome = "item"
        except DataError as error:
            outcome = known(error)
        try:
            read_image(file, verify="decode")
            assert outcome in ("item", "media_truncated", "media_broken"), number  # decode may pass over a torn end
        except DataError as error:
            known(error)
            assert outcome != "item", number
        outcomes[outcome] = outcomes.get(outcome, 0) + 1
    assert sum(outcomes.values()) == PICTURES
    assert {"item", "media_broken", "media_truncated", "media_bomb", "media_size"} <= set(outcomes)


HOSTILE = {
    "nothing": (b"", "media_broken"),
    "page": (b"<!DOCTYPE html><html>404</html>", "media_broken"),
    "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "media_broken"),
    "svg": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "media_broken"),
    "jpeg of fill bytes": (b"\xff\xd8" + b"\xff" * (1 << 20), "media_broken"),
    "jpeg of empty segments": (b"\xff\xd8" + b"\xff\xe0\0\2" * (1 << 19), "media_broken"),
    "jpeg of junk": (b"\xff\xd8\xff" + bytes(1 << 20), "media_broken"),
    "gif of blocks": (picture(9, 9, kind="GIF")[:13] + b"!\xfe" + b"\1x" * (1 << 19), "media_broken"),
    "png of empty chunks": (picture(9, 9)[:33] + b"\0\0\0\0abcd\0\0\0\0" * (1 << 18), "media_broken"),
    "webp of empty chunks": (
        b"RIFF\xff\xff\xff\x7fWEBPVP8X\x0a\0\0\0\x0c" + bytes(9) + b"abcd\0\0\0\0" * (1 << 18),
        "media_broken",
    ),
    "webp of 2^28 pixels": (b"RIFF\x1e\0\0\0WEBPVP8X\x0a\0\0\0\0\0\0\0\xff\x3f\0\xff\x3f\0", "media_bomb"),
    "gif of 2^32 pixels": (b"GIF89a\xff\xff\xff\xff\0\0\0,\0\0\0\0\xff\xff\xff\xff\0\2\0;", "media_bomb"),
    "bmp of 2^31 rows": (b"BM" + bytes(12) + b"\x28\0\0\0\1\0\0\0\xff\xff\xff\x7f\1\0\x18\0" + bytes(24), "media_bomb"),
    "tiff of 2^34 pixels": (
        b"II*\0\x08\0\0\0\x02\0\0\1\4\0\1\0\0\0\0\0\2\0\1\1\4\0\1\0\0\0\0\0\2\0\0\0\0\0",
        "media_b",
    ),
    "ppm of 2^40 pixels": (b"P6 1048576 1048576 255\n", "media_bomb"),
    "jpeg of 2^32 pixels": (
        b"\xff\xd8\xff\xc0\0\x0b\x08\xff\xff\xff\xff\1\1\x11\0\xff\xda\0\x08\1\1\0\0\x3f\0\0\xff\xd9",
        "media_bomb",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_pictures_are_refused_at_once(name: str) -> None:
    data, code = HOSTILE[name]
    for verify in ("structure", "decode"):
        with pytest.raises(DataError, match=f"^{code}"):
            read_image(MediaFile(data=data), verify=verify)


def test_fuzz_videos(tmp_path: Path) -> None:
    shades = [20 * number for number in range(12)]
    kinds = {"a.mp4": {}, "b.mkv": {}, "c.avi": {"codec": "mpeg4"}, "d.webm": {"codec": "libvpx"}, "e.ts": {}}
    whole = [write_video(tmp_path / name, shades, **given).read_bytes() for name, given in kinds.items()]  # type: ignore[arg-type]
    limits = VideoLimits(timeout=5.0, memory=1024)
    outcomes: dict[str, int] = {}
    for number in range(VIDEOS):
        rng = random.Random(number)
        data = damaged(whole, rng) if number % 3 else bytes(bytearray(rng.choice(whole))[: rng.randrange(3000)])
        try:
            with open_video(MediaFile(data=data), ("auto", "pyav")[number % 2], limits=limits) as video:
                frames = video.frames(SPEC, 4)
            assert 1 <= len(frames) <= 4
            outcome = "item"
        except DataError as error:
            outcome = known(error)
        outcomes[outcome] = outcomes.get(outcome, 0) + 1
    assert {"item", "video_broken"} <= set(outcomes)
    with open_video(MediaFile(data=whole[0]), limits=limits) as video:
        assert len(video.frames(SPEC, 4)) == 4
