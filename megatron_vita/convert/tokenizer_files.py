"""The tokenizer that travels with a model: special tokens added on import, named for stock processors on export."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_vita.checkpoint.folder import CHAT_TEMPLATES, copy_tokenizer_files
from megatron_vita.convert.hf_config import read_json, write_json
from megatron_vita.data.text.tokenizer import (
    DEFAULT_TEMPLATE,
    END_OF_TEXT,
    IM_END,
    IM_START,
    IMG_CONTEXT,
    NAMED_TOKENS,
    VITA_TOKENS,
)
from megatron_vita.errors import CheckpointError

log = logging.getLogger(__name__)

TOKENIZER_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"
TEMPLATE_FILE = "chat_template.jinja"
OLD_TEMPLATE_FILE = "chat_template.json"
"""Where processors had it before TEMPLATE_FILE."""


@dataclass(frozen=True)
class Tokens:
    """The ids of a tokenizer folder."""

    folder: Path
    plain: dict[str, int]
    """Its vocabulary."""
    special: dict[str, int]
    """Its added tokens, which stand in the vocabulary too or come after it."""

    @property
    def ids(self) -> dict[str, int]:
        """Every token's id."""
        return {**self.plain, **self.special}

    @property
    def rows(self) -> int:
        """Rows an embedding needs to hold every id."""
        return 1 + max(max(self.plain.values(), default=-1), max(self.special.values(), default=-1))

    @property
    def end(self) -> int | None:
        """Id of what its tokenizer_config.json calls the end of a text."""
        name = _tokenizer_config(self.folder).get("eos_token")
        name = name.get("content") if isinstance(name, dict) else name
        return self.ids.get(name) if isinstance(name, str) else None


def read_tokens(folder: Path) -> Tokens:
    """The ids of a tokenizer folder.

    Raises:
        CheckpointError: no tokenizer.json there, or one that holds no vocabulary.
    """
    path = folder / TOKENIZER_FILE
    if not path.is_file():
        raise CheckpointError(f"{folder}: holds no tokenizer.json. Name a tokenizer folder with --tokenizer.")
    values = read_json(path)
    model, added = values.get("model"), values.get("added_tokens", [])
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocabulary, list):  # unigram models list (token, score), in the order of their ids
        vocabulary = {one[0]: i for i, one in enumerate(vocabulary) if isinstance(one, list) and one}
    if not isinstance(vocabulary, dict) or any(type(one) is not int or one < 0 for one in vocabulary.values()):
        raise CheckpointError(f"{path}: holds no model with a vocabulary. Download it again.")
    try:
        special = {str(entry["content"]): int(entry["id"]) for entry in added}
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: damaged list of added tokens ({error!r}).") from None
    return Tokens(folder, vocabulary, special)


def tokens_that_differ(first: Path, second: Path, limit: int = 3) -> list[str]:
    """What ids two tokenizer folders disagree about, for people; nothing where either has no tokenizer.json.

    Returns:
        At most `limit` tokens, each with both ids, and then how many more there are.
    """
    if not all((folder / TOKENIZER_FILE).is_file() for folder in (first, second)):
        return []
    a, b = read_tokens(first).ids, read_tokens(second).ids
    names = [name for name in [*a, *(name for name in b if name not in a)] if a.get(name) != b.get(name)]
    found = [f"{name!r} is {a.get(name, 'missing')} and {b.get(name, 'missing')}" for name in names[:limit]]
    return found + ([f"... and {len(names) - limit} more"] if len(names) > limit else [])


