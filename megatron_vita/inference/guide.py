"""Guided decoding: an answer that matches a JSON schema, because no other token may come (llguidance's grammars).

`grammar.check_guide` has tried the schema out before. Limits bound the work of every token; an answer that hits one
fails, alone.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from functools import cache, lru_cache
from typing import TYPE_CHECKING

import numpy as np
import torch

from megatron_vita.data.text.tokenizer import VitaTokenizer
from megatron_vita.errors import VitaError
from megatron_vita.inference.grammar import error_of, grammar_of, library, matcher_of

if TYPE_CHECKING:
    from llguidance import LLExecutor, LLMatcher, LLTokenizer


@cache
def _executor(process: int) -> LLExecutor:
    """Threads of this process that compute the masks of several sequences at once; a forked copy has none of them."""
    return library().LLExecutor()


class Guide:
    """What may come next in one answer."""

    __slots__ = ("_matcher", "words")

    def __init__(self, matcher: LLMatcher, words: int) -> None:
        """`Guides.begin` makes it. `words`: of 32 bits that a mask has."""
        self._matcher = matcher
        self.words = words

    def accept(self, token: int) -> None:
        """Take a token of the answer."""
        self._matcher.consume_token(token)

    @property
    def complete(self) -> bool:
        """Nothing can follow but an end token."""
        return self._matcher.is_stopped() and not self._matcher.is_error()

    @property
    def error(self) -> str | None:
        """Why the answer cannot go on, if so."""
        if (why := error_of(self._matcher)) is None:
            return None
        return f"the answer cannot be continued so that it matches its JSON schema: {why}. Simplify the schema."

    @staticmethod
    def allowed(guides: Sequence[Guide], vocab_size: int, device: torch.device) -> torch.Tensor:
        """Which tokens may come next in each answer: bool [n, v]. Rows of guides that are in error mean nothing.

        Args:
            guides: n of them, of one engine.
            vocab_size: v; tokens that the tokenizer does not have are never allowed.
            device: of the result.
        """
        words = guides[0].words
        bits = np.zeros((len(guides), words), dtype=np.int32)
        if len(guides) == 1:
            guides[0]._matcher.unsafe_compute_mask_ptr(bits.ctypes.data, bits.nbytes)
        else:
            matchers = [(one._matcher, row) for row, one in enumerate(guides)]
            _executor(os.getpid()).unsafe_compute_mask_ptr(matchers, bits.ctypes.data, 4 * words, len(guides))
        octets = torch.from_numpy(bits.view(np.uint8)).to(device)  # an eighth of the bytes go to a GPU
        shifts = torch.arange(8, dtype=torch.uint8, device=device)
        known = ((octets.unsqueeze(-1) >> shifts) & 1).bool().flatten(1)[:, :vocab_size]
        return torch.nn.functional.pad(known, (0, vocab_size - known.shape[1]))


class Guides:
    """Makes the guides of one engine, on the rank that samples. Threads may share it."""

    def __init__(self, tokenizer: VitaTokenizer, ends: frozenset[int]) -> None:
        """
        Args:
            tokenizer: that of the model.
            ends: tokens with which the model ends an answer; allowed only where the schema is satisfied.
        """
        self._tokenizer = tokenizer
        self._ends = ends
        self._lock = threading.Lock()
        self._known: LLTokenizer | None = None
        self._begun = lru_cache(maxsize=16)(lambda schema: matcher_of(self._vocabulary(), grammar_of(schema)))

    def learn(self, schema: str) -> None:
        """Make what the guides of a schema have in common, so that `begin` is quick."""
        self._begun(schema)

    def begin(self, schema: str) -> Guide:
        """The guide of a new answer by a schema that `check_guide` has let through."""
        return Guide(self._begun(schema).deep_copy(), -(-self._vocabulary().vocab_size // 32))

    def _vocabulary(self) -> LLTokenizer:
        """As llguidance knows it; it takes a second or two for 150,000 tokens, so it is made when it is needed."""
        with self._lock:
            if self._known is None:
                wrapper = library().TokenizerWrapper(_Vocabulary(self._tokenizer, self._ends))
                self._known = library().LLTokenizer(wrapper, eos_token=sorted(self._ends))
            return self._known


class _Vocabulary:
    """A tokenizer in the form that llguidance asks for."""

    def __init__(self, tokenizer: VitaTokenizer, ends: frozenset[int]) -> None:
        self.eos_token_id = min(ends)
        self.bos_token_id = None
        self.tokens = [tokenizer.token_bytes(token) for token in range(tokenizer.vocab_size)]
        nameless = [token for token, name in enumerate(self.tokens) if not name]
        self.special_token_ids = [*tokenizer.special_tokens.values(), *nameless]
        self._tokenizer = tokenizer
        self._by_bytes = {name: token for token, name in enumerate(self.tokens) if name}
        for token in self.special_token_ids:
            self._by_bytes.pop(self.tokens[token], None)
        self._longest = max(map(len, self._by_bytes))

    def __call__(self, text: str | bytes) -> list[int]:
        """Tokens that spell a text to the byte: those of the tokenizer, if it changes nothing, else the longest ones.
        (llguidance writes what can only come in one way with them.) It raises nothing, for that ends the process."""
        spelt = text.encode() if isinstance(text, str) else text
        try:
            ids = self._tokenizer.encode(spelt.decode())
            if b"".join(self.tokens[one] for one in ids) == spelt:
                return ids
        except (VitaError, UnicodeDecodeError):
            pass
        ids = []
        while spelt:
            sizes = range(min(self._longest, len(spelt)), 0, -1)
            size = next((one for one in sizes if spelt[:one] in self._by_bytes), None)
            if size is None:  # a vocabulary that cannot spell it
                break
            ids.append(self._by_bytes[spelt[:size]])
            spelt = spelt[size:]
        return ids
