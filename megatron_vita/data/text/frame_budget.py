"""Computes how many frames of a sample's videos fit into a sequence, exactly, before any of them is decoded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Protocol

import numpy as np
import numpy.typing as npt

from megatron_vita.data.example import MediaItem
from megatron_vita.data.sample import Sample
from megatron_vita.data.spec import PreprocessSpec
from megatron_vita.data.text.chat import build_example, frame_costs
from megatron_vita.data.text.tokenizer import VitaTokenizer


class Clip(Protocol):
    """The part of `VideoFile` that the budget needs."""

    def count(self, spec: PreprocessSpec, max_frames: int) -> int:
        """Frames that would be taken."""

    def times_of(self, spec: PreprocessSpec, count: int) -> list[float]:
        """When they are shown."""


def frames_that_fit(
    sample: Sample,
    images: Sequence[MediaItem],
    clips: Sequence[Clip],
    *,
    tokenizer: VitaTokenizer,
    spec: PreprocessSpec,
    seq_length: int,
) -> tuple[int, int]:
    """Frames that each video may have so that the whole sample fits, and frames that the longest would have.

    The turns, the pictures and the first frame of each video are rendered; every further frame is counted by itself.

    Args:
        sample: the conversation.
        images: one item for each of sample.images.
        clips: one for each of sample.videos; at least one.
        tokenizer: counts the text.
        spec: layout, tiling, most frames and frames a second of a video.
        seq_length: tokens there are.

    Returns:
        (fit, most): 0 <= fit <= most. With fit frames of each video at most, the Example has at most seq_length tokens,
        and if fit < most, it has more with fit + 1.
    """
    counts = [clip.count(spec, spec.max_frames) for clip in clips]
    most = max(counts)

    def rendered(limit: int) -> int:
        """Tokens of everything with one frame each."""
        taken = (clip.times_of(spec, min(count, limit))[0] for clip, count in zip(clips, counts, strict=True))
        frames = [[MediaItem(b"", 1, 1, frame=True, time=time)] for time in taken]
        return len(build_example(sample, images, frames, tokenizer=tokenizer, spec=spec).tokens)

    if spec.video_timestamps:  # fewer frames stand at other times, whose texts may be of other lengths

        def length(limit: int) -> int:
            further = 0
            for clip, count in zip(clips, counts, strict=True):
                times = clip.times_of(spec, min(count, limit))
                further += int(frame_costs(tokenizer, spec, len(times), times)[1:].sum())
            return rendered(limit) + further

    else:
        one_each = rendered(most)
        added = _added(tokenizer, spec, 1 << most.bit_length())

        def length(limit: int) -> int:
            return one_each + sum(int(added[min(count, limit) - 1]) for count in counts)

    return most_that_fit(most, seq_length, length), most


@lru_cache(maxsize=16)
def _added(tokenizer: VitaTokenizer, spec: PreprocessSpec, frames: int) -> npt.NDArray[np.int64]:
    """Tokens that so many frames have more than one has, int64 `[frames]`; the same for every sample."""
    costs = frame_costs(tokenizer, spec, frames)
    return np.asarray(np.cumsum(costs) - costs[0])


def most_that_fit(most: int, budget: int, length: Callable[[int], int]) -> int:
    """The largest number of frames up to `most` whose `length` (in tokens) is at most `budget`; 0 if none is.

    Args:
        most: frames that would be taken at best.
        budget: tokens that are free.
        length: tokens of so many frames; a frame more is many tokens more.
    """
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        if length(middle) <= budget:
            low = middle
        else:
            high = middle - 1
    return low
