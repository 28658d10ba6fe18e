"""What ends a text and how words are drawn, from the publisher's folder to an exported one."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from megatron_vita.convert import generation
from megatron_vita.convert.generation import GenerationSettings
from megatron_vita.errors import CheckpointError

CHATML = {"<|endoftext|>": 1, "<|im_start|>": 2, "<|im_end|>": 3}
SAMPLING = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "repetition_penalty": 1.05}


@pytest.mark.parametrize("turns", [False, True])
def test_what_the_publisher_says_stays(turns: bool) -> None:
    said = GenerationSettings(
        {"bos_token_id": 1, "eos_token_id": 3},
        {"bos_token_id": 1, "eos_token_id": [3, 1], "pad_token_id": 1, **SAMPLING},
    )
    assert said.completed(CHATML, None, turns=turns) == said
    llama = GenerationSettings({"bos_token_id": 6, "eos_token_id": [7, 8]}, {"eos_token_id": [7, 8], **SAMPLING})
    assert llama.completed({"<|eot_id|>": 7}, 7, turns=turns) == llama


def test_turns_end_where_the_template_ends_them() -> None:
    base = GenerationSettings(
        {"bos_token_id": 1, "eos_token_id": 1}, {"eos_token_id": [7, 8], "_from_model_config": True}
    )
    got = base.completed(CHATML, 7, turns=True)
    assert got.token_ids == {"bos_token_id": 1, "eos_token_id": [3, 1]}
    assert got.settings == {"eos_token_id": [3, 7, 8]}
    assert base.completed(CHATML, 7, turns=False) == base


def test_what_nobody_says_is_chatml() -> None:
    filler = {"bos_token_id": 1, "pad_token_id": 1}
    unsaid = GenerationSettings({}, {"_from_model_config": True, "use_cache": True})
    got = unsaid.completed(CHATML, None, turns=False)
    assert got.token_ids == {**filler, "eos_token_id": 3}
    assert got.settings == {**filler, "eos_token_id": [3, 1], "use_cache": True}
    assert GenerationSettings().completed({}, 5, turns=False) == GenerationSettings(
        {"eos_token_id": 5}, {"eos_token_id": [5]}
    )
    assert GenerationSettings().completed({}, None, turns=False) == GenerationSettings()


def test_either_file_speaks_for_the_other() -> None:
    config = GenerationSettings({"bos_token_id": 6, "eos_token_id": [7, 8]}, {"temperature": 0.6})
    assert config.completed(CHATML, None, turns=False).settings == {**config.token_ids, "temperature": 0.6}
    settings = GenerationSettings({"pad_token_id": 9}, {"eos_token_id": [7, 8], "temperature": 0.6})
    assert settings.completed(CHATML, None, turns=False).token_ids == {"eos_token_id": [7, 8], "pad_token_id": 9}


def test_a_folder_and_a_checkpoint_say_the_same(tmp_path: Path) -> None:
    _write(tmp_path, "config.json", {"bos_token_id": 4, "text_config": {"eos_token_id": [7, 8], "pad_token_id": None}})
    _write(tmp_path, "generation_config.json", SAMPLING)
    found = generation.read(tmp_path)
    assert found == GenerationSettings({"bos_token_id": 4, "eos_token_id": [7, 8]}, SAMPLING)
    (tmp_path / "tokenizer").mkdir()
    found.write(tmp_path / "tokenizer")
    assert generation.read(tmp_path / "tokenizer") == found
    assert generation.read(tmp_path / "nowhere") == GenerationSettings()
    assert GenerationSettings({}, {"a": 1}).or_else(found) == GenerationSettings(found.token_ids, {"a": 1})


@pytest.mark.parametrize("value", ["</s>", True, -1, [], [7, "8"], 7.0])
@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "token_ids.json"])
def test_an_id_that_is_none(name: str, value: Any, tmp_path: Path) -> None:
    _write(tmp_path, name, {"eos_token_id": value})
    with pytest.raises(CheckpointError, match=re.escape(f"{tmp_path / name}: eos_token_id={value!r} is no id")):
        generation.read(tmp_path)


def _write(folder: Path, name: str, values: dict[str, Any]) -> None:
    (folder / name).write_text(json.dumps(values))
