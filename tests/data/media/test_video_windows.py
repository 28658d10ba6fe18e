"""Frames read in windows are those read at once, wherever the windows lie; ascending windows cost one pass."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image as Pil

from megatron_vita.data.example import MediaItem
from megatron_vita.data.media.video import child, pyav
from megatron_vita.data.media.video.clip import MissedError, VideoFile
from megatron_vita.data.media.video.decode import open_here
from megatron_vita.data.media.video.open import open_video
from megatron_vita.data.media.video.worker import decoder
from megatron_vita.data.sample import MediaFile
from megatron_vita.data.spec import PreprocessSpec
from megatron_vita.errors import DataError
from tests.data.kit import picture
from tests.data.media.clips import ALL, CLIPS, FRAMES, X264, clip
from tests.data.videos import write_numbered

ONE_A_SECOND = PreprocessSpec(image_size=112, max_frames=4096, max_fps=5)
SOME = ["h264.mp4", "h264-long-gop.mp4", "h264-open-gop.mp4", "h264.ts", "h264.avi", "mpeg2.mpg", "anim.gif"]


def windows(video: VideoFile, spec: PreprocessSpec, numbers: list[int], size: int, every: int = 1) -> list[MediaItem]:
    items = []
    for start in range(0, len(numbers), size * every):
        items += video.frames_at(spec, numbers[start : start + size])
    return items


def at_once(file: MediaFile, spec: PreprocessSpec, backend: str = "auto") -> list[MediaItem]:
    with open_video(file, backend, limits=None) as video:
        return video.frames(spec, spec.max_frames)


@pytest.mark.parametrize(
    "name", [name if name in SOME else pytest.param(name, marks=pytest.mark.slow) for name in CLIPS]
)
def test_windows_give_the_frames_of_a_clip(clips: Path, name: str) -> None:
    file = clip(clips, name)
    for spec in (ALL, ONE_A_SECOND):
        items = at_once(file, spec)
        with open_video(file, limits=None) as video:
            numbers = video.plan(spec, spec.max_frames)
            assert windows(video, spec, numbers, 16) == items
            assert windows(video, spec, numbers, 4, every=3) == [one for k, one in enumerate(items) if k % 12 < 4]
            assert video.frames_at(spec, []) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", ["h264-no-b.mp4", "vp9.webm"])
def test_windows_by_decord(clips: Path, name: str) -> None:
    pytest.importorskip("decord")
    file = (
        clip(clips, name, options={"preset": "ultrafast", "bf": "0"}) if name == "h264-no-b.mp4" else clip(clips, name)
    )
    items = at_once(file, ONE_A_SECOND, "decord")
    with open_video(file, "decord", limits=None) as video:
        assert windows(video, ONE_A_SECOND, video.plan(ONE_A_SECOND, 4096), 8) == items


@pytest.mark.parametrize("kind", ["folder", "anim.webp", "burst.mp4"])
def test_windows_of_what_is_no_stream_of_even_rate(clips: Path, tmp_path: Path, kind: str) -> None:
    path = tmp_path / kind
    if kind == "folder":
        path.mkdir()
        for number in range(20):
            (path / f"{number}.png").write_bytes(picture(40, 30, seed=number))
    elif kind == "burst.mp4":
        write_numbered(path, 40, options=X264, milliseconds=[*range(0, 10_000, 1000), *range(10_000, 10_600, 20)])
    else:
        path = Path(str(clip(clips, kind).path))
    items = at_once(MediaFile(path=str(path)), ALL)
    for limits in ({"limits": None}, {}):
        with open_video(MediaFile(path=str(path)), **limits) as video:
            assert windows(video, ALL, video.plan(ALL, 4096), 7) == items


@pytest.fixture(scope="module")
def opened(clips: Path) -> Iterator[tuple[list[MediaItem], list[tuple[VideoFile, list[int]]]]]:
    file = clip(clips, "h264.mp4")
    videos = [open_video(file, limits=None), open_video(file)]
    yield at_once(file, ALL), [(video, video.plan(ALL, 4096)) for video in videos]
    for video in videos:
        video.close()


@given(ranges=st.lists(st.tuples(st.integers(0, FRAMES - 1), st.integers(0, 12)), min_size=1, max_size=6))
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_windows_in_any_order(
    opened: tuple[list[MediaItem], list[tuple[VideoFile, list[int]]]], ranges: list[tuple[int, int]]
) -> None:
    items, videos = opened
    for video, numbers in videos:
        for start, count in ranges:
            assert video.frames_at(ALL, numbers[start : start + count]) == items[start : start + count]


# ---------------------------------------------------------------------------------------------------------------- cost


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Presentation times of all frames that come out of the decoder."""
    times: list[int] = []
    decode = pyav.PyAvVideo._decode

    def counted(self: Any, *args: Any) -> Iterator[Any]:
        for frame in decode(self, *args):
            times.append(frame.pts)
            yield frame

    monkeypatch.setattr(pyav.PyAvVideo, "_decode", counted)
    return times


