"""What a header says without a pixel decoded is what Pillow says of the whole picture."""

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

from megatron_vita.data.media.image import decode, read_header, read_image
from megatron_vita.data.media.window import HEAD, open_window
from megatron_vita.data.sample import MediaFile
from megatron_vita.errors import DataError
from tests.data.kit import picture

FILES = 250
"""Of each kind."""


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


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "MPO", "TIFF", "PPM"])
def test_headers_agree_with_pillow(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ImageFile, "MAXBLOCK", 1 << 20)  # Pillow's writer wants room for large segments
    path = tmp_path / "picture"
    for number in range(FILES):
        data = generate(kind, number)
        image = Pil.open(io.BytesIO(data))
        wanted = image.format, *ImageOps.exif_transpose(image).size
        header = read_header(data)
        assert (header.format, header.width, header.height) == wanted, number
        path.write_bytes(b"before" + data + b"behind")
        item = read_image(MediaFile(path=str(path), offset=6, size=len(data)))
        assert (item.width, item.height) == wanted[1:], number
        upright = decode(item)
        stock = ImageOps.exif_transpose(Pil.open(io.BytesIO(data)))
        assert upright.size == stock.size
        if stock.mode in ("RGB", "L", "CMYK"):
            assert np.array_equal(np.asarray(upright), np.asarray(stock.convert("RGB"))), number


def chunk(kind: bytes, body: bytes) -> bytes:
    return len(body).to_bytes(4, "big") + kind + body + zlib.crc32(kind + body).to_bytes(4, "big")


def test_orientations_behind_the_pixels_count() -> None:
    exif = Pil.Exif()
    exif[0x0112] = 6
    data = picture(30, 20)
    late = data[:-12] + chunk(b"eXIf", exif.tobytes()[6:]) + data[-12:]
    header = read_header(late)
    assert (header.width, header.height) == (20, 30)
    assert decode(read_image(MediaFile(data=late))).size == (20, 30)


def text(name: bytes, size: int, *, packed: bool) -> bytes:
    """A text chunk of a PNG."""
    body = b"x" * size
    body = zlib.compress(body) if packed else body
    if name == b"iTXt":
        return chunk(name, b"Comment\0" + bytes([packed]) + b"\0\0\0" + body)
    if name == b"iCCP":
        return chunk(name, b"profile\0\0" + body)
    return chunk(name, b"Comment\0" + (b"\0" if packed else b"") + body)


@pytest.mark.parametrize("behind", [False, True])
@pytest.mark.parametrize(
    "given",
    [
        (text(b"zTXt", 2 << 20, packed=True),),
        (text(b"iTXt", 2 << 20, packed=True),),
        (text(b"iCCP", 2 << 20, packed=True),),
        (text(b"tEXt", 1 << 20, packed=False),) * 70,
        (chunk(b"pHYs", b"\0"),),
        (chunk(b"zTXt", b"Comment\0\7nothing"),),
    ],
    ids=["zTXt", "iTXt", "iCCP", "much tEXt", "short pHYs", "unknown method"],
)
def test_chunks_that_pillow_refuses_are_found_without_decoding(given: tuple[bytes, ...], behind: bool) -> None:
    data = picture(30, 20)
    place = len(data) - 12 if behind else 33
    data = data[:place] + b"".join(given) + data[place:]
    with pytest.raises(Exception, match=r"."):  # what stock does
        Pil.open(io.BytesIO(data)).load()
    for verify in ("structure", "decode"):
        with pytest.raises(DataError, match=r"^media_broken: "):
            read_image(MediaFile(data=data), verify=verify)


def test_texts_that_pillow_takes_are_taken() -> None:
    data = picture(30, 20)
    texts = text(b"zTXt", 1 << 20, packed=True) + text(b"iTXt", 9, packed=False) + text(b"tEXt", 3 << 20, packed=False)
    for place in (33, len(data) - 12):
        assert decode(read_image(MediaFile(data=data[:place] + texts + data[place:]), verify="decode")).size == (30, 20)


def test_windows_are_files(tmp_path: Path) -> None:
    data = random.Random(0).randbytes(3 * HEAD)
    path = tmp_path / "file"
    path.write_bytes(b"abc" + data + b"xyz")
    with open_window(MediaFile(path=str(path), offset=3, size=len(data))) as window:
        for place, size in ((0, 10), (HEAD - 5, 10), (len(data) - 7, 99), (2 * HEAD, HEAD)):
            assert window.read(place, size) == data[place : place + size]
        assert window.read(len(data) - 2, 99) == data[-2:]
        assert window.read(len(data) + 5, 9) == b""
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
            open_window(file)
