"""An import for a recipe makes the model that the recipe trains, or says what does not fit."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from megatron_vita import checkpoint
from megatron_vita.config import ModelConfig, load_model, load_run
from megatron_vita.convert import cli
from megatron_vita.convert.families import long_vita
from megatron_vita.convert.rules import Rule
from tests.convert import publishers

pytest.importorskip("transformers")

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
TINY = {
    "model": {
        "num_layers": 2,
        "hidden_size": 72,
        "ffn_hidden_size": 104,
        "num_attention_heads": 6,
        "num_query_groups": 2,
        "vocab_size": publishers.VOCAB,
    },
    "vision": {
        "num_layers": 2,
        "hidden_size": 64,
        "ffn_hidden_size": 88,
        "num_attention_heads": 4,
        "image_size": 16,
        "patch_size": 4,
    },
}
"""Sizes that stand for a shipped recipe's. All its other settings stay as they are."""


def convert(*arguments: object, expect: int = 0) -> None:
    assert cli.main([str(one) for one in arguments]) == expect


def shipped() -> list[str]:
    """Recipes that train a model from imported parts."""
    found = [str(path.relative_to(EXAMPLES)) for path in EXAMPLES.rglob("*.yaml")]
    return sorted(name for name in found if "pretrained_checkpoint" in (EXAMPLES / name).read_text())


def write_parts(folder: Path, *, epsilon: float = 1e-6, tied: bool = False) -> list[str]:
    """A decoder and a tower of the tiny sizes, as the import's flags."""
    settings = {"rms_norm_eps": epsilon, "max_position_embeddings": 512, "tie_word_embeddings": tied}
    llm = publishers.write_qwen2(folder / "llm", **settings)
    sizes = TINY["vision"]
    vit = publishers.write_intern_vit(
        folder / "vit",
        remote=True,
        hidden_size=sizes["hidden_size"],
        intermediate_size=sizes["ffn_hidden_size"],
        num_attention_heads=sizes["num_attention_heads"],
    )
    return ["--llm", str(llm), "--vision", str(vit)]


def write_recipe(path: Path, name: str, **changes: Any) -> Path:
    """A shipped recipe with the tiny sizes."""
    recipe = yaml.safe_load((EXAMPLES / name).read_text())
    model = recipe["model"]
    model.update(TINY["model"])
    model["vision"].update(TINY["vision"])
    if "projector" in model and "ffn_hidden_size" in model["projector"]:  # as wide as the tower, as in the original
        model["projector"]["ffn_hidden_size"] = TINY["vision"]["hidden_size"]
    model.update(changes)
    path.write_text(yaml.safe_dump(recipe))
    return path


def shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """What a training job asks a checkpoint for."""
    rules: list[Rule] = long_vita.rules(model)
    wanted = {rule.mcore.name: rule.mcore.shape for rule in rules if rule.mcore is not None}
    if model.projector.bias:
        inner, width = model.projector_width, model.hidden_size
        wanted |= {f"vision_projection.encoder.linear_fc{n}.bias": (size,) for n, size in ((1, inner), (2, width))}
    return wanted


@pytest.mark.parametrize("name", shipped())
def test_the_import_makes_what_a_shipped_recipe_trains(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """None of the recipe's folders exists yet, nor is any of its variables set: the import comes first."""
    for variable in ("RUN", "SHARDS", "START", "TOKENIZER"):
        monkeypatch.delenv(variable, raising=False)
    recipe = write_recipe(tmp_path / "run.yaml", name)
    tied = not load_model(recipe).untie_embeddings_and_output_weights
    convert("import", "--config", recipe, *write_parts(tmp_path, tied=tied), "--output", tmp_path / "start")
    for variable in ("RUN", "SHARDS", "START", "TOKENIZER"):
        monkeypatch.setenv(variable, "/data")
    for stage in load_run(recipe).stages:
        assert checkpoint.read_state(tmp_path / "start").stage.model == stage.model
        stored = checkpoint.read_tensors(tmp_path / "start")
        assert {key: stored.shape(key) for key in stored} == shapes(stage.model)


def test_the_import_in_the_readme_takes_the_recipe_that_its_training_takes() -> None:
    readme = (EXAMPLES.parent / "README.md").read_text().replace("\\\n", "")
    for command in ("convert_ckpt.py import", "pretrain_vita.py", "plan.py"):
        found = re.search(rf"{command}[^\n]*--config (\S+)", readme)
        assert found, command
        assert found[1] == "examples/long_vita_14b/run.yaml"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rotary_base": 1e5}, r"model.rotary_base is 100000.0, in the folders 1000000.0"),
        ({"vocab_size": 320}, r"model.vocab_size is 320, in the folders 307"),
        ({"kv_channels": 16}, r"model.kv_channels is 16, in the folders 12"),
        ({"vision": None}, r"a vision tower stands in the folders, none in the recipe"),
        ({"num_layerz": 2}, r"unknown key `num_layerz`. Did you mean `num_layers`"),
    ],
)
def test_a_recipe_for_other_parts_is_refused(
    change: dict[str, Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(tmp_path / "run.yaml", "long_vita_14b/run.yaml", **change)
    flags = [*write_parts(tmp_path), "--output", tmp_path / "start"]
    convert("import", "--config", recipe, *flags, expect=2)
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "start").exists()


def test_all_that_differs_is_named_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = write_recipe(tmp_path / "run.yaml", "long_vita_14b/run.yaml", num_layers=3)
    flags = [*write_parts(tmp_path, epsilon=1e-5), "--output", tmp_path / "start"]
    convert("import", "--config", recipe, *flags, expect=2)
    error = capsys.readouterr().err
    assert "model.num_layers is 3, in the folders 2; model.norm_epsilon is 1e-06, in the folders 1e-05." in error


def test_flags_make_a_projector_and_lie_over_a_recipe(tmp_path: Path) -> None:
    """As in training, where the same flags lie over the same recipe."""
    parts = write_parts(tmp_path)
    flags = ["--projector-ffn-hidden-size", "48", "--projector-bias", "false"]
    convert("import", *parts, *flags, "--output", tmp_path / "flags")
    recipe = write_recipe(tmp_path / "run.yaml", "quickstart/run.yaml")
    convert("import", "--config", recipe, *parts, *flags, "--output", tmp_path / "both")
    for name in ("flags", "both"):
        model = checkpoint.read_state(tmp_path / name).stage.model
        assert (model.projector.ffn_hidden_size, model.projector.bias) == (48, False)
        stored = checkpoint.read_tensors(tmp_path / name)
        assert {key: stored.shape(key) for key in stored} == shapes(model)
    a, b = (checkpoint.read_tensors(tmp_path / name) for name in ("flags", "both"))
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert load_model(recipe, flags) == dataclasses.replace(
        load_model(recipe), projector=checkpoint.read_state(tmp_path / "both").stage.model.projector
    )


@pytest.mark.parametrize(
    "flags",
    [
        ["--llm", "llm", "--projector-bias", "false"],
        ["--model", "llm", "--projector-ffn-hidden-size", "8"],
        ["--llm", "llm", "--vocab-size", "300"],
        ["--model", "llm", "--vocab-size", "300"],
    ],
)
def test_flags_that_nothing_would_read_are_refused(flags: list[str], tmp_path: Path) -> None:
    publishers.write_qwen2(tmp_path / "llm")
    placed = [str(tmp_path / one) if one == "llm" else one for one in flags]
    convert("import", *placed, "--output", tmp_path / "out", expect=2)
    assert not (tmp_path / "out").exists()
