"""The two tokenizer libraries behind one interface: `tokenizers` on a tokenizer.json, SentencePiece on a `.model`.

Stock transformers tokenises a rendered conversation as a whole: added tokens are found first, then each text between
two of them is normalised, split and tokenised. We tokenise the same texts one by one, so that words of a user never
become special tokens. `complete` and `HuggingFace` hold what makes both the same; data/text/acceptance.py tries it out.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

from megatron_vita.data.rejects import reject
from megatron_vita.errors import ConfigError

T = TypeVar("T")

NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
"""What tokenizer_config.json names; a chat template may write them (`{{ bos_token }}`)."""
_TEXT_ID = (1 << 32) - 1


def named_tokens(folder: Path) -> dict[str, str]:
    """Named special tokens of tokenizer_config.json, and of special_tokens_map.json where stock code reads it.

    Raises:
        ConfigError: a file is not readable JSON.
    """
    config = _read(folder / "tokenizer_config.json")
    if "added_tokens_decoder" not in config:
        config = {**config, **_read(folder / "special_tokens_map.json")}
    values = {name: config.get(name) for name in NAMES}
    contents = {name: one.get("content") if isinstance(one, dict) else one for name, one in values.items()}
    return {name: text for name, text in contents.items() if isinstance(text, str) and text}


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not readable JSON ({error}). Download it again.") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: does not hold a JSON object. Download it again.")
    return values


def complete(content: bytes, appended: Sequence[str], placed: Sequence[str] = ()) -> tuple[Any, bytes]:
    """Add the tokens of both layouts to a tokenizer.json, flagged so that stock code finds them anywhere in a text.

    Args:
        content: the file.
        appended: tokens that are appended in this order where they are missing. Their flags become the default ones
            of a special token: stock code sets these for the tokens that the processor asks for by name.
        placed: further tokens that a chat template places. Together with what the post-processor puts before a text
            they are made special, and found in any word and before any normalisation.

    Returns:
        The `tokenizers.Tokenizer`, and its file; the same bytes where nothing had to change.
    """
    tokenizer: Any = Tokenizer.from_buffer(content)
    added = {token.content: token for token in tokenizer.get_added_tokens_decoder().values()}
    changed = [
        AddedToken(name, special=True, normalized=False)
        for name in appended
        if name not in added or not _plain(added[name]) or added[name].lstrip or added[name].rstrip
    ]
    before, _ = affixes(tokenizer)
    for name in (*placed, *(tokenizer.id_to_token(one) for one in before)):
        token = added.get(name)
        if token is not None and not _plain(token, normalises=tokenizer.normalizer is not None):
            changed.append(AddedToken(name, lstrip=token.lstrip, rstrip=token.rstrip, special=True, normalized=False))
    if changed:
        tokenizer.add_special_tokens(changed)
        content = tokenizer.to_str(pretty=True).encode()  # what `save` would write
    return tokenizer, content


def _plain(token: Any, *, normalises: bool = True) -> bool:
    return token.special and not token.single_word and not (token.normalized and normalises)


def affixes(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Ids that the post-processor puts before and behind every text.

    Raises:
        ConfigError: it does more than that.
    """
    probe: Any = Tokenizer(models.WordLevel({"a": _TEXT_ID}, unk_token="a"))  # one id that no vocabulary has
    if tokenizer.post_processor is not None:
        probe.post_processor = tokenizer.post_processor
    ids = probe.encode("a").ids
    if ids.count(_TEXT_ID) != 1:
        raise ConfigError("its post_processor drops or repeats the text. Take another tokenizer.")
    place = ids.index(_TEXT_ID)
    return ids[:place], ids[place + 1 :]


def beginning_of(tokenizer: Any) -> list[str]:
    """Special tokens that the post-processor puts before every text, and a chat template may therefore write."""
    before, _ = affixes(tokenizer)
    added = tokenizer.get_added_tokens_decoder()
    return [added[one].content for one in before] if all(one in added for one in before) else []


def _metaspaces(pre_tokenizer: Any) -> Iterator[Any]:
    """The pre-tokenizers that put a blank before the first word of a whole text only."""
    if isinstance(pre_tokenizer, pre_tokenizers.Metaspace) and pre_tokenizer.prepend_scheme == "first":
        yield pre_tokenizer
    elif isinstance(pre_tokenizer, pre_tokenizers.Sequence):
        sequence: Any = pre_tokenizer
        for place in range(len(json.loads(sequence.__getstate__())["pretokenizers"])):
            yield from _metaspaces(sequence[place])


