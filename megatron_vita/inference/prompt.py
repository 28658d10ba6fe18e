"""Input and output of generation: a prepared prompt and an answer."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatron_vita.data.example import Example


@dataclass(frozen=True, slots=True)
class Generation:
    """One answer."""

    text: str
    """Without special tokens and without white space at its ends."""
    ids: tuple[int, ...]
    """Generated ids; the token that ended the answer is not among them."""
    finished: bool
    """The model ended the answer itself; otherwise it was cut at the limit."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """A Sample prepared for the model."""

    example: Example
    tiles: torch.Tensor
    """uint8 [n, 3, S, S]; n = tiles of the example, in token order."""
