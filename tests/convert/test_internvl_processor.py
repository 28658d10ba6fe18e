"""Pictures of a native InternVL: for any settings, the import makes the tiles and pixels of transformers' processor.

What it cannot make it refuses by name. A folder that is exported again makes the same.
"""

from __future__ import annotations

import io
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from megatron_vita.config import IMAGE_NORMS, ModelConfig, VisionConfig
from megatron_vita.convert.exporter import export
from megatron_vita.convert.families.internvl_processor import read_spec
from megatron_vita.convert.importer import import_model
from megatron_vita.convert.opening import open_model
from megatron_vita.convert.processor_files import processor_files
from megatron_vita.data.example import MediaItem
from megatron_vita.data.media.tiling import plan_tiles, render_tiles
from megatron_vita.data.spec import PreprocessSpec
from megatron_vita.errors import CheckpointError
from tests.convert import publishers

pytest.importorskip("transformers")

from tests.convert import stock_processor

SIDE = 16
TOWER = VisionConfig(
    num_layers=1, hidden_size=60, ffn_hidden_size=88, num_attention_heads=3, image_size=SIDE, patch_size=4
)
MODEL = ModelConfig(vision=TOWER)
SQUARE = {"height": SIDE, "width": SIDE}
IMAGENET = {"image_mean": list(IMAGE_NORMS["imagenet"][0]), "image_std": list(IMAGE_NORMS["imagenet"][1])}
PUBLISHED: dict[str, Any] = {
    **IMAGENET,
    "size": SQUARE,
    "crop_size": None,
    "crop_to_patches": False,
    "do_center_crop": None,
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_processor_type": "GotOcr2ImageProcessorFast",
    "max_patches": 12,
    "min_patches": 1,
    "processor_class": "InternVLProcessor",
    "resample": 3,
    "rescale_factor": 0.00392156862745098,
}
"""As OpenGVLab's folders say it."""


def _folder(tmp_path: Path, **files: Any) -> Path:
    """A folder with a tokenizer and these JSON files."""
    publishers.write_tokenizer(tmp_path, extra=tuple(stock_processor.NAMES.values()))
    stock_processor.name_tokens(tmp_path)
    for name, values in {"config": {"model_type": "internvl"}, **files}.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(values))
    return tmp_path


