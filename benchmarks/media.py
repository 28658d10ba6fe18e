"""Pictures: what their sizes cost without decoding them, and what their tiles cost as bytes instead of floats.

Two bars, both in CPU time on the same files, interleaved, best of several repeats:

* metadata pass (open the file, header, upright size, tiles, tokens) : a full decode to RGB, at least 1 : 100;
* our tiles (decode, grid, thumbnail, uint8) : the float path of Long-VITA and stock processors (Pillow decode, resize,
  crop, float32 normalise for each tile), at least 1.5 times as fast. Both give the same pixels; that is checked first.

The mix is made from scikit-learn's two photographs (china.jpg, flower.jpg): twelve widths from 640 to 1,760 pixels,
landscape, square and portrait, JPEG qualities 80 to 95, every fourth progressive, every third with EXIF and a
thumbnail as cameras write them, and one PNG in nine.

    python benchmarks/media.py [--repeats 7]
"""

from __future__ import annotations

import argparse
import io
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image
from sklearn.datasets import load_sample_images

from megatron_vita.config import IMAGE_NORMS
from megatron_vita.data.media.image import decode, read_header, read_image
from megatron_vita.data.media.tiling import count_picture_tokens, grid_for, plan_tiles, render_tiles
from megatron_vita.data.sample import MediaFile
from megatron_vita.data.spec import PreprocessSpec

SPEC = PreprocessSpec()
PNG = b"\x89PNG"
WIDTHS = (640, 640, 640, 800, 800, 1024, 1024, 1024, 1280, 1440, 1600, 1760)


def photographs(folder: Path) -> list[MediaFile]:
    """The mix, as files."""
    files = []
    for source, pixels in enumerate(load_sample_images().images):
        original = Image.fromarray(pixels)
        for number, width in enumerate(WIDTHS):
            crop = original.crop((107, 0, 534, 427)) if number % 3 == 1 else original  # a square, or 3:2
            size = (width, width * crop.height // crop.width)
            picture = crop.resize(size, Image.Resampling.LANCZOS)
            if number % 3 == 2:
                picture = picture.transpose(Image.Transpose.ROTATE_90)
            path = folder / f"{source}-{number}"
            if (source * len(WIDTHS) + number) % 9 == 8:
                picture.save(path, "PNG")
            else:
                options = {"quality": 80 + 5 * (number % 4), "progressive": number % 4 == 3}
                picture.save(path, "JPEG", exif=camera_exif(picture) if number % 3 == 0 else b"", **options)
            files.append(MediaFile(path=str(path)))
    return files


def camera_exif(picture: Image.Image) -> bytes:
    """An EXIF block with orientation and a thumbnail behind its directory."""
    exif = Image.Exif()
    exif[0x010F], exif[0x0110], exif[0x0112] = "Maker", "Camera 1", 1
    small = io.BytesIO()
    picture.resize((160, 120)).save(small, "JPEG")
    return exif.tobytes() + small.getvalue()


def metadata(data: bytes) -> int:
    """Upright size, grid and tokens of a picture; nothing is decoded."""
    header = read_header(data)
    cols, rows = grid_for(header.width, header.height, SPEC)
    return cols * rows + count_picture_tokens(header.width, header.height, SPEC)


def full_decode(file: MediaFile) -> int:
    """Every pixel of a picture as RGB, with Pillow."""
    assert file.path is not None
    with Image.open(file.path) as picture:
        pixels = picture.convert("RGB")
    return pixels.width * pixels.height


def our_tiles(data: bytes) -> npt.NDArray[np.uint8]:
    """Every tile as uint8."""
    item = read_image(MediaFile(data=data))
    return render_tiles(item, plan_tiles(item, 0, SPEC), SPEC)


def float_tiles(data: bytes) -> npt.NDArray[np.float32]:
    """Every tile as normalised float32, step by step as the reference's image processor has it."""
    picture = Image.open(io.BytesIO(data)).convert("RGB")
    side = SPEC.image_size
    cols, rows = grid_for(picture.width, picture.height, SPEC)
    grid = picture.resize((cols * side, rows * side), Image.Resampling.BICUBIC)
    corners = [(col * side, row * side) for row in range(rows) for col in range(cols)]
    tiles = [grid.crop((left, top, left + side, top + side)) for left, top in corners]
    if len(tiles) > 1:
        tiles.append(picture.resize((side, side), Image.Resampling.BICUBIC))
    mean, std = (np.array(values, dtype=np.float32) for values in IMAGE_NORMS[SPEC.image_norm])
    scaled = (np.array(tile, dtype=np.float32) * np.float32(1 / 255) for tile in tiles)
    return np.stack([((tile - mean) / std).transpose(2, 0, 1) for tile in scaled])


def best(sides: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Least CPU seconds of each side, run in turn."""
    seconds = dict.fromkeys(sides, float("inf"))
    for _ in range(repeats):
        for name, run in sides.items():
            start = time.process_time()
            run()
            seconds[name] = min(seconds[name], time.process_time() - start)
    return seconds


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--repeats", type=int, default=7)
    repeats = parser.parse_args().repeats
    with tempfile.TemporaryDirectory() as folder:
        files = photographs(Path(folder))
        data = [Path(file.path or "").read_bytes() for file in files]
        sizes = [decode(read_image(file)).size for file in files]
        megapixels = [width * height / 1e6 for width, height in sizes]
        print(
            f"{len(files)} photographs, {min(megapixels):.2f} to {max(megapixels):.2f} megapixels "
            f"(mean {np.mean(megapixels):.2f}), mean {np.mean([len(one) for one in data]) / 1e3:.0f} kB, "
            f"{sum(one.startswith(PNG) for one in data)} PNG, the rest JPEG"
        )
        seconds = best(
            {
                "decode": lambda: [full_decode(file) for file in files],
                "metadata": lambda: [metadata(one) for one in data * 10],
                "structure": lambda: [read_image(file) for file in files],
            },
            repeats,
        )
        count = len(files)
        decode_us, pass_us = seconds["decode"] / count * 1e6, seconds["metadata"] / count / 10 * 1e6
        print(f"full decode                   {decode_us:9.1f} us a picture")
        print(f"metadata pass                 {pass_us:9.1f} us a picture: {decode_us / pass_us:.0f} times (bar: 100)")
        whole_us = seconds["structure"] / count * 1e6
        print(
            f"whole file read and checked   {whole_us:9.1f} us a picture: {decode_us / whole_us:.0f} times "
            "(--verify-media structure: JPEG's end, PNG's checksums)"
        )
        mean, std = (np.reshape(values, (1, 3, 1, 1)) for values in IMAGE_NORMS[SPEC.image_norm])
        for one in data:
            ours = (our_tiles(one) / 255.0 - mean) / std
            assert np.abs(ours - float_tiles(one)).max() < 2e-6  # float32 rounding of the float path
        seconds = best(
            {"float": lambda: [float_tiles(one) for one in data], "bytes": lambda: [our_tiles(one) for one in data]},
            repeats,
        )
        print(f"float path (float32 tiles)    {seconds['float'] / count * 1e3:9.2f} ms a picture")
        print(
            f"ours (checked, uint8 tiles)   {seconds['bytes'] / count * 1e3:9.2f} ms a picture: "
            f"{seconds['float'] / seconds['bytes']:.2f} times (bar: 1.5)"
        )


if __name__ == "__main__":
    main()
