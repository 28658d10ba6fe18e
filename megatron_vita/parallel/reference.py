"""The oracle: causal attention within documents, by one process, as the definition reads."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def document_attention(q: Tensor, k: Tensor, v: Tensor, documents: Sequence[int], scale: float) -> Tensor:
    """softmax over the keys of the same document that are not later.

    Args:
        q: [s, h, d].
        k: [s, g, d]; g divides h.
        v: [s, g, d].
        documents: tokens of each document; their sum is s.
        scale: factor on the scores.

    Returns:
        [s, h, d]; differentiable.
    """
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    document = torch.repeat_interleave(torch.arange(len(documents)), torch.tensor(documents)).to(q.device)
    position = torch.arange(len(document), device=q.device)
    visible = (document[:, None] == document[None, :]) & (position[:, None] >= position[None, :])
    scores = torch.einsum("qhd,khd->hqk", q, k) * scale
    weights = scores.masked_fill(~visible, float("-inf")).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, v)
