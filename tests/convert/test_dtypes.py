"""Types of weights: what a change of type would lose is refused, and config.json names one that loses nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from megatron_vita import checkpoint
from megatron_vita.convert import cli
from tests.convert import publishers

transformers = pytest.importorskip("transformers")

NORM = "model.norm.weight"


def convert(*arguments: object, expect: int = 0) -> None:
    assert cli.main([str(one) for one in arguments]) == expect


@pytest.mark.parametrize(("value", "status"), [(1e6, 1), (-7e4, 1), (65504.0, 0), (float("inf"), 0)])
def test_a_finite_value_never_becomes_infinite(
    value: float, status: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """float16 ends at 65504. What is infinite already stays so: it is no loss of the conversion."""
    llm = publishers.write_qwen2(tmp_path / "llm")
    tensors = publishers.tensors_of(llm)
    tensors[NORM][3] = value
    save_file(tensors, llm / "model.safetensors", metadata={"format": "pt"})
    flags = ["--format", "llm", "--dtype", "float16"]
    convert("export", "--checkpoint", llm, "--output", tmp_path / "hf", *flags, expect=status)
    assert (tmp_path / "hf").exists() == (status == 0)
    if status:
        error = capsys.readouterr().err
        assert "language_model.decoder.final_layernorm.weight" in error
        assert f"{value:g} does not fit into float16" in error


def test_a_fresh_projector_has_the_type_of_the_matrices(tmp_path: Path) -> None:
    """Some publishers keep norms in float32 in a bfloat16 decoder: such a norm says nothing about a projector."""
    llm = publishers.write_qwen2(tmp_path / "llm", dtype=torch.bfloat16)
    tensors = {k: one.float() if "norm" in k else one for k, one in publishers.tensors_of(llm).items()}
    save_file(tensors, llm / "model.safetensors", metadata={"format": "pt"})
    publishers.write_intern_vit(tmp_path / "vit", remote=False)
    convert("import", "--llm", llm, "--vision", tmp_path / "vit", "--output", tmp_path / "ckpt")
    stored = checkpoint.read_tensors(tmp_path / "ckpt")
    projector = {stored.dtype(name) for name in stored if name.startswith("vision_projection.")}
    assert projector == {torch.bfloat16}


@pytest.mark.parametrize("decoder", [torch.float16, torch.bfloat16])
def test_stock_code_loads_every_value_of_a_folder_of_two_types(decoder: torch.dtype, tmp_path: Path) -> None:
    """from_pretrained casts all weights to config.json's dtype: it must be one that holds them all."""
    publishers.write_qwen2(tmp_path / "llm", dtype=decoder)
    publishers.write_intern_vit(tmp_path / "vit", remote=False)
    hf = tmp_path / "hf"
    convert("import", "--llm", tmp_path / "llm", "--vision", tmp_path / "vit", "--output", tmp_path / "ckpt")
    convert("export", "--checkpoint", tmp_path / "ckpt", "--output", hf, "--format", "internvl")
    config = json.loads((hf / "config.json").read_text())
    assert [config["dtype"], config["text_config"]["dtype"], config["vision_config"]["dtype"]] == ["float32"] * 3
    network = transformers.AutoModelForImageTextToText.from_pretrained(hf)
    loaded = network.state_dict()
    for name, one in publishers.tensors_of(hf).items():
        prefix, _, rest = name.partition("language_model.model.")
        name_in_memory = "model.language_model." + rest if rest else "model." + prefix
        name_in_memory = "lm_head.weight" if name == "language_model.lm_head.weight" else name_in_memory
        assert torch.equal(loaded[name_in_memory], one.float()), name


def test_one_type_and_a_type_that_is_asked_for_stand_in_the_config(tmp_path: Path) -> None:
    publishers.write_qwen2(tmp_path / "llm", dtype=torch.bfloat16)
    convert("export", "--checkpoint", tmp_path / "llm", "--output", tmp_path / "same", "--format", "llm")
    assert json.loads((tmp_path / "same/config.json").read_text())["dtype"] == "bfloat16"
    flags = ["--format", "llm", "--dtype", "float16"]
    convert("export", "--checkpoint", tmp_path / "llm", "--output", tmp_path / "half", *flags)
    assert json.loads((tmp_path / "half/config.json").read_text())["dtype"] == "float16"