def check_same_ids(tokens: Tokens, own: Path) -> None:
    """Refuse a tokenizer that was named instead of a model's own, and gives a token that both know another id.

    Args:
        tokens: of the one that was named.
        own: folder of the model's own; nothing is checked if it holds none.

    Raises:
        CheckpointError: naming a token.
    """
    if own == tokens.folder or not (own / TOKENIZER_FILE).is_file():
        return
    theirs, named = read_tokens(own).ids, tokens.ids
    other = [name for name, number in theirs.items() if named.get(name, number) != number]
    if other:
        name = IMG_CONTEXT if IMG_CONTEXT in other else other[0]
        raise CheckpointError(
            f"{tokens.folder}: {name!r} is {named[name]}, but {theirs[name]} in the model's own tokenizer, {own} "
            f"({len(other)} tokens differ). Name the tokenizer that the model was trained with, or none."
        )


def check_rows(tokens: Tokens, rows: int) -> None:
    """Refuse a tokenizer with ids for which a model's embedding has no row.

    Raises:
        CheckpointError: saying the highest id.
    """
    if tokens.rows > rows:
        raise CheckpointError(
            f"{tokens.folder / TOKENIZER_FILE}: its highest id is {tokens.rows - 1}, but the model's vocabulary has "
            f"{rows} rows. Give the tokenizer that the model was trained with (--tokenizer)."
        )


def check_image_token(tokens: Tokens, image_token_id: int | None, where: Path) -> None:
    """Refuse a tokenizer whose token of pictures is not the one that a model's config.json names.

    Args:
        tokens: of the tokenizer.
        image_token_id: what the config says; none where it cannot say it.
        where: the config.

    Raises:
        CheckpointError: with both ids.
    """
    found = tokens.special.get(IMG_CONTEXT)
    if image_token_id is not None and found != image_token_id:
        raise CheckpointError(
            f"{tokens.folder / TOKENIZER_FILE}: {IMG_CONTEXT} is {'missing' if found is None else found}, but {where} "
            f"says image_token_id={image_token_id}: pictures would stand where the model looks for none. Give the "
            "tokenizer that it was trained with (--tokenizer), or correct the one that is wrong."
        )


def with_vision_tokens(source: Path, target: Path) -> int:
    """Copy a tokenizer folder and add the special tokens of pictures and videos that it has not, at the end, in the
    published order; name them for stock processors and give it the package's chat template if it knows no pictures.
    A tokenizer without ChatML's tokens (Llama's), in which that template is written, gets these first.

    Returns:
        Rows an embedding needs to hold every id.

    Raises:
        CheckpointError: a file of the tokenizer is damaged.
    """
    present = read_tokens(source).special
    config = _tokenizer_config(source)
    missing = [token for token in (END_OF_TEXT, IM_START, IM_END, *VITA_TOKENS) if token not in present]
    copy_tokenizer_files(source, target, generation=False)
    if missing:
        from tokenizers import AddedToken, Tokenizer

        try:
            tokenizer = Tokenizer.from_file(str(source / TOKENIZER_FILE))
        except MemoryError:
            raise
        except Exception as error:  # the library raises bare Exception on what it cannot read
            raise CheckpointError(f"{source / TOKENIZER_FILE}: not a tokenizer that can be read: {error}") from None
        tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in missing])
        tokenizer.save(str(target / TOKENIZER_FILE))
        # Older side files list the added tokens again, without ours.
        for name in ("added_tokens.json", "special_tokens_map.json"):
            (target / name).unlink(missing_ok=True)
    config["extra_special_tokens"] = NAMED_TOKENS
    config.pop("added_tokens_decoder", None)
    if IM_END not in present:
        config.update(eos_token=IM_END, pad_token=END_OF_TEXT)
    _write_picture_template(source, target, config)
    write_json(target / CONFIG_FILE, config)
    return read_tokens(target).rows


def as_published(source: Path, target: Path, *, vision: bool) -> None:
    """Copy a tokenizer whose tokens stay as they are.

    Args:
        source: its folder.
        target: where to.
        vision: the model sees: a chat template that knows pictures goes where training and export look for it.

    Raises:
        CheckpointError: a file of the tokenizer is damaged.
    """
    config = _tokenizer_config(source)
    _templates(source)  # damaged ones are refused now and not on the way out
    copy_tokenizer_files(source, target, generation=False)
    if vision:
        _write_picture_template(source, target, config)
        write_json(target / CONFIG_FILE, config)


