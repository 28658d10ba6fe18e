"""The model card: base models, and the recipe and the data of every stage, wherever the shards are by then."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_vita import checkpoint
from megatron_vita.checkpoint.history import DataSummary, SourceSummary
from megatron_vita.convert import cli
from megatron_vita.convert.card import public_name
from megatron_vita.data.spec import PreprocessSpec
from tests.convert import publishers

pytest.importorskip("transformers")

SOURCE = SourceSummary(name="LLaVA|Re\nCap", read=10, used=8, rejected=2, truncated=3, tokens=4321, tiles=7)


def convert(*arguments: object, expect: int = 0) -> None:
    assert cli.main([str(one) for one in arguments]) == expect


def front_matter(card: str) -> dict[str, Any]:
    """The YAML that the Hub reads."""
    found = re.match(r"---\n(.*?)\n---\n", card, re.DOTALL)
    assert found
    values: dict[str, Any] = yaml.safe_load(found[1])
    return values


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """start: a fresh import of a decoder in a cache of downloads and a tower, as narrow as Long-VITA's projector."""
    root = tmp_path_factory.mktemp("parts")
    llm = root / "models--Qwen--Qwen2.5-14B-Instruct" / "snapshots" / "0123456789abcdef"
    publishers.write_qwen2(llm)
    publishers.write_intern_vit(root / "InternViT-300M-448px", remote=False)
    flags = ["--projector-ffn-hidden-size", 60, "--projector-bias", "false", "--output", root / "start"]
    convert("import", "--llm", llm, "--vision", root / "InternViT-300M-448px", *flags)
    return root


def train(start: Path, root: Path, name: str, steps: int, *, layout: str = "internvl") -> Path:
    """What a stage leaves behind, without training: its state follows from that of what it started from."""
    before = checkpoint.read_state(start)
    stage = dataclasses.replace(
        before.stage,
        name=name,
        data=dataclasses.replace(before.stage.data, data_path=str(root / "gone" / name)),
        train=dataclasses.replace(before.stage.train, global_batch_size=8),
        checkpoint=dataclasses.replace(before.stage.checkpoint, save=str(root / "save")),
    )
    assert before.preprocess is not None
    state = checkpoint.RunState(
        stage=stage,
        iteration=steps,
        consumed_packs=8 * steps,
        preprocess=PreprocessSpec(**{**before.preprocess.to_dict(), "layout": layout}),
        manifest_digest=name[-1] * 64,
        data=DataSummary(name=name, seq_length=4096, layout=layout, sources=(SOURCE,)),
        base_models=before.base_models,
        earlier=before.history,
    )
    tokenizer = checkpoint.resolve(start) / "tokenizer"
    return checkpoint.write_tensors(root / "save" / name, steps, checkpoint.read_tensors(start), state, tokenizer)


def card_of(trained: Path, output: Path, format_name: str) -> str:
    convert("export", "--checkpoint", trained, "--output", output, "--format", format_name)
    return (output / "README.md").read_text()


@pytest.mark.parametrize("format_name", ["internvl", "long_vita", "llm"])
def test_the_card_tells_of_all_stages_without_their_shards(parts: Path, tmp_path: Path, format_name: str) -> None:
    first = train(parts / "start", tmp_path, "stage1", 5)
    second = train(first, tmp_path, "stage2", 9)
    card = card_of(second, tmp_path / "hf", format_name)
    bases = ["Qwen/Qwen2.5-14B-Instruct", "InternViT-300M-448px"]
    assert front_matter(card)["base_model"] == bases[: 1 if format_name == "llm" else 2]
    for name, steps in (("stage1", 5), ("stage2", 9)):
        assert f"### {name}: {steps} steps, {8 * steps} packs" in card
        assert name[-1] * 64 in card
        assert f"name: {name}" in card
    assert card.count("| LLaVA Re Cap | 10 | 8 | 2 | 3 | 4321 | 7 |") == 2
    assert str(tmp_path) not in card
    assert str(parts) not in card


def test_a_later_stage_shows_what_differs(parts: Path, tmp_path: Path) -> None:
    """Four whole recipes would hide what matters."""
    second = train(train(parts / "start", tmp_path, "stage1", 5), tmp_path, "stage2", 9)
    card = card_of(second, tmp_path / "hf", "internvl")
    assert card.index("## Data") < card.index("## Recipe")
    first, last = (yaml.safe_load(text) for text in re.findall(r"```yaml\n(.*?)```", card, re.DOTALL))
    assert (first["data"]["data_path"], first["train"]["global_batch_size"]) == ("stage1", 8)
    assert first["checkpoint"]["save"] == "save"
    assert last == {"name": "stage2", "data": {"data_path": "stage2"}}


def test_a_fresh_import_has_no_recipe_and_no_digest(parts: Path, tmp_path: Path) -> None:
    card = card_of(parts / "start", tmp_path / "hf", "internvl")
    assert "Imported and not trained; the projector is fresh (seed 1234)." in card
    assert "- decoder: `Qwen/Qwen2.5-14B-Instruct`" in card
    assert "None" not in card
    assert "## Recipe" not in card
    assert "## Data" not in card


@pytest.mark.parametrize(
    ("format_name", "layout", "present", "absent"),
    [
        ("internvl", "internvl", ["AutoModelForImageTextToText"], ["Token layout"]),
        ("internvl", "long_vita", ["Token layout", "`long_vita` layout", "stock processor cannot write"], []),
        ("long_vita", "long_vita", ["Stock transformers has no class for `long_vita`", "`long_vita` layout"], []),
        ("long_vita", "internvl", ["Stock transformers has no class", "Long-VITA's own code cannot write"], []),
        ("llm", "internvl", ["AutoModelForCausalLM", "AutoTokenizer"], ["AutoModelForImage", "Token layout"]),
    ],
)
def test_the_card_says_how_to_load_the_folder_and_what_its_input_is(
    parts: Path, tmp_path: Path, format_name: str, layout: str, present: list[str], absent: list[str]
) -> None:
    trained = train(parts / "start", tmp_path, "stage1", 5, layout=layout)
    card = card_of(trained, tmp_path / "hf", format_name)
    assert [one for one in present if one not in card] == []
    assert [one for one in absent if one in card] == []
    library = "megatron_vita" if format_name == "long_vita" else "transformers"
    assert front_matter(card)["library_name"] == library


def test_a_name_is_a_cached_repositorys_or_the_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert public_name("/cache/models--Qwen--Qwen3-8B/snapshots/abc") == "Qwen/Qwen3-8B"
    assert public_name("models/Qwen3-8B/") == "Qwen3-8B"
    assert public_name(".") == tmp_path.name


def test_the_code_in_the_card_runs_as_it_stands(parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    card = card_of(parts / "start", tmp_path / "hf", "llm")
    monkeypatch.chdir(tmp_path / "hf")
    names: dict[str, Any] = {}
    exec(card.split("```python\n")[1].split("```")[0], names)
    assert names["model"].config.model_type == "qwen2"
