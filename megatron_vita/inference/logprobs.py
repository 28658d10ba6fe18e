"""Log-probabilities of tokens. Legend: n rows, v vocabulary entries, k most likely tokens."""

from __future__ import annotations

import torch

_ROWS = 256
"""Rows of which `prompt_logprobs` has the whole vocabulary in memory at once."""


def prompt_logprobs(
    logits: torch.Tensor, targets: torch.Tensor, top: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log-probabilities of given tokens and of the most likely ones.

    Args:
        logits: float [n, v].
        targets: int64 [n], the token that came in each place.
        top: k, at most v of them.

    Returns:
        Log-probabilities of the targets, float32 [n]; ids of the most likely tokens, int64 [n, k], most likely first;
        their log-probabilities, float32 [n, k].
    """
    top = min(top, logits.shape[-1])
    values, ids, best = [], [], []
    for part, wanted in zip(logits.split(_ROWS), targets.split(_ROWS), strict=True):
        logprobs = torch.log_softmax(part, dim=-1, dtype=torch.float32)
        values.append(logprobs.gather(-1, wanted.unsqueeze(-1)).squeeze(-1))
        most = torch.topk(logprobs, top, dim=-1)
        ids.append(most.indices)
        best.append(most.values)
    return torch.cat(values), torch.cat(ids), torch.cat(best)
