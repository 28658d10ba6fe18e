"""Published models by name: their config.json, and what stock transformers makes of it without weights."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
import yaml

FACTS: dict[str, Any] = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text())

DECODERS: dict[str, dict[str, Any]] = {
    name: {**family["common"], **changes} for family in FACTS["decoders"] for name, changes in family["models"].items()
}
TEXT_TOWERS: dict[str, dict[str, Any]] = {name: one["config"] for name, one in FACTS["text_towers"].items()}
INTERNVL: dict[str, tuple[dict[str, Any], str, str]] = {
    name: (family, tower, decoder)
    for family in FACTS["internvl"]
    for name, (tower, decoder) in family["models"].items()
}
LONG_VITA: dict[str, dict[str, Any]] = FACTS["long_vita"]


def decoder(name: str) -> dict[str, Any]:
    """config.json of a decoder."""
    return {key: value for key, value in DECODERS[name].items() if key != "parameters"}


def intern_vit(name: str, *, native: bool) -> dict[str, Any]:
    """config.json of an InternViT, as transformers or as OpenGVLab's remote code spells it."""
    facts, side = FACTS["intern_vit"][name], FACTS["intern_vit"][name]["image_size"]
    if native:
        sides = {"image_size": [side, side], "patch_size": [14, 14]}
        return {"model_type": "internvl_vision", **facts["sizes"], **sides, **facts["native"]}
    return {"model_type": "intern_vit_6b", **facts["sizes"], "image_size": side, "patch_size": 14, **facts["remote"]}


def internvl(name: str) -> dict[str, Any]:
    """config.json of a native InternVL. A setting that is null among the facts is not in the file."""
    family, tower, text = INTERNVL[name]
    text_config = {**decoder(text), **family["text"]}
    return {
        "model_type": "internvl",
        "architectures": ["InternVLForConditionalGeneration"],
        "text_config": {key: value for key, value in text_config.items() if value is not None},
        "vision_config": intern_vit(tower, native=True),
        "image_token_id": family["image_token_id"],
        "image_seq_length": 256,
        "downsample_ratio": 0.5,
        "projector_hidden_act": "gelu",
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "default",
    }


def stock_config(config: dict[str, Any]) -> Any:
    """transformers' reading of a config.json."""
    from transformers import AutoConfig

    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config))
        return AutoConfig.from_pretrained(folder)


def saved(config: Any) -> dict[str, Any]:
    """The config.json that transformers writes: only what it thinks worth saying."""
    values = json.loads(config.to_json_string())
    assert isinstance(values, dict)
    return values


def on_meta(auto: Any, config: Any) -> Any:
    """A stock model without memory."""
    with torch.device("meta"):
        return auto.from_config(config)


def shapes(network: Any, *, on_disk: bool = False) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that its file holds; a tied head is no tensor of its own.

    Args:
        on_disk: in the names that save_pretrained writes, which for InternVL are not those of the state dict.
    """
    from transformers.core_model_loading import revert_weight_conversion

    state = {name: tensor for name, tensor in network.state_dict().items() if name not in network.all_tied_weights_keys}
    if on_disk:
        state = revert_weight_conversion(network, state)
    return {name: tuple(tensor.shape) for name, tensor in state.items()}
