"""The tiles of a prompt, decoded window by window, are those of training, whatever is asked for and in which order."""

from __future__ import annotations

import os
import pickle
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import NoReturn

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_vita.data.example import Example
from megatron_vita.data.media import image, on_demand, tiling
from megatron_vita.data.media.open import read_items
from megatron_vita.data.media.tiling import render_tiles
from megatron_vita.data.media.video.child_video import ChildVideo
from megatron_vita.data.media.video.open import VideoFile
from megatron_vita.data.media.video.worker import decoder
from megatron_vita.data.sample import Image, MediaFile, Message, Sample, Text, Video
from megatron_vita.data.spec import PreprocessSpec
from megatron_vita.data.text.chat import build_example
from megatron_vita.data.text.tokenizer import VitaTokenizer
from megatron_vita.errors import DataError
from megatron_vita.inference.openai import LimitError, Limits
from megatron_vita.inference.prefix_cache import block_keys
from megatron_vita.inference.prompt_media import PromptMedia
from tests.data.kit import picture, tokenizer_folder
from tests.data.videos import write_numbered

SPEC = PreprocessSpec(image_size=16, patch_size=4, max_tiles=6, max_frames=64, max_fps=1000)
SPECS = [
    SPEC,
    PreprocessSpec(**{**SPEC.to_dict(), "video_timestamps": True, "max_fps": 2.0}),
    PreprocessSpec(**{**SPEC.to_dict(), "layout": "long_vita", "image_size": 112, "patch_size": 14}),
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> VitaTokenizer:
    return VitaTokenizer.load(tokenizer_folder(tmp_path_factory.mktemp("tokenizer")))


def conversation(*media: tuple[type[Image] | type[Video], MediaFile]) -> Sample:
    """A question, an answer and a question, with media in the first and the last."""
    images = [file for kind, file in media if kind is Image]
    videos = [file for kind, file in media if kind is Video]
    counts = {Image: 0, Video: 0}
    parts: list[Image | Video] = []
    for kind, _ in media:
        parts.append(kind(counts[kind]))
        counts[kind] += 1
    half = len(parts) // 2
    return Sample(
        messages=(
            Message("user", (*parts[:half], Text("What is it?"))),
            Message("assistant", (Text("A picture."),)),
            Message("user", (Text("And "), *parts[half:], Text("\nthis?"))),
        ),
        images=tuple(images),
        videos=tuple(videos),
        source="test",
        line=1,
    )


def at_once(
    sample: Sample, tokenizer: VitaTokenizer, spec: PreprocessSpec = SPEC
) -> tuple[Example, npt.NDArray[np.uint8]]:
    """What training would make of it."""
    images, videos = read_items(sample, spec)
    example = build_example(sample, images, videos, tokenizer=tokenizer, spec=spec, generation_prompt=True)
    tiles = [
        render_tiles(example.media[media], list(slots), spec)
        for media, slots in groupby(example.tiles, key=lambda slot: slot.media)
    ]
    return example, np.concatenate(tiles)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, MediaFile]:
    """Media of many kinds."""
    folder = tmp_path_factory.mktemp("media")
    found: dict[str, MediaFile] = {}
    for name, width, height, kind in (("square", 16, 16, "PNG"), ("wide", 60, 22, "JPEG"), ("tall", 40, 130, "WEBP")):
        path = folder / name
        path.write_bytes(picture(width, height, seed=len(found), kind=kind))
        found[name] = MediaFile(path=str(path))
    found["bytes"] = MediaFile(data=picture(90, 31, seed=7))
    found["tiff"] = MediaFile(data=picture(60, 22, seed=7, kind="TIFF"))
    ultrafast = {"preset": "ultrafast"}
    for name, count, more in (
        ("h264.mp4", 30, {"options": ultrafast}),
        ("turned.mp4", 7, {"options": ultrafast, "rotation": (90.0, False, False)}),
        ("mpeg4.avi", 20, {"codec": "mpeg4", "options": {"bf": "2"}}),
        ("vp9.webm", 10, {"codec": "libvpx-vp9", "options": {"cpu-used": "8"}}),
        ("large.mkv", 9, {"options": ultrafast, "side": (320, 200)}),
    ):
        found[name] = MediaFile(path=str(write_numbered(folder / name, count, rate=5, **more)))
    found["video bytes"] = MediaFile(data=Path(str(found["h264.mp4"].path)).read_bytes())
    whole = b"junk" + found["video bytes"].data + b"more"  # type: ignore[operator]
    (folder / "archive").write_bytes(whole)
    found["region"] = MediaFile(path=str(folder / "archive"), offset=4, size=len(whole) - 8, label="archive/clip")
    (folder / "frames" / "inner").mkdir(parents=True)
    for number in range(21):
        path = folder / "frames" / ("inner" if number > 18 else ".") / f"{number:02}.png"
        path.write_bytes(picture(30 + number, 20, seed=number))
    found["folder"] = MediaFile(path=str(folder / "frames"), frame_rate=2.0)
    found["part"] = replace(found["h264.mp4"], start=1.5, end=4.0)
    members = tuple(found[name] for name in ("square", "wide", "tall"))
    found["members"] = MediaFile(frames=members, label="archive/frames")
    return found