def _picture(width: int, height: int) -> Image.Image:
    noise = np.random.default_rng(width * 1000 + height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(noise)


def _ours(picture: Image.Image, spec: PreprocessSpec) -> npt.NDArray[np.float32]:
    """Tiles as the tower gets them: [tiles, 3, S, S]."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    item = MediaItem(buffer.getvalue(), *picture.size)
    tiles = render_tiles(item, plan_tiles(item, 0, spec), spec)
    mean, std = (np.array(one, dtype=np.float32).reshape(3, 1, 1) for one in IMAGE_NORMS[spec.image_norm])
    return np.asarray((tiles.astype(np.float32) / 255 - mean) / std)


def _agree(folder: Path, again: Path, pictures: list[tuple[int, int]]) -> PreprocessSpec:
    """Stock over the folder = our import = stock over what we export."""
    spec = read_spec(folder, TOWER)
    _folder(again, **{name.removesuffix(".json"): values for name, values in processor_files(MODEL, spec).items()})
    assert read_spec(again, TOWER) == spec
    first = stock_processor.load(folder)
    second = stock_processor.load(again, first.tokenizer)
    for size in pictures:
        picture = _picture(*size)
        wanted = stock_processor.pixels(first, picture)
        for got in (_ours(picture, spec), stock_processor.pixels(second, picture)):
            assert got.shape == wanted.shape, size
            np.testing.assert_allclose(got, wanted, atol=1e-5)
    return spec


SIZES = [(112, 28), (84, 56), (28, 28), (300, 200), (16, 16), (15, 97)]
_FLAGS = st.sampled_from([None, True, False])
_NORMS = st.sampled_from([{}, IMAGENET, {"image_mean": 0.5, "image_std": 0.5}])
_SCALES = st.sampled_from([{}, {"do_rescale": True, "rescale_factor": 1 / 255}])
_SIZES = st.sampled_from([SQUARE, SIDE, [SIDE, SIDE]])


@st.composite
def _settings(draw: st.DrawFn) -> dict[str, Any]:
    """Settings that stock code takes; each may be absent, flags null."""
    flags = ("crop_to_patches", "do_resize", "do_convert_rgb", "use_thumbnail", "disable_grouping")
    chosen: dict[str, Any] = {key: draw(_FLAGS) for key in flags}
    chosen |= {key: draw(st.integers(-2, 14)) for key in ("min_patches", "max_patches")}
    chosen |= {"size": draw(_SIZES), "resample": 3}
    chosen |= draw(st.sampled_from([{}, {"do_center_crop": True, "crop_size": 8}, {"do_pad": True, "pad_size": 40}]))
    chosen |= draw(_NORMS) | draw(_SCALES)
    kept = ("size", "image_mean", "image_std", "crop_size", "pad_size")  # what goes with another
    return {key: value for key, value in chosen.items() if key in kept or draw(st.booleans())}


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(chosen=_settings(), nested=st.booleans(), picture=st.tuples(st.integers(4, 200), st.integers(4, 200)))
def test_any_settings_make_the_tiles_and_pixels_of_stock_code(
    chosen: dict[str, Any], nested: bool, picture: tuple[int, int], tmp_path_factory: pytest.TempPathFactory
) -> None:
    files = {"processor_config": {"image_processor": chosen}} if nested else {"preprocessor_config": chosen}
    folder = _folder(tmp_path_factory.mktemp("model"), **files)
    if chosen.get("max_patches", 12) < 2 and not chosen.get("do_resize", True):
        with pytest.raises(CheckpointError, match="do_resize=False is not supported"):
            read_spec(folder, TOWER)
        return
    _agree(folder, tmp_path_factory.mktemp("again"), [picture])


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"crop_to_patches": True},
        {"crop_to_patches": None},
        {"do_resize": None},
        {"max_patches": 1},
        {"min_patches": 0, "max_patches": 6},
        {"min_patches": 9, "max_patches": 2},
        {"min_patches": 7, "max_patches": 7},
        {"do_resize": False},
        {"do_center_crop": True, "crop_size": 8, "do_pad": True, "pad_size": 99},
        {"do_convert_rgb": False},
        {"size": SIDE},
        {"image_mean": 0.5, "image_std": 0.5},
        {"do_rescale": None, "image_mean": [0.5 * 255] * 3, "image_std": [0.5 * 255] * 3},
        {"rescale_factor": 1 / 127.5, "image_mean": 1, "image_std": 1},
        {"use_thumbnail": False, "crop_to_tiles": 3, "layout": "x"},
    ],
    ids=str,
)
def test_settings_of_publishers(changes: dict[str, Any], tmp_path: Path) -> None:
    values = {**PUBLISHED, **changes}
    for name, files in {
        "old": {"preprocessor_config": values, "processor_config": {"image_seq_length": 4}},
        "new": {"processor_config": {"image_processor": values, "image_seq_length": 4}},
    }.items():
        (tmp_path / name).mkdir()
        _agree(_folder(tmp_path / name, **files), tmp_path / f"{name}-again", SIZES)


def test_the_joint_file_is_believed_and_the_difference_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What stands in preprocessor_config.json alone is not filled in either."""
    old = {**PUBLISHED, "max_patches": 6, "min_patches": 4}
    new = {key: value for key, value in PUBLISHED.items() if key != "min_patches"}
    folder = _folder(tmp_path / "hf", preprocessor_config=old, processor_config={"image_processor": new})
    with caplog.at_level(logging.WARNING):
        spec = _agree(folder, tmp_path / "again", SIZES)
    assert (spec.min_tiles, spec.max_tiles) == (1, 12)
    assert (
        "preprocessor_config.json beside it, which transformers 4 reads, says otherwise of max_patches" in caplog.text
    )
    (folder / "processor_config.json").write_text(json.dumps({"image_processor": None, "max_patches": 3}))
    assert _agree(folder, tmp_path / "second", SIZES).max_tiles == 6


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"resample": 2}, "resample=2"),
        ({"resample": "bicubic"}, "resample='bicubic'"),
        ({"do_normalize": False}, "do_normalize=False"),
        ({"do_rescale": False}, r"unknown image_mean and image_std .* of pixels of 0..255 \(do_rescale"),
        ({"rescale_factor": 1 / 127.5}, "rescale_factor"),
        ({"rescale_factor": 0}, "rescale_factor"),
        ({"do_rescale": "no"}, "do_rescale must be true or false"),
        ({"image_mean": [0.5, 0.5]}, "image_mean must be a number, or one for each"),
        ({"image_mean": [0.1] * 3}, "unknown image_mean"),
        ({"image_std": None}, "image_std must be a number"),
        ({"do_normalize": None}, "do_normalize=False"),
        ({"do_rescale": None}, "do_rescale"),
        ({"rescale_factor": None}, "rescale_factor must be a number above 0"),
        ({"resample": None}, "resample=None"),
        ({"size": None}, "size=None is no side of a square"),
        ({"max_patches": None}, "max_patches must be a whole number"),
        ({"size": {"shortest_edge": SIDE}}, "size="),
        ({"size": {"height": SIDE, "width": 32}}, "is no side of a square"),
        ({"size": {**SQUARE, "depth": SIDE}}, "size="),
        ({"size": SIDE, "default_to_square": False}, "default_to_square=False"),
        ({"max_patches": 1, "do_resize": False}, "do_resize=False"),
        ({"max_patches": 12.0}, "max_patches must be a whole number"),
        ({"min_patches": "many"}, "min_patches must be a whole number"),
        ({"max_patches": 10**7}, "max_patches must be a whole number up to 1024"),
        ({"do_pad": True}, "do_pad=True is not supported .*pad_size"),
        ({"do_center_crop": True}, "do_center_crop=True is not supported .*crop_size"),
        ({"image_processor_type": "CLIPImageProcessor"}, "image_processor_type='CLIPImageProcessor'"),
    ],
    ids=str,
)
def test_what_stock_code_obeys_and_we_cannot_is_named(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    for name, wrap in (("preprocessor_config", lambda v: v), ("processor_config", lambda v: {"image_processor": v})):
        folder = tmp_path / name
        folder.mkdir()
        _folder(folder, **{name: wrap({**PUBLISHED, **changes})})
        with pytest.raises(CheckpointError, match=f"{folder}/{name}.json: .*{message}"):
            read_spec(folder, TOWER)


def test_what_is_not_said_is_the_default_of_stock_code(tmp_path: Path) -> None:
    """CLIP's mean and deviation, up to 12 tiles, and 384 pixels, which is not this tower's."""
    folder = _folder(tmp_path / "hf", preprocessor_config={"size": SQUARE})
    spec = _agree(folder, tmp_path / "again", SIZES)
    assert (spec.image_norm, spec.min_tiles, spec.max_tiles) == ("clip", 1, 12)
    (folder / "preprocessor_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"makes pictures of 384 pixels a side, but .* image_size=16"):
        read_spec(folder, TOWER)


@pytest.mark.parametrize(
    ("joint", "message"),
    [
        ({"image_seq_length": 256}, "image_seq_length=256, the tower gives 4 a tile"),
        ({"image_seq_length": None}, "image_seq_length must be a whole number"),
        ({"processor_class": "LlavaProcessor"}, "processor_class='LlavaProcessor' is not supported"),
        ({"image_processor": 3}, "image_processor must be an object"),
        ({"video_processor": []}, "video_processor must be an object"),
    ],
)
def test_the_joint_processor(joint: dict[str, Any], message: str, tmp_path: Path) -> None:
    folder = _folder(tmp_path, preprocessor_config=PUBLISHED, processor_config=joint)
    with pytest.raises(CheckpointError, match=f"{folder}/processor_config.json: .*{message}"):
        read_spec(folder, TOWER)


@pytest.mark.parametrize("key", ["max_patches", "size", "do_sample_frames"])
def test_a_tokenizer_that_overrides_settings_of_pictures(key: str, tmp_path: Path) -> None:
    """Stock code obeys it: with max_patches 2 there, a picture has three tiles, whatever the processor's files say."""
    folder = _folder(tmp_path, preprocessor_config=PUBLISHED)
    stock_processor.name_tokens(folder, **{key: 2})
    if key == "max_patches":
        assert len(stock_processor.pixels(stock_processor.load(folder), _picture(112, 28))) == 3
    with pytest.raises(CheckpointError, match=f"tokenizer_config.json: {key} is a setting of pictures"):
        read_spec(folder, TOWER)


VIDEO = {**PUBLISHED, "video_processor_type": "InternVLVideoProcessor", "do_sample_frames": False, "num_frames": 3}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, None),
        ({"num_frames": 8, "fps": 2, "initial_shift": False}, None),  # without do_sample_frames, nothing reads them
        ({"do_resize": False}, None),
        ({"do_center_crop": True, "crop_size": SIDE}, None),
        ({"do_sample_frames": True}, "do_sample_frames=True is not supported"),
        ({"image_mean": 0.5, "image_std": 0.5}, "normalises frames of videos as siglip, pictures .* as imagenet"),
        ({"resample": 2}, "resample=2"),
        ({"do_normalize": False}, "do_normalize=False"),
        ({"size": 32, "do_center_crop": True, "crop_size": SIDE}, "do_center_crop=True"),
        ({"do_resize": False, "do_center_crop": True, "crop_size": SIDE}, "do_center_crop=True"),
        ({"video_processor_type": "LlavaNextVideoVideoProcessor"}, "video_processor_type="),
    ],
    ids=str,
)
def test_videos_are_prepared_as_pictures_are(changes: dict[str, Any], message: str | None, tmp_path: Path) -> None:
    values = {**VIDEO, **changes}
    files: dict[str, dict[str, Any]] = {
        "video_preprocessor_config": {"preprocessor_config": PUBLISHED, "video_preprocessor_config": values},
        "processor_config": {"processor_config": {"image_processor": PUBLISHED, "video_processor": values}},
    }
    for name, content in files.items():
        folder = tmp_path / name
        folder.mkdir()
        _folder(folder, **content)
        if message is None:
            assert read_spec(folder, TOWER) == PreprocessSpec(image_size=SIDE, patch_size=4)
        else:
            with pytest.raises(CheckpointError, match=f"{folder}/{name}.json: .*{message}"):
                read_spec(folder, TOWER)


