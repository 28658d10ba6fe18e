"""Reference results: loss, gradients and updated weights of the reference implementation."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from megatron_vita.checks.plain import token_losses
from megatron_vita.checks.tiny import draw_weights, make_packs
from megatron_vita.config import ModelConfig, OptimizerConfig, TrainConfig

_PARTS = {
    "vision_model": "freeze_vision_model",
    "vision_projection": "freeze_vision_projection",
    "language_model": "freeze_language_model",
}


@dataclass(frozen=True)
class Reference:
    """Results of one optimizer step, as unsharded tensors by checkpoint key."""

    weights: dict[str, Tensor]
    """Before the step."""
    loss: float
    """Mean over the labelled tokens of the global batch."""
    grads: dict[str, Tensor]
    """Gradient of that mean; the weights that train, in the order of a forward pass."""

    def after_sgd(self, lr: float) -> dict[str, Tensor]:
        """Weights after w - lr * g."""
        trained = {name: weight.clone() for name, weight in self.weights.items() if name in self.grads}
        _step(torch.optim.SGD(trained.values(), lr=lr), trained, self.grads)
        return trained

    def after_adamw(self, settings: OptimizerConfig) -> dict[str, Tensor]:
        """Weights after the first step of AdamW with clipping by the global norm, without decay of 1-D weights."""
        trained = {name: weight.clone() for name, weight in self.weights.items() if name in self.grads}
        groups = [
            {"params": [one for one in trained.values() if one.dim() > 1], "weight_decay": settings.weight_decay},
            {"params": [one for one in trained.values() if one.dim() == 1], "weight_decay": 0.0},
        ]
        betas = (settings.adam_beta1, settings.adam_beta2)
        optimizer = torch.optim.AdamW(groups, lr=settings.lr, betas=betas, eps=settings.adam_eps)
        scale = clip_scale(self.grads, settings.clip_grad)
        _step(optimizer, trained, {name: grad * scale for name, grad in self.grads.items()})
        return trained


def clip_scale(grads: dict[str, Tensor], most: float) -> float:
    """Factor that clips all gradients to a global norm of at most `most` (0: no clipping)."""
    norm = torch.stack([grad.double().norm() for grad in grads.values()]).norm()
    return min(1.0, most / (float(norm) + 1e-6)) if most else 1.0


def _step(optimizer: torch.optim.Optimizer, weights: dict[str, Tensor], grads: dict[str, Tensor]) -> None:
    for name, weight in weights.items():
        weight.grad = grads[name]
    optimizer.step()


@lru_cache(maxsize=64)
def make_reference(model: ModelConfig, train: TrainConfig, images: str, reset: bool, dtype: torch.dtype) -> Reference:
    """Run the global batch, pack by pack, and differentiate.

    Args:
        model: the tiny model.
        train: what is frozen, and how many packs.
        images: where tiles stand.
        reset: every document for itself; otherwise a pack is one document.
        dtype: of the weights. The arithmetic is the same, but float32 for bfloat16 weights.
    """
    wide = torch.float32 if dtype == torch.bfloat16 else dtype
    weights = {name: weight.to(dtype).to(wide) for name, weight in draw_weights(model).items()}
    trained = {name: weight for name, weight in weights.items() if not getattr(train, _PARTS[name.split(".")[0]])}
    leaves = {name: weight.clone().requires_grad_(name in trained) for name, weight in weights.items()}
    packs = make_packs(model, train.global_batch_size, images)
    count = sum(int((pack.labels >= 0).sum()) for pack in packs)
    loss_sum = 0.0
    for pack in packs:
        losses = token_losses(
            leaves,
            model,
            tokens=pack.tokens,
            labels=pack.labels,
            documents=pack.documents if reset else (len(pack.tokens),),
            tiles=pack.tiles,
            first_token=pack.first_token,
        )
        share = losses.sum()
        if share.requires_grad:  # not, where all that trains is the projector, and the pack has no tile
            share.backward()
        loss_sum += share.item()
    grads = {name: _gradient(leaves[name]) / count for name in trained}
    return Reference(weights, loss_sum / count, grads)


def _gradient(leaf: Tensor) -> Tensor:
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
