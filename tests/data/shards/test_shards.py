"""The packed format: what is written is read back, the same input gives the same bytes, damage is named."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset

from megatron_vita.data.example import Example, MediaItem, TileSlot
from megatron_vita.data.sample import MediaFile
from megatron_vita.data.shards.format import SMALL_SUFFIXES, SUFFIXES, sample_cost
from megatron_vita.data.shards.manifest import Reject, SourceCounts, load_manifest, reference_record
from megatron_vita.data.shards.reader import ShardSet
from megatron_vita.data.shards.writer.in_memory import ShardWriter
from megatron_vita.errors import ConfigError, DataError
from tests.data import packed


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Example], list[list[int]]]:
    items = packed.examples(40)
    prefix = tmp_path_factory.mktemp("made") / "train"
    _, packs = packed.write(prefix, items)
    return prefix, items, packs


def copy(prefix: Path, folder: Path) -> Path:
    for path in prefix.parent.iterdir():
        shutil.copy(path, folder / path.name)
    return folder / prefix.name


def writer(prefix: Path, **changes: object) -> ShardWriter:
    settings: dict = {
        "spec": packed.SPEC,
        "seq_length": packed.SEQ_LENGTH,
        "tokenizer": packed.TOKENIZER,
        "template_sha256": "c" * 64,
    }
    return ShardWriter(prefix, **{**settings, **changes})


def test_megatron_reads_one_sequence_an_example_and_one_document_a_pack(made: tuple) -> None:
    prefix, items, packs = made
    order = [index for one in packs for index in one]
    for name in ("tokens", "labels"):
        dataset = IndexedDataset(f"{prefix}.{name}")
        assert dataset.index.dtype is np.int32
        np.testing.assert_array_equal(dataset.document_indices, np.cumsum([0, *map(len, packs)]))
        for sequence, index in enumerate(order):
            np.testing.assert_array_equal(dataset[sequence], getattr(items[index], name))
    media = IndexedDataset(f"{prefix}.media")
    assert [media[item].tobytes() for item in range(len(media))] == [m.data for i in order for m in items[i].media]
    assert len(media.document_indices) == len(packs) + 1
    assert int(media.document_indices[1]) == sum(len(items[i].media) for i in packs[0])


def test_the_reader_gives_back_every_pack(made: tuple) -> None:
    prefix, items, packs = made
    shards = ShardSet(prefix)
    shards.verify(full=True)
    assert len(shards) == len(packs)
    for pack, members in enumerate(packs):
        tokens = np.concatenate([items[i].tokens for i in members])
        np.testing.assert_array_equal(shards.tokens(pack), tokens)
        np.testing.assert_array_equal(shards.labels(pack), np.concatenate([items[i].labels for i in members]))
        some = np.array([0, len(tokens) - 1])
        np.testing.assert_array_equal(shards.tokens(pack, some), tokens[some])
        assert shards.sample_lengths(pack).tolist() == [len(items[i].tokens) for i in members]
        assert shards.pack_length(pack) == len(tokens)
        rows = shards.pack_samples(pack)
        assert shards.samples["line"][rows.start : rows.stop].tolist() == [i + 1 for i in members]
        assert all(shards.pack_of_sample(sample) == pack for sample in rows)
        tiles = shards.tiles(shards.pack_tiles(pack))
        assert set(tiles["pack"].tolist()) <= {pack}
        starts = np.cumsum([0, *(len(items[i].tokens) for i in members)])
        expected = [
            start + slot.first_token for start, i in zip(starts, members, strict=False) for slot in items[i].tiles
        ]
        assert tiles["first_token"].tolist() == expected
        assert all(tokens[t : t + 4].tolist() == [packed.CONTEXT] * 4 for t in expected)
        pictures = [m.data for i in members for m in items[i].media]
        assert [shards.media_bytes(item) for item in tiles["media"].tolist()] == pictures
        owners = shards.sample_of_tile(np.array(shards.pack_tiles(pack), dtype=np.int64)).tolist()
        assert owners == [sample for sample, i in zip(rows, members, strict=True) for _ in items[i].tiles]
    counted = sum(int((item.labels != -100).sum()) for item in items)
    assert shards.manifest.totals["labels"] == counted == int(shards.samples["labels"].sum())


def test_work_depends_on_what_a_document_is(made: tuple) -> None:
    prefix, items, packs = made
    shards = ShardSet(prefix)
    tiles = [sum(len(items[i].tiles) for i in one) for one in packs]
    alone = [sum(len(items[i].tokens) * (len(items[i].tokens) + 1) // 2 for i in one) for one in packs]
    assert shards.pack_work(reset=True).tolist() == [list(pair) for pair in zip(alone, tiles, strict=True)]
    joint = [length * (length + 1) // 2 for length in (shards.pack_length(pack) for pack in range(len(packs)))]
    assert shards.pack_work(reset=False).tolist() == [list(pair) for pair in zip(joint, tiles, strict=True)]
    assert shards.samples["cost"].tolist() == [
        sample_cost(len(items[i].tokens), len(items[i].tiles), 4) for one in packs for i in one
    ]


def test_the_same_input_gives_the_same_bytes_and_digest(made: tuple, tmp_path: Path) -> None:
    prefix, items, _ = made
    manifest, _ = packed.write(tmp_path / "again" / "other", items)
    assert manifest.digest == load_manifest(prefix).digest
    for suffix in (*SUFFIXES, "json"):
        assert Path(f"{prefix}.{suffix}").read_bytes() == (tmp_path / "again" / f"other.{suffix}").read_bytes(), suffix
    changed, _ = packed.write(tmp_path / "changed", packed.examples(40, seed=1))
    assert changed.digest != manifest.digest


def test_numpy_reads_the_tables(made: tuple) -> None:
    prefix, items, _ = made
    assert len(np.load(f"{prefix}.samples.npy", mmap_mode="r")) == len(items)
    assert np.load(f"{prefix}.tiles.npy").dtype.names[:4] == ("pack", "first_token", "tokens", "media")


@pytest.mark.parametrize("suffix", [*SUFFIXES, "json"])
def test_one_flipped_bit_is_refused_with_the_file_named(made: tuple, tmp_path: Path, suffix: str) -> None:
    prefix, items, _ = made
    if suffix == "rejects.jsonl":
        with writer(tmp_path / "train") as made_here:
            made_here.add_pack([items[0]], [(0, 1)])
            made_here.finish([SourceCounts(name="m", read=2, used=1, rejected={"x": 1})], [Reject("m", 2, "x", "y")])
        prefix = tmp_path / "train"
    else:
        prefix = copy(prefix, tmp_path)
    path = Path(f"{prefix}.{suffix}")
    data = bytearray(path.read_bytes())
    for place in {0, len(data) // 2, len(data) - 1}:
        for bit in (0, 6):
            flipped = bytearray(data)
            flipped[place] ^= 1 << bit
            path.write_bytes(flipped)
            with pytest.raises(DataError, match=path.name):
                ShardSet(prefix).verify(full=True)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_flipped_bit_is_found_on_opening_or_when_it_is_read(made: tuple, tmp_path: Path, suffix: str) -> None:
    prefix = copy(made[0], tmp_path)
    path = Path(f"{prefix}.{suffix}")
    data = bytearray(path.read_bytes())
    if not data:
        return  # no rejects
    data[len(data) // 2] ^= 8
    path.write_bytes(data)

    def everything() -> None:
        shards = ShardSet(prefix)
        assert suffix not in SMALL_SUFFIXES, "found on opening"
        for pack in range(len(shards)):
            shards.tokens(pack, slice(0, 1))
            shards.labels(pack)
        for item in range(shards.manifest.totals["media"]):
            shards.media_bytes(item)

    with pytest.raises(DataError, match=rf"{path.name} is damaged"):
        everything()


def test_pictures_inside_archives_may_be_referred_to(tmp_path: Path) -> None:
    archive = tmp_path / "some.tar"
    archive.write_bytes(b"before" + packed.png(3) + b"after")
    origin = MediaFile(path=str(archive), offset=6, size=len(packed.png(3)))
    item = MediaItem(packed.png(3), 16, 16, origin=origin)
    record = reference_record(item, archive, tmp_path, offset=6)
    tokens = np.array([3, 3, 3, 3, 5, 6], dtype=np.int32)
    labels = np.array([-100, -100, -100, 5, 6, -100], dtype=np.int32)
    example = Example(tokens, labels, (TileSlot(0, 0, 0, 0, 1, 1),), (MediaItem(record, 16, 16),))
    with writer(tmp_path / "set", media="reference") as made_here:
        made_here.add_pack([example], [(0, 1)])
        made_here.finish([SourceCounts(name="m", read=1, used=1)])
    assert ShardSet(tmp_path / "set").media_bytes(0) == packed.png(3)
    archive.write_bytes(b"before" + packed.png(4) + b"after")
    with pytest.raises(DataError, match=r"some\.tar is not the file that"):
        ShardSet(tmp_path / "set").media_bytes(0)


@pytest.mark.slow
@pytest.mark.parametrize("suffix", ["tokens.idx", "labels.idx", "media.idx", "samples.npy", "tiles.npy"])
def test_no_damaged_index_gives_other_data_or_a_foreign_error(
    made: tuple, tmp_path: Path, suffix: str, capfd: pytest.CaptureFixture[str]
) -> None:
    def everything(shards: ShardSet) -> list[bytes]:
        packs = range(len(shards))
        read = [part.tobytes() for pack in packs for part in (shards.tokens(pack), shards.labels(pack))]
        return [*read, *(shards.media_bytes(item) for item in range(shards.manifest.totals["media"]))]

    whole = everything(ShardSet(made[0]))
    prefix = copy(made[0], tmp_path)
    path = Path(f"{prefix}.{suffix}")
    data = path.read_bytes()
    refused = []
    for place in range(len(data)) if suffix.endswith("idx") else range(128):  # all of a table's header
        path.write_bytes(data[:place] + bytes([data[place] ^ 0x5A]) + data[place + 1 :])
        try:
            shards = ShardSet(prefix)
        except DataError as error:
            refused.append(str(error))
            continue
        assert everything(shards) == whole, place
    assert refused
    assert all(path.name in message for message in refused)
    assert "Traceback" not in capfd.readouterr().err  # megatron-core's reader complains when it is half made


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_missing_and_short_files_are_named_on_opening(made: tuple, tmp_path: Path, suffix: str) -> None:
    prefix = copy(made[0], tmp_path)
    path = Path(f"{prefix}.{suffix}")
    data = path.read_bytes()
    path.write_bytes(data + b"x")
    with pytest.raises(DataError, match=rf"{path.name} has {len(data) + 1} bytes"):
        ShardSet(prefix)
    path.unlink()
    with pytest.raises(DataError, match=f"{path.name} is missing"):
        ShardSet(prefix)


def test_no_set_another_version_and_an_edited_manifest(made: tuple, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no packed shards at"):
        ShardSet(tmp_path / "nothing")
    prefix = copy(made[0], tmp_path)
    path = Path(f"{prefix}.json")
    values = json.loads(path.read_text())
    for changes, message in (({"format_version": 9}, "format version 9"), ({"seq_length": 97}, "edited by hand")):
        path.write_text(json.dumps({**values, **changes}))
        with pytest.raises(DataError, match=message):
            load_manifest(prefix)


def test_text_only_has_no_media_files_and_replaces_an_older_set(made: tuple, tmp_path: Path) -> None:
    prefix = copy(made[0], tmp_path)
    manifest, _ = packed.write(prefix, packed.examples(5, pictures=False))
    assert manifest.media == "none"
    assert not any(Path(f"{prefix}.{suffix}").exists() for suffix in ("media.bin", "media.idx", "tiles.npy"))
    shards = ShardSet(prefix)
    shards.verify()
    assert len(shards.tiles(shards.pack_tiles(0))) == 0
    with pytest.raises(DataError, match="without media"):
        shards.media_bytes(0)


def test_nothing_half_written_is_left_and_the_old_set_survives(made: tuple, tmp_path: Path) -> None:
    prefix = copy(made[0], tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with writer(prefix) as made_here:
        made_here.add_pack([made[1][0]], [(0, 1)])
    with pytest.raises(DataError, match="no sample was left"), writer(prefix) as made_here:
        made_here.finish([])
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_counts_must_add_up(made: tuple, tmp_path: Path) -> None:
    item = made[1][0]
    for source, rejects in (
        (SourceCounts(name="m", read=3, used=1, rejected={"x": 1}), [Reject("m", 2, "x", "y")]),
        (SourceCounts(name="m", read=2, used=1, rejected={"x": 1}), []),
        (SourceCounts(name="m", read=2, used=2), []),
    ):
        with writer(tmp_path / "set") as made_here:
            made_here.add_pack([item], [(0, 1)])
            with pytest.raises(DataError, match="counts of m do not add up"):
                made_here.finish([source], rejects)
    with writer(tmp_path / "set") as made_here:
        made_here.add_pack([item], [(0, 1)])
        manifest = made_here.finish(
            [SourceCounts(name="m", read=2, used=1, rejected={"x": 1})], [Reject("m", 2, "x", "kaputt \udc80")]
        )
    assert manifest.sources[0].tokens == len(item.tokens)
    assert manifest.totals["read"] == manifest.totals["samples"] + manifest.totals["rejected"]
    line = json.loads((tmp_path / "set.rejects.jsonl").read_text())
    assert (line["source"], line["line"], line["code"]) == ("m", 2, "x")


def test_examples_that_break_the_format_are_refused(made: tuple, tmp_path: Path) -> None:
    good = next(item for item in made[1] if len(item.tiles) > 1)
    bad = {
        "last label": dataclasses.replace(good, labels=np.zeros_like(good.labels)),
        "vocabulary": dataclasses.replace(good, tokens=good.tokens + 500),
        "overlap": dataclasses.replace(good, tiles=good.tiles[::-1]),
        "beyond its": dataclasses.replace(good, media=()),
    }
    with writer(tmp_path / "set") as made_here:
        for message, item in bad.items():
            with pytest.raises(DataError, match=message):
                made_here.add_pack([item], [(0, 1)])
        with pytest.raises(DataError, match="at most 96"):
            made_here.add_pack([good] * 20, [(0, 1)] * 20)


def test_references_are_checked_when_read(tmp_path: Path) -> None:
    picture = tmp_path / "ähnlich.png"
    picture.write_bytes(packed.png(3))
    tokens = np.array([3, 3, 3, 3, 5, 6], dtype=np.int32)
    labels = np.array([-100, -100, -100, 5, 6, -100], dtype=np.int32)
    frame = MediaItem(packed.png(9), 16, 16, frame=True)
    tiles = (TileSlot(0, 0, 0, 0, 1, 1),)
    still = Example(tokens, labels, tiles, (MediaItem(picture.read_bytes(), 16, 16),))
    moving = Example(tokens, labels, tiles, (frame,))
    with writer(tmp_path / "set", media="reference") as made_here:
        made_here.add_pack([still, moving], [(0, 1), (0, 2)], [[picture], [None]])
        manifest = made_here.finish([SourceCounts(name="m", read=2, used=2)])
    assert manifest.media == "reference"
    shards = ShardSet(tmp_path / "set")
    assert shards.media_bytes(0) == picture.read_bytes()
    assert shards.media_bytes(1) == frame.data
    assert shards.tiles(range(2))["frame"].tolist() == [0, 1]
    picture.write_bytes(packed.png(4))
    with pytest.raises(DataError, match="is not the file that"):
        shards.media_bytes(0)
    picture.unlink()
    with pytest.raises(DataError, match="cannot be read"):
        shards.media_bytes(0)


def test_offsets_are_64_bit(tmp_path: Path) -> None:
    """The container's own pointers for more than 4 GiB, without writing them."""
    from megatron.core.datasets.indexed_dataset import _IndexWriter

    pointers = _IndexWriter(str(tmp_path / "x.idx"), np.int32)._sequence_pointers([2**20] * 2050)
    assert pointers[-1] == 4 * 2**20 * 2049 > 2**32
