"""The rotary embedding in plain PyTorch: a part of the reference in plain.py, written without parallel/rotary.py."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megatron_vita.config import ModelConfig


def frequencies(model: ModelConfig) -> tuple[Tensor, float]:
    """Angles a position, [r / 2], and the factor of their cosines and sines, by the rotary embedding's scaling.

    Published models compute both in float32, whatever the weights are.
    """
    r = int(model.head_dim * model.rotary_percent)
    frequency = 1.0 / (model.rotary_base ** (torch.arange(0, r, 2).float() / r))
    if model.rotary_seq_len_interpolation_factor is not None:
        return frequency / model.rotary_seq_len_interpolation_factor, 1.0
    if model.rope_scaling_factor is not None:
        return _llama3(frequency, model.rope_scaling_factor, model), 1.0
    if model.yarn_rotary_scaling_factor is not None:
        return _yarn(frequency, model.yarn_rotary_scaling_factor, model), _yarn_scale(model)
    return frequency, 1.0


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """[n, heads, d]: of the first r numbers, the pair (x[i], x[i + r/2]), or (x[2i], x[2i + 1]) if interleaved, turns
    by its token's angle; cos and sin [n, 1, r / 2]."""
    x, rest = x.split([2 * cos.shape[-1], x.shape[-1] - 2 * cos.shape[-1]], dim=-1)
    if interleaved:
        low, high = x.unflatten(-1, (-1, 2)).unbind(-1)
        turned = torch.stack([low * cos - high * sin, high * cos + low * sin], dim=-1).flatten(-2)
    else:
        low, high = x.chunk(2, dim=-1)
        turned = torch.cat([low * cos - high * sin, high * cos + low * sin], dim=-1)
    return torch.cat([turned, rest], dim=-1)


def _llama3(frequency: Tensor, factor: float, model: ModelConfig) -> Tensor:
    """Llama 3.1's scaling: waves that turn less than once (`low`) in 8192 tokens are stretched, those that turn more
    than four times (`high`) are not, the rest is mixed."""
    low, high = model.rope_scaling_low_freq_factor, model.rope_scaling_high_freq_factor
    turns = model.rope_scaling_original_max_position_embeddings * frequency / (2 * math.pi)
    smooth = (turns - low) / (high - low)
    mixed = (1 - smooth) * frequency / factor + smooth * frequency
    return torch.where(turns < low, frequency / factor, torch.where(turns > high, frequency, mixed))


def _yarn(frequency: Tensor, factor: float, model: ModelConfig) -> Tensor:
    """YaRN: as Llama 3.1's, but mixed by the number of a dimension: from the one whose wave turns beta_fast times in
    the original length to the one whose wave turns beta_slow times."""
    r, base, length = 2 * len(frequency), model.rotary_base, model.yarn_original_max_position_embeddings
    assert length is not None

    def dimension(turns: float) -> float:  # i of length * base ** (-2 i / r) = 2 pi turns
        return r / 2 * math.log(length / (2 * math.pi * turns), base)

    first, last = dimension(model.yarn_beta_fast), dimension(model.yarn_beta_slow)
    if model.yarn_correction_range_round_to_int:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, r - 1)
    stretched = ((torch.arange(len(frequency)) - first) / (last - first or 0.001)).clamp(0, 1)
    return frequency * (1 - stretched) + frequency / factor * stretched


def _yarn_scale(model: ModelConfig) -> float:
    if model.yarn_attention_factor is not None:
        return model.yarn_attention_factor
    log = math.log(model.yarn_rotary_scaling_factor or 1.0)
    if model.yarn_mscale is None or model.yarn_mscale_all_dim is None:
        return 1 + 0.1 * log
    return (1 + 0.1 * model.yarn_mscale * log) / (1 + 0.1 * model.yarn_mscale_all_dim * log)
