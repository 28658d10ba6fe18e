"""Text <-> ids. A literal `<image>` or `<|im_end|>` in somebody's text is text: special tokens are placed by name."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from megatron_vita.data.text.template import ChatTemplate
from megatron_vita.errors import ConfigError

log = logging.getLogger(__name__)

IM_START, IM_END, END_OF_TEXT = "<|im_start|>", "<|im_end|>", "<|endoftext|>"
IMG, IMG_END, IMG_CONTEXT = "<img>", "</img>", "<IMG_CONTEXT>"
VID, VID_END, VID_CONTEXT = "<vid>", "</vid>", "<VID_CONTEXT>"
PATCH, PATCH_END, PATCH_CONTEXT = "<patch>", "</patch>", "<PATCH_CONTEXT>"
VIDEO = "<video>"

VITA_TOKENS = (
    IMG, IMG_END, IMG_CONTEXT, VID, VID_END, VID_CONTEXT, PATCH, PATCH_END, PATCH_CONTEXT,
    "<quad>", "</quad>", "<ref>", "</ref>", "<box>", "</box>", "<image>", VIDEO,
)  # fmt: skip
"""What Long-VITA appends to Qwen2.5's tokenizer, in its order."""
REQUIRED_TOKENS = (END_OF_TEXT, IM_START, IM_END, IMG, IMG_END, IMG_CONTEXT, VIDEO)
"""Without these no conversation with pictures can be written down; `long_vita` needs the others as well."""

NAMED_TOKENS = {
    "start_image_token": IMG,
    "end_image_token": IMG_END,
    "context_image_token": IMG_CONTEXT,
    "video_token": VIDEO,
}
"""What transformers' InternVL processor asks its tokenizer for by name."""
DEFAULT_TEMPLATE = Path(__file__).with_name("chat_template.jinja")
"""The package's own chat template: ChatML, no default system turn."""

_CACHED_CHARACTERS = 48


