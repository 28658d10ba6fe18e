"""Tokenizer files of a model: special tokens are added on import and named for stock processors on export."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_vita.checkpoint.folder import CHAT_TEMPLATES, copy_tokenizer_files
from megatron_vita.convert.hf_config import read_json, write_json
from megatron_vita.convert.token_ids import CONFIG_FILE, TOKENIZER_FILE, Tokens, read_tokens, tokenizer_config
from megatron_vita.data.text.backends import beginning_of, complete, named_tokens
from megatron_vita.data.text.tokenizer import (
    CHAT_TOKENS,
    END_OF_TEXT,
    IM_END,
    IMG_CONTEXT,
    NAMED_TOKENS,
    VITA_TOKENS,
    VitaTokenizer,
    named_beginning,
    own_template,
)
from megatron_vita.errors import CheckpointError, ConfigError

log = logging.getLogger(__name__)

TEMPLATE_FILE = "chat_template.jinja"
OLD_TEMPLATE_FILE = "chat_template.json"
"""File of the chat template in older processors."""
STOCK_CLASS = "PreTrainedTokenizerFast"
"""The class of transformers that, in any version, uses tokenizer.json unchanged."""
_KEPT = ("model_max_length", "clean_up_tokenization_spaces", "padding_side", "truncation_side")
"""Settings of a publisher that do not affect ids."""


def with_vision_tokens(source: Path, target: Path) -> int:
    """Copy a tokenizer folder and add the special tokens of pictures and videos that it has not, at the end, in the
    published order; name them for stock processors and give it the package's chat template if it knows no pictures. A
    tokenizer without ChatML's tokens (Llama's), in which that template is written, gets these first. Raises
    CheckpointError: a file of the tokenizer is damaged, or a conversation would not become stock code's ids.

    Returns:
        Rows an embedding needs to hold every id.
    """
    copy_tokenizer_files(source, target, generation=False)
    _write_for_stock(source, target, (*CHAT_TOKENS, *VITA_TOKENS))
    return read_tokens(target).rows


def as_published(source: Path, target: Path, *, vision: bool) -> None:
    """Copy a tokenizer whose ids stay as they are. Raises CheckpointError: a file of the tokenizer is damaged, or a
    conversation would not become stock code's ids.

    Args:
        source: its folder.
        target: where to.
        vision: the model sees: a chat template that knows pictures goes where training and export look for it.
    """
    _templates(source)  # damaged ones are rejected now, not at export
    copy_tokenizer_files(source, target, generation=False)
    if vision:
        _write_for_stock(source, target)


def copy_for_export(tokens: Tokens, target: Path, *, vision: bool) -> None:
    """Copy a tokenizer into a Hugging Face folder. A decoder keeps the chat template that its publisher gave it. Raises
    CheckpointError: a file of the tokenizer is damaged.

    Args:
        tokens: of the tokenizer; check_exportable has let it pass.
        target: the folder.
        vision: name the tokens of pictures for stock processors, with a chat template that knows pictures.
    """
    source = tokens.folder
    copy_tokenizer_files(source, target, generation=False)
    if vision:
        _write_for_stock(source, target, processor_class="InternVLProcessor")
        return
    config = tokenizer_config(source)
    if IM_END in tokens.special:
        config = {"tokenizer_class": STOCK_CLASS, "eos_token": IM_END, "pad_token": END_OF_TEXT, **config}
        if not _templates(source):
            log.info("%s: has no chat template; the package's own (ChatML) is written", source)
            (target / TEMPLATE_FILE).write_text(own_template(_completed(source)[2]), encoding="utf-8")
    write_json(target / CONFIG_FILE, config)


def _write_for_stock(source: Path, target: Path, appended: Sequence[str] = (), processor_class: str = "") -> None:
    """Write the files that decide over ids so that stock code makes those of training, in any class and version: all
    that decides stands in tokenizer.json, and the class named is the one that obeys it. (Others build the publisher's
    usual pipeline anew, and add what they find in further files and settings.) Raises CheckpointError: a file of the
    tokenizer is damaged, or a conversation would not become stock code's ids.

    Args:
        source: a folder of which everything was copied.
        target: where to.
        appended: tokens that are appended where they are missing.
        processor_class: of the whole model, in an exported folder.
    """
    present, publisher = read_tokens(source).special, tokenizer_config(source)
    names, content, beginning = _completed(source, appended)
    (target / TOKENIZER_FILE).write_bytes(content)
    for name in (
        "added_tokens.json",
        "special_tokens_map.json",
    ):  # list tokens again, without the appended ones or otherwise
        (target / name).unlink(missing_ok=True)
    named = {key: name for key, name in named_tokens(source).items() if name in names}
    if IM_END in names:
        chatml = {"eos_token": IM_END, "pad_token": END_OF_TEXT if END_OF_TEXT in names else IM_END}
        named = {**chatml, **named} if IM_END in present else {**named, **chatml}
    if not _write_picture_template(source, target, own_template(beginning)):
        named |= named_beginning(beginning)
    config = {
        "tokenizer_class": STOCK_CLASS,
        **{key: publisher[key] for key in _KEPT if key in publisher},
        **named,
        "extra_special_tokens": {key: name for key, name in NAMED_TOKENS.items() if name in names},
        "model_input_names": ["input_ids", "attention_mask"],
    }
    write_json(target / CONFIG_FILE, {**config, "processor_class": processor_class} if processor_class else config)
    if all(name in names for name in CHAT_TOKENS):
        try:
            VitaTokenizer.load(target, template=own_template(beginning))
        except ConfigError as error:
            raise CheckpointError(str(error).replace(str(target), str(source))) from None


def _completed(source: Path, appended: Sequence[str] = ()) -> tuple[set[str], bytes, list[str]]:
    """A folder's added tokens, its tokenizer.json with the flags that training needs, and what begins a text."""
    path = source / TOKENIZER_FILE
    present = () if appended else read_tokens(source).special
    try:
        tokenizer, content = complete(
            path.read_bytes(), appended or [n for n in VITA_TOKENS if n in present], CHAT_TOKENS
        )
        added = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
        return added, content, beginning_of(tokenizer)
    except MemoryError:
        raise
    except Exception as error:  # the library raises bare Exception on what it cannot read
        raise CheckpointError(f"{path}: not a tokenizer that can be read: {error}") from None


