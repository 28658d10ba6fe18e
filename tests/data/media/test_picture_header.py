"""What a header says, read by few short reads, is what Pillow says of the whole picture."""

from __future__ import annotations

import io
import random
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image as Pil
from PIL import ImageFile, ImageOps, PngImagePlugin

from megatron_vita.data.media import picture_header
from megatron_vita.data.media.image import decode, read_image
from megatron_vita.data.media.picture_header import parse_header, read_header
from megatron_vita.data.media.window import HEAD, Window, open_window
from megatron_vita.data.sample import MediaFile
from megatron_vita.errors import DataError
from tests.data.kit import picture

FILES = 250
"""Of each kind."""
PLAIN = ("JPEG", "PNG", "WEBP", "GIF", "BMP")


def exif_block(rng: random.Random) -> bytes:
    """EXIF with an orientation of 0 to 9, other tags around it, and maybe a thumbnail behind."""
    exif = Pil.Exif()
    if rng.random() < 0.5:
        exif[0x010F] = "Maker" * rng.randrange(1, 20)
    if rng.random() < 0.9:
        exif[0x0112] = rng.randrange(10)
    if rng.random() < 0.5:
        exif[0x0131] = "Software"
    if rng.random() < 0.3:
        exif.endian = rng.choice("<>")
    return exif.tobytes() + bytes(rng.choice((0, 0, 300, 9000, 50000)))


def xmp_packet(rng: random.Random) -> str:
    value = rng.randrange(10)
    return rng.choice((f'<x tiff:Orientation="{value}"/>', f"<tiff:Orientation>{value}</tiff:Orientation>", "<x/>"))


def generate(kind: str, number: int) -> bytes:
    """A picture file with anything in its header that writers put there."""
    rng = random.Random(number)
    width, height = rng.randrange(1, 70), rng.randrange(1, 70)
    pixels = np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)
    image, options = Pil.fromarray(pixels), {}
    if kind == "JPEG":
        image = image.convert(rng.choice(("RGB", "L", "CMYK")))
        options = {"quality": rng.randrange(5, 100), "progressive": rng.random() < 0.4}
        if rng.random() < 0.3:
            options["icc_profile"] = bytes(rng.randrange(100, 150000))
        if rng.random() < 0.3:
            options["comment"] = bytes(rng.randrange(60000))
    elif kind == "MPO":
        options = {"save_all": True, "append_images": [image.copy()]}
    elif kind == "PNG":
        mode = rng.choice(("RGB", "L", "P", "1", "RGBA", "LA", "I;16"))
        image = Pil.fromarray(pixels[:, :, 0].astype(np.uint16) * 257) if mode == "I;16" else image.convert(mode)
        text = PngImagePlugin.PngInfo()
        if rng.random() < 0.3:
            text.add_itxt("XML:com.adobe.xmp", xmp_packet(rng), zip=rng.random() < 0.5)
        if rng.random() < 0.3:
            block = exif_block(rng).hex()
            text.add_text("Raw profile type exif", f"\nexif\n{len(block) // 2:8}\n{block}\n", zip=rng.random() < 0.5)
        options["pnginfo"] = text
        if mode in ("RGB", "RGBA") and rng.random() < 0.2:
            options |= {"save_all": True, "append_images": [image.copy()]}
    elif kind == "WEBP":
        image = image.convert(rng.choice(("RGB", "RGBA")))
        options = {"lossless": rng.random() < 0.5}
        if rng.random() < 0.3:
            options |= {"save_all": True, "append_images": [ImageOps.mirror(image)]}
    elif kind == "GIF":
        options = {"comment": bytes(rng.randrange(900))} if rng.random() < 0.5 else {}
        if rng.random() < 0.5:
            options |= {"save_all": True, "append_images": [ImageOps.invert(image)]}
    elif kind == "BMP":
        image = image.convert(rng.choice(("RGB", "L", "P", "1", "RGBA")))
    elif kind == "TIFF":
        options = {"compression": rng.choice(("raw", "tiff_lzw", "tiff_deflate"))}
    if kind in ("JPEG", "MPO", "PNG", "WEBP") and rng.random() < 0.5:
        options["exif"] = exif_block(rng)
    if kind in ("JPEG", "WEBP") and rng.random() < 0.3:
        options["xmp"] = xmp_packet(rng).encode()
    if kind == "TIFF" and rng.random() < 0.7:
        options["exif"] = Pil.Exif()
        options["exif"][0x0112] = rng.randrange(1, 9)
    return saved(image, kind, **options)


