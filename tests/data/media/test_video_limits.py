"""Videos in their child process: what hangs, crashes or eats memory is rejected, and the next clip is decoded.

The misbehaving decoder is an `av` of our own on the module search path, which the child takes over.
"""

from __future__ import annotations

import itertools
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest

from megatron_vita.data.media.image import decode
from megatron_vita.data.media.video import child_video
from megatron_vita.data.media.video.open import VideoLimits, open_video
from megatron_vita.data.media.video.worker import decoder
from megatron_vita.data.sample import MediaFile
from megatron_vita.data.spec import PreprocessSpec
from megatron_vita.errors import ConfigError, DataError

SPEC = PreprocessSpec(image_size=16, patch_size=4, max_frames=8)

FAKE = """
import contextlib, ctypes, mmap, os, time
from fractions import Fraction
from types import SimpleNamespace
import numpy as np

__version__ = "18.0.0"
logging = SimpleNamespace(PANIC=0, INFO=1, get_level=lambda: 0, set_level=lambda level: None)

def misbehave(what):
    if what == "hang":
        time.sleep(600)
    elif what == "spin":  # and never gives Python its turn
        ctypes.PyDLL(None).sleep(600)
    elif what == "crash":
        ctypes.string_at(0)
    elif what == "exit":
        os._exit(3)
    elif what == "eat":
        kept = []
        while True:
            kept.append(np.ones(1 << 20))
    elif what == "share":  # memory that no limit of the kernel's counts
        mapped = mmap.mmap(-1, 600 << 20)
        for place in range(0, len(mapped), 4096):
            mapped[place] = 1
        time.sleep(600)
    elif what == "ask":
        np.ones(1 << 34)
    elif what == "raise":
        raise KeyError("odd")

class Frame(SimpleNamespace):
    width = height = 8
    interlaced_frame = key_frame = False
    side_data, format = (), SimpleNamespace(components=())
    def to_ndarray(self, format, threads):
        return np.full((8, 8, 3), 77, np.uint8)

class Packet(SimpleNamespace):
    is_discard = is_keyframe = False
    def decode(self):
        misbehave(self.what)
        return [Frame(pts=self.pts)] if self.size else []

@contextlib.contextmanager
def open(source, container_options):
    when, what = os.path.basename(source).split(".")[0].split("-")
    if when == "open":
        misbehave(what)
    context = SimpleNamespace(name="fake", width=8, height=8, extradata=None)
    one = Fraction(1)
    stream = SimpleNamespace(disposition=4, index=0, codec_context=context, average_rate=one, time_base=one)
    stream.sample_aspect_ratio = None
    packets = [Packet(pts=number, dts=number, size=9, what=what) for number in range(4)]
    packets.append(Packet(pts=None, dts=None, size=0, what="nothing"))
    yield SimpleNamespace(
        streams=SimpleNamespace(video=[stream]),
        format=SimpleNamespace(name="fake"),
        demux=lambda stream: iter(packets),
        dumps_format=lambda: "",
    )
"""