ALL = [
    (Image, "wide"), (Image, "square"), (Video, "h264.mp4"), (Video, "turned.mp4"), (Image, "tall"), (Video, "folder"),
    (Video, "mpeg4.avi"), (Image, "bytes"), (Video, "video bytes"), (Video, "region"), (Video, "vp9.webm"),
    (Video, "members"), (Video, "part"), (Video, "large.mkv"), (Image, "wide"),
]  # fmt: skip


@pytest.mark.parametrize("spec", SPECS, ids=["plain", "timestamps", "long_vita"])
def test_every_tile_is_that_of_training(
    files: dict[str, MediaFile], tokenizer: VitaTokenizer, spec: PreprocessSpec
) -> None:
    sample = conversation(*((kind, files[name]) for kind, name in ALL))
    expected, pixels = at_once(sample, tokenizer, spec)
    example, media = PromptMedia.open(sample, spec, tokenizer=tokenizer)
    assert np.array_equal(example.tokens, expected.tokens)
    assert example.tiles == expected.tiles
    assert [item.time for item in example.media] == [item.time for item in expected.media]
    assert not any(item.data or item.origin for item in example.media)
    count = len(example.tiles)
    assert np.array_equal(media.tiles(0, count).numpy(), pixels)
    for ranks, window in ((1, 7), (2, 8), (4, 3)):
        for rank in range(ranks):
            other = PromptMedia.reopen(*pickle.loads(pickle.dumps((sample, example))), spec)
            for start in range(rank * window, count, ranks * window):
                stop = min(start + window, count)
                assert np.array_equal(other.tiles(start, stop).numpy(), pixels[start:stop]), (ranks, rank, start)
            other.close()
    media.close()
    assert np.array_equal(media.tiles(3, 60).numpy(), pixels[3:60])
    media.close()


@pytest.mark.parametrize("most", [1, 2, 12])
def test_a_picture_may_have_a_number_of_tiles_of_its_own(
    files: dict[str, MediaFile], tokenizer: VitaTokenizer, most: int
) -> None:
    """Tokens, pixels and keys are those of a model whose preprocessing has that number, on every rank."""
    names = ("wide", "tall", "bytes")
    own = conversation(*((Image, replace(files[name], max_tiles=most)) for name in names))
    spec = replace(SPEC, max_tiles=most)
    expected, pixels = at_once(conversation(*((Image, files[name]) for name in names)), tokenizer, spec)
    trained, pixels_trained = at_once(conversation(*((Image, files[name]) for name in names)), tokenizer)
    example, media = PromptMedia.open(own, SPEC, tokenizer=tokenizer)
    assert np.array_equal(example.tokens, expected.tokens)
    assert example.tiles == expected.tiles != trained.tiles
    assert np.array_equal(at_once(own, tokenizer)[0].tokens, expected.tokens)
    other = PromptMedia.reopen(*pickle.loads(pickle.dumps((own, example))), SPEC)
    assert np.array_equal(other.tiles(0, len(example.tiles)).numpy(), pixels)
    keys, keys_trained = (
        block_keys(one.tokens, 4, one.tiles, media.digests(), SPEC.tokens_per_tile) for one in (example, trained)
    )
    shared = sum(one == same for one, same in zip(keys, keys_trained, strict=False))
    assert shared * 4 <= example.tiles[0].first_token, "a block with pixels of another grid must not be shared"
    assert not np.array_equal(pixels, pixels_trained)


