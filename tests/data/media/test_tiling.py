"""Tiles: the grid rule and the pixels of stock transformers' PIL image processor, Long-VITA's square frames."""

from __future__ import annotations

import io
import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from megatron_vita.config import IMAGE_NORMS
from megatron_vita.data.example import MediaItem
from megatron_vita.data.media.image import read_image
from megatron_vita.data.media.tiling import count_picture_tokens, grid_for, plan_tiles, render_tiles, shrink_frame
from megatron_vita.data.media.video.clip import encode_frame
from megatron_vita.data.sample import Image as Part
from megatron_vita.data.sample import MediaFile, Message, Sample, Text
from megatron_vita.data.spec import PreprocessSpec
from megatron_vita.data.text.chat import build_example
from megatron_vita.data.text.tokenizer import VitaTokenizer
from tests.data.kit import blank, picture, tokenizer_folder

got_ocr2 = pytest.importorskip("transformers.models.got_ocr2.image_processing_pil_got_ocr2")


@pytest.mark.slow
@given(
    st.integers(1, 5000),
    st.integers(1, 5000),
    st.sampled_from([(448, 1, 12), (448, 1, 6), (16, 1, 4), (336, 2, 9), (448, 1, 1)]),
)
@settings(max_examples=500)
def test_grid_equals_stock(width: int, height: int, sizes: tuple[int, int, int]) -> None:
    tile, least, most = sizes
    spec = PreprocessSpec(image_size=tile, patch_size=14 if tile % 28 == 0 else 4, min_tiles=least, max_tiles=most)
    stock = got_ocr2.get_optimal_tiled_canvas((height, width), (tile, tile), least, most)
    assert grid_for(width, height, spec) == (stock if most > 1 else (1, 1))


def test_every_tie_is_settled_as_stock() -> None:
    spec = PreprocessSpec()
    for cols in range(1, 13):
        for rows in range(1, 13):
            for scale in (1, 100, 300, 448, 700):
                size = (cols * scale, rows * scale)
                stock = got_ocr2.get_optimal_tiled_canvas(size[::-1], (448, 448), 1, 12)
                assert grid_for(*size, spec) == stock


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "CMYK", "RGBA", "LA", "1"])
@pytest.mark.parametrize("size", [(64, 64), (120, 40), (33, 90), (16, 16), (5, 300)])
def test_pixels_equal_stock(mode: str, size: tuple[int, int]) -> None:
    spec = PreprocessSpec(image_size=32, patch_size=4, max_tiles=6)
    data = picture(*size, kind="TIFF", mode=mode)
    item = read_image(MediaFile(data=data))
    slots = plan_tiles(item, 0, spec)
    mean, std = IMAGE_NORMS["imagenet"]
    processor = got_ocr2.GotOcr2ImageProcessorPil(
        size={"height": 32, "width": 32}, image_mean=mean, image_std=std, crop_to_patches=True, max_patches=6
    )
    stock = processor(Image.open(io.BytesIO(data)), return_tensors="np")
    tiles = render_tiles(item, slots, spec)
    assert tiles.dtype == np.uint8
    assert tiles.shape == stock["pixel_values"].shape
    shape = (1, 3, 1, 1)
    ours = (tiles.astype(np.float64) / 255 - np.reshape(mean, shape)) / np.reshape(std, shape)
    assert np.abs(ours - stock["pixel_values"]).max() < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("most", range(1, 13))
def test_pixels_equal_stock_at_every_number_of_tiles(most: int) -> None:
    spec = PreprocessSpec(image_size=32, patch_size=4, max_tiles=most)
    mean, std = IMAGE_NORMS["imagenet"]
    processor = got_ocr2.GotOcr2ImageProcessorPil(
        size={"height": 32, "width": 32}, image_mean=mean, image_std=std, crop_to_patches=True, max_patches=most
    )
    rng = np.random.default_rng(most)
    grids = [(cols, rows) for cols in range(1, most + 1) for rows in range(1, most + 1) if cols * rows <= most]
    sizes = [(cols * 29 + 1, rows * 31 - 1) for cols, rows in grids]  # near every grid, and odd
    sizes += [(1, 7), (7, 1), (2, 501), (601, 3), *map(tuple, rng.integers(4, 333, (6, 2)).tolist())]
    counts = set()
    for number, size in enumerate(sizes):
        data = picture(*size, seed=number, kind=("JPEG", "PNG")[number % 2])
        item = read_image(MediaFile(data=data))
        slots = plan_tiles(item, 0, spec)
        counts.add(len(slots) - (len(slots) > 1))
        stock = processor(Image.open(io.BytesIO(data)), return_tensors="np")["pixel_values"]
        if most == 1:  # stock wants no patches then: it resizes
            stock = stock.reshape(1, 3, 32, 32)
        tiles = render_tiles(item, slots, spec).astype(np.float64)
        shape = (1, 3, 1, 1)
        ours = (tiles / 255 - np.reshape(mean, shape)) / np.reshape(std, shape)
        assert ours.shape == stock.shape, size
        assert np.abs(ours - stock).max() < 1e-6, size
    assert counts == {cols * rows for cols, rows in grids}


