"""Videos as a player shows them: turned, with square pixels, cropped, and the stream that a player takes."""

from __future__ import annotations

import contextlib
import struct
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from megatron_vita.data.media.image import decode
from megatron_vita.data.media.video.open import VideoLimits, open_video
from megatron_vita.data.sample import MediaFile
from megatron_vita.data.spec import PreprocessSpec
from megatron_vita.errors import DataError
from tests.data.media.clips import ALL, FRAMES, GOOD, X264, clip, sample, shown
from tests.data.videos import SIDE, numbered, write_numbered, write_sound

# ------------------------------------------------------------------------------------------------ how it is shown

UPRIGHT = {
    (0.0, False, False): lambda a: a,
    (0.0, True, False): lambda a: a[:, ::-1],
    (0.0, False, True): lambda a: a[::-1],
    (180.0, False, False): lambda a: a[::-1, ::-1],
    (90.0, False, False): lambda a: np.rot90(a, 1),
    (-90.0, False, False): lambda a: np.rot90(a, -1),
    (90.0, True, False): lambda a: np.rot90(a[:, ::-1], 1),
    (90.0, False, True): lambda a: np.rot90(a[::-1], 1),
}


@pytest.mark.parametrize("suffix", ["mp4", "mov", "mkv"])
@pytest.mark.parametrize("rotation", UPRIGHT)
def test_all_eight_orientations(tmp_path: Path, suffix: str, rotation: tuple[float, bool, bool]) -> None:
    path = write_numbered(tmp_path / f"a.{suffix}", 2, options=X264, rotation=rotation)
    with open_video(MediaFile(path=str(path)), limits=None) as video:
        first, _ = (np.asarray(decode(item)).astype(int) for item in video.frames(ALL, 2))
    with open_video(
        MediaFile(path=str(write_numbered(tmp_path / f"b.{suffix}", 2, options=X264))), limits=None
    ) as video:
        lying = np.asarray(decode(video.frames(ALL, 2)[0])).astype(int)
    wanted = UPRIGHT[rotation](lying)
    assert first.shape == wanted.shape
    assert np.abs(first - wanted).mean() < 3


@pytest.mark.parametrize(("aspect", "size"), [((2, 1), (192, 64)), ((1, 2), (48, 64)), ((12, 11), (105, 64))])
@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.mpg", "a.avi"])
def test_pixels_are_made_square(tmp_path: Path, name: str, aspect: tuple[int, int], size: tuple[int, int]) -> None:
    codec = "libx264" if name[-3:] in ("mp4", "mkv", "avi") else "mpeg2video"
    if codec == "mpeg2video" and aspect != (2, 1):
        pytest.skip("MPEG-2 knows few shapes")
    path = write_numbered(
        tmp_path / name, 4, codec=codec, aspect=Fraction(*aspect), options=X264 if codec == "libx264" else GOOD
    )
    with open_video(MediaFile(path=str(path)), limits=None) as video:
        items = video.frames(PreprocessSpec(image_size=448, max_fps=1000), 4)
    assert {(item.width, item.height) for item in items} == {size} or codec == "mpeg2video"
    assert shown(items)[0] == [0, 1, 2, 3]


def test_a_container_crops(tmp_path: Path) -> None:
    """Matroska's PixelCropTop and PixelCropLeft."""
    path = write_numbered(tmp_path / "a.mkv", 3, options=X264)
    segment, tracks, track, picture = b"\x18\x53\x80\x67", b"\x16\x54\xae\x6b", b"\xae", b"\xe0"
    crop = b"\x54\xbb\x81\x10" + b"\x54\xcc\x81\x18"  # 16 rows, 24 columns
    path.write_bytes(grown(path.read_bytes(), [segment, tracks, track, picture], crop))
    with open_video(MediaFile(path=str(path)), limits=None) as video:
        (item,) = video.frames(ALL, 1)
    assert (item.width, item.height) == (SIDE[0] - 24, SIDE[1] - 16)
    wanted = numbered(1)[16:, 24:].astype(int)
    assert np.abs(np.asarray(decode(item)).astype(int) - wanted).mean() < 6


def test_a_clean_aperture_crops(tmp_path: Path) -> None:
    """MP4's and MOV's `clap`: 64 of 96 columns, 48 of 64 rows, in the middle."""
    for suffix in ("mp4", "mov"):
        path = write_numbered(tmp_path / f"a.{suffix}", 3, options=X264)
        data, place, sizes = bytearray(path.read_bytes()), 0, []
        for name in (b"moov", b"trak", b"mdia", b"minf", b"stbl", b"stsd", b"avc1"):
            place = data.index(name, place) + 4
            sizes.append(place - 8)
        end = sizes[-1] + int.from_bytes(data[sizes[-1] : sizes[-1] + 4], "big")
        box = struct.pack(">I4s8i", 40, b"clap", 64, 1, 48, 1, 0, 1, 0, 1)
        for at in sizes:
            data[at : at + 4] = (int.from_bytes(data[at : at + 4], "big") + len(box)).to_bytes(4, "big")
        data[end:end] = box
        path.write_bytes(data)
        with open_video(MediaFile(path=str(path)), limits=None) as video:
            (item,) = video.frames(ALL, 1)
        assert (item.width, item.height) == (64, 48)
        wanted = numbered(1)[8:56, 16:80].astype(int)
        assert np.abs(np.asarray(decode(item)).astype(int) - wanted).mean() < 6


