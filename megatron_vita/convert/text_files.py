"""Tokenizer and generation settings of a model: their import into a checkpoint and export from it.

Both ways the tokenizer is held against the model before anything is written: ids that another tokenizer gave the
model's words, or that have no row in its embedding, are found here and not in the loss.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_vita.convert import generation
from megatron_vita.convert.hf_config import write_json
from megatron_vita.convert.opening import MEGATRON, OpenModel
from megatron_vita.convert.token_ids import (
    TOKENIZER_FILE,
    Tokens,
    check_exportable,
    check_image_token,
    check_rows,
    check_same_as_trained,
    check_same_ids,
    read_tokens,
)
from megatron_vita.convert.tokenizer_files import as_published, copy_for_export, with_vision_tokens
from megatron_vita.data.text.tokenizer import IM_END, IMG_CONTEXT
from megatron_vita.errors import CheckpointError


def into_checkpoint(opened: OpenModel, tokenizer: Path | None, target: Path, *, joined: bool = False) -> int:
    """Gather a checkpoint's tokenizer folder for a model that is being imported. Raises CheckpointError: no tokenizer,
    a damaged one, or one that is not the model's.

    Args:
        opened: the model.
        tokenizer: the folder that was named, or none for the model's own.
        target: where to.
        joined: the model is a decoder that gets a tower, so its tokenizer gets the tokens of pictures.

    Returns:
        Rows an embedding needs to hold every id. More than the model has only where tokens were added.
    """
    tokens = read_tokens(tokenizer or opened.tokenizer_dir)
    if joined:
        check_rows(Tokens(tokens.folder, tokens.plain, {}), opened.model.vocab_size)
    else:
        check_rows(tokens, opened.model.vocab_size)
    check_image_token(tokens, opened.image_token_id, opened.path / "config.json")
    if opened.image_token_id is None:  # where it is said, it is the better witness: the model's own may be wrong
        check_same_ids(tokens, opened.tokenizer_dir)
    said = generation.read(opened.tokenizer_dir).or_else(generation.read(tokens.folder))
    if joined or (opened.kind == MEGATRON and opened.model.vision is not None):
        rows = with_vision_tokens(tokens.folder, target)
        said = said.completed(read_tokens(target).special, tokens.end, turns=True)
    else:
        rows = tokens.rows
        as_published(tokens.folder, target, vision=opened.model.vision is not None)
    said.write(target)
    return rows


def tokens_for_export(opened: OpenModel, tokenizer: Path | None, *, vision: bool) -> Tokens:
    """The tokenizer that goes into an exported folder. Raises CheckpointError: no tokenizer, a damaged one, one that is
    not the model's, or one without tokens of pictures.

    Args:
        opened: the model.
        tokenizer: the folder that was named, or none for the model's own.
        vision: whether the folder's model sees.
    """
    tokens = read_tokens(tokenizer or opened.tokenizer_dir)
    check_exportable(tokens, vision=vision)
    check_same_ids(tokens, opened.tokenizer_dir)
    check_same_as_trained(tokens, opened.state.stage.data.tokenizer_model if opened.state else "")
    if vision:
        check_image_token(tokens, opened.image_token_id, opened.path / "config.json")
    check_rows(tokens, opened.model.vocab_size)
    return tokens


def out_of_checkpoint(opened: OpenModel, tokens: Tokens, target: Path, *, vision: bool) -> dict[str, Any]:
    """Write tokenizer and generation_config.json into a Hugging Face folder. Raises CheckpointError: nothing says what
    ends a text, or a file is damaged.

    Args:
        opened: the model.
        tokens: what tokens_for_export found.
        target: the folder.
        vision: whether its model sees.

    Returns:
        Its ids by config.json's names: `bos_token_id`, `eos_token_id`, `pad_token_id` and, if it knows pictures,
        `image_token_id`.
    """
    said = generation.read(opened.tokenizer_dir).or_else(generation.read(tokens.folder))
    trained = opened.state is not None and opened.state.iteration > 0  # on turns of the package's template
    said = said.completed(tokens.special, tokens.end, turns=vision or trained)
    if generation.END not in said.settings:
        raise CheckpointError(
            f"{tokens.folder}: has neither {IM_END} nor an eos_token in its tokenizer_config.json, and its publisher's "
            "config.json and generation_config.json name no end either: nothing would end an answer. Add one of them."
        )
    copy_for_export(tokens, target, vision=vision)
    write_json(target / generation.GENERATION_FILE, said.settings)
    image = tokens.special.get(IMG_CONTEXT)
    return {**said.token_ids, **({} if image is None else {"image_token_id": image})}


def image_token(*models: OpenModel) -> int:
    """Id of what stands for a picture in models of one vocabulary: as a config says it, else as a tokenizer does.
    Raises CheckpointError: none says it."""
    for opened in models:
        if opened.image_token_id is not None:
            return opened.image_token_id
    for opened in models:
        if (opened.tokenizer_dir / TOKENIZER_FILE).is_file():
            found = read_tokens(opened.tokenizer_dir).special.get(IMG_CONTEXT)
            if found is not None:
                return found
    names = " and ".join(str(opened.path) for opened in models)
    raise CheckpointError(f"{names}: no tokenizer there has {IMG_CONTEXT}, in whose place a picture stands.")
