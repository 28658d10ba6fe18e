"""Media stores: an archive is looked into as if it had been unpacked, and never believed."""

from __future__ import annotations

import io
import os
import struct
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from megatron_vita.data.media.video.open import open_video
from megatron_vita.data.sample import MediaFile
from megatron_vita.data.sources.media_store import archive_media, zips
from megatron_vita.data.sources.media_store import compressed as packed
from megatron_vita.data.sources.media_store import store as stores
from megatron_vita.data.sources.media_store.index import Table, TableBuilder, key_of
from megatron_vita.data.sources.media_store.store import MediaRule, list_archives, open_store, prepare
from megatron_vita.data.spec import PreprocessSpec
from megatron_vita.errors import ConfigError, DataError
from tests.data.sources.test_readers import PACK, tar_of, zip_of


def content(file: MediaFile) -> bytes:
    if file.data is not None:
        return file.data
    assert file.path is not None
    data = Path(file.path).read_bytes()
    return data if file.size is None else data[file.offset : file.offset + file.size]


def store(root: Path, **rule: Any) -> stores.MediaStore:
    rule.setdefault("archives", list_archives(root))
    return open_store(MediaRule(root=root, **rule), root / ".work")


def rejected(one: stores.MediaStore, reference: str) -> str:
    with pytest.raises(DataError) as caught:
        one.find(reference)
    return str(caught.value).partition(":")[0]


FORMS = {
    "x.zip": zip_of,
    "x.stored.zip": lambda files: zip_of(files, zipfile.ZIP_STORED),
    "x.tar": tar_of,
    "x.tar.gz": lambda files: PACK["gz"](tar_of(files)),
    "x.tar.zst": lambda files: PACK["zst"](tar_of(files)),
    "x.txz": lambda files: PACK["xz"](tar_of(files)),
    "x.tar.bz2": lambda files: PACK["bz2"](tar_of(files)),
}
PART = st.text("abé +(,)", min_size=1, max_size=4).filter(lambda text: text.strip(" .") == text)
TREES = st.dictionaries(
    st.lists(PART, min_size=1, max_size=3).map("/".join), st.binary(max_size=40), max_size=8
).filter(lambda tree: not any(other.startswith(name + "/") for name in tree for other in tree))


@settings(deadline=None, max_examples=30)
@given(
    tree=TREES.filter(bool),
    form=st.sampled_from(sorted(FORMS)),
    dotted=st.booleans(),
    folder=st.sampled_from(["", "p", "p/q"]),
)
def test_lookups_equal_a_real_unpack(
    tmp_path_factory: pytest.TempPathFactory, tree: dict[str, bytes], form: str, dotted: bool, folder: str
) -> None:
    root = tmp_path_factory.mktemp("root")
    (root / folder).mkdir(parents=True, exist_ok=True)
    archive = root / folder / form
    archive.write_bytes(FORMS[form]({("./" if dotted else "") + name: data for name, data in tree.items()}))
    looked = store(root)
    real = tmp_path_factory.mktemp("real")
    with zipfile.ZipFile(archive) if form.endswith("zip") else _opened_tar(archive) as opened:
        opened.extractall(real)
    unpacked = {str(path.relative_to(real)): path.read_bytes() for path in real.rglob("*") if path.is_file()}
    assert unpacked == tree
    parts = folder.split("/") if folder else []
    for name, data in tree.items():
        for above in range(len(parts) + 1):  # unpacked in its own folder, or in one above
            reference = "/".join([*parts[:above], name])
            assert content(looked.find(reference)) == data
            assert content(looked.find(str(root / reference))) == data
        assert rejected(looked, name + "x") == "media_missing"
        assert rejected(looked, "elsewhere/" + name) == "media_missing"


def _opened_tar(path: Path) -> tarfile.TarFile:
    if path.name.endswith("zst"):
        return tarfile.open(fileobj=io.BytesIO(packed.peek(path, 1 << 30)))
    return tarfile.open(path)