class VitaTokenizer:
    """A tokenizer with the special tokens of both layouts and the chat template that goes with it."""

    def __init__(self, backend: _HuggingFace | _SentencePiece, path: Path, sha256: str, template: str) -> None:
        self._backend = backend
        self.path = path
        """Folder or file it was loaded from."""
        self.sha256 = sha256
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
        self.template = ChatTemplate(template, tuple(backend.special), where=str(path))
        """The parsed template: roles and part kinds -> what stands between them."""
        self._encode_short = lru_cache(maxsize=1 << 16)(lambda text: tuple(backend.encode(text)))

    @classmethod
    def load(cls, path: str | Path) -> VitaTokenizer:
        """Open a Hugging Face folder (tokenizer.json), a tokenizer.json, or a SentencePiece `.model` file.

        A folder of a text model may lack the tokens of pictures and videos: they are appended behind its own, in the
        published order, as convert_ckpt.py import does when it writes the folder anew; both have one digest. The
        chat template is the folder's chat_template.jinja if it knows pictures, else the package's own (ChatML, no
        default system turn). A template inside tokenizer_config.json is not used: those of text models know none.

        Raises:
            ConfigError: no tokenizer there, a file that cannot be read, or special tokens that are missing.
        """
        path = Path(path)
        file = path / "tokenizer.json" if path.is_dir() else path
        if not file.is_file():
            raise ConfigError(
                f"{file}: no tokenizer. Give a Hugging Face folder with tokenizer.json, or a SentencePiece .model file."
            )
        content = file.read_bytes()
        backend: _HuggingFace | _SentencePiece
        try:
            backend = _SentencePiece(content) if file.suffix == ".model" else _HuggingFace(content)
        except MemoryError:
            raise
        except Exception as error:  # both libraries raise bare Exception or RuntimeError on a damaged file
            raise ConfigError(f"{file}: not a tokenizer that can be read: {error}") from None
        template = DEFAULT_TEMPLATE.read_text(encoding="utf-8")
        jinja = file.parent / "chat_template.jinja"
        if jinja.is_file():
            own = jinja.read_text(encoding="utf-8")
            if IMG_CONTEXT in own:
                template = own
            else:
                log.info("%s knows no pictures: the package's own chat template is used.", jinja)
        return cls(backend, path, backend.sha256, template)

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
        """What fills a row up (`<|endoftext|>`, as Qwen2.5 does)."""
        return self.token_id(END_OF_TEXT)

    @property
    def eos_id(self) -> int:
        """What ends an answer (`<|im_end|>`)."""
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

    def encode(self, text: str) -> list[int]:
        """Ids of a piece of text, special-token parsing off, nothing put before or after."""
        if len(text) <= _CACHED_CHARACTERS:
            return list(self._encode_short(text))
        return self._backend.encode(text)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of many texts at once, on all cores where the backend can."""
        return self._backend.encode_batch(texts)

    def cut(self, text: str, max_tokens: int) -> str:
        """The longest beginning of a text that its first `max_tokens` tokens spell, in whole characters."""
        return self._backend.cut(text, max_tokens)

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """Text of ids."""
        return self._backend.decode([int(i) for i in ids], skip_special_tokens)


class _HuggingFace:
    """`tokenizers` on a tokenizer.json."""

    def __init__(self, content: bytes) -> None:
        self._tokenizer: Any = Tokenizer.from_buffer(content)
        added = self._tokenizer.get_added_tokens_decoder()
        present = {token.content for token in added.values()}
        missing = [AddedToken(token, special=True, normalized=False) for token in VITA_TOKENS if token not in present]
        if missing:
            self._tokenizer.add_special_tokens(missing)
            content = self._tokenizer.to_str(pretty=True).encode()  # what `save` would write
        self.sha256 = hashlib.sha256(content).hexdigest()
        # Tokens added without the special flag would be found in plain text. Ours must not be.
        loose = [t.content for t in added.values() if t.content in VITA_TOKENS + REQUIRED_TOKENS and not t.special]
        if loose:
            self._tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in loose])
        added = self._tokenizer.get_added_tokens_decoder()
        self._tokenizer.encode_special_tokens = True
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.special: dict[str, int] = {token.content: id_ for id_, token in added.items() if token.special}
        self.vocab_size: int = max(self._tokenizer.get_vocab_size(), *(id_ + 1 for id_ in added), 0)

    def encode(self, text: str) -> list[int]:
        # the batch call leaves out the offsets, which nobody reads here
        return self._tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [one.ids for one in self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]

    def cut(self, text: str, max_tokens: int) -> str:
        offsets = self._tokenizer.encode(text, add_special_tokens=False).offsets
        if len(offsets) <= max_tokens:
            return text
        # a token that begins inside a character shares its offset: step back to where a character begins
        end = offsets[max_tokens][0]
        return text[:end]

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)


class _SentencePiece:
    """A SentencePiece model; the special tokens get the ids after its own pieces."""

    def __init__(self, content: bytes) -> None:
        from sentencepiece import SentencePieceProcessor

        self._model: Any = SentencePieceProcessor(model_proto=content)
        self.sha256 = hashlib.sha256(content).hexdigest()
        own = self._model.vocab_size()
        names = [END_OF_TEXT, IM_START, IM_END, *VITA_TOKENS]
        # A piece of the same name inside the model is plain text to us; ours come behind it.
        self.special: dict[str, int] = {name: own + number for number, name in enumerate(names)}
        self._names = dict(zip(self.special.values(), self.special, strict=True))
        self._own = own
        self.vocab_size: int = own + len(names)

    def encode(self, text: str) -> list[int]:
        return self._model.encode(text)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return self._model.encode(list(texts))

    def cut(self, text: str, max_tokens: int) -> str:
        low, high = 0, len(text)
        while low < high:
            middle = (low + high + 1) // 2
            if len(self.encode(text[:middle])) <= max_tokens:
                low = middle
            else:
                high = middle - 1
        return text[:low]

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        out, run = [], []
        for id_ in ids:
            if id_ < self._own:
                run.append(id_)
                continue
            out.append(self._model.decode(run))
            run = []
            if not skip_special_tokens:
                out.append(self._names.get(id_, ""))
        return "".join([*out, self._model.decode(run)])
