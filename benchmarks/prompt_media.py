"""Media of a prompt: what decoding them window by window costs in memory and time, beside decoding them at once.

A clip (H.264 or MPEG-4 in AVI, which has no times to jump by) and a folder of frames, of 64, 1,024 and 4,096 frames at
one a second; of the clip every fifth frame is taken. Windows of 8 tiles:

* memory: how much resident memory of this process and of the decoding child grows from the first windows to the peak,
  each case in a process of its own. It must not grow with the frames;
* time: CPU seconds of both processes to open and read all windows, and those of one rank of 2 and of 4, against what
  decoding all frames at once takes.

    python benchmarks/prompt_media.py [--frames 64 1024 4096]
"""

from __future__ import annotations

import argparse
import io
import multiprocessing
import tempfile
from pathlib import Path

import av
import numpy as np
import psutil
from PIL import Image

from megatron_vita.data.example import MediaItem
from megatron_vita.data.media.on_demand import Video
from megatron_vita.data.media.tiling import plan_tiles, render_tiles
from megatron_vita.data.media.video.open import VideoLimits, open_video
from megatron_vita.data.media.video.worker import decoder
from megatron_vita.data.sample import MediaFile
from megatron_vita.data.spec import PreprocessSpec

SPEC = PreprocessSpec(image_size=112, max_frames=4096)
WINDOW, RATE = 8, 5
KINDS = {"clip, H.264 in MP4": "libx264.mp4", "clip, MPEG-4 in AVI": "mpeg4.avi", "folder of JPEGs": "folder"}


def write(path: Path, frames: int) -> MediaFile:
    """A clip of so many seconds, or a folder of so many frames; 160 x 120 pixels that move."""
    rng = np.random.default_rng(0)
    wide = np.repeat(np.repeat(rng.integers(0, 256, (15, 160, 3), dtype=np.uint8), 8, 0), 8, 1)

    def picture(number: int) -> np.ndarray:
        return np.ascontiguousarray(wide[:, number * 4 % 1000 :][:, :160])

    if path.name.endswith("folder"):
        path.mkdir()
        for number in range(frames):
            Image.fromarray(picture(number)).save(path / f"{number}.jpg", quality=90)
        return MediaFile(path=str(path))
    with av.open(str(path), "w") as container:
        stream = container.add_stream(path.name.split("-")[1].split(".")[0], rate=RATE)
        stream.width, stream.height, stream.pix_fmt = 160, 120, "yuv420p"
        stream.codec_context.gop_size = 25
        for number in range(frames * RATE):
            frame = av.VideoFrame.from_ndarray(picture(number), format="rgb24").reformat(format="yuv420p")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return MediaFile(path=str(path))


def processes() -> list[psutil.Process]:
    """This process and the child."""
    return [psutil.Process(), psutil.Process(decoder.child(VideoLimits()).pid)]


def seconds() -> float:
    """CPU seconds of both."""
    return sum(sum(one.cpu_times()[:2]) for one in processes())


def at_once(file: MediaFile) -> dict[str, float]:
    """CPU seconds, and MiB over the state before, of decoding all frames and then all tiles."""
    render(MediaItem(_grey(), 16, 16, frame=True))
    before, begun = [one.memory_info().rss for one in processes()], seconds()
    with open_video(file) as video:
        items = video.frames(SPEC, SPEC.max_frames)
    tiles = np.concatenate([render(item) for item in items])
    peak = [one.memory_info().rss for one in processes()]
    used = {"here": (peak[0] - before[0]) / 2**20, "child": (peak[1] - before[1]) / 2**20}
    return {"seconds": seconds() - begun, "tiles": len(tiles), **used}


def in_windows(file: MediaFile, ranks: int) -> dict[str, float]:
    """The same by the windows of the last of some ranks; MiB from the fourth window to the peak."""
    render(MediaItem(_grey(), 16, 16, frame=True))
    begun = seconds()
    video = Video(file, SPEC, "auto", proven=ranks == 1)
    slots = [plan_tiles(item, number, SPEC)[0] for number, item in enumerate(video.items)]
    resident = []
    for start in range((ranks - 1) * WINDOW, len(slots), ranks * WINDOW):
        video.render(slots[start : start + WINDOW], 0, SPEC)
        resident.append([one.memory_info().rss for one in processes()])
    spent = seconds() - begun
    growth = (np.max(resident[3:] or resident[-1:], axis=0) - resident[min(3, len(resident) - 1)]) / 2**20
    return {"seconds": spent, "tiles": len(slots), "here": growth[0], "child": growth[1]}


def render(item: MediaItem) -> np.ndarray:
    """The tile of a frame."""
    return render_tiles(item, plan_tiles(item, 0, SPEC), SPEC)


def _grey() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16)).save(buffer, "JPEG")
    return buffer.getvalue()


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--frames", type=int, nargs="+", default=[64, 1024, 4096])
    arguments = parser.parse_args()
    print(
        "| medium | frames | read | MiB here | MiB in the child | CPU seconds | of all at once |\n" + "| --- " * 7 + "|"
    )
    with tempfile.TemporaryDirectory() as folder:
        for kind, name in KINDS.items():
            for frames in arguments.frames:
                file = write(Path(folder) / f"{frames}-{name}", frames)
                whole = 0.0
                for what, ranks in (("all at once", 0), ("windows of 8", 1), ("rank 1 of 2", 2), ("rank 3 of 4", 4)):
                    with multiprocessing.get_context("spawn").Pool(1) as pool:  # with memory of its own
                        measured = pool.apply(in_windows, (file, ranks)) if ranks else pool.apply(at_once, (file,))
                    whole = whole or measured["seconds"]
                    print(
                        f"| {kind} | {measured['tiles']} | {what} | {measured['here']:.1f} | {measured['child']:.1f} | "
                        f"{measured['seconds']:.2f} | {measured['seconds'] / whole:.2f} |",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
