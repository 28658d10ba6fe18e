"""Decodes by PyAV, from the start or a clean entry point; frames are identified by their presentation time.

A container's packets list the frames and their times. They are checked against the decoder's frames: where times or
numbers differ, the whole clip is decoded once.
"""

from __future__ import annotations

import itertools
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from PIL import Image

from megatron_vita.data.media.video.choice import Numbers, Times
from megatron_vita.data.media.video.clip import MissedError, VideoFile
from megatron_vita.data.media.video.display import Display
from megatron_vita.data.rejects import reject

CONTAINERS = (
    "mov,matroska,avi,flv,live_flv,asf,mpeg,mpegts,mpegvideo,ogg,gif,apng,m4v,h264,hevc,vvc,av1,obu,vc1,ivf,nut,dv,rm,"
    "mjpeg,wtv,mxf,yuv4mpegpipe"
)
"""ffmpeg's names of the formats that are opened: such as hold the pictures themselves."""
_UNTIMED = {"avi", "mpeg", "mpegvideo", "h264", "hevc", "vvc", "av1", "obu", "vc1", "m4v", "dv", "mjpeg"}
"""Formats whose packets do not say, or not rightly, when their frame is shown: there the frames' order counts."""
_INDEXED = {"mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm"}
"""Formats with an index of key frames."""
_CODECS = {"libdav1d": "av1", "libvpx": "vp8", "libvpx-vp9": "vp9"}
"""Codecs that go by the name of the library."""
_PAYS = 50
"""Number of frames: fewer are decoded and dropped, more are skipped by a seek."""
_LONGEST = 1e7
"""Seconds; what lies further from 0 (four months) is a mark for "not known"."""
_LEAST_PLAYED = 0.9
"""Share of a clip's frames that must come out: a recording may begin or end between two key frames."""


