"""Write digits/digits.jsonl: two held-out scans of each digit, as the quickstart asks about them.

    python examples/evaluate/make_digits.py --output examples/evaluate/digits/digits.jsonl

The scans are those that a quickstart with its default seed never trains on. A line is one question: `image` (a PNG file
in base64), `question`, `answer`.
"""

from __future__ import annotations

import argparse
import base64
import importlib.util
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

SEED = 1
"""The quickstart's default."""
OF_EACH = 2


def questions() -> Iterator[dict[str, str]]:
    """The lines of the file, drawn by the quickstart's own functions."""
    from sklearn.datasets import load_digits

    path = Path(__file__).parents[1] / "quickstart/make_data.py"
    spec = importlib.util.spec_from_file_location("make_data", path)
    assert spec is not None
    assert spec.loader is not None
    quickstart = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = quickstart  # dataclasses look their module up
    spec.loader.exec_module(quickstart)

    bunch = load_digits()
    labels = bunch.target.astype(np.int64)
    rng = np.random.default_rng(np.random.SeedSequence(SEED).spawn(16)[0])
    held_out = quickstart.split_scans(labels, quickstart.Sizes().held_out, rng)
    chosen = sorted(scan for digit in range(10) for scan in np.flatnonzero(held_out & (labels == digit))[:OF_EACH])
    stock = quickstart.draw_all(bunch.images, labels, np.asarray(chosen), 1, rng)
    for index in range(len(stock)):
        picture = base64.b64encode(quickstart.encode_picture(stock.picture(index))).decode()
        yield {"image": picture, "question": quickstart.ASK_DIGIT, "answer": str(stock.labels[index])}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Write the twenty questions about digits.", allow_abbrev=False)
    parser.add_argument("--output", type=Path, required=True, help="file to write")
    args = parser.parse_args(argv)
    args.output.write_text("".join(json.dumps(line) + "\n" for line in questions()), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
