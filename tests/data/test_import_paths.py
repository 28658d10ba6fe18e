"""Names that scripts outside this repository import keep their path when their code moves."""

from __future__ import annotations

import importlib

import pytest


@pytest.mark.parametrize(
    ("path", "names"),
    [
        ("data.shards", ["ShardSet"]),
        ("data.tokenizer", ["VitaTokenizer"]),
        ("data.tiling", ["grid_for", "plan_tiles", "render_tiles"]),
        ("data.video", ["open_video"]),
        ("data.example", ["MediaItem", "TileSlot"]),
        ("data.sample", ["MediaFile"]),
        ("data.spec", ["PreprocessSpec"]),
        ("convert", ["open_model"]),
    ],
)
def test_names_keep_their_import_path(path: str, names: list[str]) -> None:
    module = importlib.import_module(f"megatron_vita.{path}")
    assert not [name for name in names if not hasattr(module, name)]