def no_pixels(*_: object, **__: object) -> NoReturn:
    raise AssertionError("decoded")


@pytest.mark.parametrize(
    ("media", "limits", "value"),
    [
        ([(Image, "wide")], {"picture_pixels": 1319}, 1320), ([(Image, "tiff")], {"picture_pixels": 1319}, 1320),
        ([(Image, "wide"), (Image, "tall")], {"pixels": 6519}, 6520),
        ([(Video, "members")], {"frames": 2}, 3),
        ([(Video, "folder")], {"video_seconds": 9.5}, 10), ([(Video, "h264.mp4")], {"video_seconds": 5.7}, 5.8),
    ],
)  # fmt: skip
def test_limits_hold_before_a_pixel_is_decoded(
    files: dict[str, MediaFile],
    tokenizer: VitaTokenizer,
    monkeypatch: pytest.MonkeyPatch,
    media: list[tuple[type[Image] | type[Video], str]],
    limits: dict[str, float],
    value: float,
) -> None:
    sample = conversation(*((kind, files[name]) for kind, name in media))
    ((name, most),) = limits.items()
    generous = Limits(**{name: value})  # type: ignore[arg-type]
    PromptMedia.open(sample, SPEC, tokenizer=tokenizer, limits=generous)[1].close()
    for module, called in ((image, "decode"), (tiling, "decode"), (VideoFile, "plan"), (ChildVideo, "plan")):
        monkeypatch.setattr(module, called, no_pixels)
    with pytest.raises(LimitError, match=f"{value}.*{name}={most} is the limit"):
        PromptMedia.open(sample, SPEC, tokenizer=tokenizer, limits=Limits(**limits))  # type: ignore[arg-type]


def test_tokens_of_media_are_counted_before_a_prompt_is_written(
    files: dict[str, MediaFile], tokenizer: VitaTokenizer
) -> None:
    sample = conversation(*((kind, files[name]) for kind, name in (*ALL[:6], (Image, "bytes"))))
    counted: list[int] = []
    for spec in SPECS:
        example, media = PromptMedia.open(sample, spec, tokenizer=tokenizer, check=counted.append)
        media.close()
        assert len(example.tiles) * spec.tokens_per_tile < counted[-1] < len(example.tokens)

    def refuse(tokens: int) -> None:
        raise DataError(f"{tokens}")

    with pytest.raises(DataError, match=str(counted[0])):
        PromptMedia.open(sample, SPEC, tokenizer=tokenizer, check=refuse)


def test_any_range_in_any_order(files: dict[str, MediaFile], tokenizer: VitaTokenizer) -> None:
    sample = conversation(*((kind, files[name]) for kind, name in ALL[:6]))
    example, pixels = at_once(sample, tokenizer)
    _, media = PromptMedia.open(sample, SPEC, tokenizer=tokenizer)
    end = st.integers(0, len(example.tiles))

    @given(ranges=st.lists(st.tuples(end, end), min_size=1, max_size=4))
    @settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    def check(ranges: list[tuple[int, int]]) -> None:
        for start, stop in map(sorted, ranges):
            assert np.array_equal(media.tiles(start, stop).numpy(), pixels[start:stop])

    check()
    for start, stop in ((-1, 2), (2, 1), (0, len(example.tiles) + 1)):
        with pytest.raises(IndexError):
            media.tiles(start, stop)
    media.close()


def test_text_alone(tokenizer: VitaTokenizer) -> None:
    example, media = PromptMedia.open(conversation(), SPEC, tokenizer=tokenizer)
    assert media.tiles(0, 0).shape == (0, 3, 16, 16)
    assert (example.tiles, media.digests()) == ((), [])
    assert PromptMedia.reopen(conversation(), example, SPEC).tiles(0, 0).shape == (0, 3, 16, 16)