@pytest.mark.parametrize("matrix", ["bt709", "smpte170m"])
@pytest.mark.parametrize("span", ["tv", "pc"])
def test_colours_are_those_of_the_stream(tmp_path: Path, matrix: str, span: str) -> None:
    """A red encoded by either matrix and in either range is that red."""
    av = pytest.importorskip("av")
    weights = {"bt709": (0.2126, 0.0722), "smpte170m": (0.299, 0.114)}[matrix]
    red = np.array([200.0, 30.0, 40.0])
    luma = weights[0] * red[0] + (1 - sum(weights)) * red[1] + weights[1] * red[2]
    chroma = (red[2] - luma) / (2 - 2 * weights[1]), (red[0] - luma) / (2 - 2 * weights[0])
    scale, base, wide = (219 / 255, 16, 224 / 255) if span == "tv" else (1.0, 0, 1.0)
    planes = np.empty((64 + 32, 96), np.uint8)
    planes[:64] = round(base + luma * scale)
    planes[64:80], planes[80:] = (round(128 + part * wide) for part in chroma)
    with av.open(str(tmp_path / "a.mp4"), "w") as out:
        options = {"qp": "1", "x264-params": f"colormatrix={matrix}:fullrange={'on' if span == 'pc' else 'off'}"}
        stream = out.add_stream("libx264", rate=25, options=options)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        for _ in range(3):
            out.mux(stream.encode(av.VideoFrame.from_ndarray(planes, format="yuv420p")))
        out.mux(stream.encode())
    with open_video(MediaFile(path=str(tmp_path / "a.mp4")), limits=None) as video:
        (item,) = video.frames(ALL, 1)
    assert np.abs(np.asarray(decode(item)).astype(float) - red).max() < 5


def grown(data: bytes, path: list[bytes], more: bytes) -> bytes:
    """An EBML file with something put at the end of the element that a path leads to."""
    out, start, end, sizes = bytearray(data), 0, len(data), []
    for name in path:
        place = start
        while True:
            at = place + 9 - out[place].bit_length()
            width = 9 - out[at].bit_length()
            size = int.from_bytes(out[at : at + width], "big") & ((1 << 7 * width) - 1)
            if bytes(out[place:at]) == name:
                break
            place = at + width + size
        sizes.append((at, width, size))
        start, end = at + width, at + width + size
    for at, width, size in sizes:
        out[at : at + width] = ((size + len(more)) | (1 << 7 * width)).to_bytes(width, "big")
    out[end:end] = more
    return bytes(out)


# ---------------------------------------------------------------------------------------------------- which stream


def mux(path: Path, streams: list[tuple[Path, int]]) -> Path:
    """Streams of several files in one: (file, disposition)."""
    av = pytest.importorskip("av")
    with contextlib.ExitStack() as stack:
        opened = [(stack.enter_context(av.open(str(file))), role) for file, role in streams]
        out = stack.enter_context(av.open(str(path), "w"))
        pairs = []
        for source, role in opened:
            given = (source.streams.video or source.streams.audio)[0]
            stream = out.add_stream_from_template(given)
            stream.disposition = role
            pairs.append((source, given, stream))
        for source, given, stream in pairs:
            for packet in source.demux(given):
                if packet.dts is not None:
                    packet.stream = stream
                    out.mux(packet)
    return path


def test_cover_pictures_are_no_videos_and_the_default_stream_is_played(clips: Path, tmp_path: Path) -> None:
    from av.stream import Disposition

    film = Path(str(clip(clips, "h264.mp4").path))
    cover = write_numbered(tmp_path / "cover.mp4", 1, codec="mjpeg", pix_fmt="yuvj420p", side=(480, 320))
    other = write_numbered(tmp_path / "other.mp4", 9, options=X264, side=(128, 96))
    sound = write_sound(tmp_path / "sound.mp4")
    attached, default, none = Disposition.attached_pic, Disposition.default, Disposition(0)
    for suffix in ("mp4", "mkv"):
        if suffix == "mp4":
            path = mux(tmp_path / "covered.mp4", [(cover, attached), (film, default)])
            with open_video(MediaFile(path=str(path)), limits=None) as video:
                assert shown(video.frames(ALL, 5))[0] == sample(FRAMES, 5)
            only = mux(tmp_path / "only.mp4", [(sound, default), (cover, attached)])
            with pytest.raises(DataError, match=r"^video_broken: .*only a cover picture"):
                open_video(MediaFile(path=str(only)), limits=None)
        for number, (roles, total) in enumerate([((default, none), FRAMES), ((none, default), 9)]):
            path = mux(tmp_path / f"two{number}.{suffix}", [(film, roles[0]), (other, roles[1])])
            with open_video(MediaFile(path=str(path)), limits=None) as video:
                assert video.total == total


@pytest.mark.parametrize(
    ("name", "was", "now"),
    [
        ("h264.mp4", b"avc1", b"avs3"),
        ("mpeg4.avi", b"FMP4", b"ZQXJ"),
        ("hevc-open.mkv", b"V_MPEGH/ISO/HEVC", b"V_UNKNOWN/ISO/XX"),
    ],
)
def test_a_stream_without_decoder_is_rejected_by_name(clips: Path, name: str, was: bytes, now: bytes) -> None:
    data = Path(str(clip(clips, name).path)).read_bytes()
    assert was in data
    for limits in (None, VideoLimits()):
        with pytest.raises(DataError, match=r"^video_codec: .*no decoder for its video") as error:
            open_video(MediaFile(data=data.replace(was, now)), limits=limits)
        if len(now) == 4:
            assert now.decode() in str(error.value)
