"""Text <-> ids. A literal `<image>` or `<|im_end|>` in somebody's text is text: special tokens are placed by name."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property, lru_cache
from itertools import takewhile
from pathlib import Path

from megatron_vita.data.text.backends import BYTE_TOKEN, BYTES, HuggingFace, SentencePiece
from megatron_vita.data.text.template import ChatTemplate, SkeletonPart
from megatron_vita.errors import ConfigError

IM_START, IM_END, END_OF_TEXT = "<|im_start|>", "<|im_end|>", "<|endoftext|>"
IMG, IMG_END, IMG_CONTEXT = "<img>", "</img>", "<IMG_CONTEXT>"
VID, VID_END, VID_CONTEXT = "<vid>", "</vid>", "<VID_CONTEXT>"
PATCH, PATCH_END, PATCH_CONTEXT = "<patch>", "</patch>", "<PATCH_CONTEXT>"
VIDEO = "<video>"

VITA_TOKENS = (
    IMG, IMG_END, IMG_CONTEXT, VID, VID_END, VID_CONTEXT, PATCH, PATCH_END, PATCH_CONTEXT,
    "<quad>", "</quad>", "<ref>", "</ref>", "<box>", "</box>", "<image>", VIDEO,
)  # fmt: skip
"""Tokens that Long-VITA appends to Qwen2.5's tokenizer, in its order."""
CHAT_TOKENS = (END_OF_TEXT, IM_START, IM_END)
"""Tokens that end a text, begin a turn and end a turn."""
REQUIRED_TOKENS = (*CHAT_TOKENS, IMG, IMG_END, IMG_CONTEXT, VIDEO)
"""Without these no conversation with pictures can be written down; `long_vita` needs the others as well."""

NAMED_TOKENS = {
    "start_image_token": IMG,
    "end_image_token": IMG_END,
    "context_image_token": IMG_CONTEXT,
    "video_token": VIDEO,
}
"""Tokens that transformers' InternVL processor reads from its tokenizer by name."""
DEFAULT_TEMPLATE = Path(__file__).with_name("chat_template.jinja")
"""The package's own chat template: ChatML, no default system turn. `own_template` writes a beginning of text too."""

_CACHED_CHARACTERS = 48
_SPACE = "\t\n\x0b\x0c\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000" + "".join(map(chr, range(0x2000, 0x200B)))
"""Blanks that a token with lstrip or rstrip swallows (Unicode's White_Space; Python's own list has four more)."""


def own_template(beginning: Sequence[str] = ()) -> str:
    """The package's own chat template.

    Args:
        beginning: tokens that the tokenizer's post-processor puts before a text. The template writes them: who
            renders it without a post-processor (a server) gets them as well, and nobody gets them twice.
    """
    template = DEFAULT_TEMPLATE.read_text(encoding="utf-8")
    return f"{{{{- {''.join(beginning)!r} -}}}}\n{template}" if beginning else template


def named_beginning(beginning: Sequence[str]) -> dict[str, str]:
    """What tokenizer_config.json has to call the beginning of a text, so that stock processors find it in a prompt."""
    return {"bos_token": beginning[0]} if beginning else {}


