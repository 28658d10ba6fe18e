"""Settings of the engine that replace the model's own: rotary scaling, longest sequence, frames of a video."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_vita.errors import ConfigError, DataError
from megatron_vita.evaluation.evaluate import EvalSettings, evaluate
from megatron_vita.inference.engine import Engine
from megatron_vita.inference.opening import open_for_inference
from megatron_vita.inference.prompt import Generation
from megatron_vita.inference.sampling_config import SamplingConfig
from megatron_vita.inference.settings import EngineSettings
from tests.data.kit import picture
from tests.inference.tiny import question, save_checkpoint

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}
FRAMES = 12
"""Of the video; the checkpoint's preprocessing takes 8."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint, the same weights in one with YaRN, and a video as a folder of frames."""
    folder = tmp_path_factory.mktemp("overrides")
    save_checkpoint(folder)
    yarn: dict[str, Any] = {"position_embedding_type": "yarn", "yarn_rotary_scaling_factor": 4.0}
    yarn |= {"yarn_original_max_position_embeddings": 256, "max_position_embeddings": 1024}
    save_checkpoint(folder, name="scaled", **yarn)
    (folder / "video").mkdir()
    for number in range(FRAMES):
        (folder / f"video/{number:03d}.png").write_bytes(picture(16, 16, seed=number))
    return folder


def answer(path: Path, text: str = "Which?", *, videos: tuple[Path, ...] = (), **settings: Any) -> Generation:
    engine = Engine.load(path, EngineSettings(kv_cache_memory="8MiB", **settings))
    sampling = SamplingConfig(logprobs=0, ignore_eos=True)
    (found,) = engine.generate([question(text, videos=list(videos))], max_new_tokens=4, sampling=sampling)
    engine.close()
    return found


def test_a_scaling_is_that_of_a_checkpoint_which_has_it(folder: Path) -> None:
    text = "Which digit is it? " * 8
    plain, scaled = answer(folder / "tiny", text), answer(folder / "scaled", text)
    turned_on = answer(folder / "tiny", text, rope_scaling=YARN)
    turned_off = answer(folder / "scaled", text, rope_scaling={"rope_type": "default"}, max_position_embeddings=512)
    assert turned_on == scaled
    assert turned_off == plain
    assert plain.logprobs != scaled.logprobs


def test_more_or_fewer_frames_than_the_model_was_trained_with(folder: Path) -> None:
    tokens = {}
    for most in (None, 2, 8, FRAMES, 100):
        engine = Engine.load(folder / "tiny", EngineSettings(kv_cache_memory="8MiB", max_frames=most))
        found = engine.generate([question("Which?", videos=[folder / "video"])], max_new_tokens=1)
        tokens[most] = found[0].prompt_tokens
        assert found[0].prefill_seconds > 0
        engine.close()
    assert tokens[None] == tokens[8]
    assert tokens[2] < tokens[8] < tokens[FRAMES] == tokens[100]


def test_the_longest_sequence_is_a_setting(folder: Path) -> None:
    longer = "Which digit is it? " * 150
    with pytest.raises(DataError, match="the model handles 512 with the answer"):
        answer(folder / "tiny", longer)
    found = answer(folder / "tiny", longer, max_position_embeddings=4096)
    assert found.prompt_tokens > 512
    assert len(found.ids) == 4
    assert answer(folder / "tiny", longer, rope_scaling=YARN | {"factor": 16.0}).prompt_tokens == found.prompt_tokens


def test_frames_of_a_text_only_model_are_refused(tmp_path: Path) -> None:
    root = save_checkpoint(tmp_path, vision=False)
    with pytest.raises(ConfigError, match=r"max_frames=3: .*text-only"):
        open_for_inference(root, EngineSettings(max_frames=3))


def test_an_override_decides_an_answer_and_stands_beside_it(folder: Path, tmp_path: Path) -> None:
    talk = [{"role": "user", "content": "<video>\nWhich?"}, {"role": "assistant", "content": "7"}]
    (folder / "q.jsonl").write_text(json.dumps({"messages": talk, "videos": ["video"]}) + "\n")
    runs = []
    for overrides in ({}, {"max_frames": 3}, {"rope_scaling": YARN}, {"rotary_base": 500.0}):
        engine = EngineSettings(kv_cache_memory="8MiB", **overrides)  # type: ignore[arg-type]
        evaluate([str(folder / "tiny")], [str(folder / "q.jsonl")], tmp_path, EvalSettings(engine=engine))
        (line,) = [json.loads(text) for text in (tmp_path / "results.jsonl").read_text().splitlines()]
        assert line["overrides"] == overrides
        assert line["prefill_seconds"] > 0
        runs.append((line["run"], line["prompt_tokens"]))
    assert len({run for run, _ in runs}) == 4
    assert [tokens == runs[0][1] for _, tokens in runs] == [True, False, True, True]
