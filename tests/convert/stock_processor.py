"""transformers' own InternVLProcessor over a folder, without torchvision: pictures only."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image
from transformers import AutoImageProcessor, AutoTokenizer
from transformers.models.internvl.processing_internvl import InternVLProcessor

NAMES = {
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": "<IMG_CONTEXT>",
    "video_token": "<video>",
}


class Stock(InternVLProcessor):
    """Stock but for its video half, which needs torchvision."""

    def check_argument_for_proper_class(self, *args: Any, **kwargs: Any) -> None:
        return None


def name_tokens(folder: Path, **more: Any) -> None:
    """Give a folder's tokenizer the names that InternVLProcessor asks for, and any other keys."""
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "extra_special_tokens": NAMES, **more}))


def load(folder: Path, tokenizer: Any = None) -> Stock:
    """The folder's processor. Which file of settings is believed is stock code's own choice."""
    path = folder / "processor_config.json"
    joint = json.loads(path.read_text()) if path.is_file() else {}
    tokenizer = tokenizer or AutoTokenizer.from_pretrained(folder)
    image = AutoImageProcessor.from_pretrained(folder, backend="pil")
    return Stock(image, tokenizer, None, image_seq_length=joint.get("image_seq_length", 4))


def pixels(stock: Stock, picture: Image.Image) -> npt.NDArray[np.float32]:
    """[tiles, 3, S, S] of one picture."""
    out: Sequence[Any] = stock(images=[picture], text=["<IMG_CONTEXT>\nWhat?"])["pixel_values"]
    return np.stack([np.asarray(one, dtype=np.float32) for one in out])
