"""Decodes by decord, and checks each frame: PyAV decodes the clip, too, and a clip that differs is rejected.

decord (0.6, unmaintained) seeks by counting frames and lands elsewhere wherever frames are reordered across its entry
points. It does not say when the frame was shown that it gives, so pictures are the only proof.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from megatron_vita.data.media.video.clip import Reading, VideoFile
from megatron_vita.data.media.video.pyav import PyAvVideo, first_line
from megatron_vita.data.rejects import reject
from megatron_vita.errors import DataError

_CELLS = 32
"""Frames are compared by the means of so many by so many cells."""
_LIKE = 10.0
"""Grey levels by which a cell of the same frame may differ between decoders: they convert colours differently."""
_NOISE = 2.0
"""Grey levels of one cell by which the frame before or behind may be nearer; of all on average, a quarter of it."""
_SECONDS = 2e-3


class DecordVideo(VideoFile):
    """A clip that decord decodes."""

    def __init__(self, name: str, source: Callable[[], Any]) -> None:
        """Open it in both decoders.

        Raises:
            DataError: video_inexact, where decord counts other frames than there are, or shows them at other times.
        """
        import decord

        decord.logging.set_level(decord.logging.QUIET)
        self._proof = PyAvVideo(name, source)
        self._reader = decord.VideoReader(source(), ctx=decord.cpu(0), num_threads=1)
        total = len(self._reader)
        super().__init__(name, self._proof.times, self._proof.fps)
        stamps = np.asarray(self._reader.get_frame_timestamp(range(total)) if total else [], dtype=np.float64)
        starts = stamps.reshape(total, 2)[:, 0]
        if total != self.total or np.abs(starts - starts[:1] - self.times).max() > _SECONDS:
            raise self._inexact("counts or times its frames differently")

    def read(self, numbers: Iterable[int]) -> Iterator[Image.Image]:
        """See `VideoFile.read`.

        Raises:
            DataError: video_inexact, where a frame is not PyAV's.
        """
        truth, known = Reading(self._proof), dict[int, Image.Image]()
        for number in numbers:
            near = range(max(number - 1, max(known, default=-1) + 1, 0), min(number + 2, self.total))
            known.update(zip(near, truth.pictures(near), strict=True))
            known = {at: one for at, one in known.items() if at >= number - 1}
            picture = self._decode(number)
            if picture.size != known[number].size:
                raise self._inexact(f"shows frames of {picture.size} pixels instead of {known[number].size}")
            off = {at: np.abs(_cells(one) - _cells(picture)) for at, one in known.items() if abs(at - number) <= 1}
            best = min(one.mean() for one in off.values()), min(one.max() for one in off.values())
            if off[number].max() > min(_LIKE, best[1] + _NOISE) or off[number].mean() > best[0] + _NOISE / 4:
                raise self._inexact(f"gives another frame for number {number}")
            yield picture

    def prove(self, numbers: Sequence[int]) -> None:
        """See `VideoFile.prove`."""
        self._proof.prove(numbers)

    def learn(self) -> None:
        """See `VideoFile.learn`: what takes decoding all of it is not for decord."""
        raise self._inexact("cannot be proven on a clip whose container tells its frames wrongly")

    def _decode(self, number: int) -> Image.Image:
        try:
            (pixels,) = self._reader.get_batch([number]).asnumpy()
        except MemoryError:
            raise
        except Exception as error:  # decord raises its own DECORDError, RuntimeError or IndexError
            raise reject(
                "video_broken", f"{self.name}: a frame cannot be decoded by decord ({first_line(error)})."
            ) from None
        self.check_size(pixels.shape[1], pixels.shape[0])
        return Image.fromarray(pixels)

    def _inexact(self, what: str) -> DataError:
        return reject(
            "video_inexact",
            f"{self.name}: decord {what}. Use --video-backend pyav, which is exact, or drop the sample.",
        )


def _cells(picture: Image.Image) -> npt.NDArray[np.float64]:
    small = picture.resize((_CELLS, _CELLS), Image.Resampling.BOX)
    return np.asarray(small, dtype=np.float64)