def _write_picture_template(source: Path, target: Path, own: str) -> bool:
    """Into TEMPLATE_FILE and nowhere else: the publisher's chat template if it knows pictures (True), else `own`."""
    templates = _templates(source)
    known = [text for text in templates.values() if IMG_CONTEXT in text]
    if templates and not known:
        log.info(
            "%s: the publisher's chat template (%s) knows no pictures; the package's own (ChatML, no default system "
            "turn, no tools) takes its place",
            source,
            next(iter(templates)),
        )
    (target / TEMPLATE_FILE).write_text(known[0] if known else own, encoding="utf-8")
    (target / OLD_TEMPLATE_FILE).unlink(missing_ok=True)
    if not known:
        for path in (target / CHAT_TEMPLATES).glob("*"):
            path.unlink()
    return bool(known)


def _templates(folder: Path) -> dict[str, str]:
    """Default chat templates of a tokenizer folder by file, in the order in which stock code prefers them."""
    found: dict[str, Any] = {}
    path = folder / TEMPLATE_FILE
    if path.is_file():
        try:
            found[TEMPLATE_FILE] = path.read_text(encoding="utf-8")
        except ValueError:
            raise CheckpointError(f"{path}: is no text in UTF-8. Download it again.") from None
    inside = tokenizer_config(folder).get("chat_template")
    if isinstance(inside, list):  # several by name
        inside = {one.get("name"): one.get("template") for one in inside if isinstance(one, dict)}
    found[CONFIG_FILE] = inside.get("default") if isinstance(inside, dict) else inside
    if (folder / OLD_TEMPLATE_FILE).is_file():
        found[OLD_TEMPLATE_FILE] = read_json(folder / OLD_TEMPLATE_FILE).get("chat_template")
    for name, text in found.items():
        if text is not None and not isinstance(text, str):
            raise CheckpointError(f"{folder / name}: its chat_template is no text. Download it again.")
    return {name: text for name, text in found.items() if text is not None}
