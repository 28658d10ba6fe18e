"""How pictures and videos become tiles and tokens: settings that training, chat, evaluation and export share."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_vita.config import IMAGE_NORMS, LAYOUTS, VisionConfig
from megatron_vita.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class PreprocessSpec:
    """Stored in a shard set's manifest, in a checkpoint's run.json, and in an exported folder's processor settings."""

    layout: str = "internvl"
    """Token layout of pictures and videos: `internvl` or `long_vita`."""
    image_size: int = 448
    """Side of a tile in pixels."""
    patch_size: int = 14
    """Side of a patch in pixels."""
    min_tiles: int = 1
    """Fewest tiles of a picture (thumbnail not counted)."""
    max_tiles: int = 12
    """Most tiles of a picture (thumbnail not counted)."""
    image_norm: str = "imagenet"
    """Name of the pixel mean and standard deviation."""
    max_frames: int = 128
    """Most frames taken from a video."""
    max_fps: float = 1.0
    """Most frames taken per second of video."""
    video_timestamps: bool = False
    """Say before each frame of a video when it is shown: `Frame7 (12.5s): `. Only `internvl` has text there."""

    def __post_init__(self) -> None:
        if self.layout not in LAYOUTS:
            raise ConfigError(f"layout={self.layout!r}: choose one of {', '.join(LAYOUTS)}.")
        if self.image_norm not in IMAGE_NORMS:
            raise ConfigError(f"image_norm={self.image_norm!r}: choose one of {', '.join(sorted(IMAGE_NORMS))}.")
        if self.patch_size < 1 or self.image_size % (2 * self.patch_size):
            raise ConfigError(f"image_size={self.image_size} must be a multiple of twice patch_size={self.patch_size}.")
        if not 1 <= self.min_tiles <= self.max_tiles:
            raise ConfigError(f"need 1 <= min_tiles <= max_tiles, got {self.min_tiles} and {self.max_tiles}.")
        if self.max_frames < 1 or not self.max_fps > 0:
            raise ConfigError(f"max_frames={self.max_frames} and max_fps={self.max_fps} must be positive.")
        if self.video_timestamps and self.layout != "internvl":
            raise ConfigError(f"video_timestamps: layout {self.layout} has no text between frames. Use internvl.")

    @property
    def tokens_per_tile(self) -> int:
        """Context tokens of one tile: (image_size / patch_size / 2) squared."""
        return (self.image_size // self.patch_size // 2) ** 2

    @classmethod
    def for_tower(cls, vision: VisionConfig) -> PreprocessSpec:
        """What a tower asks for, where nothing was trained yet that could say more."""
        return cls(image_size=vision.image_size, patch_size=vision.patch_size, image_norm=vision.image_norm)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> PreprocessSpec:
        """The inverse of `to_dict`; keys that are not settings raise ConfigError."""
        unknown = set(values) - {field.name for field in dataclasses.fields(cls)}
        if unknown:
            raise ConfigError(f"unknown preprocessing settings {sorted(unknown)}")
        return cls(**values)
