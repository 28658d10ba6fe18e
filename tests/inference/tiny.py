"""A tiny random model as a checkpoint, with media to ask about."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import av
import numpy as np

from megatron_vita import checkpoint
from megatron_vita.config import ModelConfig, ParallelConfig, StageConfig, TrainConfig, VisionConfig
from megatron_vita.data.sample import Image, MediaFile, Message, Sample, Text, Video
from megatron_vita.data.spec import PreprocessSpec
from megatron_vita.data.text.tokenizer import VitaTokenizer
from megatron_vita.inference.world import inference_groups
from megatron_vita.models.build import build_model
from tests.data.kit import picture, tokenizer_folder

SPEC = PreprocessSpec(image_size=16, patch_size=4, max_tiles=6, max_frames=8)


def stage(vocab_size: int, *, vision: bool = True, name: str = "tiny", seed: int = 1, **changes: Any) -> StageConfig:
    """Settings of a model small enough for a test; weights large enough that no two tokens tie. `changes`: to it."""
    tower = VisionConfig(
        num_layers=2, hidden_size=16, ffn_hidden_size=32, num_attention_heads=2, image_size=16, patch_size=4,
        init_method_std=0.3, layer_scale_init=1.0,
    )  # fmt: skip
    model = ModelConfig(
        num_layers=2, hidden_size=32, ffn_hidden_size=48, num_attention_heads=4, num_query_groups=2,
        vocab_size=vocab_size, max_position_embeddings=512, init_method_std=0.3, vision=tower if vision else None,
    )  # fmt: skip
    model = dataclasses.replace(model, **changes)
    return StageConfig(name=name, model=model, parallel=ParallelConfig(), train=TrainConfig(seed=seed))


def save_checkpoint(folder: Path, *, vision: bool = True, name: str = "tiny", seed: int = 1, **changes: Any) -> Path:
    """A fresh model's checkpoint and tokenizer under `folder`; returns the root of the checkpoint."""
    tokenizer = tokenizer_folder(folder / "tokenizer")
    settings = stage(VitaTokenizer.load(tokenizer).vocab_size, vision=vision, name=name, seed=seed, **changes)
    groups = inference_groups(ParallelConfig())
    models = build_model(settings, groups)
    state = checkpoint.RunState(stage=settings, iteration=0, preprocess=SPEC if vision else None)
    root = folder / name
    checkpoint.save(root, models, None, None, state, groups, tokenizer=tokenizer)
    return root


def write_media(folder: Path) -> dict[str, Path]:
    """A square picture, a wide one that is cut into tiles, and a video of five frames."""
    paths = {"square": folder / "square.png", "wide": folder / "wide.jpg", "video": folder / "video.mp4"}
    paths["square"].write_bytes(picture(16, 16, seed=1))
    paths["wide"].write_bytes(picture(60, 22, seed=2, kind="JPEG"))
    with av.open(str(paths["video"]), "w") as container:
        stream = container.add_stream("libx264", rate=1, options={"crf": "12", "preset": "ultrafast"})
        stream.width = stream.height = 32
        stream.pix_fmt = "yuv420p"
        rng = np.random.default_rng(3)
        for _ in range(5):
            pixels = rng.integers(0, 256, size=(32, 32, 3), dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return paths


def question(text: str, *, images: list[Path] | None = None, videos: list[Path] | None = None) -> Sample:
    """One user turn: pictures, videos, text."""
    images, videos = images or [], videos or []
    parts = [*(Image(i) for i in range(len(images))), *(Video(i) for i in range(len(videos))), Text("\n" + text)]
    return Sample(
        messages=(Message("user", tuple(parts)),),
        images=tuple(MediaFile(path=str(path)) for path in images),
        videos=tuple(MediaFile(path=str(path)) for path in videos),
        source="test",
        line=1,
    )
