"""The data compiler end to end: a mix goes in, a shard set comes out, and every record is accounted for."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image as Pil

from megatron_vita.data.compile.record import Compiler, Rules
from megatron_vita.data.compile.run import Options, run
from megatron_vita.data.example import IGNORE_INDEX
from megatron_vita.data.media.open import read_items
from megatron_vita.data.sample import Sample
from megatron_vita.data.shards.manifest import Manifest
from megatron_vita.data.shards.reader import ShardSet
from megatron_vita.data.sources import load_mix, read_samples
from megatron_vita.data.spec import PreprocessSpec
from megatron_vita.data.text.chat import build_example
from megatron_vita.data.text.tokenizer import VitaTokenizer
from megatron_vita.errors import ConfigError, DataError
from tests.data.kit import picture, tokenizer_folder

TOOL = Path(__file__).parents[3] / "tools" / "preprocess_data.py"
SPEC = PreprocessSpec(image_size=16, patch_size=4, max_tiles=4, max_frames=8)


def turns(question: str, answer: str = "seven") -> list[dict[str, str]]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def frame_folder(path: Path, count: int) -> None:
    path.mkdir(parents=True)
    for number in range(count):
        Pil.new("RGB", (16, 16), (number * 10,) * 3).save(path / f"{number}.png")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four forms, good records and one of each kind of bad one."""
    root = tmp_path_factory.mktemp("world")
    tokenizer_folder(root / "tok")
    (root / "images").mkdir()
    for number in range(12):
        (root / f"images/{number}.png").write_bytes(picture(16 + number * 4, 24, seed=number))
    (root / "images/cut.png").write_bytes(picture(30, 30)[:-20])
    (root / "secret.png").write_bytes(picture(8, 8))
    llava = [
        {"image": f"images/{n}.png", "conversations": turns("<image>\nWhich digit", f"it is {n}")} for n in range(12)
    ]
    llava += [
        {"image": "images/99.png", "conversations": turns("<image>")},
        {"image": "images/cut.png", "conversations": turns("<image>")},
        {"image": "../elsewhere.png", "conversations": turns("<image>")},
        {"image": "images/1.png", "conversations": turns("no placeholder")},
        {"image": "images/1.png", "conversations": turns("<image>")[:1]},
    ]
    text = json.dumps(llava)
    (root / "llava.json").write_text(text[:-1] + ', {"broken": }]')
    rows = [[{"bytes": picture(20, 20, seed=n), "path": None}] * (1 + n % 3) for n in range(8)]
    texts = [[{"user": f"q{n}", "assistant": "a", "source": "x"}] * 2 for n in range(8)]
    pq.write_table(pa.table({"images": rows, "texts": texts}), root / "c.parquet", row_group_size=3)
    frame_folder(root / "clip", 20)
    videos = [{"messages": [{"role": "user", "content": "<video>\nWhich"}, {"role": "assistant", "content": "three"}],
               "videos": ["clip"]}] * 3  # fmt: skip
    (root / "v.jsonl").write_text("".join(json.dumps(v) + "\n" for v in videos) + "{oops\n")
    (root / "t.jsonl").write_text(
        "".join(json.dumps({"text": f"Some words, number {n}. " * 3}) + "\n" for n in range(9))
    )
    mix = {
        "llava": {"data_paths": ["${WORLD}/llava.json"], "media_root": "${WORLD}"},
        "cauldron": {"data_paths": ["${WORLD}/c.parquet"]},
        "clips": {"data_paths": ["${WORLD}/v.jsonl"], "media_root": "${WORLD}"},
        "texts": {"data_paths": ["${WORLD}/t.jsonl"], "ratio": 0.5},
    }
    (root / "mix.yaml").write_text(json.dumps({"dataset": mix}))
    return root