def test_midpoints_between_two_ratios_are_settled_as_stock() -> None:
    grids = [(cols, rows) for cols in range(1, 13) for rows in range(1, 13) if cols * rows <= 12]
    for most, least in ((12, 1), (12, 3), (9, 2), (5, 1)):
        spec = PreprocessSpec(min_tiles=least, max_tiles=most)
        for (cols, rows), (cols2, rows2) in itertools.combinations(grids, 2):
            for scale in (1, 53):
                size = ((cols * rows2 + cols2 * rows) * scale, 2 * rows * rows2 * scale)
                stock = got_ocr2.get_optimal_tiled_canvas(size[::-1], (448, 448), least, most)
                assert grid_for(*size, spec) == stock, size


@pytest.mark.parametrize("layout", ["internvl", "long_vita"])
def test_tokens_are_counted_from_the_size_alone(layout: str, tmp_path: Path) -> None:
    tokenizer = VitaTokenizer.load(tokenizer_folder(tmp_path))
    spec = PreprocessSpec(layout=layout, image_size=16, patch_size=4)
    turns = (Message("user", (Text("Which"), Part(0), Text("digit"))), Message("assistant", (Text("seven"),)))
    sample = Sample(turns, (MediaFile(data=b""),))
    marks = [tokenizer.token_id(name) for name in ("<img>", "</img>", "</patch>")]
    for size in ((10, 10), (40, 20), (20, 40), (99, 98), (300, 10), (120, 91), (64, 48)):
        tokens = build_example(sample, [blank(*size)], [], tokenizer=tokenizer, spec=spec).tokens
        places = np.flatnonzero(np.isin(tokens, marks))
        assert places[-1] - places[0] + 1 == count_picture_tokens(*size, spec)


def test_some_tiles_of_a_picture() -> None:
    spec = PreprocessSpec(image_size=16, patch_size=4, max_tiles=6)
    item = read_image(MediaFile(data=picture(60, 40)))
    slots = plan_tiles(item, 0, spec)
    assert len(slots) == 7
    everything = render_tiles(item, slots, spec)
    for number in (6, 0, 3):
        assert np.array_equal(render_tiles(item, slots[number : number + 1], spec)[0], everything[number])
    assert render_tiles(item, (), spec).shape == (0, 3, 16, 16)


def test_frames_are_one_tile_stretched_or_padded() -> None:
    frame = Image.new("RGB", (8, 4), (255, 0, 0))
    for layout in ("internvl", "long_vita"):
        spec = PreprocessSpec(layout=layout, image_size=16, patch_size=4)
        item = encode_frame(frame)
        assert (item.width, item.height, item.frame) == (8, 4, True)
        (slot,) = plan_tiles(item, 0, spec)
        tile = render_tiles(item, [slot], spec)[0]
        assert tile[:, 8, 8].tolist() == [255, 0, 0]
        corner = [255, 0, 0] if layout == "internvl" else [int(m * 255) for m in IMAGE_NORMS["imagenet"][0]]
        assert tile[:, 0, 0].tolist() == corner


def test_stored_frames_lose_no_pixel_of_their_tile() -> None:
    picture_ = Image.open(io.BytesIO(picture(60, 40)))
    for layout in ("internvl", "long_vita"):
        spec = PreprocessSpec(layout=layout, image_size=16, patch_size=4)
        raw = MediaItem(picture(60, 40), 60, 40, frame=True)
        stored = encode_frame(shrink_frame(picture_, spec))
        assert (stored.width, stored.height) == (16, 16)
        slots = plan_tiles(stored, 0, spec)
        assert np.array_equal(render_tiles(stored, slots, spec), render_tiles(raw, slots, spec))
    large = encode_frame(Image.open(io.BytesIO(picture(200, 100))))
    assert large.data[:2] == b"\xff\xd8"
