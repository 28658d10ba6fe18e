"""Containers as datasets have them: whole and damaged, regions of archives, edit lists, folders of frames."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image as Pil

from megatron_vita.data.media.image import decode
from megatron_vita.data.media.video.choice import count_frames, frame_rate, sample_frames
from megatron_vita.data.media.video.open import open_video
from megatron_vita.data.sample import MediaFile
from megatron_vita.data.spec import PreprocessSpec
from megatron_vita.errors import DataError
from tests.data.videos import write_sound, write_video

SPEC = PreprocessSpec(image_size=16, patch_size=4, max_frames=64, max_fps=1000)
GREYS = [20 + 5 * number for number in range(40)]
IRREGULAR = [0, *np.cumsum(np.random.default_rng(0).integers(10, 900, 39)).tolist()]

CLIPS: dict[str, dict[str, Any]] = {
    "plain.mp4": {},
    "reordered.mp4": {"options": {"bf": "3", "x264-params": "keyint=12"}},
    "streamed.mp4": {"container_options": {"movflags": "frag_keyframe+empty_moov"}},
    "index-first.mp4": {"container_options": {"movflags": "faststart"}},
    "irregular.mp4": {"milliseconds": IRREGULAR},
    "irregular.mkv": {"milliseconds": IRREGULAR},
    "vp9.webm": {"codec": "libvpx-vp9"},
    "reordered.avi": {"codec": "mpeg4", "options": {"bf": "2"}},
    "old.mpg": {"codec": "mpeg1video", "rate": 25},
    "windows.wmv": {"codec": "wmv2"},
    "flash.flv": {"codec": "flv1"},
    "broadcast.ts": {},
    "raw.h264": {},
}


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clips")
    for name, options in CLIPS.items():
        write_video(folder / name, GREYS, **{"rate": 10, **options})
    return folder


def frames(file: MediaFile, backend: str) -> tuple[list[float], list[float]]:
    """Times and greys of all frames, in this process."""
    with open_video(file, backend, limits=None) as video:
        items = video.frames(SPEC, 64)
        assert len(items) == video.total == len(video.times)
        assert [item.time for item in items] == video.times.tolist()
    return video.times.tolist(), [float(np.asarray(decode(item)).mean()) for item in items]


@pytest.mark.parametrize("name", CLIPS)
def test_frames_are_shown_at_the_times_told(clips: Path, name: str) -> None:
    times, greys = frames(MediaFile(path=str(clips / name)), "auto")
    assert np.abs(np.subtract(greys, GREYS)).mean() < 2  # one frame further is 5
    rate = CLIPS[name].get("rate", 10 if name != "raw.h264" else 25)
    wanted = [ms / 1000 for ms in IRREGULAR] if "irregular" in name else [number / rate for number in range(40)]
    assert times == pytest.approx(wanted, abs=0.002)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["decord", "pyav"])
def test_a_region_of_a_larger_file_is_a_video(clips: Path, backend: str, tmp_path: Path) -> None:
    data = (clips / "plain.mp4").read_bytes()
    archive = tmp_path / "an archive, with a comma.tar"
    archive.write_bytes(b"x" * 1000 + data + b"y" * 700)
    member = MediaFile(path=str(archive), offset=1000, size=len(data), label="archive:plain.mp4")
    assert frames(member, backend) == frames(MediaFile(path=str(clips / "plain.mp4")), backend)
    with open_video(member, backend) as video:
        assert len(video.frames(SPEC, 64)) == 40
    beyond = MediaFile(path=str(archive), offset=1000, size=len(data) + 900)
    with pytest.raises(DataError, match="media_missing"):
        open_video(beyond, backend)


@pytest.mark.parametrize("name", [name for name in CLIPS if name.endswith((".mp4", ".mkv", ".webm", ".avi"))])
def test_truncated_clips_are_refused(clips: Path, name: str) -> None:
    data = (clips / name).read_bytes()
    for part in (0.3, 0.6, 0.9):
        with pytest.raises(DataError, match="video_broken"):
            open_video(MediaFile(data=data[: int(part * len(data))]), limits=None)


def test_the_packets_count_and_not_what_the_header_says(clips: Path) -> None:
    data = bytearray((clips / "reordered.avi").read_bytes())
    for mark, place in ((b"avih", 16), (b"strh", 32)):
        start = data.find(mark) + 8 + place
        data[start : start + 4] = (4000).to_bytes(4, "little")
    times, greys = frames(MediaFile(data=bytes(data)), "pyav")
    assert np.abs(np.subtract(greys, GREYS)).mean() < 2  # one frame further is 5
    assert len(times) == 40
    with pytest.raises(DataError, match="video_inexact"):  # decord counts 4,000
        frames(MediaFile(data=bytes(data)), "decord")


def test_a_recording_that_begins_between_key_frames(clips: Path) -> None:
    data = (clips / "broadcast.ts").read_bytes()
    packets = [data[place : place + 188] for place in range(0, len(data), 188)]
    with open_video(MediaFile(data=b"".join(packets[: len(packets) // 2])), limits=None) as video:
        assert 0 < len(video.frames(SPEC, 64)) == video.total < 40


def test_clips_that_an_edit_list_has_cut(clips: Path, tmp_path: Path) -> None:
    """What lies before the cut is there for the decoder's sake; decord loses count of it."""
    av = pytest.importorskip("av")
    with av.open(str(clips / "reordered.mp4")) as whole, av.open(str(tmp_path / "cut.mp4"), "w") as cut:
        stream = cut.add_stream_from_template(whole.streams.video[0])
        for packet in whole.demux(whole.streams.video[0]):
            if packet.dts is not None:
                shift = int(1.3 / packet.time_base)
                packet.pts, packet.dts, packet.stream = packet.pts - shift, packet.dts - shift, stream
                cut.mux(packet)
    for backend in ("auto", "pyav"):
        with open_video(MediaFile(path=str(tmp_path / "cut.mp4")), backend, limits=None) as video:
            assert video.total == 27
            greys = [float(np.asarray(decode(item)).mean()) for item in video.frames(SPEC, 5)]
            wanted = [GREYS[13 + number] for number in sample_frames(27, 5)]
        assert np.abs(np.subtract(greys, wanted)).mean() < 2


