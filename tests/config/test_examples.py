"""Every recipe that is shipped loads and fits the ranks its comments name."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from megatron_vita.config import RunConfig, load_run
from megatron_vita.planning.parameters import count_parameters
from tests.convert import published

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
RANKS = {
    "quickstart/run.yaml": 2,
    "quickstart/lm.yaml": 1,
    "long_vita_0.5b/run.yaml": 8,
    "long_vita_7b/run.yaml": 32,
    "long_vita_14b/run.yaml": 64,
}
LONG_VITA = {
    "long_vita_0.5b/run.yaml": "Qwen2.5-0.5B",
    "long_vita_7b/run.yaml": "Qwen2.5-7B",
    "long_vita_14b/run.yaml": "Qwen2.5-14B",
}
"""Recipes of the reference's four stages, and their decoders."""


@pytest.fixture(autouse=True)
def _folders(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("RUN", "SHARDS", "START", "TOKENIZER"):
        monkeypatch.setenv(variable, "/data")


@pytest.mark.parametrize("name", RANKS)
def test_recipe_loads_and_fits(name: str) -> None:
    load_run(EXAMPLES / name).check(RANKS[name])


def test_no_recipe_is_forgotten() -> None:
    recipes = {str(path.relative_to(EXAMPLES)) for path in EXAMPLES.rglob("*.yaml") if "\nmodel:" in path.read_text()}
    assert recipes == set(RANKS)


def recipe(name: str) -> RunConfig:
    return load_run(EXAMPLES / name)


@pytest.mark.parametrize("name", LONG_VITA)
def test_the_long_vita_recipes_keep_the_reference_schedule(name: str) -> None:
    stages = recipe(name).stages
    assert [stage.data.seq_length for stage in stages] == [32768, 16384, 131072, 1048576]
    assert [stage.optimizer.lr for stage in stages] == [1e-3, 1e-5, 5e-6, 5e-6]
    assert [stage.data.reset_per_document for stage in stages] == [True, True, False, False]
    assert [stage.train.train_iters for stage in stages] == [1000, 5000, 1000, 500]


@pytest.mark.parametrize("name", LONG_VITA)
def test_the_long_vita_recipes_differ_in_decoder_and_layout_only(name: str) -> None:
    for stage, reference in zip(recipe(name).stages, recipe("long_vita_14b/run.yaml").stages, strict=True):
        assert dataclasses.replace(stage, model=reference.model, parallel=reference.parallel) == reference
        assert (stage.model.vision, stage.model.projector) == (reference.model.vision, reference.model.projector)


@pytest.mark.parametrize(("name", "decoder"), LONG_VITA.items())
def test_the_long_vita_recipes_have_their_published_decoders(name: str, decoder: str) -> None:
    facts, model = published.DECODERS[decoder], recipe(name).stages[0].model
    assert model.num_layers == facts["num_hidden_layers"]
    assert model.hidden_size == facts["hidden_size"]
    assert model.ffn_hidden_size == facts["intermediate_size"]
    assert model.num_attention_heads == facts["num_attention_heads"]
    assert model.num_query_groups == facts["num_key_value_heads"]
    assert model.vocab_size == facts["vocab_size"]
    assert model.untie_embeddings_and_output_weights is not facts["tie_word_embeddings"]
    assert (model.rotary_base, model.norm_epsilon) == (facts["rope_theta"], facts["rms_norm_eps"])
    assert count_parameters(model).decoder == facts["parameters"]
