"""The tokenizer that travels with a model: special tokens added on import, named for stock processors on export."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from megatron_vita.checkpoint.folder import TOKENIZER_FILES
from megatron_vita.convert.hf_config import read_json, write_json
from megatron_vita.data.tokenizer import (
    DEFAULT_TEMPLATE,
    END_OF_TEXT,
    IM_END,
    IM_START,
    IMG_CONTEXT,
    NAMED_TOKENS,
    VITA_TOKENS,
)
from megatron_vita.errors import CheckpointError


def special_ids(folder: Path) -> dict[str, int]:
    """Id of every added token of a tokenizer folder.

    Raises:
        CheckpointError: no readable tokenizer.json.
    """
    values = read_json(folder / "tokenizer.json")
    try:
        return {entry["content"]: int(entry["id"]) for entry in values.get("added_tokens", ())}
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{folder / 'tokenizer.json'}: damaged list of added tokens ({error!r}).") from None


def tokens_that_differ(first: Path, second: Path, limit: int = 3) -> list[str]:
    """What ids two tokenizer folders disagree about, for people; nothing where either has no tokenizer.json.

    Returns:
        At most `limit` tokens, each with both ids, and then how many more there are.
    """
    if not all((folder / "tokenizer.json").is_file() for folder in (first, second)):
        return []
    a, b = _ids(first), _ids(second)
    names = [name for name in [*a, *(name for name in b if name not in a)] if a.get(name) != b.get(name)]
    found = [f"{name!r} is {a.get(name, 'missing')} and {b.get(name, 'missing')}" for name in names[:limit]]
    return found + ([f"... and {len(names) - limit} more"] if len(names) > limit else [])


def _ids(folder: Path) -> dict[str, int]:
    vocabulary = read_json(folder / "tokenizer.json").get("model", {}).get("vocab")
    plain = vocabulary if isinstance(vocabulary, dict) else {}  # other kinds of models list pairs
    return {**plain, **special_ids(folder)}


def with_vision_tokens(source: Path, target: Path) -> int:
    """Copy a tokenizer folder and add the special tokens of pictures and videos that it has not, at the end, in the
    published order; name them for stock processors and give it the package's chat template if it knows no pictures.
    A tokenizer without ChatML's tokens (Llama's), in which that template is written, gets these first.

    Returns:
        Rows an embedding needs to hold every id.
    """
    from tokenizers import AddedToken, Tokenizer

    target.mkdir(parents=True, exist_ok=True)
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    present = special_ids(source)
    missing = [token for token in (END_OF_TEXT, IM_START, IM_END, *VITA_TOKENS) if token not in present]
    if missing:
        tokenizer = Tokenizer.from_file(str(source / "tokenizer.json"))
        tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in missing])
        tokenizer.save(str(target / "tokenizer.json"))
        # Older side files list the added tokens again, without ours.
        for name in ("added_tokens.json", "special_tokens_map.json"):
            (target / name).unlink(missing_ok=True)
    template = target / "chat_template.jinja"
    if not template.is_file() or IMG_CONTEXT not in template.read_text(encoding="utf-8"):
        shutil.copyfile(DEFAULT_TEMPLATE, template)
    config = _tokenizer_config(target)
    config["extra_special_tokens"] = NAMED_TOKENS
    config.pop("chat_template", None)
    config.pop("added_tokens_decoder", None)
    if IM_END not in present:
        config.update(eos_token=IM_END, pad_token=END_OF_TEXT)
    write_json(target / "tokenizer_config.json", config)
    return _rows(target)


def copy_for_export(source: Path, target: Path, *, vision: bool) -> dict[str, int]:
    """Copy a checkpoint's tokenizer into a Hugging Face folder.

    Returns:
        Ids of its special tokens. Where it has no ChatML (a Llama alone), `<|im_end|>` stands for what ends its texts.

    Raises:
        CheckpointError: the checkpoint holds no tokenizer, or one without the tokens of pictures.
    """
    if not (source / "tokenizer.json").is_file():
        raise CheckpointError(
            f"{source}: holds no tokenizer.json, and an exported folder needs one. Name its folder with --tokenizer."
        )
    ids = special_ids(source)
    if vision:
        missing = [token for token in NAMED_TOKENS.values() if token not in ids]
        if missing:
            raise CheckpointError(
                f"{source}: its tokenizer has no {' '.join(missing)}. Export with the one it trained with."
            )
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    config = _tokenizer_config(target)
    if IM_END in ids:
        config = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": IM_END, "pad_token": END_OF_TEXT, **config}
        if not (target / "chat_template.jinja").is_file():
            shutil.copyfile(DEFAULT_TEMPLATE, target / "chat_template.jinja")
    else:
        end = config.get("eos_token")
        end = end.get("content") if isinstance(end, dict) else end
        if end not in ids:
            raise CheckpointError(
                f"{source}: has neither {IM_END} nor an eos_token in its tokenizer_config.json: nothing would end an "
                "answer. Add the publisher's tokenizer_config.json."
            )
        ids = {**ids, IM_END: ids[end]}
    if vision:
        config["extra_special_tokens"] = NAMED_TOKENS
        config["processor_class"] = "InternVLProcessor"
    write_json(target / "tokenizer_config.json", config)
    return ids


def _rows(folder: Path) -> int:
    """Rows an embedding needs for every id of a tokenizer folder."""
    return max(_ids(folder).values(), default=-1) + 1


def _tokenizer_config(folder: Path) -> dict[str, Any]:
    path = folder / "tokenizer_config.json"
    return read_json(path) if path.is_file() else {}
