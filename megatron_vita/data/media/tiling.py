"""Dynamic tiling: a picture's size decides its grid; tiles are rendered only when they are needed.

`grid_for` and `plan_tiles` look at sizes alone and are exact, so lengths are final before anything is decoded.
`render_tiles` gives the pixels that stock transformers' PIL path gives (GotOcr2ImageProcessorPil), as uint8.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

import numpy as np
import numpy.typing as npt
from PIL import Image

from megatron_vita.config import IMAGE_NORMS
from megatron_vita.data.example import MediaItem, TileSlot
from megatron_vita.data.media.image import decode
from megatron_vita.data.spec import PreprocessSpec

Grid = tuple[int, int]
"""(columns, rows)."""


@lru_cache(maxsize=64)
def _grids(min_tiles: int, max_tiles: int) -> tuple[list[float], list[list[Grid]]]:
    """Allowed aspect ratios, ascending, and the grids of each, by area."""
    sides = range(1, max_tiles + 1)
    grids = [(cols, rows) for cols in sides for rows in sides if min_tiles <= cols * rows <= max_tiles]
    by_ratio: dict[float, list[Grid]] = {}
    for cols, rows in sorted(grids, key=lambda grid: grid[0] * grid[1]):
        by_ratio.setdefault(cols / rows, []).append((cols, rows))
    ratios = sorted(by_ratio)
    return ratios, [by_ratio[ratio] for ratio in ratios]


def _best_grid(width: int, height: int, tile: int, min_tiles: int, max_tiles: int) -> Grid:
    ratios, grids = _grids(min_tiles, max_tiles)
    if not ratios:
        return 1, 1
    aspect = width / height
    above = bisect_left(ratios, aspect)
    if above == len(ratios) or (above and aspect - ratios[above - 1] < ratios[above] - aspect):
        nearest = grids[above - 1]
    elif above and aspect - ratios[above - 1] == ratios[above] - aspect:  # as near to one ratio as to another
        nearest = sorted((*grids[above - 1], *grids[above]), key=lambda grid: grid[0] * grid[1])
    else:
        nearest = grids[above]
    best = nearest[0]
    for cols, rows in nearest[1:]:
        # On a tie the later, larger grid wins only if the picture fills more than half of it.
        if width * height > 0.5 * tile * tile * cols * rows:
            best = cols, rows
    return best


def grid_for(width: int, height: int, spec: PreprocessSpec) -> Grid:
    """(columns, rows) of the grid whose aspect ratio is nearest the picture's; the native InternVL rule.

    Args:
        width: pixels, upright.
        height: pixels, upright.
        spec: tile size and the fewest and most tiles.
    """
    if spec.max_tiles == 1:
        return 1, 1
    return _best_grid(width, height, spec.image_size, spec.min_tiles, spec.max_tiles)


def count_picture_tokens(width: int, height: int, spec: PreprocessSpec) -> int:
    """Tokens of one picture between the texts around it, from its size alone; what `chat.build_example` writes for it.

    `internvl`: `<img>`, the context of grid and thumbnail, `</img>` (the newline behind it belongs to the text, with
    which it is tokenised). `long_vita`: every tile has its own two marks, and every row of the grid a newline.

    Args:
        width: pixels, upright.
        height: pixels, upright.
        spec: layout, tiling, tokens a tile.
    """
    cols, rows = grid_for(width, height, spec)
    tiles = cols * rows + (cols * rows > 1)
    if spec.layout == "internvl":
        return 2 + tiles * spec.tokens_per_tile
    return tiles * (spec.tokens_per_tile + 2) + (rows if tiles > 1 else 0)


def spec_of(item: MediaItem, spec: PreprocessSpec) -> PreprocessSpec:
    """The preprocessing of a picture, which may have a number of tiles of its own."""
    if item.max_tiles is None:
        return spec
    return replace(spec, max_tiles=item.max_tiles, min_tiles=min(spec.min_tiles, item.max_tiles))


def plan_tiles(item: MediaItem, media: int, spec: PreprocessSpec) -> tuple[TileSlot, ...]:
    """Tiles of one picture or frame in token order, their `first_token` still 0.

    `internvl` puts the thumbnail last, `long_vita` first. A picture of one tile, and a frame, has none.

    Args:
        item: the picture.
        media: its index in the Example.
        spec: layout and tile counts.
    """
    cols, rows = (1, 1) if item.frame else grid_for(item.width, item.height, spec_of(item, spec))
    grid = tuple(TileSlot(0, media, row, col, rows, cols) for row in range(rows) for col in range(cols))
    if len(grid) == 1:
        return grid
    thumbnail = TileSlot(0, media, 0, 0, rows, cols, thumbnail=True)
    return (thumbnail, *grid) if spec.layout == "long_vita" else (*grid, thumbnail)


class PictureTiles:
    """A decoded picture, of which tiles are asked for one after the other.

    A picture is stretched to its grid, never padded. A frame is one tile: stretched in `internvl`, padded to a square
    with the mean colour first in `long_vita`.
    """

    def __init__(self, item: MediaItem, spec: PreprocessSpec) -> None:
        """Decode it.

        Args:
            item: the picture.
            spec: tile size, layout, mean colour.

        Raises:
            DataError: the picture cannot be decoded.
        """
        picture = decode(item)
        self._picture = pad_to_square(picture, spec) if item.frame and spec.layout == "long_vita" else picture
        self._side = spec.image_size
        self._grid: Image.Image | None = None

    def render(self, slots: Sequence[TileSlot]) -> npt.NDArray[np.uint8]:
        """Pixels of some tiles, uint8 `[len(slots), 3, S, S]`, S = spec.image_size."""
        side = self._side
        out = np.empty((len(slots), 3, side, side), dtype=np.uint8)
        for number, slot in enumerate(slots):
            if slot.thumbnail:
                tile = _stretch(self._picture, side, side)
            else:
                if self._grid is None:
                    self._grid = _stretch(self._picture, slot.cols * side, slot.rows * side)
                left, top = slot.col * side, slot.row * side
                whole = self._grid.size == (side, side)
                tile = self._grid if whole else self._grid.crop((left, top, left + side, top + side))
            out[number] = np.asarray(tile).transpose(2, 0, 1)
        return out


def render_tiles(item: MediaItem, slots: Sequence[TileSlot], spec: PreprocessSpec) -> npt.NDArray[np.uint8]:
    """Pixels of some tiles of one picture; see `PictureTiles`.

    Args:
        item: the picture; decoded once, however many tiles are asked for.
        slots: which of its tiles.
        spec: tile size, layout, mean colour.

    Returns:
        uint8 `[len(slots), 3, S, S]`, S = spec.image_size; the tower normalises them on its device.

    Raises:
        DataError: the picture cannot be decoded.
    """
    if not slots:
        return np.empty((0, 3, spec.image_size, spec.image_size), dtype=np.uint8)
    return PictureTiles(item, spec).render(slots)


def pad_to_square(picture: Image.Image, spec: PreprocessSpec) -> Image.Image:
    """The picture in the middle of a square of the mean colour (Long-VITA's frames)."""
    width, height = picture.size
    if width == height:
        return picture
    side = max(width, height)
    red, green, blue = (int(mean * 255) for mean in IMAGE_NORMS[spec.image_norm][0])
    square = Image.new("RGB", (side, side), (red, green, blue))
    square.paste(picture, ((side - width) // 2, (side - height) // 2))
    return square


def shrink_frame(picture: Image.Image, spec: PreprocessSpec) -> Image.Image:
    """A frame as it is stored: with more pixels than a tile it becomes its tile now, since only that is read."""
    if picture.width * picture.height <= spec.image_size**2:
        return picture
    if spec.layout == "long_vita":
        picture = pad_to_square(picture, spec)
    return _stretch(picture, spec.image_size, spec.image_size)


def _stretch(picture: Image.Image, width: int, height: int) -> Image.Image:
    if picture.size == (width, height):
        return picture
    return picture.resize((width, height), Image.Resampling.BICUBIC)
