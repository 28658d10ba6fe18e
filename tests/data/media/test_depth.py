"""Pictures of every mode: what is deeper than 8 bits is scaled by the rule that docs/datasets.md tells, or rejected."""

from __future__ import annotations

import io
import struct
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image as Pil
from PIL import ImageCms

from megatron_vita.data.media.image import decode, read_image
from megatron_vita.data.media.tiling import plan_tiles, render_tiles
from megatron_vita.data.sample import MediaFile
from megatron_vita.data.spec import PreprocessSpec
from megatron_vita.errors import DataError

RAMP = np.linspace(0, 1, 48 * 64).reshape(48, 64)
SPEC = PreprocessSpec(image_size=64, patch_size=4, max_tiles=1)


def tiff(values: npt.NDArray[Any], *, order: str = "<", photometric: int = 1, **tags: int) -> bytes:
    """An uncompressed TIFF of any values, `[height, width]` or `[height, width, layers]`."""
    layers = values.shape[2] if values.ndim == 3 else 1
    kind = {"u": 1, "i": 2, "f": 3}[values.dtype.kind]
    bits = tags.pop("bits", 8 * values.itemsize)
    body = values.astype(values.dtype.newbyteorder(order)).tobytes()
    extra = (338, 3, tags["extra"]) if "extra" in tags else None
    entries = [
        (256, 4, values.shape[1]),
        (257, 4, values.shape[0]),
        (258, 3, bits) if layers == 1 else (258, 3, (bits,) * layers),
        (259, 3, 1),
        (262, 3, photometric),
        (273, 4, 0),
        (277, 3, layers),
        (278, 4, values.shape[0]),
        (279, 4, len(body)),
        *([extra] if extra else []),
        (339, 3, kind) if layers == 1 else (339, 3, (kind,) * layers),
    ]
    start = 8 + 2 + 12 * len(entries) + 4
    blocks = b""
    packed = struct.pack(order + "H", len(entries))
    total = sum(2 * len(value) for _, _, value in entries if isinstance(value, tuple) and len(value) > 2)
    for tag, form, value in entries:
        given = value if isinstance(value, tuple) else (value,)
        if tag == 273:
            given = (start + total,)
        if form == 3 and len(given) > 2:
            packed += struct.pack(order + "HHII", tag, form, len(given), start + len(blocks))
            blocks += struct.pack(order + f"{len(given)}H", *given)
        else:
            field = struct.pack(order + ("H" if form == 3 else "I") * len(given), *given).ljust(4, b"\0")
            packed += struct.pack(order + "HHI", tag, form, len(given)) + field
    header = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "I", 8)
    return header + packed + bytes(4) + blocks + body


def pfm(values: npt.NDArray[Any], *, order: str = "<", scale: float = 1.0) -> bytes:
    sign = -scale if order == "<" else scale
    head = f"Pf\n{values.shape[1]} {values.shape[0]}\n{sign}\n".encode()
    return head + values[::-1].astype(order + "f4").tobytes()