def test_frames_that_stock_code_cannot_use_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = _folder(tmp_path, preprocessor_config=PUBLISHED, video_preprocessor_config={**VIDEO, "size": 384})
    with caplog.at_level(logging.WARNING):
        read_spec(folder, TOWER)
    assert "makes frames of 384 pixels a side, which the tower does not take" in caplog.text


def test_an_exported_folder_obeys_what_is_changed_in_it(tmp_path: Path) -> None:
    """Our side file says what stock files cannot; of what they say, they are believed, as stock code believes them."""
    spec = PreprocessSpec(image_size=SIDE, patch_size=4, max_tiles=5, max_frames=7, max_fps=0.5)
    files = processor_files(MODEL, spec)
    folder = _folder(tmp_path / "hf", **{name.removesuffix(".json"): values for name, values in files.items()})
    assert read_spec(folder, TOWER) == spec
    changed = {**files["preprocessor_config.json"], "max_patches": 3, "crop_to_patches": False}
    (folder / "preprocessor_config.json").write_text(json.dumps(changed))
    again = _agree(folder, tmp_path / "again", SIZES)
    assert (again.max_tiles, again.max_frames, again.max_fps) == (3, 7, 0.5)


def test_a_whole_model_there_and_back(tmp_path: Path) -> None:
    """crop_to_patches: false, as a publisher says it: imported, opened, exported and opened again, the same tiles."""
    hf = publishers.write_internvl(tmp_path / "hf")
    stock_processor.name_tokens(hf)
    (hf / "preprocessor_config.json").write_text(json.dumps(PUBLISHED))
    (hf / "processor_config.json").write_text(json.dumps({"image_seq_length": 4}))
    step = import_model(hf, tmp_path / "ck")
    back = export(step, tmp_path / "back", "internvl")
    specs = [open_model(one).preprocess for one in (hf, step, back)]
    assert specs[0] is not None
    assert specs == [specs[0]] * 3
    for size in SIZES:
        wanted = stock_processor.pixels(stock_processor.load(hf), _picture(*size))
        np.testing.assert_allclose(_ours(_picture(*size), specs[0]), wanted, atol=1e-5)
        np.testing.assert_array_equal(stock_processor.pixels(stock_processor.load(back), _picture(*size)), wanted)