@pytest.mark.parametrize("backend", ["decord", "pyav"])
@pytest.mark.parametrize(("degrees", "matrix"), [(90, (0, 1, -1, 0)), (180, (-1, 0, 0, -1)), (270, (0, -1, 1, 0))])
def test_clips_filmed_upright_stand_upright(
    tmp_path: Path, backend: str, degrees: int, matrix: tuple[int, int, int, int]
) -> None:
    def track(a: int, b: int, c: int, d: int) -> bytes:
        return struct.pack(">9i", a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30)

    path = write_video(tmp_path / "clip.mp4", [0, 0], side=(128, 64), left=200)  # as the sensor lies
    data = path.read_bytes()
    assert data.count(track(1, 0, 0, 1)) >= 1
    start = data.index(track(1, 0, 0, 1), data.index(b"tkhd"))
    path.write_bytes(data[:start] + track(*matrix) + data[start + 36 :])
    with open_video(MediaFile(path=str(path)), backend, limits=None) as video:
        (item,) = video.frames(PreprocessSpec(), 1)
    pixels = np.asarray(decode(item)).mean(-1)
    assert pixels.shape == ((64, 128) if degrees == 180 else (128, 64))
    bright = {90: pixels[:60], 180: pixels[:, 68:], 270: pixels[68:]}[degrees]
    assert bright.mean() > 180
    assert pixels.mean() < 110


def test_sound_alone_and_nothing_at_all_are_refused(clips: Path, tmp_path: Path) -> None:
    data = (clips / "streamed.mp4").read_bytes()
    (tmp_path / "empty.mp4").write_bytes(data[: data.find(b"moof") - 4])
    for path in (write_sound(tmp_path / "sound.mp4"), tmp_path / "empty.mp4"):
        for backend in ("auto", "pyav"):
            with pytest.raises(DataError, match="video_broken"), open_video(MediaFile(path=str(path)), backend) as clip:
                clip.frames(SPEC, 4)


def test_folders_of_frames_have_the_rate_of_their_dataset(tmp_path: Path) -> None:
    for name, fps in (("frames", 1.0), ("twice", 2.0)):
        folder = tmp_path / name / "clip"
        folder.mkdir(parents=True)
        for number in range(11):
            Pil.new("RGB", (16, 16), (number * 20,) * 3).save(folder / f"{number}.jpg")
        with open_video(MediaFile(path=str(folder), frame_rate=fps)) as video:
            assert (video.total, video.fps) == (11, fps)
            one_a_second = PreprocessSpec(image_size=16, patch_size=4)
            items = video.frames(one_a_second, 64)
            assert len(items) == int(11 / fps)
            assert (items[0].time, items[-1].time) == (0.0, 10 / fps)  # the whole clip, its tail included


def test_rates_come_from_the_times() -> None:
    assert frame_rate([0.0, 0.5, 1.0]) == 2.0
    assert frame_rate([3.0]) == frame_rate([1.0, 1.0]) == 0.0
    rounded = [round(number / 30, 3) for number in range(300)]  # as Matroska has them
    assert count_frames(300, frame_rate(rounded), 64, 1.0) == 10
    assert sample_frames(300, 10)[-1] == 299