class PyAvVideo(VideoFile):
    """A clip that PyAV decodes."""

    def __init__(self, name: str, source: Callable[[], Any]) -> None:
        """Read every packet's header.

        Raises:
            DataError: video_broken or video_codec.
        """
        self.name, self._source = name, source
        with self._open() as container:
            stream = self._choose(container)
            self._display = Display(described(container, stream), stream.sample_aspect_ratio)
            form = container.format.name
            indexed = form in _INDEXED
            codec = _CODECS.get(stream.codec_context.name, stream.codec_context.name)
            packets = [
                (packet.pts, packet.dts, indexed and _is_entry(packet, codec, stream.codec_context.extradata))
                for packet in container.demux(stream)
                if packet.size and not packet.is_discard and not _is_hidden(packet, codec)
            ]
            self._rate = float(stream.average_rate or stream.guessed_rate or 0)
            self._step = float(stream.time_base or 1)
        self._packets = len(packets)
        shown, decoded = ([row[column] for row in packets] for column in (0, 1))
        if form == "avi":  # which has frames at equal distances, in the order of decoding; ffmpeg guesses the rest
            shown = decoded
        self._labels = self._stamps(shown, repeated=True) if form not in _UNTIMED else None
        """When each frame is shown, in the stream's clock; None: a frame is known by its number."""
        self._decoded = decoded
        self._entries = np.array([], dtype=np.int64)
        """Times of the key frames from which decoding may begin."""
        if self._labels is not None:
            self._entries = np.unique(np.array([pts for pts, _, entry in packets if entry], dtype=np.int64))
        stamps = self._labels if self._labels is not None else self._stamps(shown)
        super().__init__(name, *self._times(stamps, len(packets)))

    def _stamps(self, values: Sequence[int | None], *, repeated: bool = False) -> Numbers | None:
        """Times of a clip's packets in ascending order; None where some are missing, out of reach or said twice."""
        known = np.array([value for value in values if value is not None], dtype=np.float64)
        if not len(known) or len(known) < len(values) or np.abs(known * self._step).max() >= _LONGEST:
            return None
        stamps = np.unique(np.array(values, dtype=np.int64))
        return stamps if len(stamps) == len(values) or (repeated and 2 * len(stamps) > len(values)) else None

    def _times(self, stamps: Numbers | None, total: int) -> tuple[Times, float | None]:
        """(seconds at which each frame is shown, frames a second)."""
        if stamps is None and total == self._packets:
            stamps = self._stamps(self._decoded)
        if stamps is not None:
            return stamps.astype(np.float64) * self._step, None
        rate = self._rate if np.isfinite(self._rate) and self._rate > 0 else 25.0
        return np.arange(total, dtype=np.float64) / rate, rate

    def read(self, numbers: Iterable[int]) -> Iterator[Image.Image]:
        """See `VideoFile.read`."""
        return map(self._display.show, self._find(numbers))

    def prove(self, numbers: Sequence[int]) -> None:
        """See `VideoFile.prove`: by all frames, or where an index allows to jump, by the first and the last.

        (The fields of a frame counted as two frames, which is the error of such containers, show there, too.)"""
        deque(self._find((numbers[0], numbers[-1]) if len(self._entries) else numbers), maxlen=0)

    def _find(self, numbers: Iterable[int]) -> Iterator[Any]:
        """The decoder's frames by number."""
        wanted: Iterator[int] = (int(one if self._labels is None else self._labels[one]) for one in numbers)
        if len(self._entries):
            pending: list[int] = []

            def noted() -> Iterator[int]:
                for label in wanted:
                    pending[:] = [label]
                    yield label

            try:
                yield from self._play(noted(), jump=True)
                return
            except MissedError:  # an entry was not what it seemed
                self._entries = self._entries[:0]
            wanted = itertools.chain(pending, wanted)
        yield from self._play(wanted)

    def learn(self) -> None:
        """See `VideoFile.learn`."""
        labels: list[int | None] = []
        fields = False
        with self._open() as container:
            for frame in self._decode(container, self._choose(container)):
                labels.append(frame.pts)
                fields = fields or frame.interlaced_frame
        played = len(labels)
        # the two fields of an interlaced frame may come as two packets
        if played < _LEAST_PLAYED * self._packets / (2 if fields else 1):
            raise reject("video_broken", f"{self.name}: only {played} of {self._packets} frames can be decoded.")
        stamps = self._stamps(labels, repeated=True) if self._labels is not None else None
        ordered = stamps is not None and None not in labels and bool((np.diff(np.array(labels, np.int64)) >= 0).all())
        self._labels = stamps if ordered else None
        self._entries = self._entries[:0]
        self.set_times(*self._times(self._labels, played))

    def _open(self) -> Any:
        import av

        options = {"format_whitelist": CONTAINERS, "protocol_whitelist": "file,subfile"}
        return av.open(self._source(), container_options=options)

    def _choose(self, container: Any) -> Any:
        """The video that a player shows: the one marked as default, else the first; cover pictures are none."""
        from av.stream import Disposition

        still = Disposition.attached_pic | Disposition.timed_thumbnails
        streams = [stream for stream in container.streams.video if not stream.disposition & still]
        if not streams:
            what = "only a cover picture" if container.streams.video else "no video stream"
            raise reject("video_broken", f"{self.name}: {what} in it.")
        stream = next((one for one in streams if one.disposition & Disposition.default), streams[0])
        if stream.codec_context is None:
            codec = re.search(r"Video: ([^,\n]*)", described(container, stream))
            raise reject(
                "video_codec",
                f"{self.name}: this build of PyAV has no decoder for its video ({codec[1] if codec else 'unknown'}). "
                "Convert it, or drop the sample.",
            )
        stream.codec_context.thread_count = 1
        stream.codec_context.options = {"err_detect": "explode"}  # damage is an error, and is not concealed
        return stream

    def _play(self, wanted: Iterator[int], *, jump: bool = False) -> Iterator[Any]:
        """Frames by label."""
        with self._open() as container:
            stream = self._choose(container)
            self.check_size(stream.codec_context.width, stream.codec_context.height)
            frames = self._decode(container, stream)
            frame: Any = None
            last, number = -(1 << 63), -1
            for label in wanted:
                entry = self._entry_before(last, label) if jump else None
                if entry is not None:
                    frames, last = self._jump(container, stream, entry), entry - 1
                while last < label:
                    frame = next(frames, None)
                    if frame is None:
                        raise MissedError
                    number += 1
                    found = number if self._labels is None else frame.pts
                    if found == last and self._labels is not None:
                        continue  # of several frames of one time the first counts
                    if found is None or found < last or found > label:
                        raise MissedError
                    last = found
                self.check_size(frame.width, frame.height)
                yield frame
            if self._labels is None and number + 1 + sum(1 for _ in frames) != self.total:
                raise MissedError  # by numbers alone, only the right count proves them

    def _decode(self, container: Any, stream: Any, packets: Iterator[Any] | None = None) -> Iterator[Any]:
        """The decoder's frames in the order in which they are shown; damage after the first one rejects the clip."""
        begun = False
        for packet in container.demux(stream) if packets is None else packets:
            if not packet.size and packet.dts is not None:
                continue  # a frame that was left out; to the decoder it would mean the end
            try:
                frames = packet.decode()
            except MemoryError:
                raise
            except Exception as error:  # av.error.FFmpegError and its many children
                if begun or "memory" in str(error).lower():
                    raise reject(
                        "video_broken", f"{self.name}: a frame cannot be decoded ({first_line(error)})."
                    ) from None
                continue  # a recording may begin between two key frames
            for frame in frames:
                begun = True
                yield frame

    def _entry_before(self, last: int, wanted: int) -> int | None:
        """The last clean entry before a frame, if a seek there skips enough frames."""
        assert self._labels is not None
        place = int(np.searchsorted(self._entries, wanted, side="right")) - 1
        if place < 0:
            return None
        entry = int(self._entries[place])
        skipped = np.searchsorted(self._labels, entry) - np.searchsorted(self._labels, last)
        return entry if skipped > _PAYS else None

    def _jump(self, container: Any, stream: Any, entry: int) -> Iterator[Any]:
        """Frames from a clean entry on.

        Raises:
            MissedError: the container leads elsewhere.
        """
        container.seek(entry, stream=stream)
        packets = container.demux(stream)
        first = next(packets)
        if first.pts is None or first.pts > entry or first.pts not in self._entries:
            raise MissedError

        def rest() -> Iterator[Any]:
            yield first
            yield from packets

        frames = self._decode(container, stream, rest())
        return (frame for frame in frames if frame.pts is None or frame.pts >= entry)


