"""A part of a video: its frames alone are sampled, in this process and in the child, of a file or a folder."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image as Pil

from megatron_vita.data.media.video.open import VideoLimits, open_video
from megatron_vita.data.sample import MediaFile
from megatron_vita.data.spec import PreprocessSpec
from megatron_vita.errors import DataError
from tests.data.media.clips import X264, shown
from tests.data.videos import write_numbered

SPEC = PreprocessSpec(image_size=112, max_fps=2.0, max_frames=64)
RATE = 5


@pytest.fixture(scope="module")
def film(tmp_path_factory: pytest.TempPathFactory) -> MediaFile:
    """Ten seconds at five frames a second."""
    path = write_numbered(tmp_path_factory.mktemp("parts") / "film.mp4", 10 * RATE, rate=RATE, options=X264)
    return MediaFile(path=str(path))


@pytest.mark.parametrize("limits", [None, VideoLimits()], ids=["here", "child"])
@pytest.mark.parametrize(
    ("start", "end", "most", "numbers"),
    [
        (0.0, None, 4, [0, 16, 33, 49]),
        (2.0, 4.0, 4, [10, 13, 17, 20]),  # frames 10 to 20: both ends are shown
        (2.0, 4.0, 64, [10, 13, 17, 20]),  # eleven frames are 2.2 s, and two a second of these four
        (2.1, 2.1, 64, [10]),  # what is shown then
        (8.0, 99.0, 3, [40, 45, 49]),  # an end behind the end is the end
        (9.9, None, 64, [49]),
    ],
)
def test_frames_of_a_part(
    film: MediaFile, limits: VideoLimits | None, start: float, end: float | None, most: int, numbers: list[int]
) -> None:
    with open_video(replace(film, start=start, end=end), limits=limits) as video:
        assert video.plan(SPEC, most) == numbers
        found, times = shown(video.frames(SPEC, most))
    assert found == numbers
    assert times == pytest.approx([number / RATE for number in numbers]), "seconds of the whole video"


@pytest.mark.parametrize("limits", [None, VideoLimits()], ids=["here", "child"])
@pytest.mark.parametrize(("start", "end"), [(11.0, 12.0), (-1.0, 2.0), (5.0, 4.0)])
def test_no_part_of_the_video(film: MediaFile, limits: VideoLimits | None, start: float, end: float) -> None:
    with pytest.raises(DataError, match=r"video_broken: .*are no part of it: its last frame is shown at 9\.8"):
        open_video(replace(film, start=start, end=end), limits=limits)


def test_a_part_of_a_folder_of_frames(tmp_path: Path) -> None:
    for number in range(1, 31):
        Pil.new("RGB", (16, 16), (number * 8,) * 3).save(tmp_path / f"{number:05}.jpg")
    folder = MediaFile(path=str(tmp_path), frame_rate=3.0, start=2.0, end=6.0)
    with open_video(folder) as video:
        assert video.plan(SPEC, 4) == [6, 10, 14, 18]
