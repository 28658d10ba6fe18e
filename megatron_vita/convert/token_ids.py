"""Token ids of a tokenizer folder, checked against its model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_vita.convert.hf_config import read_json
from megatron_vita.data.text.tokenizer import IMG_CONTEXT, NAMED_TOKENS, VitaTokenizer
from megatron_vita.errors import CheckpointError, ConfigError, DataError

TOKENIZER_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"


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
        name = tokenizer_config(self.folder).get("eos_token")
        name = name.get("content") if isinstance(name, dict) else name
        return self.ids.get(name) if isinstance(name, str) else None


def read_tokens(folder: Path) -> Tokens:
    """The ids of a tokenizer folder. Raises CheckpointError: no tokenizer.json there, or one without a vocabulary."""
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
    """Description of the ids in which two tokenizer folders differ; empty if either has no tokenizer.json.

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
    """Reject a tokenizer that was named instead of a model's own, and gives a token that both know another id. Raises
    CheckpointError: naming a token.

    Args:
        tokens: of the one that was named.
        own: folder of the model's own; nothing is checked if it holds none.
    """
    if own == tokens.folder or not (own / TOKENIZER_FILE).is_file():
        return
    known, named = read_tokens(own).ids, tokens.ids
    other = [name for name, number in known.items() if named.get(name, number) != number]
    if other:
        name = IMG_CONTEXT if IMG_CONTEXT in other else other[0]
        raise CheckpointError(
            f"{tokens.folder}: {name!r} is {named[name]}, but {known[name]} in the model's own tokenizer, {own} "
            f"({len(other)} tokens differ). Name the tokenizer that the model was trained with, or none."
        )


def check_rows(tokens: Tokens, rows: int) -> None:
    """Reject a tokenizer with ids for which a model's embedding has no row. Raises CheckpointError: saying the highest
    id."""
    if tokens.rows > rows:
        raise CheckpointError(
            f"{tokens.folder / TOKENIZER_FILE}: its highest id is {tokens.rows - 1}, but the model's vocabulary has "
            f"{rows} rows. Give the tokenizer that the model was trained with (--tokenizer)."
        )


def check_image_token(tokens: Tokens, image_token_id: int | None, where: Path) -> None:
    """Reject a tokenizer whose token of pictures is not the one that a model's config.json names. Raises
    CheckpointError: with both ids.

    Args:
        tokens: of the tokenizer.
        image_token_id: what the config says; none where it cannot say it.
        where: the config.
    """
    found = tokens.special.get(IMG_CONTEXT)
    if image_token_id is not None and found != image_token_id:
        raise CheckpointError(
            f"{tokens.folder / TOKENIZER_FILE}: {IMG_CONTEXT} is {'missing' if found is None else found}, but {where} "
            f"says image_token_id={image_token_id}: pictures would stand where the model looks for none. Give the "
            "tokenizer that it was trained with (--tokenizer), or correct the one that is wrong."
        )


def check_same_as_trained(tokens: Tokens, trained: str) -> None:
    """Reject a folder for what was trained with a SentencePiece model, unless conversations become the same ids. Raises
    CheckpointError: they differ, or the file is gone.

    Args:
        tokens: of the folder that is to be exported.
        trained: the run's data.tokenizer_model; anything else than a `.model` file lies in the checkpoint already.
    """
    if not trained.endswith(".model"):
        return
    try:
        same = VitaTokenizer.load(trained).same_ids(VitaTokenizer.load(tokens.folder))
    except (ConfigError, DataError) as error:
        raise CheckpointError(f"{tokens.folder}: cannot be compared with {trained}: {error}") from None
    if not same:
        raise CheckpointError(
            f"{tokens.folder}: conversations become other ids than with {trained}, which the model was trained with. "
            "Name the folder of the same tokenizer (--tokenizer), its special tokens behind the pieces."
        )


def check_exportable(tokens: Tokens, *, vision: bool) -> None:
    """Reject a tokenizer without the tokens of pictures. Raises CheckpointError: naming what is missing."""
    missing = [token for token in NAMED_TOKENS.values() if token not in tokens.special]
    if vision and missing:
        raise CheckpointError(
            f"{tokens.folder}: its tokenizer has no {' '.join(missing)}. Export with the one it trained with."
        )


def tokenizer_config(folder: Path) -> dict[str, Any]:
    """Its settings; none where it has no such file."""
    path = folder / CONFIG_FILE
    return read_json(path) if path.is_file() else {}
