"""Reference implementation of attention with document masking: one process, materialised mask and scores. For tests."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def document_attention(q: Tensor, k: Tensor, v: Tensor, documents: Sequence[int], scale: float) -> Tensor:
    """Causal attention within documents: a token attends to itself and the earlier tokens of its document.

    Args:
        q: [s, h, d].
        k: [s, g, d]; g divides h (GQA).
        v: [s, g, d].
        documents: length of each document in tokens; their sum is s.
        scale: softmax scale.

    Returns:
        [s, h, d]; differentiable by autograd.
    """
    heads_per_group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(heads_per_group, dim=1), v.repeat_interleave(heads_per_group, dim=1)
    document = torch.repeat_interleave(torch.arange(len(documents)), torch.tensor(documents)).to(q.device)
    position = torch.arange(len(document), device=q.device)
    mask = (document[:, None] == document[None, :]) & (position[:, None] >= position[None, :])
    scores = torch.einsum("qhd,khd->hqk", q, k) * scale
    weights = scores.masked_fill(~mask, float("-inf")).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, v)