def saved(image: Pil.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def shown(data: bytes) -> npt.NDArray[np.int64]:
    """Pixels of a picture: the same by every way that leads to them."""
    pixels = np.asarray(decode(read_image(MediaFile(data=data))))
    checked = read_image(MediaFile(data=data), verify="decode")
    assert np.array_equal(np.asarray(decode(checked)), pixels)
    if pixels.shape[:2] == (64, 64):
        assert np.array_equal(render_tiles(checked, plan_tiles(checked, 0, SPEC), SPEC)[0].transpose(1, 2, 0), pixels)
    return pixels.astype(np.int64)


EIGHT = np.rint(RAMP * 255)
RAMPS: dict[str, bytes] = {
    "16-bit PNG": saved(Pil.fromarray((RAMP * 65535).astype(np.uint16)), "PNG"),
    "16-bit PGM": b"P5 64 48 65535\n" + (RAMP * 65535).astype(">u2").tobytes(),
    "10-bit PGM": b"P5 64 48 1023\n" + (RAMP * 1023).astype(">u2").tobytes(),
    "16-bit PPM": b"P6 64 48 65535\n" + (RAMP * 65535).astype(">u2").repeat(3).tobytes(),
    "float, one is white": tiff(RAMP.astype(np.float32)),
    "float, big-endian": tiff(RAMP.astype(np.float32), order=">"),
    "float to a thousand": tiff((RAMP * 1000).astype(np.float32)),
    "float to two": tiff((RAMP * 2).astype(np.float32)),
    "float of both signs": tiff((RAMP * 2 - 1).astype(np.float32)),
    "float of large values": tiff((RAMP * 6e8 + 4e8).astype(np.float32)),
    "float of whole numbers": tiff(EIGHT.astype(np.float32)),
    "float, white is zero": tiff((1 - RAMP).astype(np.float32), photometric=0),
    "int32 of large values": tiff((RAMP * 2e9).astype(np.int32)),
    "int32, big-endian": tiff((RAMP * 2e9).astype(np.int32), order=">"),
    "int32 of both signs": tiff((RAMP * 4e9 - 2e9).astype(np.int32)),
    "int32 to a thousand": tiff((RAMP * 1000).astype(np.int32)),
    "int32 of bytes": tiff(EIGHT.astype(np.int32)),
    "uint32": tiff((RAMP * 4294967295).astype(np.uint32)),
    "uint32 of bytes": tiff(EIGHT.astype(np.uint32)),
    "uint16 TIFF": tiff((RAMP * 65535).astype(np.uint16)),
    "uint16, big-endian": tiff((RAMP * 65535).astype(np.uint16), order=">"),
    "uint16, white is zero": tiff(((1 - RAMP) * 65535).astype(np.uint16), photometric=0),
    "int16 of both signs": tiff((RAMP * 60000 - 30000).astype(np.int16)),
    "int16, big-endian": tiff((RAMP * 60000 - 30000).astype(np.int16), order=">"),
    "int8 of both signs": tiff((RAMP * 254 - 127).astype(np.int8)),
    "uint8, white is zero": tiff((255 - EIGHT).astype(np.uint8), photometric=0),
    "uint16 colour": tiff((RAMP * 65535).astype(np.uint16)[..., None].repeat(3, 2), photometric=2),
    "uint16 colour, big-endian": tiff(
        (RAMP * 65535).astype(np.uint16)[..., None].repeat(3, 2), photometric=2, order=">"
    ),
    "uint16 colour and alpha": tiff(
        np.stack([*[(RAMP * 65535).astype(np.uint16)] * 3, np.full(RAMP.shape, 65535, np.uint16)], 2),
        photometric=2,
        extra=2,
    ),
    "PFM": pfm(RAMP),
    "PFM, big-endian": pfm(RAMP, order=">"),
    "PFM to fifty": pfm(RAMP * 50),
    "PFM, scaled": pfm(RAMP, scale=0.5),
}


@pytest.mark.parametrize("name", RAMPS)
def test_a_ramp_from_black_to_white_is_one(name: str) -> None:
    try:
        pixels = shown(RAMPS[name])
    except DataError as error:
        if "big-endian" in name or "white is zero" in name:  # not every kind is known to Pillow: named then
            pytest.skip(f"rejected: {error}")
        raise
    wanted = EIGHT // 2 if name == "PFM, scaled" else EIGHT
    assert pixels.shape == (48, 64, 3)
    assert np.abs(pixels - wanted[..., None]).max() <= 1


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("make", [tiff, pfm])
def test_values_that_are_no_numbers_are_rejected(make: Any, value: float) -> None:
    values = RAMP.astype(np.float32)
    values[7, 5] = value
    for verify in ("structure", "decode"):
        with pytest.raises(DataError, match=r"^media_broken: .*NaN or infinite"):
            read_image(MediaFile(data=make(values)), verify=verify)


@pytest.mark.parametrize(
    ("data", "grey"),
    [
        (tiff(np.zeros((4, 4), np.float32)), 0),
        (tiff(np.ones((4, 4), np.float32)), 255),
        (tiff(np.full((4, 4), 0.5, np.float32)), 128),
        (tiff(np.full((4, 4), 7.5, np.float32)), 128),
        (tiff(np.full((4, 4), -3, np.int32)), 128),
        (tiff(np.full((4, 4), 7, np.int32)), 7),
        (tiff(np.full((4, 4), 65535, np.uint16)), 255),
        (tiff(np.full((4, 4), 200, np.uint16)), 1),
    ],
)
def test_pictures_of_one_value(data: bytes, grey: int) -> None:
    assert set(shown(data).ravel().tolist()) == {grey}


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from([np.float32, np.int32, np.uint32, np.uint16, np.int16, np.int8]).flatmap(
        lambda kind: arrays(
            kind, (3, 5), elements={"allow_nan": False, "allow_infinity": False} if kind == np.float32 else None
        )
    )
)
def test_order_is_kept_whatever_the_values(values: npt.NDArray[Any]) -> None:
    grey = shown(tiff(values))[..., 0].ravel()
    order = np.argsort(values.ravel(), kind="stable")
    assert (np.diff(grey[order]) >= 0).all()


