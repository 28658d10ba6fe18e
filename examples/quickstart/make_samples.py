"""Write the samples of the server's web page: two pictures and a video that the quickstart's model reads.

    python examples/quickstart/make_samples.py [--output megatron_vita/serving/page]

The scans are E. Alpaydin's and C. Kaynak's, from "Optical Recognition of Handwritten Digits" (UCI, 1998,
https://doi.org/10.24432/C50P49), licensed CC BY 4.0, as scikit-learn ships them. They are enlarged from 8 x 8 points,
and in the video one frame is inverted. The quickstart's default seed holds them out of training.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from make_data import ASK_DIGIT, ASK_MARKED, Sizes, draw_all, encode_picture, encode_video, invert, split_scans

SEED = 1
PICTURES = (("digit_3.png", "A handwritten digit", 3, 1), ("digit_8.png", "Another digit", 8, 4))
"""(file, title, digit, which of its held-out scans)."""
FRAMES = ((2, 0), (7, 3), (0, 2), (9, 1), (4, 2), (6, 0), (1, 3), (5, 5), (8, 2), (3, 0), (2, 6), (0, 4))
"""(digit, which of its held-out scans) of each frame."""
MARKED = 4


def main(argv: Sequence[str] | None = None) -> int:
    """Write the files and samples.json, which names them."""
    from sklearn.datasets import load_digits

    parser = argparse.ArgumentParser(description="Write the samples of the server's web page.", allow_abbrev=False)
    default = Path(__file__).resolve().parents[2] / "megatron_vita/serving/page"
    parser.add_argument("--output", type=Path, default=default, help="folder to write to")
    args = parser.parse_args(argv)

    bunch = load_digits()
    first = np.random.default_rng(np.random.SeedSequence(SEED).spawn(16)[0])  # as make_data.py draws the split
    labels = bunch.target.astype(np.int64)
    held_out = np.flatnonzero(split_scans(labels, Sizes().held_out, first))
    stock = draw_all(bunch.images, labels, held_out, 1, np.random.default_rng())

    def index(digit: int, which: int) -> int:
        return int(np.flatnonzero(stock.labels == digit)[which])

    samples = []
    for name, title, digit, which in PICTURES:
        (args.output / name).write_bytes(encode_picture(stock.picture(index(digit, which))))
        samples.append({"file": name, "title": title, "question": ASK_DIGIT})
    frames = [stock.pixels[index(*one)] for one in FRAMES]
    frames[MARKED] = invert(frames[MARKED])
    encode_video(args.output / "marked.mp4", frames)
    samples.append({"file": "marked.mp4", "title": f"A video, {len(FRAMES)} frames", "question": ASK_MARKED})
    (args.output / "samples.json").write_text(json.dumps(samples, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
