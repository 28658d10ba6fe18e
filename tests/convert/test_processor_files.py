"""How a folder wants its pictures: both of transformers' spellings, and the side file of our own exports."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest

from megatron_vita.config import ModelConfig, ProjectorConfig, VisionConfig
from megatron_vita.convert.families import long_vita
from megatron_vita.convert.families.internvl_processor import read_spec
from megatron_vita.convert.opening import open_model, open_tower
from megatron_vita.convert.processor_files import processor_files, with_norm, with_own_projector
from megatron_vita.data.spec import PreprocessSpec
from megatron_vita.errors import CheckpointError
from tests.convert import publishers

TOWER = VisionConfig(
    num_layers=1, hidden_size=60, ffn_hidden_size=88, num_attention_heads=3, image_size=16, patch_size=4
)
MODEL = ModelConfig(vision=TOWER)
HALF = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
TILES = {"crop_to_patches": True, "min_patches": 2, "max_patches": 5, "size": {"height": 16, "width": 16}}
WANTED = PreprocessSpec(image_size=16, patch_size=4, min_tiles=2, max_tiles=5, image_norm="siglip")


def _write(folder: Path, **files: dict[str, Any]) -> None:
    for name, values in files.items():
        (folder / f"{name}.json").write_text(json.dumps(values))


def test_the_new_place_and_the_old_one_are_read_alike(tmp_path: Path) -> None:
    for name, files in {
        "old": {"preprocessor_config": {**HALF, **TILES}},
        "flat": {"preprocessor_config": {**HALF, **TILES}, "processor_config": {"image_seq_length": 4}},
        "new": {"processor_config": {"image_processor": {**HALF, **TILES}}},
        "both": {"preprocessor_config": {**HALF, **TILES}, "processor_config": {"image_processor": {**HALF, **TILES}}},
    }.items():
        (tmp_path / name).mkdir()
        _write(tmp_path / name, **files)
        assert read_spec(tmp_path / name, TOWER) == WANTED, name
        assert with_norm(tmp_path / name, TOWER).image_norm == "siglip", name


def test_settings_as_transformers_saves_them(tmp_path: Path) -> None:
    """What its own processor says, nested as ProcessorMixin.save_pretrained nests it."""
    module = pytest.importorskip("transformers.models.got_ocr2.image_processing_pil_got_ocr2")
    stock = module.GotOcr2ImageProcessorPil(**HALF, **TILES)
    _write(tmp_path, processor_config={"image_processor": stock.to_dict(), "processor_class": "InternVLProcessor"})
    assert read_spec(tmp_path, TOWER) == WANTED


def test_a_model_and_a_tower_are_opened_by_it(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    publishers.write_internvl(tmp_path / "ivl")
    publishers.write_intern_vit(tmp_path / "vit", remote=False)
    for name in ("ivl", "vit"):
        _write(tmp_path / name, processor_config={"image_processor": {**HALF, **TILES}})
    opened = open_model(tmp_path / "ivl")
    assert opened.preprocess == WANTED
    assert opened.model.vision is not None
    assert opened.model.vision.image_norm == open_tower(tmp_path / "vit")[0].image_norm == "siglip"


def test_nothing_said_is_what_the_tower_asks(tmp_path: Path) -> None:
    assert long_vita.processor(tmp_path, MODEL) == PreprocessSpec(layout="long_vita", image_size=16, patch_size=4)
    assert read_spec(tmp_path, TOWER) == PreprocessSpec(image_size=16, patch_size=4)
    assert with_norm(tmp_path, TOWER) == TOWER


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"size": {"height": 32, "width": 32}}, "makes pictures of 32 pixels a side, but .* image_size=16"),
        ({"size": 32}, "makes pictures of 32 pixels"),
        ({"size": {"shortest_edge": 32}}, "makes pictures of 32 pixels"),
        ({"size": {"height": 16, "width": 32}}, "is no side of a square"),
        ({"do_center_crop": True, "crop_size": {"height": 8, "width": 8}}, "of 8 pixels"),
        ({"image_mean": [0.1] * 3, "image_std": [0.1] * 3}, "unknown image_mean"),
        ({"rescale_factor": 1 / 127.5}, "unknown image_mean .* of pixels of 0..2 "),
        ({"do_normalize": False}, "do_normalize=False"),
    ],
)
def test_settings_of_a_tower_that_do_not_fit_are_refused(values: dict[str, Any], message: str, tmp_path: Path) -> None:
    _write(tmp_path, processor_config={"image_processor": values})
    with pytest.raises(CheckpointError, match=f"{tmp_path}/processor_config.json: .*{message}"):
        with_norm(tmp_path, TOWER)


def test_a_crop_decides_over_what_is_resized(tmp_path: Path) -> None:
    _write(tmp_path, preprocessor_config={"size": {"shortest_edge": 20}, "do_center_crop": True, "crop_size": 16})
    assert with_norm(tmp_path, TOWER) == TOWER


def test_of_two_places_the_new_one_is_believed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A tower's, too. (A whole InternVL's: test_internvl_processor.py.)"""
    _write(tmp_path, preprocessor_config={}, processor_config={"image_processor": HALF})
    assert with_norm(tmp_path, TOWER).image_norm == "siglip"
    assert not caplog.text
    _write(tmp_path, preprocessor_config={"image_mean": [0.1] * 3})
    assert with_norm(tmp_path, TOWER).image_norm == "siglip"
    assert "says otherwise of image_mean" in caplog.text


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    model = dataclasses.replace(MODEL, projector=ProjectorConfig(ffn_hidden_size=60, bias=False))
    files = processor_files(model, dataclasses.replace(WANTED, max_fps=2.0))
    _write(tmp_path, **{name.removesuffix(".json"): values for name, values in files.items()})
    assert read_spec(tmp_path, TOWER).max_fps == 2.0
    assert with_own_projector(tmp_path, MODEL) == model
    (tmp_path / "megatron_vita.json").unlink()
    assert read_spec(tmp_path, TOWER) == WANTED
    assert with_own_projector(tmp_path, MODEL) == MODEL


@pytest.mark.parametrize(
    ("projector", "message"),
    [
        ({"bias": False, "ffn_hidden_size": 10**6}, "ffn_hidden_size must be a whole number from 1 to 128"),
        ({"bias": False, "ffn_hidden_size": 0}, "ffn_hidden_size"),
        ({"bias": False, "ffn_hidden_size": "60"}, "ffn_hidden_size"),
        ({"bias": 1}, "bias must be true or false"),
        ([], "projector must be an object"),
    ],
)
def test_a_side_file_that_says_nonsense(projector: Any, message: str, tmp_path: Path) -> None:
    _write(tmp_path, megatron_vita={"projector": projector})
    with pytest.raises(CheckpointError, match=re.escape(str(tmp_path / "megatron_vita.json")) + ".*" + message):
        with_own_projector(tmp_path, MODEL)


def test_a_side_file_without_settings_is_named(tmp_path: Path) -> None:
    _write(tmp_path, megatron_vita={"format_version": 1})
    with pytest.raises(CheckpointError, match=r"megatron_vita.json: has no 'preprocess'"):
        read_spec(tmp_path, TOWER)