COLOUR = np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8).repeat(4, 0).repeat(4, 1)


def test_other_modes() -> None:
    image = Pil.fromarray(COLOUR)
    for data in (saved(image, "TIFF"), saved(image, "PPM"), tiff(COLOUR, photometric=2), saved(image, "BMP")):
        assert np.array_equal(shown(data), COLOUR)
    bilevel = image.convert("1")
    for data in (saved(bilevel, "PNG"), saved(bilevel, "TIFF"), saved(bilevel, "TIFF", compression="group4")):
        assert np.array_equal(shown(data)[..., 0], np.asarray(bilevel) * 255)
    cmyk = image.convert("CMYK")
    assert np.array_equal(shown(saved(cmyk, "TIFF")), np.asarray(cmyk.convert("RGB")))
    ycbcr = image.convert("YCbCr")
    assert np.abs(shown(saved(ycbcr, "TIFF")) - COLOUR).max() < 6
    lab = ImageCms.profileToProfile(
        image, ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), outputMode="LAB"
    )
    assert lab is not None
    assert np.abs(shown(saved(lab, "TIFF")) - COLOUR).mean() < 4


def test_transparency_is_laid_on_white() -> None:
    image = Pil.fromarray(COLOUR).convert("RGBA")
    clear = np.zeros((48, 64), np.uint8)
    clear[:, 32:] = 255
    image.putalpha(Pil.fromarray(clear))
    wanted = COLOUR.copy()
    wanted[:, :32] = 255
    for kind in ("PNG", "TIFF"):
        assert np.array_equal(shown(saved(image, kind)), wanted)
    assert np.array_equal(shown(saved(image, "WEBP", lossless=True)), wanted)
    grey = shown(saved(image.convert("LA"), "PNG"))
    assert (grey[:, :32] == 255).all()
    associated = np.dstack([COLOUR * (clear[..., None] > 0), clear])
    assert np.array_equal(shown(tiff(associated.astype(np.uint8), photometric=2, extra=1)), wanted)
    palette = Pil.fromarray(COLOUR).quantize(16)
    index = int(np.asarray(palette)[0, 0])
    pixels = shown(saved(palette, "PNG", transparency=index))
    assert (pixels[np.asarray(palette) == index] == 255).all()
    deep = Pil.fromarray((RAMP * 65535).astype(np.uint16))
    value = int(np.asarray(deep)[20, 20])
    assert (shown(saved(deep, "PNG", transparency=value))[np.asarray(deep) == value] == 255).all()
    plain = Pil.fromarray(COLOUR)
    key = tuple(COLOUR[0, 0].tolist())
    assert (shown(saved(plain, "PNG", transparency=key))[(key == COLOUR).all(-1)] == 255).all()


def test_of_several_pages_and_pictures_the_first_counts() -> None:
    first, second = Pil.fromarray(COLOUR), Pil.new("RGB", (64, 48), "blue")
    for kind in ("TIFF", "PNG"):
        assert np.array_equal(shown(saved(first, kind, save_all=True, append_images=[second])), COLOUR)


OTHERS = {
    "JPEG 2000": saved(Pil.fromarray(COLOUR), "JPEG2000"),
    "AVIF": b"\0\0\0\x20ftypavif" + bytes(50),
    "HEIC": b"\0\0\0\x18ftypheic" + bytes(50),
    "JPEG XL": b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(50),
    "Radiance HDR": b"#?RADIANCE\nFORMAT=32-bit_rle_rgbe\n\n-Y 4 +X 4\n" + bytes(64),
    "OpenEXR": b"v/1\x01\x02\0\0\0" + bytes(50),
    "PFM of three colours": b"PF\n4 4\n-1.0\n" + bytes(192),
    "Photoshop": b"8BPS\0\1" + bytes(50),
    "kind that Pillow does not know": tiff(RAMP.astype(np.float32)[..., None].repeat(3, 2), photometric=2),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_not_opened_is_rejected_by_name(name: str) -> None:
    for verify in ("structure", "decode"):
        with pytest.raises(DataError, match=f"^media_broken: .*{name}"):
            read_image(MediaFile(data=OTHERS[name]), verify=verify)
