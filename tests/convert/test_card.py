"""The model card: the recipe, and the data as the shard set's manifest tells it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from megatron_vita import checkpoint
from megatron_vita.convert import cli
from tests.convert import publishers

pytest.importorskip("transformers")

DIGEST = "5e" * 32


@pytest.mark.parametrize("same", [True, False])
def test_the_card_lists_the_sources_of_the_set_it_was_trained_on(tmp_path: Path, same: bool) -> None:
    publishers.write_qwen2(tmp_path / "llm")
    assert cli.main(["import", "--llm", str(tmp_path / "llm"), "--output", str(tmp_path / "fresh")]) == 0
    sources = [{"name": "LLaVA|ReCap", "read": 10, "used": 9, "tokens": 4321, "tiles": 7, "files": ["/home/me/a.json"]}]
    manifest = {"digest": DIGEST if same else "0" * 64, "seq_length": 4096, "sources": sources}
    (tmp_path / "stage1.json").write_text(json.dumps(manifest))
    state = checkpoint.read_state(tmp_path / "fresh")
    data = dataclasses.replace(state.stage.data, data_path=str(tmp_path / "stage1"))
    state = dataclasses.replace(
        state, iteration=5, manifest_digest=DIGEST, stage=dataclasses.replace(state.stage, data=data)
    )
    tensors, tokenizer = checkpoint.read_tensors(tmp_path / "fresh"), tmp_path / "fresh/iter_0000000/tokenizer"
    trained = checkpoint.write_tensors(tmp_path / "trained", 5, tensors, state, tokenizer)
    output = tmp_path / "hf"
    assert cli.main(["export", "--checkpoint", str(trained), "--output", str(output), "--format", "llm"]) == 0
    card = (output / "README.md").read_text()
    assert DIGEST in card
    assert ("| LLaVA ReCap | 10 | 9 | 4321 | 7 |" in card) == same
    assert str(tmp_path) not in card
    assert "/home/me" not in card
