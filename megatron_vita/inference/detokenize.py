"""Text of an answer while its tokens come: no character in halves, nothing of a stop string.

`tokenizers` has a DecodeStream, but its pieces are not always the text of the whole: it shows bytes of byte-fallback
tokens that a later token makes invalid, and blanks at the beginning differ.
"""

from __future__ import annotations

from collections.abc import Sequence

from megatron_vita.data.text.tokenizer import VitaTokenizer


class TextStream:
    """Turns the tokens of one answer into pieces of text, without special tokens.

    All pieces together are `tokenizer.decode` of all ids, up to the first stop string.
    """

    def __init__(self, tokenizer: VitaTokenizer, stop: Sequence[str] = (), *, min_tokens: int = 0) -> None:
        """
        Args:
            tokenizer: that of the model.
            stop: strings that end the answer, not empty.
            min_tokens: a stop string that ends within the text of this many tokens is plain text (as in vLLM).
        """
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._longest = max(map(len, self._stop), default=0)
        self._min_tokens = min_tokens
        self._tokens = 0
        self._context: list[int] = []  # what the text of new tokens may depend on; its own text is known
        self._pending: list[int] = []  # tokens whose text is not known yet
        self._held = ""  # may be the beginning of a stop string
        self._plain = 0  # characters of `_held` in which no stop string may end
        self.stopped: str | None = None
        """The stop string that came."""

    def append(self, token_id: int) -> str:
        """Take a token.

        Returns:
            Text that is new and can be shown; often empty. Nothing comes after a stop string.
        """
        self._tokens += 1
        silent = self._tokenizer.silent
        if not (self._pending and silent(token_id) and silent(self._pending[-1])):  # two do what one does
            self._pending.append(token_id)
        if self._tokenizer.unfinished(self._pending):
            return self._release("")
        return self._release(self._decode())

    def finish(self) -> str:
        """The rest of the text; bytes that are no character become U+FFFD. A stop string may be found here too."""
        text = self._release(self._decode())
        if self.stopped is None:
            text, self._held = text + self._held, ""
        return text

    def _decode(self) -> str:
        """Text of the pending tokens."""
        known = self._tokenizer.decode(self._context)
        text = self._tokenizer.decode(self._context + self._pending)[len(known) :]
        if text:
            # Tokens at the beginning of a text are decoded in another way (blanks): an anchor stands there.
            self._context = [*self._tokenizer.anchor, *self._pending]
            self._pending = []
        return text

    def _release(self, text: str) -> str:
        """Hold back what may belong to a stop string, and cut the text at the one that ends first."""
        if self.stopped is not None:
            return ""
        self._held += text
        if self._tokens <= self._min_tokens:
            self._plain = len(self._held)
        found = []
        for one in self._stop:
            start = self._held.find(one, max(0, self._plain - len(one) + 1))
            if start >= 0:
                found.append((start + len(one), start, one))
        if found:
            _, cut, self.stopped = min(found)
        else:
            cut = len(self._held) - self._beginning()
        shown, self._held = self._held[:cut], self._held[cut:]
        self._plain = max(0, self._plain - cut)
        return shown

    def _beginning(self) -> int:
        """Length of the longest end of the held text with which a stop string begins."""
        for length in range(min(self._longest - 1, len(self._held)), 0, -1):
            if any(one.startswith(self._held[-length:]) for one in self._stop):
                return length
        return 0