@pytest.fixture(autouse=True)
def _here(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD", str(world))


def options(world: Path, prefix: Path, **changes: Any) -> Options:
    given = {"data_config": str(world / "mix.yaml"), "tokenizer": str(world / "tok"), "output": str(prefix)}
    return Options(**{**given, "seq_length": 256, "spec": SPEC, "progress": False, **changes})


def digests(prefix: Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(prefix.parent.glob(f"{prefix.name}.*"))
    }


@pytest.fixture(scope="module")
def made(world: Path) -> tuple[Path, Manifest]:
    os.environ["WORLD"] = str(world)
    prefix = world / "out" / "set"
    return prefix, run(options(world, prefix))


def test_every_record_is_accounted_for(made: tuple[Path, Manifest]) -> None:
    prefix, manifest = made
    by_name = {source.name: source for source in manifest.sources}
    assert by_name["llava"].read == 18
    assert by_name["llava"].used == 12
    assert dict(by_name["llava"].rejected) == {
        "bad_json": 1, "media_count": 1, "media_missing": 1, "media_truncated": 1, "no_answer": 1, "path_escape": 1,
    }  # fmt: skip
    assert (by_name["clips"].used, dict(by_name["clips"].rejected)) == (3, {"bad_json": 1})
    assert (by_name["cauldron"].used, by_name["texts"].read) == (8, 4)
    assert by_name["llava"].files == ("${WORLD}/llava.json",)
    rejects = [json.loads(line) for line in Path(f"{prefix}.rejects.jsonl").read_text().splitlines()]
    assert len(rejects) == 7 == manifest.totals["rejected"]
    assert {(r["line"], r["code"]) for r in rejects if r["source"] == "llava"} >= {
        (13, "media_missing"),
        (18, "bad_json"),
    }
    assert manifest.totals["samples"] == 12 + 8 + 3 + 4
    assert sorted(path.name for path in prefix.parent.iterdir()) == sorted([*digests(prefix)])


def test_the_set_reads_back_as_the_samples_are(world: Path, made: tuple[Path, Manifest]) -> None:
    prefix, _ = made
    shards = ShardSet(prefix)
    shards.verify()
    tokenizer = VitaTokenizer.load(world / "tok")
    wanted = {}
    for line, (sample, _) in enumerate(read_samples(world / "c.parquet"), 1):
        assert isinstance(sample, Sample)
        images, videos = read_items(sample, SPEC)
        wanted[line] = build_example(sample, images, videos, tokenizer=tokenizer, spec=SPEC)
    source = [s.name for s in shards.manifest.sources].index("cauldron")
    found = 0
    for pack in range(shards.num_packs):
        tokens, labels, start = shards.tokens(pack), shards.labels(pack), 0
        for row in shards.pack_samples(pack):
            record = shards.samples[row]
            stop = start + int(record["length"])
            assert labels[stop - 1] == IGNORE_INDEX
            if record["source"] == source:
                example = wanted[int(record["line"])]
                assert np.array_equal(tokens[start:stop], example.tokens)
                assert np.array_equal(labels[start:stop], example.labels)
                tiles = shards.tiles(shards.pack_tiles(pack))
                mine = tiles[(tiles["first_token"] >= start) & (tiles["first_token"] < stop)]
                assert len(mine) == len(example.tiles)
                for tile, slot in zip(mine, example.tiles, strict=True):
                    assert tile["first_token"] - start == slot.first_token
                    stored, item = shards.media_bytes(int(tile["media"])), example.media[slot.media]
                    assert stored == item.data
                    assert [tile[name] for name in ("row", "col", "cols")] == [slot.row, slot.col, slot.cols]
                found += 1
            start = stop
    assert found == 8


@pytest.mark.slow
def test_two_processes_write_the_same_bytes(world: Path, made: tuple[Path, Manifest]) -> None:
    prefix, manifest = made
    other = world / "other" / "set"
    assert run(options(world, other, workers=2)).digest == manifest.digest
    assert digests(other) == digests(prefix)


@pytest.mark.slow
def test_resume_keeps_a_finished_set_and_nothing_else(world: Path) -> None:
    prefix = world / "resumed" / "set"
    first = run(options(world, prefix, resume=True))
    stamp = Path(f"{prefix}.tokens.bin").stat().st_mtime_ns
    assert run(options(world, prefix, resume=True)).digest == first.digest
    assert Path(f"{prefix}.tokens.bin").stat().st_mtime_ns == stamp
    assert run(options(world, prefix, resume=True, seed=3)).digest != first.digest
    data = bytearray(Path(f"{prefix}.tokens.bin").read_bytes())
    data[40] ^= 1
    Path(f"{prefix}.tokens.bin").write_bytes(data)
    run(options(world, prefix, resume=True, seed=3))
    ShardSet(prefix).verify()


def test_a_failure_leaves_nothing_behind_and_the_old_set_whole(
    world: Path, made: tuple[Path, Manifest], monkeypatch: pytest.MonkeyPatch
) -> None:
    prefix, _ = made
    before = digests(prefix)

    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("megatron_vita.data.shards.writer.packs.PackWriter.write", fail)
    with pytest.raises(KeyboardInterrupt):
        run(options(world, prefix, seed=9))
    assert digests(prefix) == before
    assert sorted(path.name for path in prefix.parent.iterdir()) == [".set.work", *sorted(before)]
    shutil.rmtree(prefix.parent / ".set.work")


def test_reference_media_point_to_the_files(world: Path) -> None:
    prefix = world / "referred" / "set"
    manifest = run(options(world, prefix, media="reference"))
    assert manifest.media == "reference"
    assert Path(f"{prefix}.media.bin").stat().st_size < Path(f"{world}/out/set.media.bin").stat().st_size
    shards = ShardSet(prefix)
    sizes = {len(shards.media_bytes(item)) for item in range(manifest.totals["media"])}
    assert len(picture(16, 24, seed=0)) in sizes


def test_turns_that_fixes_drop_are_counted(world: Path, tmp_path: Path) -> None:
    odd = {"from": "tool", "value": "noise"}
    records = [
        {"conversations": [odd, *turns("q"), odd]},
        {"conversations": turns("q")},
        {"conversations": [odd, {"from": "tool", "value": "more"}]},  # nothing is left of it: rejected, not counted
    ]
    (tmp_path / "r.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    group = {"source": "sharegpt", "fix": ["drop_bad_role"], "data_paths": [str(tmp_path / "r.jsonl")]}
    (tmp_path / "mix.yaml").write_text(json.dumps({"dataset": {"talk": group}}))
    prefix = tmp_path / "out" / "set"
    small = options(world, prefix, data_config=str(tmp_path / "mix.yaml"))
    manifest = run(small)
    (source,) = manifest.sources
    assert (source.used, source.dropped, dict(source.rejected)) == (2, 2, {"bad_order": 1})
    assert manifest.totals["dropped"] == 2
    assert ShardSet(prefix).samples["dropped"].sum() == 2
    group["num"] = 2  # another mix: the Examples are taken from the set, and their counts with them
    (tmp_path / "mix.yaml").write_text(json.dumps({"dataset": {"more": group, "talk": group}}))
    again = run(dataclasses.replace(small, resume=True))
    assert sum(row["dropped"] for row in ShardSet(prefix).samples) == again.totals["dropped"]


# ---------------------------------------------------------------------------------------------- what does not fit


def one(world: Path, folder: Path, record: dict[str, Any], **rules: Any) -> Any:
    """Compile one record."""
    (folder / "one.jsonl").write_text(json.dumps(record))
    mix = {"dataset": {"one": {"data_paths": [str(folder / "one.jsonl")], "media_root": str(world)}}}
    (folder / "one.yaml").write_text(json.dumps(mix))
    (file,) = load_mix(folder / "one.yaml")
    compiler = Compiler(VitaTokenizer.load(world / "tok"), Rules(spec=SPEC, **rules))
    ((line, parsed),) = file.reader().read(file.reader().index())
    return compiler.compile(parsed, file, line)


CLIP = {
    "messages": [{"role": "user", "content": "<video>\nWhich"}, {"role": "assistant", "content": "three"}],
    "videos": ["clip"],
}


def test_frames_are_what_the_sequence_holds_to_the_token(world: Path, tmp_path: Path) -> None:
    whole = len(one(world, tmp_path, CLIP, seq_length=999).example.tokens)
    for room, frames in ((whole, 8), (whole - 1, 7)):
        made = one(world, tmp_path, CLIP, seq_length=room)
        assert len(made.example.media) == frames
        assert made.shortened == (frames < 8)
    means = [int(np.asarray(Pil.open(io.BytesIO(item.data))).mean()) for item in made.example.media]
    assert (means[0], means[-1]) == (0, 190)  # first and last frame of the clip
    for policy in ("reject", "reduce-frames"):
        with pytest.raises(DataError, match="overlong"):
            one(world, tmp_path, CLIP, seq_length=whole - 1 if policy == "reject" else 10, overlong=policy)


@pytest.mark.slow
def test_truncate_keeps_the_answers(world: Path, tmp_path: Path) -> None:
    long = {"messages": [{"role": "user", "content": "digit " * 400}, {"role": "assistant", "content": "the answer"}]}
    made = one(world, tmp_path, long, seq_length=100, overlong="truncate")
    tokenizer = VitaTokenizer.load(world / "tok")
    assert 90 <= len(made.example.tokens) <= 100
    assert made.shortened
    assert "the answer" in tokenizer.decode(made.example.tokens)
    wordy = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "digit " * 400}]}
    cut = one(world, tmp_path, wordy, seq_length=50, overlong="truncate").example
    assert len(cut.tokens) == 50
    learnt = cut.labels[:-1] != IGNORE_INDEX
    assert np.array_equal(cut.labels[:-1][learnt], cut.tokens[1:][learnt])
    assert cut.labels[-1] == IGNORE_INDEX
    assert learnt.sum() > 40
    document = one(world, tmp_path, {"text": "digit " * 400}, seq_length=50, overlong="truncate").example
    assert len(document.tokens) == 50
    assert (document.labels[:-1] == document.tokens[1:]).all()
    many = {"messages": [{"role": "user", "content": "<image>" * 6}, {"role": "assistant", "content": "a"}],
            "images": ["images/1.png"] * 6}  # fmt: skip
    with pytest.raises(DataError, match="overlong"):
        one(world, tmp_path, many, seq_length=40, overlong="truncate")
    for policy in ("reject", "reduce-frames"):
        with pytest.raises(DataError, match="overlong"):
            one(world, tmp_path, long, seq_length=100, overlong=policy)