def saved(image: Pil.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", [*PLAIN, "MPO", "TIFF", "PPM"])
def test_headers_agree_with_pillow(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ImageFile, "MAXBLOCK", 1 << 20)  # Pillow's writer wants room for large segments
    asked = 0
    ask = picture_header._ask_pillow

    def counted(window: Window) -> tuple[str, int, int, int]:
        nonlocal asked
        asked += 1
        return ask(window)

    monkeypatch.setattr(picture_header, "_ask_pillow", counted)
    path = tmp_path / "picture"
    for number in range(FILES):
        data = generate(kind, number)
        image = Pil.open(io.BytesIO(data))
        wanted = image.format, *ImageOps.exif_transpose(image).size
        header = parse_header(Window(data, len(data)))
        assert (header.format, header.width, header.height) == wanted, number
        path.write_bytes(b"before" + data + b"behind")
        assert read_header(MediaFile(path=str(path), offset=6, size=len(data))) == header, number
        upright = decode(read_image(MediaFile(data=data)))
        stock = ImageOps.exif_transpose(Pil.open(io.BytesIO(data)))
        assert upright.size == stock.size
        if stock.mode in ("RGB", "L", "CMYK"):
            assert np.array_equal(np.asarray(upright), np.asarray(stock.convert("RGB"))), number
    assert (asked == 0) == (kind in PLAIN)  # the fast way is taken wherever it should be


def chunk(kind: bytes, body: bytes) -> bytes:
    return len(body).to_bytes(4, "big") + kind + body + zlib.crc32(kind + body).to_bytes(4, "big")


def test_orientations_behind_the_pixels_count() -> None:
    exif = Pil.Exif()
    exif[0x0112] = 6
    data = picture(30, 20)
    late = data[:-12] + chunk(b"eXIf", exif.tobytes()[6:]) + data[-12:]
    header = parse_header(Window(late, len(late)))
    assert (header.width, header.height, header.orientation) == (20, 30, 6)
    assert decode(read_image(MediaFile(data=late))).size == (20, 30)


def test_only_what_is_needed_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "large.png"
    path.write_bytes(picture(1500, 1500))
    read = 0
    inner = Window.read

    def counted(window: Window, place: int, size: int) -> bytes:
        nonlocal read
        read += size
        return inner(window, place, size)

    monkeypatch.setattr(Window, "read", counted)
    assert read_header(MediaFile(path=str(path))).width == 1500
    assert read + HEAD < 8192 < path.stat().st_size // 100


def test_windows_are_files(tmp_path: Path) -> None:
    data = random.Random(0).randbytes(3 * HEAD)
    path = tmp_path / "file"
    path.write_bytes(b"abc" + data + b"xyz")
    with open_window(MediaFile(path=str(path), offset=3, size=len(data))) as window:
        stream, like = window.stream(), io.BytesIO(data)
        for place, whence, size in ((0, 0, 10), (HEAD - 5, 0, 10), (-7, 2, 99), (5, 1, 9), (-(1 << 20), 1, 3)):
            try:
                assert stream.seek(place, whence) == like.seek(place, whence)
            except ValueError:
                continue
            assert stream.read(size) == like.read(size)
        assert window.read(len(data) - 2, 99) == data[-2:]
        assert window.read(len(data) + 5, 9) == b""
        assert window.stream(10).read() == data[:10]
    (tmp_path / "folder").mkdir()
    for file in (
        MediaFile(),
        MediaFile(path=str(tmp_path / "none")),
        MediaFile(path="a\0b"),
        MediaFile(path=str(path), offset=3, size=1 << 40),
        MediaFile(path=str(path), offset=1 << 40),
        MediaFile(path=str(tmp_path / "folder")),
    ):
        with pytest.raises(DataError, match="media_missing"):
            read_header(file)