class ChatTokenizer:
    """A tokenizer with the special tokens of both layouts and the chat template that goes with it. Not tried out yet:
    `VitaTokenizer.load` does that."""

    def __init__(
        self, backend: HuggingFace | SentencePiece, path: Path, template: str, named: Mapping[str, str]
    ) -> None:
        self._backend = backend
        self.path = path
        """Folder or file it was loaded from."""
        self.sha256 = backend.sha256
        """Digest of tokenizer.json with the tokens of pictures in it (or of the .model file), hexadecimal."""
        self.chat_template = template
        """The Jinja template's source."""
        self.template_sha256 = hashlib.sha256(template.encode()).hexdigest()
        """Digest of the template's source."""
        missing = [token for token in REQUIRED_TOKENS if token not in backend.special]
        if missing:
            raise ConfigError(
                f"{path}: the tokenizer has no special tokens {' '.join(missing)}, in which the chat template is "
                "written. Add them (transformers: tokenizer.add_tokens([...], special_tokens=True); save_pretrained), "
                "or use a tokenizer that has them."
            )
        self.template = ChatTemplate(template, tuple(backend.special), where=str(path), named=named)
        """The parsed template: roles and part kinds -> what stands between them."""
        self._bos = named.get("bos_token", "")
        self.joins_blanks = False
        """Blanks at the beginning of an answer would join the end of its turn's header: they are removed too."""
        self._encode_short = lru_cache(maxsize=1 << 16)(lambda text: tuple(backend.encode(text)))

    @property
    def vocab_size(self) -> int:
        """Number of ids, special tokens included (an embedding may have more rows)."""
        return self._backend.vocab_size

    @property
    def special_tokens(self) -> dict[str, int]:
        """Every special token with its id."""
        return dict(self._backend.special)

    @property
    def pad_id(self) -> int:
        """Id of the padding token (`<|endoftext|>`, as in Qwen2.5)."""
        return self.token_id(END_OF_TEXT)

    @property
    def eos_id(self) -> int:
        """Id of the token that ends an answer (`<|im_end|>`)."""
        return self.token_id(IM_END)

    def token_id(self, token: str) -> int:
        """Id of a special token by name.

        Raises:
            ConfigError: the tokenizer has no such special token.
        """
        try:
            return self._backend.special[token]
        except KeyError:
            raise ConfigError(
                f"{self.path}: the tokenizer has no special token {token}. Add it, or choose another --layout."
            ) from None

    def encode(self, text: str, *, first: bool = False) -> list[int]:
        """Ids of a piece of text, special-token parsing off, nothing put before or after.

        Args:
            text: the piece.
            first: nothing at all stands before it (otherwise a special token does): some tokenizers put a blank
                before the first word of a text.
        """
        if first:
            return self._backend.encode(text, first=True)
        if len(text) <= _CACHED_CHARACTERS:
            return list(self._encode_short(text))
        return self._backend.encode(text)

    def between(self, text: str, left: str | None, right: str | None = None) -> list[int]:
        """Ids of the text between two special tokens, without the blanks that these swallow.

        Args:
            text: all that stands between them.
            left: the token before it, or none at the beginning of everything.
            right: the token behind it, if any.
        """
        if left in self._backend.swallows_right:
            text = text.lstrip(_SPACE)
        if right in self._backend.swallows_left:
            text = text.rstrip(_SPACE)
        return self.encode(text, first=left is None) if text else []

    def beginning(self, skeleton: Sequence[SkeletonPart] = ()) -> list[int]:
        """Ids that stand before a rendered conversation, or before a plain text: those of the tokenizer's
        post-processor, unless the template itself writes a beginning of text (as stock processors see it)."""
        leading = takewhile(lambda part: part.kind in ("literal", "token"), skeleton)
        written = self.writes_beginning("".join(part.value for part in leading))
        return [] if written else list(self._backend.before)

    def writes_beginning(self, rendered: str) -> bool:
        """Whether a rendered conversation has its beginning of text already: stock processors then add nothing."""
        return bool(self._bos) and rendered.startswith(self._bos)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of many texts at once, on all cores where the backend can."""
        return self._backend.encode_batch(texts)

    def cut(self, text: str, max_tokens: int) -> str:
        """The longest beginning of a text that its first `max_tokens` tokens spell, in whole characters."""
        return self._backend.cut(text, max_tokens)

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """Text of ids."""
        return self._backend.decode([int(i) for i in ids], skip_special_tokens)

    @cached_property
    def anchor(self) -> tuple[int, ...]:
        """Ids of a short text. What is decoded behind them is not decoded as the beginning of a text."""
        return tuple(self.encode("a"))

    def silent(self, id_: int) -> bool:
        """Whether `decode` leaves an id out: a special token, or one that the tokenizer does not have."""
        return self._backend.silent(id_)

    def unfinished(self, ids: Sequence[int]) -> bool:
        """Whether the text at the end of ids may change with the next one: bytes of a character that is not whole."""
        return self._backend.unfinished(ids)

    def token_bytes(self, id_: int) -> bytes:
        """The bytes (UTF-8) that a token adds within a text; a special token adds its name, an unknown id nothing.

        Those of all tokens of a text, one after the other, are the text, also where a token is a part of a character.
        """
        text = self.decode((*self.anchor, id_), False).removeprefix(self.decode(self.anchor, False))
        if "\ufffd" in text and not self.silent(id_):
            name = self._backend.token(id_)
            if byte := BYTE_TOKEN.fullmatch(name):
                return bytes.fromhex(byte[1])
            if all(one in BYTES for one in name):
                return bytes(BYTES[one] for one in name)
        return text.encode()
