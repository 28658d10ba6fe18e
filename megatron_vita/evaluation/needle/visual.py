"""Visual needles: one picture at a depth of a clip of N frames. A clip is a list of paths; no frame is copied."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import overload

from megatron_vita.data.media.video.decode import frames_of
from megatron_vita.data.media.video.open import open_video
from megatron_vita.data.sample import MediaFile, Message, Sample, Text, Video
from megatron_vita.data.spec import PreprocessSpec
from megatron_vita.errors import ConfigError
from megatron_vita.evaluation.needle.drawing import SIDE, draw_scene, drawn
from megatron_vita.evaluation.needle.grid import Grid, place
from megatron_vita.evaluation.needle.needles import NEEDLE, Choose
from megatron_vita.evaluation.questions import Question
from megatron_vita.inference.answer_key import MediaKeys

log = logging.getLogger(__name__)

SCENES = 512
"""Generated frames that differ; a longer clip repeats them."""
_WINDOW = 16
"""Frames of a haystack's video in memory at once."""
_START = 3
"""Purpose of a draw."""


@dataclass(frozen=True, slots=True)
class Haystack:
    """Pictures that a clip takes a run of, from the beginning again behind the last."""

    count: int
    frame: Callable[[int], MediaFile]
    """Number, below `count`, -> picture."""


class VisualNeedles(Sequence[Question]):
    """The questions of one clip length, made when they are asked for."""

    def __init__(self, grid: Grid, frames: int, haystack: Haystack, needle: Choose) -> None:
        """Nothing is drawn or opened.

        Args:
            grid: depths and samples.
            frames: N, pictures of a clip with its needle.
            haystack: the other pictures; the run begins where the question's draw says.
            needle: of each question.
        """
        self._grid, self._frames, self._haystack, self._needle = grid, frames, haystack, needle

    def __len__(self) -> int:
        return len(self._grid)

    @overload
    def __getitem__(self, index: int) -> Question: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Question]: ...
    def __getitem__(self, index: int | slice) -> Question | Sequence[Question]:
        if isinstance(index, slice):
            return [self[number] for number in range(len(self))[index]]
        depth, sample = self._grid.cell(index)
        needle, line = self._needle(depth, sample), self._grid.line(depth, sample)
        assert needle.image is not None
        many = self._haystack.count
        start = int(self._grid.draw(depth, sample, _START).integers(many))
        clip = [self._haystack.frame((start + number) % many) for number in range(self._frames - 1)]
        clip.insert(place(depth, self._frames), needle.image)
        name = f"needle of {self._frames} frames, depth {depth:g}, sample {sample + 1}"
        video = MediaFile(frames=tuple(clip), label=name)
        turn = Message("user", (Video(0), Text("\n" + needle.question)))
        return Question(
            Sample((turn,), videos=(video,), source=name, line=line),
            needle.answer,
            line,
            {"needle": "visual", "frames": self._frames, "depth": depth, "sample": sample},
            task=NEEDLE,
        )


def open_haystack(path: Path | None, folder: Path, most: int, seed: int) -> Haystack:
    """Pictures to hide a needle among; those that are made are kept in `folder` and found there again.

    Args:
        path: a folder of frames, which are used where they lie; a video, of which one frame a second is written, at
            most `most`; None: scenes, drawn when a clip has them.
        folder: for what is made.
        most: frames of the longest clip.
        seed: of the scenes.

    Raises:
        ConfigError: no such file or folder, or no frame in it.
        DataError: a video that cannot be decoded, or a file in the folder that is no frame.
    """
    if path is None:
        scenes = folder / f"scenes_{seed}"
        return Haystack(SCENES, cache(lambda n: drawn(scenes / f"{n:03}.png", partial(draw_scene, seed, n))))
    if path.is_dir():
        found = frames_of(str(path))
    elif path.is_file():
        found = _of_video(path, folder, most)
    else:
        raise ConfigError(f"{path}: no such file or folder. Check --haystack.")
    if not found:
        raise ConfigError(f"{path}: no frame in it. Check --haystack.")
    if len(found) < most - 1:
        log.warning("%s: %d frames; clips of up to %d repeat them", path, len(found), most)
    return Haystack(len(found), found.__getitem__)


def _of_video(path: Path, folder: Path, most: int) -> list[MediaFile]:
    """One frame a second of a video, at most `most`, as files."""
    whole = MediaFile(path=str(path))
    into = folder / f"{path.stem}_{MediaKeys().key(whole)[:12]}_{most}"
    if not into.is_dir():
        partial_into = into.with_name(into.name + ".partial")
        partial_into.mkdir(parents=True, exist_ok=True)
        spec = PreprocessSpec(image_size=SIDE, max_frames=most)
        with open_video(whole) as video:
            numbers = video.plan(spec, most)
            for start in range(0, len(numbers), _WINDOW):
                for number, item in enumerate(video.frames_at(spec, numbers[start : start + _WINDOW]), start):
                    suffix = "png" if item.data.startswith(b"\x89PNG") else "jpg"
                    (partial_into / f"{number:06}.{suffix}").write_bytes(item.data)
        partial_into.rename(into)
    return frames_of(str(into))
