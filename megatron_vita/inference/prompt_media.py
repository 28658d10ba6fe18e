"""The pixels of a prompt, decoded where and when they are asked for: never more of them than a window is in memory.

`PromptMedia.open` reads headers, which give every length. `tiles` decodes; asked for ascending ranges it goes through
each medium once, also where it is asked for every second range only, as the ranks of a group do.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from itertools import accumulate, groupby

import numpy as np
import torch

from megatron_vita.data.example import IGNORE_INDEX, Example, MediaItem
from megatron_vita.data.media.image import PictureHeader
from megatron_vita.data.media.on_demand import Medium, Picture, Video
from megatron_vita.data.media.tiling import count_picture_tokens, spec_of
from megatron_vita.data.media.video.open import VideoFile, VideoLimits
from megatron_vita.data.rejects import reject
from megatron_vita.data.sample import Image, Sample, Text
from megatron_vita.data.spec import PreprocessSpec
from megatron_vita.data.text.chat import build_example
from megatron_vita.data.text.chat_tokenizer import ChatTokenizer
from megatron_vita.inference.openai.limits import Limits
from megatron_vita.inference.prompt import RawPrompt

_VIDEO_LIMITS = VideoLimits()


class PromptMedia:
    """Tiles of a conversation's pictures and videos, decoded when they are asked for.

    Not for several threads at once. A medium that fails leaves the others usable.
    """

    def __init__(self, sources: Sequence[Medium], example: Example, spec: PreprocessSpec) -> None:
        """Use `open` or `reopen`. `sources`: the pictures and videos in token order."""
        self._sources, self._slots, self._spec = sources, example.tiles, spec
        self._ends = list(accumulate(len(source.items) for source in sources))
        self._current: Medium | None = None

    @classmethod
    def open(
        cls,
        sample: Sample | RawPrompt,
        spec: PreprocessSpec,
        *,
        tokenizer: ChatTokenizer,
        video_backend: str = "auto",
        video_limits: VideoLimits = _VIDEO_LIMITS,
        limits: Limits | None = None,
        check: Callable[[int], None] | None = None,
    ) -> tuple[Example, PromptMedia]:
        """Read the headers of a conversation's media and lay it out as a prompt.

        Of a video as much is decoded as it takes to prove which frames it has: none, or little where its container
        has an index.

        Args:
            sample: a conversation whose last turn is the user's, or a text.
            spec: tile size, tiling, frames of a video.
            tokenizer: ids and chat template.
            video_backend: see `open_video`.
            video_limits: of decoding.
            limits: of pictures and videos.
            check: is called with the tokens of pictures and frames before the prompt is written, and may raise.

        Returns:
            (what training would make of it, with media that hold no bytes; their tiles).

        Raises:
            DataError: a medium that is missing or damaged, or a conversation that does not end with a question.
            LimitError: pictures or videos that are too large.
        """
        if isinstance(sample, RawPrompt):
            example = raw_example(sample, tokenizer)
            return example, cls([], example, spec)
        sample.check()
        media = _Media(sample, spec, video_backend, video_limits, proven=True, limits=limits)
        try:
            if check is not None:
                frames = sum(len(video.items) for video in media.videos)
                check(sum(_tokens(one.items[0], spec) for one in media.images) + frames * (spec.tokens_per_tile + 2))
            example = build_example(
                sample,
                [source.items[0] for source in media.images],
                [source.items for source in media.videos],
                tokenizer=tokenizer,
                spec=spec,
                generation_prompt=True,
            )
            items = [item for source in media.in_order for item in source.items]
            assert all(one is other for one, other in zip(example.media, items, strict=True)), "media in another order"
        except BaseException:
            media.close()
            raise
        return example, cls(media.in_order, example, spec)

    @classmethod
    def reopen(
        cls,
        sample: Sample | RawPrompt,
        example: Example,
        spec: PreprocessSpec,
        video_backend: str = "auto",
        video_limits: VideoLimits = _VIDEO_LIMITS,
    ) -> PromptMedia:
        """Open on another rank what `open` has opened on the first.

        Args:
            sample: as given there.
            example: as returned there.
            spec: as given there.
            video_backend: as given there.
            video_limits: as given there.

        Raises:
            DataError: a medium that is missing, damaged, or another than on the first rank.
        """
        planned = [(item.width, item.height, item.time) for item in example.media]
        for proven in (False, True):  # most containers are right about their frames, which costs no decoding
            media = _Media(sample, spec, video_backend, video_limits, proven=proven)
            items = [item for source in media.in_order for item in source.items]
            if [(item.width, item.height, item.time) for item in items] == planned:
                return cls(media.in_order, example, spec)
            media.close()
        raise reject(
            "media_changed",
            f"{sample.id}: its media are not those that were planned: the files differ between ranks, or changed.",
        )

    def tiles(self, start: int, stop: int) -> torch.Tensor:
        """Pixels of tiles `start` to `stop` of `example.tiles`, uint8 `[stop - start, 3, S, S]`, on the CPU.

        Raises:
            DataError: one of their media cannot be decoded, or has changed on disk.
        """
        if not 0 <= start <= stop <= len(self._slots):
            raise IndexError(f"tiles {start} to {stop} of {len(self._slots)}")
        side = self._spec.image_size
        out = np.empty((stop - start, 3, side, side), dtype=np.uint8)
        for place, run in groupby(range(start, stop), key=self._source_of):
            tiles = list(run)
            source = self._sources[place]
            if self._current is not source:
                self._release()
            self._current = source
            slots = [self._slots[tile] for tile in tiles]
            first_media = self._ends[place] - len(source.items)
            out[tiles[0] - start : tiles[-1] + 1 - start] = source.render(slots, first_media, self._spec)
            if tiles[-1] + 1 == len(self._slots) or self._source_of(tiles[-1] + 1) != place:
                self._release()
        return torch.from_numpy(out)

    def digests(self) -> list[bytes]:
        """SHA-256 of what decides the pixels of each of `example.media`, besides the preprocessing: the content of a
        picture; the content of a video, or of a folder's picture, with the number of the frame.

        Raises:
            DataError: a medium cannot be read, or has changed on disk.
        """
        return [digest for source in self._sources for digest in source.digests()]

    def close(self) -> None:
        """Let go of all files. What is asked for afterwards opens them again."""
        for source in self._sources:
            source.release()
        self._current = None

    def _source_of(self, tile: int) -> int:
        return bisect_right(self._ends, self._slots[tile].media)

    def _release(self) -> None:
        if self._current is not None:
            self._current.release()
            self._current = None


def raw_example(prompt: RawPrompt, tokenizer: ChatTokenizer) -> Example:
    """A text, or its ids, as a prompt: the ids that a document begins with in training, without its end.

    Raises:
        DataError: empty_turn, if there is no token.
    """
    ids = prompt.ids
    if ids is None:
        ids = (*tokenizer.beginning(), *tokenizer.between(prompt.text, None))
    if not ids:
        raise reject("empty_turn", f"{prompt.id}: the prompt has no token. Begin a text.")
    tokens = np.array(ids, dtype=np.int32)
    return Example(tokens, np.full(len(tokens), IGNORE_INDEX, dtype=np.int32))


def _tokens(item: MediaItem, spec: PreprocessSpec) -> int:
    return count_picture_tokens(item.width, item.height, spec_of(item, spec))


class _Used:
    """Adds up what a request's media have, as their headers say it."""

    def __init__(self, limits: Limits | None, spec: PreprocessSpec) -> None:
        self._limits, self._spec = limits, spec
        self._pixels = self._frames = 0
        self._seconds = 0.0

    def picture(self, header: PictureHeader) -> None:
        """One more picture. Raises LimitError."""
        if self._limits is None:
            return
        pixels = header.width * header.height
        self._limits.check("picture_pixels", pixels)
        self._pixels += pixels
        self._limits.check("pixels", self._pixels)

    def video(self, video: VideoFile) -> None:
        """One more video. Raises LimitError."""
        if self._limits is None:
            return
        self._seconds += float(video.times[-1])
        self._limits.check("video_seconds", self._seconds)
        self._frames += video.count(self._spec, self._spec.max_frames)
        self._limits.check("frames", self._frames)


class _Media:
    """The opened media of a Sample."""

    def __init__(
        self,
        sample: Sample | RawPrompt,
        spec: PreprocessSpec,
        backend: str,
        video_limits: VideoLimits,
        *,
        proven: bool,
        limits: Limits | None = None,
    ) -> None:
        self.images: list[Picture] = []
        self.videos: list[Video] = []
        used = _Used(limits, spec)
        try:
            for file in sample.images:
                self.images.append(Picture(file, check=used.picture))
            for file in sample.videos:
                self.videos.append(Video(file, spec, backend, proven=proven, check=used.video, limits=video_limits))
        except BaseException:
            self.close()
            raise
        parts = [part for message in sample.messages for part in message.parts]
        self.in_order: list[Medium] = [
            self.images[part.index] if isinstance(part, Image) else self.videos[part.index]
            for part in parts
            if not isinstance(part, Text)
        ]

    def close(self) -> None:
        """Let go of all files."""
        for video in self.videos:
            video.release()
