"""Stock transformers' ids of a conversation: the chat template, then the InternVL processor's own code.

AutoProcessor needs torchvision for its video processor, which no text needs: the processor is made without one, and its
methods that write text are called.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from megatron_vita.data.example import MediaItem
from megatron_vita.data.sample import Sample, Text
from megatron_vita.data.spec import PreprocessSpec


class Stock:
    """What an exported folder's stock processor does."""

    def __init__(self, folder: Path, spec: PreprocessSpec) -> None:
        import transformers
        from transformers.models.internvl.processing_internvl import InternVLProcessor

        self.tokenizer: Any = transformers.AutoTokenizer.from_pretrained(str(folder))
        self._pictures = transformers.GotOcr2ImageProcessorPil(
            size={"height": spec.image_size, "width": spec.image_size},
            crop_to_patches=True,
            min_patches=1,
            max_patches=12,
        )
        self._processor = processor = InternVLProcessor.__new__(InternVLProcessor)
        processor.image_seq_length = spec.tokens_per_tile
        named = self.tokenizer
        processor.start_image_token, processor.end_image_token = named.start_image_token, named.end_image_token
        processor.image_token, processor.video_token = named.context_image_token, named.video_token

    def __call__(
        self,
        sample: Sample,
        images: list[MediaItem],
        videos: list[list[MediaItem]],
        *,
        generation_prompt: bool = True,
        in_parts: bool = False,
    ) -> list[int]:
        content = []
        for message in sample.messages:
            parts = [
                {"type": "text", "text": p.text} if isinstance(p, Text) else {"type": type(p).__name__.lower()}
                for p in message.parts
            ]
            texts_only = all(part["type"] == "text" for part in parts) and not in_parts
            joined = "".join(p["text"] for p in parts) if texts_only else parts
            content.append({"role": message.role, "content": joined})
        text = self.tokenizer.apply_chat_template(content, tokenize=False, add_generation_prompt=generation_prompt)
        begun = self.tokenizer.bos_token is not None and text.startswith(self.tokenizer.bos_token)
        tiles = {
            "num_patches": [self._pictures.get_number_of_image_patches(item.height, item.width) for item in images]
        }
        clips = {"pixel_values_videos": [np.empty((len(frames), 0)) for frames in videos]}
        (text,), _ = self._processor.get_text_with_replacements(
            [text],
            [self._processor.replace_image_token(tiles, index) for index in range(len(images))],
            [self._processor.replace_video_token(clips, index) for index in range(len(videos))],
        )
        # as stock apply_chat_template calls its processor
        ids: list[int] = self.tokenizer(text, **({"add_special_tokens": False} if begun else {}))["input_ids"]
        return ids