def test_files_on_disk_win_and_several_archives_are_one(tmp_path: Path) -> None:
    folder = tmp_path / "laion/chunks"
    folder.mkdir(parents=True)
    for n in range(11):
        (folder / f"images_{n}.zip").write_bytes(zip_of({f"images/{n}.jpg": b"%d" % n, "images/same.jpg": b"same"}))
    (tmp_path / "laion/images").mkdir()
    (tmp_path / "laion/images/3.jpg").write_bytes(b"disk")
    one = store(tmp_path)
    assert [path.name for path in list_archives(tmp_path)[:3]] == ["images_0.zip", "images_1.zip", "images_2.zip"]
    assert content(one.find("laion/images/10.jpg")) == b"10"
    assert content(one.find("laion/images/3.jpg")) == b"disk"
    assert content(one.find("laion/chunks/images/3.jpg")) == b"3"
    assert content(one.find("laion/images/same.jpg")) == b"same"
    (folder / "more.zip").write_bytes(zip_of({"images/same.jpg": b"else", "images/0.jpg": b"00"}))
    assert rejected(store(tmp_path), "laion/images/same.jpg") == "media_ambiguous"
    assert rejected(store(tmp_path), "laion/images/0.jpg") == "media_ambiguous"
    assert content(store(tmp_path).find("laion/images/1.jpg")) == b"1"