@pytest.mark.parametrize("name", ["h264.mp4", "h264-long-gop.mp4", "h264.ts", "h264.avi"])
@pytest.mark.parametrize("every", [1, 2, 4])
def test_ascending_windows_cost_one_pass(clips: Path, name: str, every: int, decoded: list[int]) -> None:
    with open_video(clip(clips, name), limits=None) as video:
        numbers = video.plan(ONE_A_SECOND, 4096)
        proof = len(decoded)
        assert proof <= (FRAMES if name != "h264.mp4" else 30)
        windows(video, ONE_A_SECOND, numbers, 2, every)
        assert len(decoded) - proof <= FRAMES
        assert len(decoded) - proof == len(set(decoded[proof:]))


def test_a_window_further_on_is_jumped_to(clips: Path, decoded: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pyav, "_PAYS", 5)
    with open_video(clip(clips, "h264.mp4"), limits=None) as video:
        for start in (0, 70, 130):
            video.frames_at(ALL, range(start, start + 3))
        assert len(decoded) <= 3 * (12 + 3)  # a key frame every 12


def test_an_entry_that_leads_elsewhere_is_made_up_for(clips: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the midst of a reading: it plays the clip from the start and goes on."""
    file, jump, jumps = clip(clips, "h264.mp4"), pyav.PyAvVideo._jump, []
    items = at_once(file, ALL)
    monkeypatch.setattr(pyav, "_PAYS", 5)

    def wrong(self: Any, *args: Any) -> Any:
        jumps.append(args[-1])
        if len(jumps) == 2:
            raise MissedError
        return jump(self, *args)

    monkeypatch.setattr(pyav.PyAvVideo, "_jump", wrong)
    with open_video(file, limits=None) as video:
        for start in (10, 50, 52, 100, 140):
            assert video.frames_at(ALL, range(start, start + 2)) == items[start : start + 2]
    assert len(jumps) == 2


def test_a_closed_clip_is_read_again(clips: Path) -> None:
    items = at_once(clip(clips, "h264.mp4"), ALL)
    for limits in ({"limits": None}, {}):
        video = open_video(clip(clips, "h264.mp4"), **limits)
        for start in (20, 23, 0):
            assert video.frames_at(ALL, range(start, start + 3)) == items[start : start + 3]
            video.close()
            decoder.stop()


def test_few_clips_wait_with_their_decoders(clips: Path) -> None:
    """Many are open at once in a server; those that have waited longest are begun anew."""
    file = clip(clips, "h264.mp4")
    items, videos = at_once(file, ALL), {number: open_here(file) for number in range(12)}
    request = {"spec": ALL.to_dict(), "max_frames": 0}
    for first in (0, 3):
        for number in range(12):
            _, blobs = child._frames(videos, {**request, "video": number, "numbers": [first, first + 2]}, [])
            assert blobs == [items[first].data, items[first + 2].data]
            assert sum(one._reading is not None for one in videos.values()) <= 8
    assert sorted(videos) == [*range(12)]


# -------------------------------------------------------------------------------------------- containers that are wrong


def recording(clips: Path) -> MediaFile:
    """Begins between two key frames, so that fewer frames come out than it has packets."""
    data = Path(str(clip(clips, "h264.ts").path)).read_bytes()
    return MediaFile(data=data[12 * 188 :])


def test_what_a_container_is_wrong_about_is_learnt_before_frames_are_promised(clips: Path) -> None:
    file = recording(clips)
    items = at_once(file, ALL)
    with open_video(file) as video:
        assert video.total > len(items)
        numbers = video.plan(ALL, 4096)
        assert video.times_of(ALL, video.count(ALL, 4096)) == [item.time for item in items]
        assert len(numbers) == len(items) == video.total
        half = len(items) // 2
        assert video.frames_at(ALL, numbers[:half]) == items[:half]
        decoder.stop()  # what was learnt is lost with it
        assert video.frames_at(ALL, numbers[half:]) == items[half:]


def test_frames_that_are_asked_for_without_proof_are_right_or_refused(clips: Path) -> None:
    with open_video(recording(clips), limits=None) as video:
        numbers = video.numbers(ALL, 7)
        with pytest.raises(DataError, match=r"video_broken: .* not stand where its container says"):
            video.frames_at(ALL, numbers)
        plan = video.plan(ALL, 7)
        assert video.frames_at(ALL, plan) == at_once(
            recording(clips), PreprocessSpec(**{**ALL.to_dict(), "max_frames": 7})
        )


class _Fickle(VideoFile):
    """Misses its second frame, always."""

    def learn(self) -> None:
        pass

    def read(self, numbers: Any) -> Iterator[Pil.Image]:
        for number in numbers:
            if number:
                raise MissedError
            yield Pil.new("RGB", (4, 4))


def test_a_clip_that_differs_each_time_is_rejected() -> None:
    video = _Fickle("odd", np.arange(3.0))
    assert len(video.frames_at(ALL, [0])) == 1
    with pytest.raises(DataError, match="video_broken: odd: its frames come out differently each time"):
        video.frames_at(ALL, [1, 2])
    assert len(video.frames_at(ALL, [0])) == 1


def test_frames_that_were_read_are_freed_at_once(clips: Path) -> None:
    """Without waiting for Python's garbage collector, which counts objects and not how large they are."""
    pytest.importorskip("av")

    def alive() -> int:
        return sum(type(one).__name__ == "VideoFrame" for one in gc.get_objects())

    file = clip(clips, "h264.mp4")
    gc.collect()
    gc.disable()
    try:
        before = alive()
        with open_video(file, limits=None) as video:
            video.frames_at(ALL, range(100))
            assert alive() <= before + 2
    finally:
        gc.enable()