class HuggingFace:
    """`tokenizers` on a tokenizer.json."""

    def __init__(self, content: bytes, appended: Sequence[str], placed: Sequence[str]) -> None:
        tokenizer, self._content = complete(content, appended, placed)
        self._tokenizer = self._set_up(tokenizer)
        self.sha256 = hashlib.sha256(self._content).hexdigest()
        added = tokenizer.get_added_tokens_decoder()
        self.special: dict[str, int] = {token.content: id_ for id_, token in added.items() if token.special}
        self.vocab_size: int = max(tokenizer.get_vocab_size(), *(id_ + 1 for id_ in added), 0)
        self.swallows_left = frozenset(token.content for token in added.values() if token.special and token.lstrip)
        self.swallows_right = frozenset(token.content for token in added.values() if token.special and token.rstrip)
        self.before, self.behind = affixes(tokenizer)
        self.beginning = beginning_of(tokenizer)
        if getattr(tokenizer.model, "dropout", None):
            raise ConfigError("its model has a dropout: a text would become other ids each time. Set it to null.")
        state = "" if tokenizer.decoder is None else tokenizer.decoder.__getstate__().decode()
        self._byte_level, self._byte_fallback = '"ByteLevel"' in state, '"ByteFallback"' in state
        self._whole: Any = tokenizer  # for a text at the very beginning
        first = list(_metaspaces(tokenizer.pre_tokenizer))
        for one in first:
            one.prepend_scheme = "never"
        if first:
            self._whole = None  # made when it is needed: it takes as much memory again

    @staticmethod
    def _set_up(tokenizer: Any) -> Any:
        tokenizer.encode_special_tokens = True
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return tokenizer

    def _at_beginning(self) -> Any:
        if self._whole is None:
            self._whole = self._set_up(Tokenizer.from_buffer(self._content))
        return self._whole

    def token(self, id_: int) -> str:
        """Name of an id."""
        return str(self._tokenizer.id_to_token(id_))

    def encode(self, text: str, *, first: bool = False) -> list[int]:
        tokenizer = self._at_beginning() if first else self._tokenizer
        # the batch call leaves out the offsets, which nobody reads here
        return _guarded(tokenizer.encode_batch_fast, [text])[0].ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [one.ids for one in _guarded(self._tokenizer.encode_batch_fast, list(texts))]

    def parse(self, text: str, *, affixes: bool) -> list[int]:
        """Ids of a rendered conversation as stock transformers makes them: special tokens are found in it."""
        tokenizer = self._at_beginning()
        tokenizer.encode_special_tokens = False
        try:
            return _guarded(tokenizer.encode, text, affixes).ids
        finally:
            tokenizer.encode_special_tokens = True

    def cut(self, text: str, max_tokens: int) -> str:
        offsets = _guarded(self._tokenizer.encode, text).offsets
        if len(offsets) <= max_tokens:
            return text
        # a token that begins inside a character shares its offset: step back to where a character begins
        end = offsets[max_tokens][0]
        return text[:end]

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)

    def silent(self, id_: int) -> bool:
        name = self._tokenizer.id_to_token(id_)
        return name is None or name in self.special

    def unfinished(self, ids: Sequence[int]) -> bool:
        tail = b""
        for id_ in reversed(ids):
            if self.silent(id_):
                continue
            name = self.token(id_)
            if self._byte_fallback:
                return BYTE_TOKEN.fullmatch(name) is not None  # a run of them is decoded as a whole
            if not self._byte_level:
                return False
            known = all(one in BYTES for one in name)
            tail = (bytes(BYTES[one] for one in name) if known else name.encode()) + tail
            if len(tail) >= 3:  # more bytes of a character than that are all of it
                break
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        decoder.decode(tail[-3:])
        return bool(decoder.getstate()[0])


BYTE_TOKEN = re.compile("<0x([0-9a-fA-F]{2})>")
"""Name of a byte in tokenizers that fall back to bytes."""
_PRINTABLE = (*range(33, 127), *range(161, 173), *range(174, 256))
BYTES = {chr(one): one for one in _PRINTABLE} | {
    chr(256 + place): one for place, one in enumerate(sorted({*range(256)} - {*_PRINTABLE}))
}
"""The characters in which byte-level tokenizers write bytes (GPT-2, `bytes_to_unicode`)."""


def _guarded(encode: Callable[..., T], text: str | list[str], affixes: bool = False) -> T:
    """Encode; a failed assertion of the library costs the text and not the run.

    Raises:
        DataError: tokenizer_failed. Some normalisers and flags of added tokens make it cut characters in two.
    """
    try:
        return encode(text, add_special_tokens=affixes)
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # of Rust, and no Exception
            raise
        raise reject("tokenizer_failed", f"the tokenizers library fails on this text ({error}).") from error


class SentencePiece:
    """A SentencePiece model; the special tokens get the ids after its own pieces."""

    def __init__(self, content: bytes, names: Sequence[str]) -> None:
        from sentencepiece import SentencePieceProcessor

        self._model: Any = SentencePieceProcessor(model_proto=content)
        self.sha256 = hashlib.sha256(content).hexdigest()
        own = self._model.vocab_size()
        # A piece of the same name inside the model is plain text here; the tokens of this package come behind it.
        self.special: dict[str, int] = {name: own + number for number, name in enumerate(names)}
        self._names = dict(zip(self.special.values(), self.special, strict=True))
        self._own = own
        self.vocab_size: int = own + len(names)
        self.before: list[int] = []
        self.behind: list[int] = []
        self.beginning: list[str] = []
        self.swallows_left = self.swallows_right = frozenset[str]()

    def token(self, id_: int) -> str:
        """Name of an id."""
        return self._names.get(id_) or str(self._model.id_to_piece(id_))

    def encode(self, text: str, *, first: bool = False) -> list[int]:
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

    def silent(self, id_: int) -> bool:
        return id_ >= self._own

    def unfinished(self, ids: Sequence[int]) -> bool:
        return bool(ids) and ids[-1] < self._own and bool(self._model.is_byte(ids[-1]))
