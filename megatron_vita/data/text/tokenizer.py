"""Opening a tokenizer. A literal `<image>` or `<|im_end|>` in somebody's text is text: special tokens are placed by
name. All else is tokenised as stock transformers does it, or the tokenizer is refused."""

from __future__ import annotations

import logging
from pathlib import Path

from megatron_vita.data.text import acceptance
from megatron_vita.data.text.backends import HuggingFace, SentencePiece, named_tokens
from megatron_vita.data.text.chat_tokenizer import (
    CHAT_TOKENS,
    DEFAULT_TEMPLATE,
    END_OF_TEXT,
    IM_END,
    IM_START,
    IMG,
    IMG_CONTEXT,
    IMG_END,
    NAMED_TOKENS,
    PATCH,
    PATCH_CONTEXT,
    PATCH_END,
    REQUIRED_TOKENS,
    VID,
    VID_CONTEXT,
    VID_END,
    VIDEO,
    VITA_TOKENS,
    ChatTokenizer,
    named_beginning,
    own_template,
)
from megatron_vita.errors import ConfigError

__all__ = [
    "CHAT_TOKENS",
    "DEFAULT_TEMPLATE",
    "END_OF_TEXT",
    "IMG",
    "IMG_CONTEXT",
    "IMG_END",
    "IM_END",
    "IM_START",
    "NAMED_TOKENS",
    "PATCH",
    "PATCH_CONTEXT",
    "PATCH_END",
    "REQUIRED_TOKENS",
    "VID",
    "VIDEO",
    "VID_CONTEXT",
    "VID_END",
    "VITA_TOKENS",
    "VitaTokenizer",
    "named_beginning",
    "own_template",
]

log = logging.getLogger(__name__)


class VitaTokenizer(ChatTokenizer):
    """A tokenizer that gives conversations the ids of stock transformers; `load` checks it."""

    @classmethod
    def load(cls, path: str | Path, *, template: str | None = None) -> VitaTokenizer:
        """Open a Hugging Face folder (tokenizer.json), a tokenizer.json, or a SentencePiece `.model` file.

        A folder of a text model may lack the tokens of pictures and videos: they are appended behind its own, in the
        published order, as convert_ckpt.py import does when it writes the folder anew; both have one digest. The
        chat template is the folder's chat_template.jinja if it knows pictures, else the package's own (ChatML, no
        default system turn). A template inside tokenizer_config.json is not used: those of text models know none.
        (`template` is taken instead of both, if given.)
        Probe conversations are tokenised as stock transformers does it, and must become the same ids here.

        Raises:
            ConfigError: no tokenizer there, a file that cannot be read, special tokens that are missing, or a
                tokenizer with which a conversation would not become the ids of stock transformers.
        """
        path = Path(path)
        file = path / "tokenizer.json" if path.is_dir() else path
        if not file.is_file():
            raise ConfigError(
                f"{file}: no tokenizer. Give a Hugging Face folder with tokenizer.json, or a SentencePiece .model file."
            )
        content = file.read_bytes()
        backend: HuggingFace | SentencePiece
        try:
            if file.suffix == ".model":
                backend = SentencePiece(content, (*CHAT_TOKENS, *VITA_TOKENS))
            else:
                backend = HuggingFace(content, VITA_TOKENS, CHAT_TOKENS)
        except ConfigError as error:
            raise ConfigError(f"{file}: {error}") from None
        except MemoryError:
            raise
        except Exception as error:  # both libraries raise bare Exception or RuntimeError on a damaged file
            raise ConfigError(f"{file}: not a tokenizer that can be read: {error}") from None
        publisher = named_tokens(file.parent)
        named = publisher | named_beginning(backend.beginning)
        jinja = file.parent / "chat_template.jinja"
        if template is None and jinja.is_file():
            own = jinja.read_text(encoding="utf-8")
            if IMG_CONTEXT in own:
                template, named = own, publisher
            else:
                log.info("%s knows no pictures: the package's own chat template is used.", jinja)
        tokenizer = cls(backend, path, template or own_template(backend.beginning), named)
        acceptance.check(tokenizer, backend)
        return tokenizer

    def same_ids(self, other: ChatTokenizer) -> bool:
        """Whether conversations become the same ids with another tokenizer, as far as probes tell."""
        return acceptance.same_ids(self, other)