@pytest.fixture
def clips(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder for clips, whose names say how the decoder shall behave: `open-hang.mp4`, `read-crash.mp4`."""
    (tmp_path / "modules" / "av").mkdir(parents=True)
    (tmp_path / "modules" / "av" / "__init__.py").write_text(FAKE)
    (tmp_path / "modules" / "av" / "stream.py").write_text(
        "class Disposition:\n    attached_pic, timed_thumbnails, default = 1, 2, 4\n"
    )
    (tmp_path / "modules" / "av" / "sidedata").mkdir()
    (tmp_path / "modules" / "av" / "sidedata" / "sidedata.py").write_text("SideDataContainer = lambda frame: {}\n")
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    decoder.stop()
    yield tmp_path
    decoder.stop()


def clip(folder: Path, name: str) -> MediaFile:
    (folder / name).write_bytes(b"a clip")
    return MediaFile(path=str(folder / name))


def frames(file: MediaFile, limits: VideoLimits) -> int:
    with open_video(file, "pyav", limits=limits) as video:
        items = video.frames(SPEC, 4)
    assert {int(np.asarray(decode(item)).mean()) for item in items} == {77}
    return len(items)


@pytest.mark.slow
@pytest.mark.parametrize("when", ["open", "read"])
@pytest.mark.parametrize(
    ("what", "code"),
    [
        ("hang", "video_timeout"),
        ("spin", "video_timeout"),
        ("crash", "media_crash"),
        ("exit", "media_crash"),
        ("eat", "video_memory"),
        ("share", "video_memory"),
        ("ask", "video_memory"),
        ("raise", "video_broken"),
    ],
)
def test_a_clip_that_misbehaves_costs_itself_alone(clips: Path, when: str, what: str, code: str) -> None:
    limits = VideoLimits(timeout=1.0 if code == "video_timeout" else 60.0, memory=256)
    good = clip(clips, "read-well.mp4")
    assert frames(good, limits) == 4
    with pytest.raises(DataError, match=rf"^{code}: .*{when}-{what}\.mp4"):
        frames(clip(clips, f"{when}-{what}.mp4"), limits)
    assert frames(good, limits) == 4


def test_videos_open_at_once_survive_the_loss_of_their_process(clips: Path) -> None:
    limits = VideoLimits(memory=256)
    with open_video(clip(clips, "read-well.mp4"), "pyav", limits=limits) as good:
        with open_video(clip(clips, "read-exit.mp4"), "pyav", limits=limits) as bad:
            assert (good.count(SPEC, 8), bad.count(SPEC, 8)) == (4, 4)
            with pytest.raises(DataError, match="media_crash"):
                bad.frames(SPEC, 4)
        assert len(good.frames(SPEC, 4)) == 4


def test_each_thread_has_a_process_of_its_own(clips: Path) -> None:
    """A server's threads read videos at once: one that takes long holds up no other, and a clip may change hands."""
    limits = VideoLimits()
    found: list[tuple[int, int]] = []

    with open_video(clip(clips, "open-fine.mp4"), "pyav") as video:
        numbers = video.plan(SPEC, 4)

        def read() -> None:
            found.append((decoder.child(limits).pid, len(video.frames_at(SPEC, numbers))))
            video.close()

        thread = threading.Thread(target=read)
        thread.start()
        thread.join()
        assert len(video.frames_at(SPEC, numbers)) == len(numbers)
    ((pid, count),) = found
    assert count == len(numbers) > 0
    assert pid != decoder.child(limits).pid
    psutil.Process(pid).wait(timeout=60)  # it ends with its thread


def test_the_time_limit_is_on_each_pass_through_a_clip(clips: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, ask, left = itertools.count(step=40), decoder.ask, []
    monkeypatch.setattr(child_video, "time", SimpleNamespace(monotonic=lambda: next(clock)))

    def asked(name: str, limits: VideoLimits, seconds: float, message: dict[str, Any], blobs: Any = ()) -> Any:
        left.append((message["do"], seconds))
        return ask(name, limits, 60.0, message, blobs)

    monkeypatch.setattr(decoder, "ask", asked)
    with open_video(clip(clips, "read-well.mp4"), "pyav", limits=VideoLimits(timeout=100.0, memory=256)) as video:
        video.plan(SPEC, 4)
        for number in (0, 2, 3, 1):
            video.frames_at(SPEC, [number])
    reading = [("frames", seconds) for seconds in (100.0, 60.0, 20.0, 100.0)]
    assert left[:-1] == [("open", 100.0), ("plan", 60.0), *reading]


def test_one_process_serves_clip_after_clip(clips: Path) -> None:
    limits = VideoLimits(memory=256)
    pids = set()
    for _ in range(3):
        assert frames(clip(clips, "read-well.mp4"), limits) == 4
        pids.add(decoder.child(limits).pid)
    assert len(pids) == 1


def test_a_forked_copy_of_the_process_gets_its_own(clips: Path) -> None:
    limits = VideoLimits(memory=256)
    assert frames(clip(clips, "read-well.mp4"), limits) == 4
    ours = decoder.child(limits).pid
    reader, writer = os.pipe()
    copy = os.fork()
    if not copy:
        frames(clip(clips, "read-well.mp4"), limits)
        os.write(writer, str(decoder.child(limits).pid).encode())
        decoder.stop()
        os._exit(0)
    os.close(writer)
    assert os.waitpid(copy, 0)[1] == 0
    with os.fdopen(reader) as told:
        assert int(told.read()) != ours
    assert frames(clip(clips, "read-well.mp4"), limits) == 4
    assert decoder.child(limits).pid == ours


@pytest.mark.slow
@pytest.mark.parametrize("what", ["hang", "spin"])
def test_the_child_dies_with_its_parent(clips: Path, what: str) -> None:
    """Also while it decodes; where it never gives Python its turn, by the kernel's clock."""
    file = clip(clips, f"read-{what}.mp4")
    seconds = 600 if what == "hang" else 0.2
    script = (
        f"import sys; sys.path[:0] = [{str(clips / 'modules')!r}]\n"
        "import threading\n"
        "from megatron_vita.data.sample import MediaFile\n"
        "from megatron_vita.data.spec import PreprocessSpec\n"
        "from megatron_vita.data.media.video.open import VideoLimits, open_video\n"
        "from megatron_vita.data.media.video.worker import decoder\n"
        f"limits = VideoLimits(timeout={seconds}, memory=256)\n"
        f"video = open_video(MediaFile(path={file.path!r}), 'pyav', limits=limits)\n"
        "print(decoder.child(limits).pid, flush=True)\n"
        "decoder._lose = lambda *_: threading.Event().wait()\n"
        "video.frames(PreprocessSpec(image_size=16, patch_size=4), 4)\n"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = psutil.Process(int(parent.stdout.readline()))
        parent.send_signal(signal.SIGKILL)
    psutil.wait_procs([child], timeout=60)
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE


def test_limits_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ConfigError, match="--video-timeout"):
        VideoLimits(timeout=0)
    with pytest.raises(ConfigError, match="--video-memory"):
        VideoLimits(memory=8)


def test_a_process_whose_parent_is_gone_before_it_is_ready_says_nothing() -> None:
    ours, theirs = socket.socketpair()
    ours.close()
    script = f"from megatron_vita.data.media.video.child import main; main({theirs.fileno()}, 256)"
    with theirs:
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", script], pass_fds=[theirs.fileno()], capture_output=True, timeout=60,
            cwd=Path(__file__).parents[3],
        )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, b"")