def test_an_archive_counts_in_its_own_folder_and_above_alone(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.tar").write_bytes(tar_of({f"{name}.jpg": b"x"}))
    one = store(tmp_path)
    for reference in ("a/a.jpg", "b/b.jpg", "a.jpg", "b.jpg"):
        assert content(one.find(reference)) == b"x"
    for reference in ("a/b.jpg", "b/a.jpg"):
        assert rejected(one, reference) == "media_missing"


def test_split_archives_are_joined(tmp_path: Path) -> None:
    data = FORMS["x.tar.gz"]({f"images/{n}.jpg": os.urandom(3000) for n in range(9)} | {"images/a.jpg": b"a"})
    for part, at in zip(("aa", "ab", "ac"), (0, 9000, 18000), strict=True):
        end = len(data) if part == "ac" else at + 9000
        (tmp_path / f"images.tar.gz.{part}").write_bytes(data[at:end])
    assert [path.name for path in list_archives(tmp_path)] == ["images.tar.gz.aa"]
    assert content(store(tmp_path, rewrite=(("Comic/", ""),)).find("Comic/images/a.jpg")) == b"a"
    (tmp_path / "images.tar.gz.ab").rename(tmp_path / "gone")
    with pytest.raises(ConfigError, match=r"between images\.tar\.gz\.aa and images\.tar\.gz\.ac"):
        prepare(MediaRule(root=tmp_path, archives=list_archives(tmp_path)), tmp_path / ".w2")
    (tmp_path / "images.tar.gz.ac").unlink()
    with pytest.raises(ConfigError, match=r"images\.tar\.gz\.aa: .*ends early"):
        prepare(MediaRule(root=tmp_path, archives=list_archives(tmp_path)), tmp_path / ".w2")


# ---------------------------------------------------------------------------------------------------- hostile archives


def hostile_tar(extra: list[tarfile.TarInfo]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for info in [tarfile.TarInfo("good/1.jpg"), *extra, tarfile.TarInfo("good/2.jpg")]:
            info.size = 4 if info.type == tarfile.REGTYPE else 0
            tar.addfile(info, io.BytesIO(b"evil" if info in extra else b"good"))
    return out.getvalue()


def member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info


def test_hostile_members_of_a_tar(tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"secret")
    root = tmp_path / "root"
    root.mkdir()
    members = [
        member("/etc/passwd"),
        member("../up.jpg"),
        member("good/../good/1.jpg"),  # must not take the place of the good one
        member("good/link.jpg", tarfile.SYMTYPE, "../../secret"),
        member("good/hard.jpg", tarfile.LNKTYPE, "good/1.jpg"),
        member("good/dev.jpg", tarfile.CHRTYPE),
        member("good/pipe.jpg", tarfile.FIFOTYPE),
    ]
    (root / "x.tar").write_bytes(hostile_tar(members))
    one = store(root)
    assert content(one.find("good/1.jpg")) == content(one.find("good/2.jpg")) == b"good"
    for reference, code in (
        ("etc/passwd", "path_escape"),
        ("/etc/passwd", "path_escape"),
        ("../up.jpg", "path_escape"),
        ("up.jpg", "path_escape"),
        ("good/link.jpg", "path_escape"),
        ("good/hard.jpg", "path_escape"),
        ("good/dev.jpg", "media_broken"),
        ("good/pipe.jpg", "media_broken"),
        ("good/\0.jpg", "media_missing"),
        ("good/\ud800.jpg", "media_missing"),
        ("x" * 5000, "media_missing"),
        ("good", "media_missing"),
    ):
        assert rejected(one, reference) == code, reference


def test_members_of_one_name_that_differ_are_refused(tmp_path: Path) -> None:
    members = [member("twice.jpg"), member("thrice.jpg"), member("thrice.jpg")]
    out = io.BytesIO(hostile_tar(members))
    with tarfile.open(fileobj=out, mode="a") as tar:
        info = member("twice.jpg")
        info.size = 5
        tar.addfile(info, io.BytesIO(b"other"))
    (tmp_path / "x.tar").write_bytes(out.getvalue())
    one = store(tmp_path)
    assert rejected(one, "twice.jpg") == "media_ambiguous"
    assert content(one.find("thrice.jpg")) == b"evil"  # twice the same
    assert content(one.find("good/1.jpg")) == b"good"


def test_hostile_members_of_a_zip(tmp_path: Path) -> None:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("good.jpg", b"good")
        archive.writestr("../up.jpg", b"evil")
        archive.writestr("/abs.jpg", b"evil")
        link = zipfile.ZipInfo("link.jpg")
        link.create_system, link.external_attr = 3, 0o120777 << 16
        archive.writestr(link, "/etc/passwd")
        archive.writestr("locked.jpg", b"x" * 50)
        archive.writestr("lzma.jpg", b"x" * 50, zipfile.ZIP_LZMA)
        archive.writestr("wrong.jpg", b"wrong" * 50)
        archive.writestr("crc.jpg", b"z" * 50)
        archive.writestr("larger.jpg", b"y" * 5000)
        archive.writestr("folder/", b"")
    data = bytearray(out.getvalue())
    with zipfile.ZipFile(io.BytesIO(bytes(data))) as archive:
        wrong = archive.getinfo("wrong.jpg").header_offset + 30 + len("wrong.jpg")
    data[wrong : wrong + 6] = b"\xff" * 6
    directory = data.rindex(b"PK\x05\x06")
    at = data.index(b"PK\x01\x02")
    while at < directory:
        names, extras, comment = struct.unpack_from("<3H", data, at + 28)
        name = bytes(data[at + 46 : at + 46 + names])
        if name == b"locked.jpg":
            data[at + 8] |= 1
        if name == b"crc.jpg":
            data[at + 16] ^= 1
        if name == b"larger.jpg":
            data[at + 24 : at + 28] = struct.pack("<L", 10)
        at += 46 + names + extras + comment
    (tmp_path / "x.zip").write_bytes(data)
    one = store(tmp_path)
    assert content(one.find("good.jpg")) == b"good"
    for name, code in (
        ("up.jpg", "path_escape"),
        ("abs.jpg", "path_escape"),
        ("link.jpg", "path_escape"),
        ("locked.jpg", "media_broken"),
        ("lzma.jpg", "media_broken"),
        ("wrong.jpg", "media_broken"),
        ("crc.jpg", "media_broken"),
        ("larger.jpg", "media_broken"),
        ("folder", "media_missing"),
    ):
        assert rejected(one, name) == code, name


def test_bombs_in_a_zip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zips, "BOMB_FLOOR", 1 << 18)
    monkeypatch.setattr(archive_media, "IN_MEMORY", 1 << 20)
    large = os.urandom(1 << 20) + bytes(1 << 20)
    (tmp_path / "x.zip").write_bytes(
        zip_of({"bomb.jpg": bytes(4 << 20), "film.mp4": large, "flat.bmp": bytes(1 << 17)})
    )
    one = store(tmp_path)
    assert rejected(one, "bomb.jpg") == "media_bomb"
    film = one.find("film.mp4")  # too large for memory: on disk, once
    assert film.data is None
    assert content(film) == large
    assert one.find("film.mp4") == film
    assert content(one.find("flat.bmp")) == bytes(1 << 17)
    monkeypatch.setattr(archive_media, "MAX_MEMBER", 1 << 20)
    assert rejected(one, "film.mp4") == "media_bomb"


@pytest.mark.parametrize("form", sorted(FORMS))
def test_archives_that_are_cut_short_are_named(tmp_path: Path, form: str) -> None:
    data = FORMS[form]({f"{n}.jpg": os.urandom(3000) for n in range(20)})
    for keep in (100, len(data) // 2, len(data) - 12000):
        (tmp_path / form).write_bytes(data[:keep])
        with pytest.raises(ConfigError, match=rf"{form}: .*Fetch it again"):
            prepare(MediaRule(root=tmp_path, archives=(tmp_path / form,)), tmp_path / ".work")


def test_damaged_directories_are_named(tmp_path: Path) -> None:
    tar = bytearray(tar_of({f"{n}.jpg": b"x" * 600 for n in range(5)}))
    tar[3 * 512 + 10] ^= 0xFF  # a header: tarfile takes that for the end
    (tmp_path / "x.tar").write_bytes(tar)
    zipped = bytearray(zip_of({f"{n}.jpg": b"x" * 600 for n in range(5)}))
    zipped[zipped.index(b"PK\x01\x02", zipped.index(b"PK\x01\x02") + 4)] = 0
    (tmp_path / "x.zip").write_bytes(zipped)
    for name in ("x.tar", "x.zip"):
        with pytest.raises(ConfigError, match=rf"{name}.*damaged.*Fetch it again"):
            prepare(MediaRule(root=tmp_path, archives=(tmp_path / name,)), tmp_path / ".work")


@settings(deadline=None, max_examples=150)
@given(
    form=st.sampled_from(["x.tar", "x.zip", "x.stored.zip", "x.tar.gz"]),
    changes=st.lists(st.tuples(st.integers(0, 1 << 16), st.binary(max_size=3)), min_size=1, max_size=4),
)
def test_damage_never_crashes(tmp_path_factory: pytest.TempPathFactory, form: str, changes: list[Any]) -> None:
    """Whatever bytes are changed: an error of ours, or members that can be read."""
    root = tmp_path_factory.mktemp("fuzz")
    tree = {"a/1.jpg": b"one" * 9, "a/" + "long" * 40 + ".jpg": b"two", "a/\u00e9.jpg": b"x" * 700}
    data = bytearray(FORMS[form](tree))
    for place, new in changes:
        at = place % len(data)
        data[at : at + len(new)] = new
    (root / form).write_bytes(data)
    try:
        one = store(root, archives=(root / form,), frames=True)
    except ConfigError:
        return
    for name in [*tree, "a", "none"]:
        try:
            found = one.find(name)
        except DataError:
            continue
        for file in found.frames or [found]:
            content(file)


def test_hostile_headers_of_a_tar(tmp_path: Path) -> None:
    """Sizes below zero (tarfile goes round for ever), names of gigabytes, headers upon headers."""
    negative = tarfile.TarInfo("a.jpg").tobuf(tarfile.USTAR_FORMAT)
    negative = negative[:124] + b"\xff" * 10 + b"\xfe\x00" + negative[136:]
    long = tarfile.TarInfo("././@LongLink")
    long.type, long.size = tarfile.GNUTYPE_LONGNAME, 1 << 40
    chained = tarfile.TarInfo("././@LongLink")
    chained.type = tarfile.GNUTYPE_LONGNAME
    for number, data in enumerate((negative, long.tobuf(tarfile.GNU_FORMAT), chained.tobuf(tarfile.GNU_FORMAT) * 3000)):
        data = bytearray(data)
        for at in range(0, len(data), 512):
            header = data[at : at + 512]
            header[148:156] = b" " * 8
            data[at + 148 : at + 156] = b"%06o\0 " % sum(header)
        path = tmp_path / f"{number}.tar"
        path.write_bytes(bytes(data) + bytes(10240))
        with pytest.raises(ConfigError, match=rf"{number}\.tar: .*damaged"):
            prepare(MediaRule(root=tmp_path, archives=(path,)), tmp_path / ".work")


def test_multi_volume_zips_say_how_to_join_them(tmp_path: Path) -> None:
    (tmp_path / "split.zip").write_bytes(zip_of({"a.jpg": b"a"}))
    (tmp_path / "split.z01").write_bytes(b"x")
    data = bytearray(zip_of({"a.jpg": b"a"}))
    data[data.index(b"PK\x05\x06") + 4] = 2  # the third disk
    (tmp_path / "last.zip").write_bytes(data)
    for name in ("split", "last"):
        with pytest.raises(ConfigError, match=rf"zip -s 0 .*{name}\.zip --out .*{name}_whole\.zip"):
            prepare(MediaRule(root=tmp_path, archives=(tmp_path / f"{name}.zip",)), tmp_path / ".work")


def test_archives_stay_under_the_root(tmp_path: Path) -> None:
    (tmp_path / "root").mkdir()
    (tmp_path / "out.zip").write_bytes(zip_of({"a.jpg": b"a"}))
    (tmp_path / "root/link.zip").symlink_to(tmp_path / "out.zip")
    with pytest.raises(ConfigError, match="outside the media root"):
        store(tmp_path / "root").find("a.jpg")
    with pytest.raises(ConfigError, match="resolve 'nearest'"):
        open_store(MediaRule(root=tmp_path, resolve="nearest"))


def test_zips_of_other_make(tmp_path: Path) -> None:
    """Large offsets (zip64), something before the zip, a comment behind it, names of no declared code page."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.comment = b"PK\x05\x06 no end" * 3
        with archive.open("big.jpg", "w", force_zip64=True) as stream:
            stream.write(b"big")
        archive.writestr("caf\u00e9.jpg", b"coffee")
    data = out.getvalue()
    plain = bytearray(data)
    for magic, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):  # forget that the name is UTF-8
        at = plain.rindex(magic)
        plain[at + flags + 1] &= ~0x08
    (tmp_path / "x.zip").write_bytes(b"#!/bin/sh\n" + bytes(plain))
    rule = MediaRule(root=tmp_path, archives=(tmp_path / "x.zip",))
    (tmp_path / "y.zip").write_bytes(data)
    for archive in (rule, MediaRule(root=tmp_path, archives=(tmp_path / "y.zip",))):
        one = open_store(archive, tmp_path / ".work")
        assert content(one.find("big.jpg")) == b"big"
        assert content(one.find("caf\u00e9.jpg")) == b"coffee"


def test_empty_archives_hold_nothing(tmp_path: Path) -> None:
    (tmp_path / "x.zip").write_bytes(zip_of({}))
    (tmp_path / "x.tar").write_bytes(tar_of({}))
    for archives in (list_archives(tmp_path), (tmp_path / "x.zip",)):
        assert rejected(store(tmp_path, archives=archives), "a.jpg") == "media_missing"


# -------------------------------------------------------------------------------------------------- ids, names, frames


def frame(grey: int) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (8, 8), (grey, grey, grey)).save(out, "PNG")
    return out.getvalue()


@pytest.mark.parametrize("form", ["x.zip", "x.stored.zip", "x.tar", "x.tar.gz"])
def test_ids_and_folders_of_frames(tmp_path: Path, form: str) -> None:
    films = {"k/one.mp4": b"1", "k/two.webm": b"2", "k/v.1.mkv": b"3", "k/both.mp4": b"4", "other/both.avi": b"5"}
    frames = {f"t/clip/f{n}.png": frame(n) for n in (10, 9, 11)} | {"t/clip/notes.txt": b"x"}
    (tmp_path / form).write_bytes(FORMS[form](films | frames))
    (tmp_path / "disk/deep").mkdir(parents=True)
    (tmp_path / "disk/deep/there.mp4").write_bytes(b"disk")
    (tmp_path / "disk/shots").mkdir()
    (tmp_path / "disk/shots/1.jpg").write_bytes(b"x")
    one = store(tmp_path, resolve="stem")
    for name, wanted in (("one", b"1"), ("two", b"2"), ("v.1", b"3"), ("there", b"disk"), ("there.mp4", b"disk")):
        assert content(one.find(name)) == wanted
    assert one.find("shots").path == str(tmp_path / "disk/shots")
    assert rejected(one, "both") == "media_ambiguous"
    assert rejected(one, "none") == "media_missing"
    assert rejected(one, "elsewhere/one") == "media_missing"  # a path that is not there is no id
    (tmp_path / "disk/there.webm").write_bytes(b"again")
    prepare(MediaRule(root=tmp_path, archives=list_archives(tmp_path), resolve="stem"), tmp_path / ".work")
    stores.open_store.cache_clear()
    assert rejected(store(tmp_path, resolve="stem"), "there") == "media_ambiguous"
    for found in (one.find("clip"), store(tmp_path, frames=True).find("t/clip")):
        assert [content(file) for file in found.frames] == [frame(n) for n in (9, 10, 11)]
        with open_video(found) as video:
            items = video.frames(PreprocessSpec(image_size=8, patch_size=4), 3)
        assert [Image.open(io.BytesIO(item.data)).convert("RGB").getpixel((0, 0))[0] for item in items] == [9, 10, 11]
    assert rejected(store(tmp_path), "t/clip") == "media_missing"


def test_names_in_archives_that_are_unpacked_flat(tmp_path: Path) -> None:
    (tmp_path / "a/chunks").mkdir(parents=True)
    (tmp_path / "a/chunks/0.zip").write_bytes(zip_of({"data/0/7.jpg": b"7", "data/0/8.jpg": b"8"}))
    (tmp_path / "a/chunks/1.zip").write_bytes(zip_of({"data/1/8.jpg": b"88", "__MACOSX/data/._7.jpg": b"no"}))
    one = store(tmp_path, resolve="name")
    assert content(one.find("a/images/7.jpg")) == b"7"
    assert rejected(one, "a/images/8.jpg") == "media_ambiguous"
    (tmp_path / "b").mkdir()
    (tmp_path / "b/9.jpg").write_bytes(b"9")
    stores.open_store.cache_clear()
    prepare(MediaRule(root=tmp_path, archives=list_archives(tmp_path), resolve="name"), tmp_path / ".work")
    assert content(store(tmp_path, resolve="name").find("a/images/9.jpg")) == b"9"


@pytest.mark.parametrize("resolve", ["name", "stem"])
def test_members_that_are_not_read_are_named_by_name_too(tmp_path: Path, resolve: str) -> None:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name, kind in (
            ("a/link.mp4", tarfile.SYMTYPE),
            ("a/pipe.mp4", tarfile.FIFOTYPE),
            ("a/both.mp4", tarfile.SYMTYPE),
        ):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "good.mp4"
            archive.addfile(info)
        info = tarfile.TarInfo("b/both.mp4")
        info.size = 4
        archive.addfile(info, io.BytesIO(b"good"))
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep/x.tar").write_bytes(out.getvalue())
    one, end = store(tmp_path, resolve=resolve), ".mp4" if resolve == "name" else ""
    with pytest.raises(DataError, match=rf"path_escape: deep/x\.tar: link{end}: it is a link"):
        one.find(f"link{end}")
    with pytest.raises(DataError, match=rf"media_broken: deep/x\.tar: pipe{end}: it is no file"):
        one.find(f"pipe{end}")
    assert content(one.find(f"both{end}")) == b"good"


# ---------------------------------------------------------------------------------------------------- what is kept


def test_indexes_are_kept_until_an_archive_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for n in range(2):
        (tmp_path / f"{n}.tar").write_bytes(tar_of({f"{n}.jpg": b"old"}))
    rule, work = MediaRule(root=tmp_path, archives=list_archives(tmp_path)), tmp_path / ".work"
    prepare(rule, work)
    with monkeypatch.context() as patch:
        patch.setattr(archive_media, "index_archive", None)
        assert content(open_store(rule, work).find("1.jpg")) == b"old"
    stores.open_store.cache_clear()
    (tmp_path / "1.tar").write_bytes(tar_of({"more.jpg": b"more", "1.jpg": b"renewed"}))
    one = open_store(rule, work)
    assert content(one.find("1.jpg")) == b"renewed"
    assert content(one.find("more.jpg")) == b"more"
    assert content(one.find("0.jpg")) == b"old"


def test_rows_of_one_hash_half_are_told_apart(tmp_path: Path) -> None:
    table = TableBuilder()
    for number in range(200):
        table.add((number % 3, number), number, 1)
    table.save(tmp_path / "t")
    kept = Table(tmp_path / "t")
    assert [kept.find((number % 3, number))[0].first for number in range(200)] == list(range(200))
    assert kept.find((2, 3)) == []
    assert kept.find(key_of(b"p", "none")) == []
