"""What a compiled record leaves unused is counted, reported at the end, and the same however the set was made."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from megatron_vita.data.compile.inputs import Options
from megatron_vita.data.compile.run import run
from megatron_vita.data.shards.manifest import Manifest, load_manifest
from megatron_vita.data.shards.reader import ShardSet
from megatron_vita.data.spec import PreprocessSpec
from megatron_vita.data.text.tokenizer import VitaTokenizer
from tests.data.fixtures_kit import turns
from tests.data.kit import picture, tokenizer_folder

SPEC = PreprocessSpec(image_size=16, patch_size=4, max_tiles=4)


@pytest.fixture
def world(tmp_path: Path) -> Path:
    """A picture set whose records do not all hold a picture."""
    tokenizer_folder(tmp_path / "tok")
    (tmp_path / "a.png").write_bytes(picture(20, 20))
    records: list[dict[str, Any]] = [
        {"image": "a.png", "conversations": turns("<image>\nq", "a"), "gloss": "words"},
        {"conversations": turns("<image>\nq", "a"), "gloss": "words", "id": "x"},
        {"conversations": turns("<image> <image>", "a"), "remark": "words"},
        {"conversations": turns("plain", "a")},
        {"image": None, "conversations": turns("<image>\nq", "a")},
        {"conversations": turns("plain", "BAD", "again", "GOOD")},
    ]
    records[5]["conversations"][1]["weight"] = 0
    (tmp_path / "a.json").write_text(json.dumps(records))
    group = {"source": "llava", "data_paths": [f"{tmp_path}/a.json"]}
    (tmp_path / "mix.yaml").write_text(json.dumps({"dataset": {"set": group}}))
    return tmp_path


def compiled(world: Path, name: str, **more: Any) -> Manifest:
    given = {
        "data_config": str(world / "mix.yaml"),
        "tokenizer": str(world / "tok"),
        "output": str(world / "out" / name),
    }
    return run(Options(**{**given, "seq_length": 256, "spec": SPEC, "progress": False, **more}))


def test_tags_without_media_and_unread_fields_are_told(world: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "megatron_vita")
    manifest = compiled(world, "one")
    (source,) = manifest.sources
    assert (source.read, source.used, source.rejected, source.tags_as_text) == (6, 5, {"media_count": 1}, 2)
    assert load_manifest(world / "out" / "one") == manifest
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len([line for line in warnings if line.startswith("set: 2 records spell `<image>`")]) == 1
    assert len([line for line in warnings if "nothing reads `gloss` (2 records), `remark` (1 record)" in line]) == 1


def test_an_answer_of_weight_zero_is_not_learnt(world: Path) -> None:
    compiled(world, "one")
    shards = ShardSet(world / "out" / "one")
    learnt = [label for pack in range(shards.num_packs) for label in shards.labels(pack).tolist() if label != -100]
    text = VitaTokenizer.load(world / "tok").decode(learnt)
    assert "GOOD" in text
    assert "BAD" not in text


def test_counts_are_the_same_when_examples_are_reused(world: Path) -> None:
    fresh = compiled(world, "fresh")
    compiled(world, "grown")
    mix = json.loads((world / "mix.yaml").read_text())
    (world / "b.json").write_text(json.dumps([{"conversations": turns("more", "a")}]))
    mix["dataset"]["more"] = {"source": "llava", "data_paths": [f"{world}/b.json"]}
    (world / "mix.yaml").write_text(json.dumps(mix))
    grown, anew = compiled(world, "grown", resume=True), compiled(world, "anew")
    assert grown.sources == anew.sources
    assert grown.digest == anew.digest
    assert grown.sources[0].tags_as_text == fresh.sources[0].tags_as_text == 2


def test_a_manifest_of_an_earlier_release_is_whole(world: Path) -> None:
    (world / "a.json").write_text(json.dumps([{"conversations": turns("plain", "a")}]))
    manifest = compiled(world, "plain")
    assert "tags_as_text" not in (world / "out" / "plain.json").read_text()
    assert load_manifest(world / "out" / "plain") == manifest