def test_a_picture_is_decoded_once_and_no_frame_is_kept(
    files: dict[str, MediaFile], tokenizer: VitaTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: list[tuple[int, int]] = []
    decode = tiling.decode
    monkeypatch.setattr(tiling, "decode", lambda item: decoded.append((item.width, item.height)) or decode(item))
    sample = conversation((Image, files["wide"]), (Image, files["tall"]), (Image, files["bytes"]))
    example, media = PromptMedia.open(sample, SPEC, tokenizer=tokenizer)
    assert decoded == []
    for tile in range(len(example.tiles)):
        media.tiles(tile, tile + 1)
    assert decoded == [(60, 22), (40, 130), (90, 31)]


# ------------------------------------------------------------------------------------------------------ what goes wrong


def test_a_medium_that_fails_leaves_the_others_usable(
    files: dict[str, MediaFile], tokenizer: VitaTokenizer, tmp_path: Path
) -> None:
    clip = write_numbered(tmp_path / "torn.mp4", 200, options={"preset": "ultrafast"})
    data = bytearray(clip.read_bytes())
    middle = (data.index(b"mdat") + data.index(b"moov")) // 2
    data[middle : middle + 400] = b"\xff" * 400
    clip.write_bytes(data)
    (tmp_path / "torn.gif").write_bytes(picture(64, 64, kind="GIF")[:-400] + b";")
    sample = conversation(
        (Video, MediaFile(path=str(clip))), (Image, MediaFile(path=str(tmp_path / "torn.gif"))), (Image, files["wide"])
    )
    example, media = PromptMedia.open(sample, SPEC, tokenizer=tokenizer)
    image_tile = next(place for place, slot in enumerate(example.tiles) if not example.media[slot.media].frame)
    good = next(place for place, slot in enumerate(example.tiles) if slot.media == len(example.media) - 1)
    _, wide = at_once(conversation((Image, files["wide"])), tokenizer)
    for _ in range(2):
        with pytest.raises(DataError, match=r"video_broken: .*torn\.mp4"):
            media.tiles(0, 64)
        with pytest.raises(DataError, match=r"media_\w+: .*torn\.gif"):
            media.tiles(image_tile, image_tile + 1)
        assert np.array_equal(media.tiles(good, len(example.tiles)).numpy(), wide)
        assert media.tiles(0, 2).shape == (2, 3, 16, 16)


def touch(path: Path) -> None:
    status = path.stat()
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))


@pytest.mark.parametrize("change", [touch, Path.unlink, lambda path: path.write_bytes(path.read_bytes() + b"\0")])
@pytest.mark.parametrize("kind", [Image, Video, "folder"])
def test_media_that_change_are_named(
    files: dict[str, MediaFile], tokenizer: VitaTokenizer, tmp_path: Path, kind: type, change: Callable[[Path], None]
) -> None:
    (tmp_path / "frames").mkdir()
    for number in range(3):
        (tmp_path / "frames" / f"{number}.png").write_bytes(picture(20, 20, seed=number))
    (tmp_path / "a.jpg").write_bytes(picture(60, 22, kind="JPEG"))
    write_numbered(tmp_path / "a.mp4", 12, options={"preset": "ultrafast"})
    path = {Image: tmp_path / "a.jpg", Video: tmp_path / "a.mp4"}.get(kind, tmp_path / "frames" / "1.png")
    medium = (Image if kind is Image else Video, MediaFile(path=str(path.parent if kind == "folder" else path)))
    example, media = PromptMedia.open(conversation(medium, (Image, files["wide"])), SPEC, tokenizer=tokenizer)
    assert media.tiles(0, 1).shape == (1, 3, 16, 16)
    change(path)
    name = "frames" if kind == "folder" else path.name
    with pytest.raises(DataError, match=rf"media_changed: .*{name}.* changed on disk"):
        media.tiles(0, 2)
    with pytest.raises(DataError, match="media_changed"):
        media.digests()
    last = len(example.tiles)
    assert media.tiles(last - 1, last).shape == (1, 3, 16, 16)


@pytest.mark.parametrize("kind", [Image, Video])
def test_another_rank_finds_other_media(tokenizer: VitaTokenizer, tmp_path: Path, kind: type) -> None:
    path = tmp_path / "medium"
    write = {
        Image: lambda width: path.write_bytes(picture(width, 22)),
        Video: lambda count: write_numbered(path, count, form="mp4", options={"preset": "ultrafast"}),
    }[kind]
    write(30)
    sample = conversation((kind, MediaFile(path=str(path))))
    example, _ = PromptMedia.open(sample, SPEC, tokenizer=tokenizer)
    write(31)
    with pytest.raises(DataError, match="media_changed: test:1: its media are not those that were planned"):
        PromptMedia.reopen(sample, example, SPEC)