def _is_hidden(packet: Any, codec: str) -> bool:
    """Whether a VP8 packet holds a frame that is used as a reference and not shown."""
    return codec == "vp8" and not memoryview(packet)[0] & 0x10


def _is_entry(packet: Any, codec: str, extra: bytes | None) -> bool:
    """Whether decoding may begin at a packet, with all frames from then on correct.

    Yes for a key frame of VP8, VP9 and AV1, an intra random access point of HEVC, an instantaneous decoder refresh of
    H.264; but not for H.264's recovery points, which some writers call key frames, too.
    """
    if not packet.is_keyframe or packet.pts is None or codec not in ("h264", "hevc", "vp8", "vp9", "av1"):
        return False
    if codec not in ("h264", "hevc"):
        return True
    kinds = set(_nal_kinds(bytes(packet), extra or b"", codec))
    clean, pictures = ({5}, range(1, 6)) if codec == "h264" else (set(range(16, 22)), range(32))
    return bool(kinds & clean) and not kinds.intersection(pictures) - clean


def _nal_kinds(data: bytes, extra: bytes, codec: str) -> Iterator[int]:
    """NAL unit types of a packet, by ISO/IEC 14496-15 or Annex B of ITU-T H.264 and H.265."""
    place = 21 if codec == "hevc" else 4
    if len(extra) > place and extra[0] == 1:
        width, at, starts = (extra[place] & 3) + 1, 0, []
        while at + width < len(data):
            starts.append(at + width)
            at += width + int.from_bytes(data[at : at + width], "big")
    else:
        starts = [match.end() for match in re.finditer(rb"\x00\x00\x01", data)]
    for start in starts:
        if start < len(data):
            yield data[start] & 0x1F if codec == "h264" else data[start] >> 1 & 0x3F


def described(container: Any, stream: Any) -> str:
    """ffmpeg's description of a stream, on several lines."""
    import av

    level = av.logging.get_level()
    av.logging.set_level(av.logging.INFO)  # lower, it says nothing
    try:
        streams = re.split(r"Stream #0:(\d+)", str(container.dumps_format()))
    finally:
        av.logging.set_level(level)
    return dict(zip(streams[1::2], streams[2::2], strict=True)).get(str(stream.index), "")


def first_line(error: object) -> str:
    """The first line of an error, short enough for a message."""
    text = str(error).replace(str(getattr(error, "filename", None) or "\0"), "the file")  # wherever it lies here
    lines = [line for line in text.strip().splitlines() if line.strip()]
    return lines[0][:200] if lines else type(error).__name__
