"""Clips of variable rate and with odd times: at most --max-fps in time, and every frame at the time told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_vita.data.media.video.choice import is_even
from megatron_vita.data.media.video.clip import VideoFile
from megatron_vita.data.media.video.open import open_video
from megatron_vita.data.rejects import code_of
from megatron_vita.data.sample import MediaFile
from megatron_vita.data.spec import PreprocessSpec
from megatron_vita.errors import DataError
from tests.data.media.clips import ALL, FRAMES, GOOD, RATE, X264, clip, sample, shown
from tests.data.videos import write_numbered

# ---------------------------------------------------------------------------- times that are odd, and how many frames

BURST = [*range(0, 20_000, 1000), *range(20_000, 22_000, 20), *range(22_000, 40_000, 1000)]
"""Milliseconds: one frame a second, fifty a second for two seconds, one a second."""
JITTER = [40 * number + (number * 7919 % 21) - 10 * (number > 0) for number in range(150)]
HALTING = [*range(0, 3000, 40), *range(60_000, 63_000, 40)]


@pytest.mark.parametrize("name", ["burst.mp4", "burst.mkv", "burst.mov", "burst.flv", "burst.nut"])
@pytest.mark.parametrize("max_fps", [0.5, 1.0, 2.0, 5.0])
def test_a_burst_yields_no_more_frames_a_second_than_asked_for(clips: Path, name: str, max_fps: float) -> None:
    path = clips / name
    if not path.exists():
        write_numbered(path, len(BURST), options={"preset": "ultrafast"}, milliseconds=BURST)
    spec = PreprocessSpec(image_size=112, max_frames=4096, max_fps=max_fps)
    with open_video(MediaFile(path=str(path)), limits=None) as video:
        for most in (4096, 11, 3):
            promised = video.count(spec, most), video.times_of(spec, video.count(spec, most))
            numbers, times = shown(video.frames(spec, most))
            assert promised == (len(numbers), times)
            assert [BURST[number] / 1000 for number in numbers] == pytest.approx(times, abs=0.0011)
            assert np.diff(times).min() >= 1 / max_fps - 0.002
            assert (numbers[0], numbers[-1]) == (0, len(BURST) - 1)
            assert len(numbers) <= min(most, 1 + 40 * max_fps)
        assert video.count(spec, 4096) >= min(38, 0.9 * 39 * max_fps)


@pytest.mark.parametrize("times", [JITTER, HALTING, [number**2 for number in range(100)], [0, 5000], [0], [0, 1, 2]])
@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_frames_and_times_belong_together(tmp_path: Path, times: list[int], suffix: str) -> None:
    write_numbered(tmp_path / f"clip.{suffix}", len(times), options=X264, milliseconds=times)
    with open_video(MediaFile(path=str(tmp_path / f"clip.{suffix}")), limits=None) as video:
        for spec in (ALL, PreprocessSpec(image_size=112), PreprocessSpec(image_size=112, max_fps=3)):
            numbers, told = shown(video.frames(spec, 4096))
            assert [times[number] / 1000 for number in numbers] == pytest.approx(told, abs=0.0011)
            assert len(numbers) == len(times) or spec is not ALL or times[1] < 2


@given(
    st.lists(st.integers(1, 3000), min_size=0, max_size=200),
    st.floats(0.1, 30),
    st.integers(1, 200),
)
def test_sampling_in_time_over_all_kinds_of_clips(gaps: list[int], max_fps: float, most: int) -> None:
    times = np.cumsum([0, *gaps]) / 1000
    spec = PreprocessSpec(max_fps=max_fps, max_frames=most)
    clip = _Times("clip", times)
    for count in {clip.count(spec, most), 1, max(1, clip.count(spec, most) // 2)}:
        numbers = clip.numbers(spec, count)
        assert len(numbers) == len(set(numbers)) == count <= most
        assert numbers == sorted(numbers)
        assert 0 <= numbers[0] <= numbers[-1] < len(times)
        if count > 1:
            assert (numbers[0], numbers[-1]) == (0, len(times) - 1)
        if not is_even(times):
            assert np.diff(times[numbers]).min(initial=1e9) >= 1 / max_fps - 0.0011


class _Times(VideoFile):
    def read(self, numbers: Any) -> Any:
        raise NotImplementedError


@pytest.mark.parametrize(
    "name", ["a.mp4", "a.mkv", "a.mov", "a.ts", "a.flv", "a.webm", "a.mpg", "a.wmv", "a.nut", "a.3gp"]
)
def test_a_clip_that_begins_late_is_told_from_its_first_frame(tmp_path: Path, name: str) -> None:
    codec = {"a.webm": "libvpx", "a.mpg": "mpeg2video", "a.wmv": "wmv2"}.get(name, "libx264")
    times = [5000 + 40 * number for number in range(50)]
    options = {"libx264": X264, "libvpx": {"deadline": "realtime"}}.get(codec, GOOD)
    write_numbered(tmp_path / name, 50, codec=codec, options=options, rate=25, start=125)
    with open_video(MediaFile(path=str(tmp_path / name)), limits=None) as video:
        numbers, told = shown(video.frames(ALL, 7))
    assert numbers == sample(50, 7)
    assert told == pytest.approx([(times[number] - 5000) / 1000 for number in numbers], abs=0.0011)


def remuxed(source: Path, target: Path, change: Any) -> Path:
    """The packets of a clip in another file, each changed: (number, packet, step) -> the packet, or None."""
    av = pytest.importorskip("av")
    with av.open(str(source)) as whole, av.open(str(target), "w") as out:
        given = whole.streams.video[0]
        stream = out.add_stream_from_template(given)
        step = int(1 / (25 * given.time_base))
        for number, packet in enumerate(packet for packet in whole.demux(given) if packet.size):
            packet = change(number, packet, step)
            if packet is not None:
                packet.stream = stream
                out.mux(packet)
    return target


def test_times_that_come_twice_or_jump(clips: Path, tmp_path: Path) -> None:
    source = Path(str(clip(clips, "h264-intra.mkv", options={"preset": "ultrafast", "bf": "0"}).path))

    def twice(number: int, packet: Any, step: int) -> Any:  # frames 10 to 19 come at the time of frame 9
        if 10 <= number < 20:
            packet.pts = packet.dts = 9 * step
        return packet

    def jump(number: int, packet: Any, step: int) -> Any:  # an hour's gap
        if number >= 100:
            packet.pts, packet.dts = packet.pts + 3600 * 25 * step, packet.dts + 3600 * 25 * step
        return packet

    for name, change in (("twice.mkv", twice), ("jump.mkv", jump), ("jump.mp4", jump)):
        with open_video(MediaFile(path=str(remuxed(source, tmp_path / name, change))), limits=None) as video:
            numbers, told = shown(video.frames(ALL, 4096))
        for number, when in zip(numbers, told, strict=True):
            wanted = (
                9
                if change is twice and 9 <= number < 20
                else number + (90_000 if change is jump and number > 99 else 0)
            )
            assert when == pytest.approx(wanted / RATE, abs=0.0011)
        assert len(numbers) == len(set(numbers)) >= 140


def test_a_stream_whose_clock_starts_again(clips: Path, tmp_path: Path) -> None:
    data = Path(str(clip(clips, "h264.ts").path)).read_bytes()
    with open_video(MediaFile(data=data + data), limits=None) as video:
        numbers, told = shown(video.frames(ALL, 4096))
    assert numbers in ([*range(FRAMES), *range(FRAMES)], [*range(FRAMES)])
    assert (np.diff(told) > 0).all()


@pytest.mark.parametrize("name", ["h264.ts", "mpeg2.ts", "h264.mkv", "hevc.ts", "h264.avi", "mpeg2.mpg", "vp9.webm"])
@pytest.mark.parametrize("every", [1, 40, 300])
def test_a_clip_with_spoilt_bytes_is_right_or_rejected(clips: Path, name: str, every: int) -> None:
    data, rejected = bytearray(Path(str(clip(clips, name).path)).read_bytes()), []
    rng = np.random.default_rng(every)
    for place in rng.integers(len(data) // 3, len(data) * 2 // 3, max(1, len(data) // 188 // every)):
        data[place] ^= 1 << int(rng.integers(8))
    try:
        with open_video(MediaFile(data=bytes(data)), limits=None) as video:
            numbers, told = shown(video.frames(ALL, 4096))
    except DataError as error:
        rejected.append(code_of(error)[0])
    else:
        right = sum(abs(when * RATE - number) < 1.5 for number, when in zip(numbers, told, strict=True))
        assert right >= 0.9 * len(numbers) >= 0.8 * FRAMES
    assert set(rejected) <= {"video_broken"}
