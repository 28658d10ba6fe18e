"""The import path of scripts outside this repository; the code is in data/media/tiling.py."""

from megatron_vita.data.media.tiling import grid_for, plan_tiles, render_tiles

__all__ = ["grid_for", "plan_tiles", "render_tiles"]