# -------------------------------------------------------------------------------------------------- command line


def call(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, str(TOOL), *arguments], capture_output=True, text=True, timeout=120, env=environment
    )


@pytest.mark.slow
def test_command_line(world: Path, tmp_path: Path) -> None:
    common = ["--tokenizer", f"{world}/tok", "--seq-length", "256", "--image-size", "16", "--patch-size", "4"]
    done = call(
        "--data-config", f"{world}/mix.yaml", "--output", f"{tmp_path}/new/set", "--max-tiles", "4", "--max-frames",
        "8", "--workers", "1", *common,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith(f"wrote {tmp_path}/new/set: 27 samples of 34 records (7 rejected)")
    assert "records/s" in done.stderr or "27" in done.stderr
    assert digests(tmp_path / "new" / "set") == digests(world / "out" / "set")


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"data_config": "none.yaml"}, "no such file"),
        ({"tokenizer": "nowhere"}, "no tokenizer"),
        ({"output": "."}, "DIR/PREFIX"),
        ({"seq_length": 1}, "seq-length"),
        ({"workers": 0}, "workers"),
        ({"seed": -1}, "--seed -1"),
        ({"output": "/dev/null/set"}, "--output /dev/null/set: cannot be written"),
        ({"engine": "cloud"}, "choose one of local, ray"),
        ({"max_rejected": 1.5}, "--max-rejected 1.5"),
        ({"overlong": "drop"}, "choose one of"),
        ({"media": "link"}, "choose one of"),
    ],
)
def test_wrong_settings_are_refused_before_anything(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], complaint: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=complaint):
        run(options(world, tmp_path / "new" / "set", **changes))
    assert not list(tmp_path.iterdir())


def test_nothing_usable_is_an_error(world: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text('{"messages": []}\n{oops\n')
    mix = {"dataset": {"bad": {"source": "long_vita", "data_paths": [str(tmp_path / "bad.jsonl")]}}}
    (tmp_path / "bad.yaml").write_text(json.dumps(mix))
    with pytest.raises(DataError, match="none of 2 records"):
        run(options(world, tmp_path / "set", data_config=str(tmp_path / "bad.yaml")))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.jsonl", "bad.yaml"]
