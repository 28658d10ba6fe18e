"""The sampled frames are the frames asked for, at the times told: every frame shows its number, and it is read back.

A table of containers, codecs and ways of coding. What cannot be told exactly is rejected, never given wrongly.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_vita.data.media.video import pyav
from megatron_vita.data.media.video.open import open_video
from megatron_vita.data.rejects import code_of
from megatron_vita.data.sample import MediaFile
from megatron_vita.errors import DataError
from tests.data.media.clips import ALL, CLIPS, FRAMES, RATE, clip, sample, shown

pytestmark = pytest.mark.slow
"""As root, the AV1 encoder's threads have real-time priority: beside another test process both crawl."""


@pytest.mark.slow
@pytest.mark.parametrize("name", CLIPS)
def test_every_frame_is_the_one_asked_for(clips: Path, name: str) -> None:
    with open_video(clip(clips, name), limits=None) as video:
        assert video.total == FRAMES
        assert video.fps == pytest.approx(RATE, rel=1e-3)
        for count in (FRAMES, 12, 7, 2, 1):
            numbers, times = shown(video.frames(ALL, count))
            assert numbers == sample(FRAMES, count), count
            assert times == pytest.approx([number / RATE for number in numbers], abs=0.0011), count


@pytest.mark.parametrize("name", CLIPS)
def test_decord_gives_the_frame_asked_for_or_the_clip_is_rejected(clips: Path, name: str) -> None:
    pytest.importorskip("decord")
    file = clip(clips, name)
    exact = True
    try:
        with open_video(file, "decord", limits=None) as video:
            numbers, times = shown(video.frames(ALL, 12))
    except DataError as error:
        exact = code_of(error)[0] not in ("video_inexact", "video_broken")
    if exact:
        assert numbers == sample(FRAMES, 12)
        assert times == pytest.approx([number / RATE for number in numbers], abs=0.0011)


# ------------------------------------------------------------------------------------------------- damage and seeking


@pytest.mark.parametrize("name", ["h264.mp4", "h264.ts", "mpeg2.mpg", "vp9.webm", "mpeg4.avi", "h264.mkv", "wmv2.wmv"])
def test_of_a_damaged_clip_every_frame_is_still_the_one_told(clips: Path, name: str) -> None:
    """Cut off: rejected, or what comes is right but for the last frame, which may be torn."""
    data, rejected = Path(str(clip(clips, name).path)).read_bytes(), []
    for part in (0.5, 0.8, 0.95):
        try:
            with open_video(MediaFile(data=data[: int(part * len(data))]), limits=None) as video:
                numbers, told = shown(video.frames(ALL, 12))
        except DataError as error:
            rejected.append(code_of(error)[0])
            continue
        assert told[:-1] == pytest.approx([number / RATE for number in numbers[:-1]], abs=0.0011)
        assert abs(told[-1] * RATE - numbers[-1]) < 1.1
    assert set(rejected) <= {"video_broken"}


def test_a_recording_that_begins_between_key_frames(clips: Path) -> None:
    data = Path(str(clip(clips, "h264.ts").path)).read_bytes()
    packets = [data[place : place + 188] for place in range(0, len(data), 188)]
    with open_video(MediaFile(data=b"".join(packets[12:])), limits=None) as video:
        numbers, told = shown(video.frames(ALL, 4096))
    assert numbers == [*range(numbers[0], FRAMES)]
    assert told == pytest.approx([(number - numbers[0]) / RATE for number in numbers], abs=0.0011)


@pytest.mark.parametrize(
    "name", ["h264-open-gop.mp4", "h264-refresh.mp4", "hevc-open.mp4", "h264.mp4", "vp9.webm", "av1.mp4"]
)
def test_jumping_shows_what_playing_shows(clips: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    file = clip(clips, name)
    monkeypatch.setattr(pyav, "_PAYS", 5)
    with open_video(file, limits=None) as video:
        jumped = video.frames(ALL, 7)
    monkeypatch.setattr(pyav, "_PAYS", 1 << 30)
    with open_video(file, limits=None) as video:
        played = video.frames(ALL, 7)
    assert [item.data for item in jumped] == [item.data for item in played]
