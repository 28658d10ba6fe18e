"""Visual needles: one picture at a depth of a clip of N frames. A clip is a list of paths; no frame is copied."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import overload

from megatron_vita.data.media.video.decode import frames_of
from megatron_vita.data.media.video.open import open_video
from megatron_vita.data.sample import MediaFile, Message, Sample, Text, Video
from megatron_vita.data.spec import PreprocessSpec
from megatron_vita.errors import ConfigError
from megatron_vita.evaluation.needle.drawing import SIDE, draw_scene
from megatron_vita.evaluation.needle.grid import Grid, place
from megatron_vita.evaluation.needle.needles import NEEDLE, Needle
from megatron_vita.evaluation.questions import Question
from megatron_vita.files import write_atomic
from megatron_vita.inference.answer_key import MediaKeys

log = logging.getLogger(__name__)

SCENES = 512
"""Most generated frames that differ; a longer clip repeats them."""
_WINDOW = 16
"""Frames of a haystack's video in memory at once."""
_START = 3
"""Purpose of a draw."""


class VisualNeedles(Sequence[Question]):
    """The questions of one clip length, made when they are asked for."""

    def __init__(self, grid: Grid, frames: int, haystack: Sequence[MediaFile], needle: Callable[[int], Needle]) -> None:
        """Nothing is opened.

        Args:
            grid: depths and samples.
            frames: N, pictures of a clip with its needle.
            haystack: pictures that a clip takes a run of, from a place that the sample draws; from the beginning again
                behind the last.
            needle: the needle of each sample.
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
        needle = self._needle(sample)
        assert needle.image is not None
        start = int(self._grid.draw(sample, _START).integers(len(self._haystack)))
        clip = [self._haystack[(start + number) % len(self._haystack)] for number in range(self._frames - 1)]
        clip.insert(place(depth, self._frames), needle.image)
        name = f"needle of {self._frames} frames, depth {depth:g}, sample {sample + 1}"
        video = MediaFile(frames=tuple(clip), label=name)
        turn = Message("user", (Video(0), Text("\n" + needle.question)))
        return Question(
            Sample((turn,), videos=(video,), source=name, line=index + 1),
            needle.answer,
            index + 1,
            {"needle": "visual", "frames": self._frames, "depth": depth, "sample": sample},
            task=NEEDLE,
        )


def haystack_frames(haystack: Path | None, folder: Path, most: int, seed: int) -> list[MediaFile]:
    """Pictures to hide a needle among; those that are made are kept in `folder` and found there again.

    Args:
        haystack: a folder of frames, which are used where they lie; a video, of which one frame a second is written;
            None: `most` drawn scenes, or SCENES if that is fewer.
        folder: for what is made.
        most: frames of the longest clip.
        seed: of the scenes.

    Raises:
        ConfigError: no such file or folder, or no frame in it.
        DataError: a video that cannot be decoded, or a file in the folder that is no frame.
    """
    if haystack is None:
        made = [folder / f"scenes_{seed}" / f"{number:04}.png" for number in range(min(most, SCENES))]
        _write_missing({path: partial(draw_scene, seed, number) for number, path in enumerate(made)})
        return [MediaFile(path=str(path)) for path in made]
    if haystack.is_dir():
        found = frames_of(str(haystack))
    elif haystack.is_file():
        found = _of_video(haystack, folder, most)
    else:
        raise ConfigError(f"{haystack}: no such file or folder. Check --haystack.")
    if not found:
        raise ConfigError(f"{haystack}: no frame in it. Check --haystack.")
    if len(found) < most - 1:
        log.warning("%s: %d frames; clips of up to %d repeat them", haystack, len(found), most)
    return found


def _of_video(path: Path, folder: Path, most: int) -> list[MediaFile]:
    """One frame a second of a video, at most `most`, each once in a file."""
    spec = PreprocessSpec(image_size=SIDE, max_frames=most)
    whole = MediaFile(path=str(path))
    into = folder / f"{path.stem}_{MediaKeys().key(whole)[:12]}_{most}"
    with open_video(whole) as video:
        numbers = video.plan(spec, most)
        made = []
        for start in range(0, len(numbers), _WINDOW):
            window = range(start, min(start + _WINDOW, len(numbers)))
            items = video.frames_at(spec, [numbers[place] for place in window])
            for place, item in zip(window, items, strict=True):
                suffix = "png" if item.data.startswith(b"\x89PNG") else "jpg"
                made.append(into / f"{place:06}.{suffix}")
                _write_missing({made[-1]: partial(bytes, item.data)})
    return [MediaFile(path=str(path)) for path in made]


def _write_missing(contents: dict[Path, Callable[[], bytes]]) -> None:
    for path, content in contents.items():
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(path, content())
