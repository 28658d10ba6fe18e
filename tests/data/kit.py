"""A tokenizer and pictures for the data tests."""

from __future__ import annotations

import io
import json
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image as Pil
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from megatron_vita.data.example import MediaItem
from megatron_vita.data.text.tokenizer import END_OF_TEXT, IM_END, IM_START, VITA_TOKENS

SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
WORDS = "user assistant system Frame Which digit is this picture answer the a of and seven three"


@lru_cache(maxsize=1)
def _trained() -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        min_frequency=2,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    texts = [WORDS, " ".join(f" {word}" for word in WORDS.split()), "\n\n?\n. \n"] * 9
    texts += [f"Frame{n}: " for n in range(30)] + [word for word in WORDS.split() for _ in range(9)]
    tokenizer.train_from_iterator(texts, trainer)
    special = [END_OF_TEXT, IM_START, IM_END, *VITA_TOKENS]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return tokenizer.to_str()


def tokenizer_folder(path: Path, template: str | None = None) -> Path:
    """A Hugging Face folder with a small byte-level BPE that splits as Qwen2.5 does."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "tokenizer.json").write_text(_trained(), encoding="utf-8")
    named = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }
    config = {
        "tokenizer_class": "Qwen2Tokenizer",
        "eos_token": IM_END,
        "pad_token": END_OF_TEXT,
        "extra_special_tokens": named,
        "clean_up_tokenization_spaces": False,
    }
    (path / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    if template is None:
        from megatron_vita.data.text import chat

        template = Path(chat.__file__).with_name("chat_template.jinja").read_text(encoding="utf-8")
    (path / "chat_template.jinja").write_text(template, encoding="utf-8")
    return path


def picture(width: int, height: int, seed: int = 0, kind: str = "PNG", mode: str = "RGB") -> bytes:
    """A picture file of noise and a gradient."""
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, size=(height, width, 3), dtype=np.uint8)
    pixels[:, :, 0] = np.linspace(0, 255, width, dtype=np.uint8)[None]
    buffer = io.BytesIO()
    Pil.fromarray(pixels).convert(mode).save(buffer, kind)
    return buffer.getvalue()


def blank(width: int, height: int, frame: bool = False) -> MediaItem:
    """An item whose pixels nobody will look at."""
    return MediaItem(b"", width, height, frame)
