"""Run a model, by megatron_vita or by stock transformers, on one fixed prompt with pictures, to compare logits."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_vita.checkpoint.sharded import load_tensors
from megatron_vita.config import IMAGE_NORMS, ModelConfig, ParallelConfig, StageConfig
from megatron_vita.convert.families import STOCK, internvl
from megatron_vita.convert.opening import OpenModel
from megatron_vita.errors import CheckpointError
from megatron_vita.layout import SequenceLayout, TileRoutes

_TEXT = 7
"""Random text tokens before, between and after the pictures."""


@dataclass(frozen=True)
class ProbePrompt:
    """Ids [1, s], tiles uint8 [n, 3, S, S], and the position of each tile's first context token."""

    tokens: Tensor
    tiles: Tensor
    first_token: tuple[int, ...]


def make_probe_prompt(
    model: ModelConfig, image_token: int, *, tiles: tuple[int, ...] = (1, 5), seed: int = 0
) -> ProbePrompt:
    """Random text with pictures of the given numbers of tiles; text only for a decoder alone."""
    generator = torch.Generator().manual_seed(seed)

    def text() -> list[int]:
        ids = torch.randint(0, model.vocab_size, (_TEXT,), generator=generator).tolist()
        return [(one + 1) % model.vocab_size if one == image_token else one for one in ids]

    ids, first = text(), []
    pixels = torch.zeros(0, 3, 1, 1, dtype=torch.uint8)
    if model.vision is not None:
        size, length = model.vision.image_size, model.vision.tokens_per_tile
        for count in tiles:
            for _ in range(count):
                first.append(len(ids))
                ids += [image_token] * length
            ids += text()
        pixels = torch.randint(0, 256, (sum(tiles), 3, size, size), dtype=torch.uint8, generator=generator)
    return ProbePrompt(torch.tensor([ids]), pixels, tuple(first))


def our_logits(opened: OpenModel, prompt: ProbePrompt) -> Tensor:
    """Float32 logits [s, vocab_size] of megatron_vita's model, in this process."""
    from megatron_vita.device import torch_device
    from megatron_vita.models.build import build_model
    from megatron_vita.parallel.groups import build_groups, destroy_groups, init_distributed

    alone = not dist.is_initialized()
    init_distributed()
    groups = build_groups(ParallelConfig())
    try:
        chunks = build_model(StageConfig(model=opened.model), groups, dtype=torch.float32, fresh=False)
        load_tensors(opened.tensors, chunks, str(opened.path))
        length = prompt.tokens.shape[1]
        layout = SequenceLayout((length,))
        per_tile = opened.model.vision.tokens_per_tile if opened.model.vision else 1
        routes = TileRoutes(layout, np.array(prompt.first_token, dtype=np.int64), per_tile)
        place = torch_device()
        with torch.no_grad():
            return (
                chunks[0]
                .eval()(
                    tokens=prompt.tokens.to(place),
                    positions=torch.arange(length, device=place)[None],
                    layout=layout,
                    routes=routes,
                    tiles=prompt.tiles.to(place),
                    logits_indices=torch.arange(length, device=place),
                )
                .float()
                .cpu()
            )
    finally:
        destroy_groups()
        if alone:
            dist.destroy_process_group()


def stock_logits(opened: OpenModel, prompt: ProbePrompt) -> Tensor:
    """Float32 logits [s, vocab_size] of stock transformers on the folder; no remote code. Raises CheckpointError:
    transformers is not installed, or reports missing or unexpected weights."""
    try:
        import transformers
    except ImportError:
        raise CheckpointError(
            "transformers is not installed: pip install transformers, or leave --logits out."
        ) from None
    whole = opened.kind == internvl.MODEL_TYPE
    kind = transformers.AutoModelForImageTextToText if whole else transformers.AutoModelForCausalLM
    network, report = kind.from_pretrained(
        str(opened.path), dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    wrong = [*report["missing_keys"], *report["unexpected_keys"], *report["mismatched_keys"]]
    if wrong:
        raise CheckpointError(
            f"{opened.path}: transformers reports {wrong[0]} (of {len(wrong)}) missing or unexpected."
        )
    inputs: dict[str, Tensor] = {"input_ids": prompt.tokens}
    if opened.model.vision is not None:
        norm = opened.preprocess.image_norm if opened.preprocess else "imagenet"
        mean, std = (torch.tensor(one).view(3, 1, 1) for one in IMAGE_NORMS[norm])
        inputs["pixel_values"] = (prompt.tiles.float() / 255 - mean) / std
    with torch.no_grad():
        return network.eval()(**inputs).logits[0].float()


def run(opened: OpenModel, prompt: ProbePrompt) -> Tensor:
    """Logits by stock transformers if it knows the folder's format, else by megatron_vita's model."""
    return stock_logits(opened, prompt) if opened.kind in STOCK else our_logits(opened, prompt)
