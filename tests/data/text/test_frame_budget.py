"""Exactly the frames that a sequence holds: one token less is a frame less, at every length and in both layouts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_vita.data.example import MediaItem
from megatron_vita.data.media.video.choice import count_frames, sample_frames
from megatron_vita.data.media.video.open import open_video
from megatron_vita.data.sample import Image, MediaFile, Message, Part, Sample, Text, Video
from megatron_vita.data.spec import PreprocessSpec
from megatron_vita.data.text.chat import build_example, frame_costs
from megatron_vita.data.text.frame_budget import frames_that_fit, most_that_fit
from megatron_vita.data.text.tokenizer import VitaTokenizer
from megatron_vita.errors import ConfigError
from tests.data.kit import blank, tokenizer_folder
from tests.data.videos import write_video

K = 1024
SMALL = {"image_size": 16, "patch_size": 4}


class Clip:
    """A clip that nobody decodes: how many frames there are, and when."""

    def __init__(self, times: list[float], fps: float = 1.0) -> None:
        self.times, self.fps = times, fps

    def count(self, spec: PreprocessSpec, max_frames: int) -> int:
        return count_frames(len(self.times), self.fps, max_frames, spec.max_fps)

    def times_of(self, spec: PreprocessSpec, count: int) -> list[float]:
        return [self.times[number] for number in sample_frames(len(self.times), count)]

    def items(self, spec: PreprocessSpec, max_frames: int) -> list[MediaItem]:
        count = self.count(spec, max_frames)
        return [MediaItem(b"", 448, 448, frame=True, time=time) for time in self.times_of(spec, count)]


@pytest.fixture(scope="module")
def tok(tmp_path_factory: pytest.TempPathFactory) -> VitaTokenizer:
    return VitaTokenizer.load(tokenizer_folder(tmp_path_factory.mktemp("tokenizer")))


def ask(*parts: Part, images: int = 0, videos: int = 1) -> Sample:
    turns = (Message("user", parts), Message("assistant", (Text("seven"),)))
    return Sample(turns, (MediaFile(data=b""),) * images, (MediaFile(data=b""),) * videos)


@pytest.mark.parametrize(
    ("layout", "seq_length", "wanted"),
    [
        *(("internvl", size * K, frames) for size, frames in ((16, 61), (32, 123), (128, 494), (1024, 3946))),
        # DESIGN counts frames alone here; the turns of a question take the last one's place where they fill the rest
        *(("long_vita", size * K, frames) for size, frames in ((16, 63), (32, 126), (128, 507), (1024, 4064))),
    ],
)
def test_the_frames_that_fit_and_no_more(tok: VitaTokenizer, layout: str, seq_length: int, wanted: int) -> None:
    spec = PreprocessSpec(layout=layout, max_frames=5000)
    sample, clip = ask(Video(0), Text("Which digit is this? " * 4)), Clip([float(n) for n in range(6000)])

    def fit(size: int) -> tuple[int, int]:
        return frames_that_fit(sample, [], [clip], tokenizer=tok, spec=spec, seq_length=size)

    def length(frames: int) -> int:
        return len(build_example(sample, [], [clip.items(spec, frames)], tokenizer=tok, spec=spec).tokens)

    assert fit(seq_length) == (wanted, 5000)
    exact, further = length(wanted), length(wanted + 1)
    assert exact <= seq_length < further
    assert [fit(size)[0] for size in (exact - 1, exact, further - 1, further)] == [
        wanted - 1,
        wanted,
        wanted,
        wanted + 1,
    ]


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_the_rest_of_the_sample_is_counted(tok: VitaTokenizer, data: st.DataObject) -> None:
    layout = data.draw(st.sampled_from(["internvl", "internvl+times", "long_vita"]))
    spec = PreprocessSpec(
        layout=layout.partition("+")[0], video_timestamps="+" in layout, max_frames=40, max_tiles=4, **SMALL
    )
    gaps = st.lists(st.floats(0.02, 30), min_size=1, max_size=60)
    clips = [Clip(np.cumsum(data.draw(gaps)).tolist(), data.draw(st.floats(0.1, 2))) for _ in range(2)]
    sample = ask(Text("Which"), Video(0), Image(0), Text("\n3.5 of\n"), Video(1), Text("seven"), images=1, videos=2)
    images = [blank(*data.draw(st.sampled_from([(16, 16), (48, 16), (32, 32)])))]
    seq_length = data.draw(st.integers(30, 1500))

    def length(frames: int) -> int:
        videos = [clip.items(spec, frames) for clip in clips]
        return len(build_example(sample, images, videos, tokenizer=tok, spec=spec).tokens)

    fit, most = frames_that_fit(sample, images, clips, tokenizer=tok, spec=spec, seq_length=seq_length)
    assert most == max(clip.count(spec, 40) for clip in clips)
    assert fit == 0 or length(fit) <= seq_length
    assert fit == most or length(fit + 1) > seq_length


def test_times_stand_before_the_frames_and_are_counted(tok: VitaTokenizer) -> None:
    spec = PreprocessSpec(video_timestamps=True, **SMALL)
    clip = Clip([0.0, 9.96, 100.25])
    example = build_example(ask(Video(0), Text("Which")), [], [clip.items(spec, 3)], tokenizer=tok, spec=spec)
    text = tok.decode(example.tokens, skip_special_tokens=False).replace("<IMG_CONTEXT>", "")
    assert "Frame1 (0.0s): <img></img>\nFrame2 (10.0s): <img></img>\nFrame3 (100.2s): <img></img>\nWhich" in text
    without = PreprocessSpec(**SMALL)
    plain = build_example(ask(Video(0), Text("Which")), [], [clip.items(without, 3)], tokenizer=tok, spec=without)
    assert "Frame2: <img>" in tok.decode(plain.tokens, skip_special_tokens=False)
    added = frame_costs(tok, spec, 3, clip.times).sum() - frame_costs(tok, without, 3).sum()
    assert len(example.tokens) - len(plain.tokens) == added > 0
    with pytest.raises(ConfigError, match="video_timestamps"):
        PreprocessSpec(layout="long_vita", video_timestamps=True)


@pytest.mark.parametrize("layout", ["internvl", "internvl+times", "long_vita"])
def test_real_videos_at_the_boundary(tok: VitaTokenizer, tmp_path: Path, layout: str) -> None:
    spec = PreprocessSpec(layout=layout.partition("+")[0], video_timestamps="+" in layout, max_frames=20, **SMALL)
    path = write_video(tmp_path / "clip.mp4", [10 * number for number in range(24)], rate=2)
    sample = ask(Video(0), Text("Which"))
    with open_video(MediaFile(path=str(path))) as video:
        for wanted in range(1, 12):
            frames = video.frames(spec, wanted)
            assert len(frames) == wanted
            exact = len(build_example(sample, [], [frames], tokenizer=tok, spec=spec).tokens)
            for seq_length, fit in ((exact - 1, wanted - 1), (exact, wanted), (exact + 1, wanted)):
                got = frames_that_fit(sample, [], [video], tokenizer=tok, spec=spec, seq_length=seq_length)
                assert got == (fit, 12)


def test_most_that_fit() -> None:
    for room in range(0, 60):
        assert most_that_fit(5, room, lambda count: 7 + 10 * count) == min(5, max(0, (room - 7) // 10))