def copy_for_export(tokens: Tokens, target: Path, *, vision: bool) -> None:
    """Copy a tokenizer into a Hugging Face folder. A decoder keeps the chat template that its publisher gave it.

    Args:
        tokens: of the tokenizer; check_exportable has let it pass.
        target: the folder.
        vision: name the tokens of pictures for stock processors, with a chat template that knows pictures.

    Raises:
        CheckpointError: a file of the tokenizer is damaged.
    """
    source, config = tokens.folder, _tokenizer_config(tokens.folder)
    copy_tokenizer_files(source, target, generation=False)
    if IM_END in tokens.special:
        config = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": IM_END, "pad_token": END_OF_TEXT, **config}
    if vision:
        config["extra_special_tokens"] = NAMED_TOKENS
        config["processor_class"] = "InternVLProcessor"
        _write_picture_template(source, target, config)
    elif IM_END in tokens.special and not _templates(source):
        log.info("%s: has no chat template; the package's own (ChatML) is written", source)
        (target / TEMPLATE_FILE).write_bytes(DEFAULT_TEMPLATE.read_bytes())
    write_json(target / CONFIG_FILE, config)


def check_exportable(tokens: Tokens, *, vision: bool) -> None:
    """Refuse a tokenizer without the tokens of pictures.

    Raises:
        CheckpointError: naming what is missing.
    """
    missing = [token for token in NAMED_TOKENS.values() if token not in tokens.special]
    if vision and missing:
        raise CheckpointError(
            f"{tokens.folder}: its tokenizer has no {' '.join(missing)}. Export with the one it trained with."
        )


def _write_picture_template(source: Path, target: Path, config: dict[str, Any]) -> None:
    """Into TEMPLATE_FILE and nowhere else: the publisher's chat template if it knows pictures, else the package's."""
    templates = _templates(source)
    known = [text for text in templates.values() if IMG_CONTEXT in text]
    if templates and not known:
        log.info(
            "%s: the publisher's chat template (%s) knows no pictures; the package's own (ChatML, no default system "
            "turn, no tools) takes its place",
            source,
            next(iter(templates)),
        )
    (target / TEMPLATE_FILE).write_text(known[0] if known else DEFAULT_TEMPLATE.read_text("utf-8"), encoding="utf-8")
    config.pop("chat_template", None)
    (target / OLD_TEMPLATE_FILE).unlink(missing_ok=True)
    if not known:
        for path in (target / CHAT_TEMPLATES).glob("*"):
            path.unlink()


def _templates(folder: Path) -> dict[str, str]:
    """Default chat templates of a tokenizer folder by file, in the order in which stock code prefers them."""
    found: dict[str, Any] = {}
    path = folder / TEMPLATE_FILE
    if path.is_file():
        try:
            found[TEMPLATE_FILE] = path.read_text(encoding="utf-8")
        except ValueError:
            raise CheckpointError(f"{path}: is no text in UTF-8. Download it again.") from None
    inside = _tokenizer_config(folder).get("chat_template")
    if isinstance(inside, list):  # several by name
        inside = {one.get("name"): one.get("template") for one in inside if isinstance(one, dict)}
    found[CONFIG_FILE] = inside.get("default") if isinstance(inside, dict) else inside
    if (folder / OLD_TEMPLATE_FILE).is_file():
        found[OLD_TEMPLATE_FILE] = read_json(folder / OLD_TEMPLATE_FILE).get("chat_template")
    for name, text in found.items():
        if text is not None and not isinstance(text, str):
            raise CheckpointError(f"{folder / name}: its chat_template is no text. Download it again.")
    return {name: text for name, text in found.items() if text is not None}


def _tokenizer_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_FILE
    return read_json(path) if path.is_file() else {}