def test_what_cannot_be_opened_is_refused_and_nothing_stays_open(
    files: dict[str, MediaFile], tokenizer: VitaTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed: list[VideoFile] = []
    monkeypatch.setattr(on_demand.Video, "release", lambda self: closed.append(self))
    missing = MediaFile(path="/nowhere/at-all.mp4")
    with pytest.raises(DataError, match="media_missing: /nowhere"):
        PromptMedia.open(conversation((Video, files["h264.mp4"]), (Video, missing)), SPEC, tokenizer=tokenizer)
    with pytest.raises(DataError, match="media_missing: /nowhere"):
        PromptMedia.open(conversation((Image, missing)), SPEC, tokenizer=tokenizer)
    assert len(closed) == 1
    sample = conversation((Video, files["h264.mp4"]))
    answered = Sample((Message("user", (Video(0),)), sample.messages[1]), (), sample.videos, "test", 1)
    with pytest.raises(DataError, match="bad_order"):
        PromptMedia.open(answered, SPEC, tokenizer=tokenizer)
    assert len(closed) == 2


def test_a_container_that_is_wrong_about_its_frames(tokenizer: VitaTokenizer, tmp_path: Path) -> None:
    """A recording that begins between two key frames: how many frames it has shows only when it is decoded."""
    write_numbered(tmp_path / "whole.ts", 150, options={"preset": "ultrafast", "bf": "3"})
    clip = MediaFile(data=(tmp_path / "whole.ts").read_bytes()[12 * 188 :])
    sample = conversation((Video, clip), (Video, clip))
    expected, pixels = at_once(sample, tokenizer)
    example, media = PromptMedia.open(sample, SPEC, tokenizer=tokenizer)
    assert np.array_equal(example.tokens, expected.tokens)
    for one in (media, PromptMedia.reopen(sample, example, SPEC)):
        decoder.stop()
        tiles = [one.tiles(place, min(place + 8, len(pixels))).numpy() for place in range(0, len(pixels), 8)]
        assert np.array_equal(np.concatenate(tiles), pixels)


# -------------------------------------------------------------------------------------------------- digests and memory


def test_digests_say_which_media_are_the_same(
    files: dict[str, MediaFile], tokenizer: VitaTokenizer, tmp_path: Path
) -> None:
    def digests(*media: tuple[type[Image] | type[Video], MediaFile]) -> list[bytes]:
        example, prompt = PromptMedia.open(conversation(*media), SPEC, tokenizer=tokenizer)
        found = prompt.digests()
        assert len(found) == len(example.media)
        again = PromptMedia.reopen(conversation(*media), example, SPEC)
        assert again.digests() == found
        return found

    clip, copy, members = files["h264.mp4"], files["video bytes"], files["members"]
    one = digests((Video, clip), (Image, files["wide"]), (Image, files["square"]))
    assert len(set(one)) == len(one) == 32
    assert digests((Image, files["square"]), (Video, copy)) == [one[-1], *one[:30]]
    assert digests((Video, files["region"])) == one[:30]
    frames = digests((Video, members))
    assert not set(frames) & set(one)
    changed = [MediaFile(data=picture(9, 9)), *members.frames[1:]]
    assert digests((Video, MediaFile(frames=tuple(changed))))[1:] == frames[1:]
    assert len(set(digests((Video, files["folder"])))) == 21


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["folder", "clip"])
def test_memory_does_not_grow_with_the_frames(tokenizer: VitaTokenizer, tmp_path: Path, kind: str) -> None:
    spec = PreprocessSpec(**{**SPEC.to_dict(), "max_frames": 4096})
    peaks = {}
    for count in (64, 1024):
        path = tmp_path / f"{count}"
        if kind == "folder":
            path.mkdir()
            for number in range(count):
                (path / f"{number}.png").write_bytes(picture(64, 48, seed=number % 8))
        else:
            write_numbered(path, count, form="mp4", options={"preset": "ultrafast"})
        example, media = PromptMedia.open(conversation((Video, MediaFile(path=str(path)))), spec, tokenizer=tokenizer)
        assert len(example.tiles) == count
        media.tiles(0, 8)
        tracemalloc.start()
        for start in range(8, count, 8):
            media.tiles(start, start + 8)
        peaks[count] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        media.close()
    assert peaks[1024] < peaks[64] + 64 * 1024
