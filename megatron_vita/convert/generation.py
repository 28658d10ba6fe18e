"""BOS, EOS and padding tokens and sampling defaults: the publisher's settings, preserved through a checkpoint.

A Hugging Face folder says it twice, and not always alike: Qwen2.5's config.json ends a text at one token, its
generation_config.json at two. A checkpoint carries both in its tokenizer folder, so that training's saves keep them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_vita.convert.hf_config import read_json, write_json
from megatron_vita.data.text.tokenizer import END_OF_TEXT, IM_END
from megatron_vita.errors import CheckpointError

GENERATION_FILE = "generation_config.json"
TOKEN_IDS_FILE = "token_ids.json"
"""File in a checkpoint's tokenizer folder with the values of KEYS in config.json."""
BEGIN, END, PAD = KEYS = ("bos_token_id", "eos_token_id", "pad_token_id")


@dataclass(frozen=True)
class GenerationSettings:
    """Generation settings of a folder; empty if it has none."""

    token_ids: Mapping[str, Any] = field(default_factory=dict)
    """KEYS of config.json that are not null: an id each, for EOS possibly several."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """generation_config.json."""

    def or_else(self, other: GenerationSettings) -> GenerationSettings:
        """These settings, completed by another's."""
        return GenerationSettings(self.token_ids or other.token_ids, self.settings or other.settings)

    def completed(self, special: Mapping[str, int], end: int | None, *, turns: bool) -> GenerationSettings:
        """Complete the settings with an EOS token: the publisher's values are kept, missing ones are ChatML's.

        Args:
            special: ids of the tokenizer's special tokens.
            end: EOS token if neither the publisher nor ChatML has one.
            turns: the model uses the package's chat template, so the end of its turns must be an EOS token.

        Returns:
            With EOS in `token_ids` and in `settings`, unless no EOS token is known.
        """
        ends = [special[name] for name in (IM_END, END_OF_TEXT) if name in special]
        ends = ends or ([] if end is None else [end])
        filler = special.get(END_OF_TEXT)
        ids, settings = dict(self.token_ids), dict(self.settings)
        if END not in ids and settings.get(END) is None:
            ids = _filled(ids, {BEGIN: filler, END: ends[0] if ends else None, PAD: filler})
            settings = _filled(settings, {**ids, END: ends or None})
        elif END not in ids:
            ids = _filled(ids, _present(settings))
        elif settings.get(END) is None:
            settings = _filled(settings, ids)
        must = special[IM_END] if turns and IM_END in special else None
        return GenerationSettings(_ending(ids, must), _ending(settings, must))

    def write(self, folder: Path) -> None:
        """Write the settings into the tokenizer folder of a checkpoint."""
        if self.token_ids:
            write_json(folder / TOKEN_IDS_FILE, self.token_ids)
        if self.settings:
            write_json(folder / GENERATION_FILE, self.settings)


def read(folder: Path) -> GenerationSettings:
    """Read the generation settings of a Hugging Face folder or of a checkpoint's tokenizer folder. Raises
    CheckpointError: a file is not JSON, or an id is not an integer."""
    ids: dict[str, Any] = {}
    if (folder / TOKEN_IDS_FILE).is_file():
        ids = _ids(read_json(folder / TOKEN_IDS_FILE), folder / TOKEN_IDS_FILE)
    elif (folder / "config.json").is_file():
        config = read_json(folder / "config.json")
        text = config.get("text_config")
        outer = _ids(config, folder / "config.json")
        ids = {**outer, **(_ids(text, folder / "config.json") if isinstance(text, Mapping) else {})}
    settings: dict[str, Any] = {}
    if (folder / GENERATION_FILE).is_file():
        settings = read_json(folder / GENERATION_FILE)
        _ids(settings, folder / GENERATION_FILE)
    return GenerationSettings(ids, settings)


def _ids(values: Mapping[str, Any], where: Path) -> dict[str, Any]:
    """The KEYS that are set, each an id or, for EOS, several."""
    found = _present(values)
    for key, value in found.items():
        many = value if key == END and isinstance(value, list) else [value]
        if not many or any(type(one) is not int or one < 0 for one in many):
            raise CheckpointError(f"{where}: {key}={value!r} is no id of a token. Download it again, or correct it.")
    return found


def _present(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: values[key] for key in KEYS if values.get(key) is not None}


def _filled(values: Mapping[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    """Values, completed by `more`."""
    return {**{key: value for key, value in more.items() if value is not None}, **_own(values)}


def _own(values: Mapping[str, Any]) -> dict[str, Any]:
    """Settings without nulls and without `_from_model_config`, with which transformers would prefer config.json."""
    return {key: value for key, value in values.items() if value is not None and key != "_from_model_config"}


def _ending(values: Mapping[str, Any], must: int | None) -> dict[str, Any]:
    """Values whose EOS tokens include `must`."""
    said = values.get(END)
    ends = said if isinstance(said, list) else [said]
    if must is None or said is None or must in ends:
        return dict(values)
    return {**_own(values), END: [must, *ends]}
