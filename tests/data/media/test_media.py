"""Media from strangers: every kind of picture, and everything that may be wrong with a file."""

from __future__ import annotations

import io
import os
import struct
import weakref
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as Pil

from megatron_vita.data.media.image import MAX_PIXELS, decode, read_image
from megatron_vita.data.media.names import locate
from megatron_vita.data.media.open import read_items
from megatron_vita.data.media.tiling import plan_tiles, render_tiles
from megatron_vita.data.media.video import clip as video_file
from megatron_vita.data.media.video.choice import count_frames, sample_frames
from megatron_vita.data.media.video.decode import natural_key
from megatron_vita.data.media.video.open import open_video
from megatron_vita.data.sample import Image, MediaFile, Message, Sample, Text, Video
from megatron_vita.data.spec import PreprocessSpec
from megatron_vita.errors import DataError
from tests.data.kit import picture

SPEC = PreprocessSpec(image_size=16, patch_size=4, max_frames=8)


def rejected(data: bytes, verify: str = "structure") -> str:
    with pytest.raises(DataError) as error:
        read_image(MediaFile(data=data), verify=verify)
    return str(error.value).partition(":")[0]


def test_all_eight_orientations() -> None:
    upright = np.zeros((20, 30, 3), dtype=np.uint8)
    upright[:10, :10] = 255
    undo = {2: "h", 3: "180", 4: "v", 5: "t", 6: "90", 7: "tv", 8: "270"}
    lay = {
        "h": lambda a: a[:, ::-1],
        "180": lambda a: a[::-1, ::-1],
        "v": lambda a: a[::-1],
        "t": lambda a: a.transpose(1, 0, 2),
        "90": lambda a: np.rot90(a, 1),
        "tv": lambda a: a[::-1, ::-1].transpose(1, 0, 2),
        "270": lambda a: np.rot90(a, -1),
    }
    for orientation in range(1, 9):
        stored = upright if orientation == 1 else lay[undo[orientation]](upright)
        for kind in ("JPEG", "PNG", "WEBP", "TIFF"):
            exif = Pil.Exif()
            exif[0x0112] = orientation
            buffer = io.BytesIO()
            options = {"quality": 95} if kind == "JPEG" else {"lossless": True} if kind == "WEBP" else {}
            Pil.fromarray(np.ascontiguousarray(stored)).save(buffer, kind, exif=exif, **options)
            item = read_image(MediaFile(data=buffer.getvalue()))
            assert (item.width, item.height) == (30, 20), (kind, orientation)
            pixels = np.asarray(decode(item)).astype(int)
            assert np.abs(pixels - upright).mean() < 3, (kind, orientation)


def test_sixteen_bit_grey_is_scaled() -> None:
    values = np.linspace(0, 65535, 64).reshape(8, 8).astype(np.uint16)
    buffer = io.BytesIO()
    Pil.fromarray(values).save(buffer, "PNG")
    pixels = np.asarray(decode(read_image(MediaFile(data=buffer.getvalue()))))
    assert np.array_equal(pixels[:, :, 1], np.rint(values / 257).astype(np.uint8))


