"""What costs a sample, and what ends the run: a picture that cannot be decoded, and everything else."""

from __future__ import annotations

import errno
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, PngImagePlugin

from megatron_vita.config import DataConfig, TrainConfig
from megatron_vita.data.loading import packed_batch
from megatron_vita.data.loading.loader import PackLoader, RankCoords
from megatron_vita.data.media import image, tiling
from megatron_vita.data.sample import MediaFile
from megatron_vita.data.shards.manifest import SourceCounts
from megatron_vita.data.shards.reader import ShardSet
from megatron_vita.data.shards.writer.in_memory import ShardWriter
from megatron_vita.errors import VitaError
from tests.data import packed

EVERY_PICTURE = 8
"""A set of so many samples, each with pictures."""


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> Path:
    items = [one for one in packed.examples(60) if one.tiles][:EVERY_PICTURE]
    prefix = tmp_path_factory.mktemp("failures") / "train"
    packed.write(prefix, items)
    return prefix


def run(prefix: Path, workers: int) -> set[int]:
    """Samples that failed in a whole epoch."""
    packs = ShardSet(prefix).num_packs
    with PackLoader(
        DataConfig(data_path=str(prefix), seq_length=packed.SEQ_LENGTH, num_workers=workers),
        TrainConfig(global_batch_size=2 * packs),
        RankCoords(dp_rank=1, dp_size=2),
    ) as steps:
        return set(next(steps).failed)


def raising(error: BaseException) -> Callable[..., Any]:
    def fail(*_: object, **__: object) -> None:
        raise error

    return fail


DECODER_ERRORS = [
    OSError("image file is truncated (3 bytes not processed)"),
    OSError("broken data stream when reading image file"),
    SyntaxError("broken PNG file"),
    ValueError("Decompressed data too large"),
    struct.error("unpack requires a buffer of 4 bytes"),
    zlib.error("Error -3 while decompressing data"),
    EOFError("no more images in file"),
    IndexError("index out of range"),
    KeyError(7),
    TypeError("an integer is required"),
    ZeroDivisionError("division by zero"),
    OverflowError("int too large to convert"),
    RuntimeError("could not create decoder object"),
]


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("error", DECODER_ERRORS, ids=repr)
def test_what_a_decoder_raises_costs_the_sample(
    prefix: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, workers: int
) -> None:
    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", raising(error))
    assert run(prefix, workers) == set(range(EVERY_PICTURE))


@pytest.mark.parametrize("error", DECODER_ERRORS, ids=repr)
def test_so_does_what_it_raises_on_a_header(prefix: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    monkeypatch.setattr(Image, "open", raising(error))
    assert run(prefix, 0) == set(range(EVERY_PICTURE))


BUGS = [
    NameError("name 'x' is not defined"),
    AttributeError("'NoneType' object has no attribute 'size'"),
    TypeError("unsupported operand"),
    KeyError("norm"),
    IndexError("list index out of range"),
    AssertionError("never"),
    RuntimeError("shape mismatch"),
    NotImplementedError(),
]
OURS = [(tiling, "decode"), (tiling, "_stretch"), (image, "to_rgb"), (packed_batch, "_media_item")]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("place", OURS, ids=lambda place: place[1])
@pytest.mark.parametrize("error", BUGS, ids=repr)
def test_a_defect_of_ours_ends_the_run_and_says_where(
    prefix: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, place: tuple[Any, str], workers: int
) -> None:
    monkeypatch.setattr(*place, raising(error))
    with pytest.raises(
        RuntimeError, match=r"^data rank 1, context rank 0, tensor rank 0, sample \d, picture \d+: "
    ) as at:
        run(prefix, workers)
    assert type(error).__name__ in str(at.value)
    assert at.value.__cause__ is error


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    "place",
    [
        (PngImagePlugin.PngImageFile, "load"),
        (Image, "open"),
        (tiling, "_stretch"),
        (image, "to_rgb"),
        (packed_batch, "_media_item"),
        (packed_batch, "render_tiles"),
    ],
    ids=lambda place: place[1],
)
def test_want_of_memory_ends_the_run_and_is_no_broken_picture(
    prefix: Path, monkeypatch: pytest.MonkeyPatch, place: tuple[Any, str], workers: int
) -> None:
    monkeypatch.setattr(*place, raising(MemoryError()))
    wanted = r"^data rank 1, context rank 0, tensor rank 0, sample \d, picture \d+: .*memory.*data.num_workers"
    with pytest.raises(VitaError, match=wanted):
        run(prefix, workers)


def test_a_disk_that_fails_ends_the_run(prefix: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ShardSet, "media_bytes", raising(OSError(errno.EIO, "Input/output error")))
    with pytest.raises(RuntimeError, match=r"sample \d, picture \d+: OSError: .*Input/output error"):
        run(prefix, 2)


def test_nobody_swallows_an_interrupt(prefix: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiling, "decode", raising(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        run(prefix, 0)


@pytest.mark.parametrize("code", [errno.EMFILE, errno.ENFILE, errno.ENOMEM])
def test_want_of_file_descriptors_is_no_missing_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    """Neither in a set that refers to its pictures, nor while records are compiled."""
    (tmp_path / "a.png").write_bytes(packed.png(3))
    (item,) = (one for one in packed.examples(3) if len(one.media) == 1)
    spec = {"spec": packed.SPEC, "seq_length": packed.SEQ_LENGTH, "tokenizer": packed.TOKENIZER}
    with ShardWriter(tmp_path / "set", **spec, template_sha256="c" * 64, media="reference") as writer:
        writer.add_pack([item], [(0, 1)], [[tmp_path / "a.png"]])
        writer.finish([SourceCounts(name="made", read=1, used=1)])
    with monkeypatch.context() as patch:
        act = Path.open

        def failing(path: Path, *args: Any, **kw: Any) -> Any:
            return raising(OSError(code, "exhausted"))() if path.suffix == ".png" else act(path, *args, **kw)

        patch.setattr(Path, "open", failing)
        with pytest.raises(RuntimeError, match=r"sample 0, picture 0: OSError: .*exhausted"):
            run(tmp_path / "set", 0)
    with monkeypatch.context() as patch:
        patch.setattr(os, "open", raising(OSError(code, "exhausted")))
        with pytest.raises(OSError, match="exhausted"):
            image.read_image(MediaFile(path=str(tmp_path / "a.png")))
