"""Functions that digits.yaml names: lmms-eval's picture, prompt and score of one question.

Columns of digits.jsonl: `image` (a PNG file in base64), `question`, `answer`. lmms-eval runs this file in its own
environment, so it imports nothing of ours.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence

from PIL import Image


def doc_to_visual(doc: Mapping[str, str]) -> list[Image.Image]:
    """The pictures of a question; lmms-eval sends each as a PNG data URL."""
    return [Image.open(io.BytesIO(base64.b64decode(doc["image"]))).convert("RGB")]


def doc_to_text(doc: Mapping[str, str]) -> str:
    """The prompt."""
    return doc["question"]


def process_results(doc: Mapping[str, str], results: Sequence[str]) -> dict[str, float]:
    """1 where the answer, without surrounding white space, is the digit."""
    return {"exact_match": float(results[0].strip() == doc["answer"])}