def test_animation_gives_its_first_picture() -> None:
    frames = [Pil.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    for kind in ("GIF", "WEBP", "PNG"):
        buffer = io.BytesIO()
        frames[0].save(buffer, kind, save_all=True, append_images=frames[1:], lossless=True)
        red, _, blue = np.asarray(decode(read_image(MediaFile(data=buffer.getvalue()))))[4, 4]
        assert red > 200
        assert blue < 50


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_truncated_files_are_refused_without_decoding(kind: str) -> None:
    data = picture(80, 60, kind=kind)
    assert read_image(MediaFile(data=data)).width == 80
    assert rejected(data[: len(data) * 3 // 5]) in ("media_truncated", "media_broken")
    assert rejected(data[: len(data) * 3 // 5], "decode") in ("media_truncated", "media_broken")


def test_damaged_files_are_refused() -> None:
    assert rejected(b"") == "media_broken"
    assert rejected(b"<html>not found</html>") == "media_broken"
    assert rejected(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n") == "media_broken"
    png = bytearray(picture(40, 40))
    png[len(png) // 2] ^= 4
    assert rejected(bytes(png)) == "media_broken"
    jpeg = picture(80, 60, kind="JPEG")
    assert rejected(jpeg[:-2]) == "media_truncated"
    for cut in (picture(40, 30)[:-20], picture(80, 60, kind="JPEG")[:-2]):  # what decodes need not be whole
        assert rejected(cut, "decode") == "media_truncated"


def bomb(width: int, height: int) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = zlib.compress(bytes(1000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def test_bombs_and_impossible_shapes_are_refused_unread() -> None:
    assert rejected(bomb(20000, 15000)) == "media_bomb"
    assert rejected(bomb(10000, MAX_PIXELS // 10000 + 1)) == "media_bomb"
    assert rejected(bomb(0, 5)) == "media_size"


@pytest.mark.parametrize("size", [(1, 1), (1, 1500), (1500, 1), (9000, 1), (3, 1)])
def test_lines_and_dots_are_pictures_as_for_stock_processors(size: tuple[int, int]) -> None:
    item = read_image(MediaFile(data=picture(*size)), verify="decode")
    slots = plan_tiles(item, 0, SPEC)
    assert len(slots) == {(1, 1): 1, (3, 1): 4}.get(size, 13)
    assert render_tiles(item, slots, SPEC).shape == (len(slots), 3, 16, 16)


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from(["JPEG", "PNG", "WEBP", "GIF"]),
    st.lists(st.tuples(st.floats(0, 0.999), st.integers(0, 255)), min_size=1, max_size=6),
)
def test_flipped_bytes_never_crash(kind: str, changes: list[tuple[float, int]]) -> None:
    data = bytearray(picture(24, 16, kind=kind))
    for place, value in changes:
        data[int(place * len(data))] = value
    try:
        item = read_image(MediaFile(data=bytes(data)))
        assert decode(item).size == (item.width, item.height)
    except DataError:
        pass


def test_paths_stay_under_the_root(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (root / "a.png").write_bytes(b"x")
    (tmp_path / "secret.png").write_bytes(b"x")
    os.symlink(tmp_path / "secret.png", root / "link.png")
    (tmp_path / "root2").mkdir()
    real = os.path.realpath(root)
    for path in ("a.png", f"{real}/a.png", "./a.png", "sub/../a.png"):
        assert locate(real, path) == f"{real}/a.png"
    for path in ("../secret.png", str(tmp_path / "secret.png"), "link.png", "../root2", "/etc/passwd"):
        with pytest.raises(DataError, match="path_escape"):
            locate(real, path)
    for path in ("a\0.png", "\udc80\ud800.png"):
        with pytest.raises(DataError, match="media_missing"):
            locate(real, path)
    assert locate(real, "b.png") is None


# ---------------------------------------------------------------------------------------------------- videos


@given(st.integers(1, 5000), st.integers(1, 600))
def test_sampling_covers_the_whole_clip(total: int, wanted: int) -> None:
    count = min(total, wanted)
    frames = sample_frames(total, count)
    assert len(set(frames)) == count
    assert frames == sorted(frames)
    assert frames[0] >= 0
    assert frames[-1] < total
    if count > 1:
        assert (frames[0], frames[-1]) == (0, total - 1)
        steps = np.diff(frames)
        assert steps.max() - steps.min() <= 1
    if count == total:
        assert frames == list(range(total))


def test_frame_counts() -> None:
    assert count_frames(64, 1.0, 64, 1.0) == 64
    assert count_frames(300, 29.97, 64, 1.0) == 10
    assert count_frames(300, 30.0, 4, 1.0) == 4
    assert count_frames(5, 30.0, 4, 1.0) == 1
    assert count_frames(5, 0.0, 64, 1.0) == 5


def make_video(path: Path, greys: list[int], side: tuple[int, int] = (32, 32), rate: int = 1) -> Path:
    av = pytest.importorskip("av")
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=rate, options={"crf": "5", "x264-params": "keyint=7"})
        stream.width, stream.height = side
        stream.pix_fmt = "yuv420p"
        for grey in greys:
            frame = np.full((side[1], side[0]), grey, dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="gray")))
        container.mux(stream.encode())
    return path


@pytest.mark.parametrize("backend", ["auto", "decord", "pyav"])
def test_frames_are_the_right_ones(tmp_path: Path, backend: str) -> None:
    greys = [int(g) for g in np.linspace(20, 235, 23)]
    path = make_video(tmp_path / "v.mp4", greys, side=(64, 32), rate=2)
    for file in (MediaFile(path=str(path)), MediaFile(data=path.read_bytes())):
        with open_video(file, backend) as video:
            assert (video.total, video.fps) == (23, 2.0)
            items = video.frames(SPEC, 8)
        assert len(items) == 8
        expected = [greys[number] for number in sample_frames(23, 8)]
        assert [int(np.asarray(decode(item)).mean()) for item in items] == pytest.approx(expected, abs=5)
        assert {(item.width, item.height, item.frame) for item in items} == {(16, 16, True)}


def test_narrow_videos_are_right(tmp_path: Path) -> None:
    path = make_video(tmp_path / "v.mp4", [30, 90, 150], side=(16, 16))
    with open_video(MediaFile(path=str(path))) as video:
        assert [int(np.asarray(decode(item)).mean()) for item in video.frames(SPEC, 8)] == pytest.approx(
            [30, 90, 150], abs=5
        )


def test_folder_of_frames(tmp_path: Path) -> None:
    for number in range(12):
        Pil.new("RGB", (16, 16), (number * 20,) * 3).save(tmp_path / f"frame{number}.png")
    (tmp_path / "notes.txt").write_text("x")
    os.symlink("/etc/hostname", tmp_path / "frame99.png")
    with open_video(MediaFile(path=str(tmp_path))) as video:
        assert video.total == 12
        means = [int(np.asarray(decode(item)).mean()) for item in video.frames(SPEC, 12)]
    assert means == [number * 20 for number in range(12)]
    assert sorted(["f10", "f9", "f1a"], key=natural_key) == ["f1a", "f9", "f10"]


def test_every_picture_of_a_folder_is_a_frame(tmp_path: Path) -> None:
    for number, suffix in enumerate(("png", "webp", "jpg", "bmp", "tif", "ppm", "tiff", "jpeg")):
        Pil.new("RGB", (16, 16), (number * 20,) * 3).save(tmp_path / f"{number:03}.{suffix}")
    with open_video(MediaFile(path=str(tmp_path))) as video:
        means = [np.asarray(decode(item)).mean() for item in video.frames(SPEC, 8)]
    assert means == pytest.approx([number * 20 for number in range(8)], abs=2)
    for name in ("004b.gif", "004b.HEIC"):
        (tmp_path / name).write_bytes(b"a picture")
        with pytest.raises(DataError, match=f"^video_broken: .*{name} is no frame"):
            open_video(MediaFile(path=str(tmp_path)))
        (tmp_path / name).unlink()


def test_broken_videos_are_data_errors(tmp_path: Path) -> None:
    whole = make_video(tmp_path / "v.mp4", [20, 200] * 10).read_bytes()
    for data in (b"", b"text" * 99, whole[: len(whole) // 2], whole[:500] + bytes(len(whole) - 500)):
        with pytest.raises(DataError, match="video_broken"), open_video(MediaFile(data=data)) as video:
            video.frames(SPEC, 8)
    with pytest.raises(DataError, match="media_missing"):
        open_video(MediaFile(path=str(tmp_path / "none.mp4")))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="video_broken"):
        open_video(MediaFile(path=str(tmp_path / "empty")))


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["decord", "pyav"])
def test_a_long_video_is_not_held_whole(tmp_path: Path, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make_video(tmp_path / "v.mp4", [index * 3 for index in range(80)])
    pictures: list[weakref.ref[Pil.Image]] = []
    most = 0

    def watched(picture: Pil.Image, spec: PreprocessSpec) -> Pil.Image:
        nonlocal most
        pictures.append(weakref.ref(picture))
        most = max(most, sum(one() is not None for one in pictures))
        return picture.copy()

    monkeypatch.setattr(video_file, "shrink_frame", watched)
    with open_video(MediaFile(path=str(path)), backend, limits=None) as video:
        items = video.frames(PreprocessSpec(image_size=16, patch_size=4, max_frames=80, max_fps=9), 80)
    assert len(items) == len(pictures) == 80
    assert most <= 17
    means = [float(np.asarray(decode(item)).mean()) for item in items]
    assert means == sorted(means)


@pytest.mark.parametrize("backend", ["decord", "pyav"])
def test_videos_of_enormous_frames_are_refused(tmp_path: Path, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make_video(tmp_path / "v.mp4", [20] * 3)
    monkeypatch.setattr(video_file, "MAX_PIXELS", 32 * 31)
    with (
        pytest.raises(DataError, match="media_bomb"),
        open_video(MediaFile(path=str(path)), backend, limits=None) as video,
    ):
        video.frames(SPEC, 8)


@pytest.mark.parametrize("backend", ["auto", "pyav"])
def test_playlists_are_refused_for_they_lead_out_of_the_media_root(tmp_path: Path, backend: str) -> None:
    secret = make_video(tmp_path / "secret.ts", [20] * 3)
    hls = f"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:3,\n{secret}\n#EXT-X-ENDLIST\n"
    for name, text in (("a.m3u8", hls), ("a.mp4", hls), ("b.mp4", "ffconcat version 1.0\nfile secret.ts\n")):
        path = tmp_path / "root" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        with pytest.raises(DataError, match=r"video_broken: .*playlist"):
            open_video(MediaFile(path=str(path)), backend)


def test_read_items(tmp_path: Path) -> None:
    path = make_video(tmp_path / "v.mp4", [20] * 12)
    (tmp_path / "p.png").write_bytes(picture(30, 20))
    turn = Message("user", (Image(0), Video(0), Text("x")))
    sample = Sample((turn,), (MediaFile(path=str(tmp_path / "p.png")),), (MediaFile(path=str(path)),))
    images, videos = read_items(sample, SPEC)
    assert (images[0].width, images[0].height, len(videos[0])) == (30, 20, 8)
    assert len(read_items(sample, SPEC, max_frames=3)[1][0]) == 3
