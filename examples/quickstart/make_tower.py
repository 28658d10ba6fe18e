"""Train the quickstart's vision tower as a digit classifier and save it in transformers' own names.

    python examples/quickstart/make_tower.py --data DIR --output DIR [--seed N] [--steps N]

The real system starts from InternViT-300M, which has seen pictures before it meets a language model. This is its
miniature: stock transformers' InternVLVisionModel at the quickstart's sizes, taught from training scans to tell digits
and whether one is inverted, from the four tokens that pixel shuffle makes of a picture. The classifier on top is thrown
away; the folder holds config.json and model.safetensors, as a publisher's would.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F
from tqdm import tqdm
from transformers import InternVLVisionConfig, InternVLVisionModel

from megatron_vita.config import IMAGE_NORMS
from megatron_vita.models.projector import pixel_shuffle

SIDE, PATCH = 16, 4


def load_pictures(data: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """The single-picture samples of digits.json: uint8 `[n, 3, 16, 16]` and digit int64 `[n]`."""
    pictures, digits = [], []
    for record in json.loads((data / "digits.json").read_text(encoding="utf-8")):
        answer = record["conversations"][1]["value"]
        if answer.isdigit():
            with Image.open(data / record["image"]) as image:
                pictures.append(np.asarray(image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BICUBIC)))
            digits.append(int(answer))
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous(), torch.tensor(digits)


def build_tower() -> InternVLVisionModel:
    """A tower of the sizes in run.yaml, with InternViT's biases, layer scale and missing final norm."""
    config = InternVLVisionConfig(
        hidden_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=256,
        image_size=[SIDE, SIDE],
        patch_size=[PATCH, PATCH],
        attention_bias=True,
        layer_norm_eps=1e-6,
        layer_scale_init_value=1.0,  # at 0.1 so short a training stays nearly linear and misreads inverted digits
    )
    return InternVLVisionModel(config)


def train(tower: InternVLVisionModel, pictures: torch.Tensor, digits: torch.Tensor, *, steps: int, seed: int) -> float:
    """Train the tower; returns its accuracy on training images over the last tenth of the steps."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in IMAGE_NORMS["imagenet"])
    head = torch.nn.Linear(4 * 256, 12)  # ten digits, and upright or inverted
    parameters = [*tower.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=2e-3, betas=(0.9, 0.95), weight_decay=0.05)
    generator = torch.Generator().manual_seed(seed)
    batch, right, seen = 64, 0, 0
    for step in tqdm(range(steps), desc="tower", unit="step", mininterval=2):
        optimizer.param_groups[0]["lr"] = (
            2e-3 * min(1, (step + 1) / 20) * (0.51 + 0.49 * math.cos(math.pi * step / steps))
        )
        chosen = torch.randint(len(pictures), (batch,), generator=generator)
        inverted = torch.rand(batch, generator=generator) < 0.3
        pixels = pictures[chosen].float() / 255
        pixels = torch.where(inverted.view(-1, 1, 1, 1), 1 - pixels, pixels)
        tokens = pixel_shuffle(tower((pixels - mean) / std).last_hidden_state[:, 1:])
        logits = head(tokens.flatten(1))
        digit = F.cross_entropy(logits[:, :10], digits[chosen])
        mark = F.cross_entropy(logits[:, 10:], inverted.long())
        optimizer.zero_grad()
        (digit + 0.3 * mark).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if step >= 0.9 * steps:
            right += int((logits[:, :10].argmax(-1) == digits[chosen]).sum())
            seen += batch
    return right / max(seen, 1)


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line, train, save."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--data", type=Path, required=True, help="folder written by make_data.py")
    parser.add_argument("--output", type=Path, required=True, help="Hugging Face folder to write")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--steps", type=int, default=600)
    arguments = parser.parse_args(argv)
    torch.manual_seed(arguments.seed)
    pictures, digits = load_pictures(arguments.data)
    tower = build_tower()
    accuracy = train(tower, pictures, digits, steps=arguments.steps, seed=arguments.seed)
    tower.save_pretrained(arguments.output)
    print(f"wrote {arguments.output}: a tower that tells {accuracy:.1%} of its training pictures")
    return 0


if __name__ == "__main__":
    sys.exit(main())
