"""Recipes and synthetic shards for tiny training runs."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import yaml

from megatron_vita.config import RunConfig, load_run
from megatron_vita.data.example import Example, MediaItem
from megatron_vita.data.shards.manifest import SourceCounts, TokenizerInfo
from megatron_vita.data.shards.writer.in_memory import ShardWriter
from megatron_vita.data.shards.writer.packing import pack
from megatron_vita.data.text.tokenizer import VitaTokenizer
from tests.data import packed
from tests.data.kit import tokenizer_folder

LENGTH = packed.SEQ_LENGTH

MODEL = {
    "num_layers": 2,
    "hidden_size": 32,
    "ffn_hidden_size": 48,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "vocab_size": 640,
    "init_method_std": 0.1,
    "vision": {
        "num_layers": 1,
        "hidden_size": 16,
        "ffn_hidden_size": 24,
        "num_attention_heads": 2,
        "image_size": 16,
        "patch_size": 4,
    },
}

STAGES: tuple[dict[str, Any], ...] = (
    {
        "name": "align",
        "data": {"reset_per_document": True},
        "train": {"freeze_vision_model": True, "freeze_language_model": True},
    },
    {
        "name": "learn",
        "data": {"reset_per_document": True},
        "parallel": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    },
    {"name": "long", "parallel": {"pipeline_model_parallel_size": 2}, "train": {"freeze_vision_model": True}},
    {"name": "longer", "parallel": {"context_parallel_size": 2}, "train": {"freeze_vision_model": True}},
)
"""The quickstart's four stages: data, tensor and sequence, pipeline, context parallel."""


def make_shards(folder: Path, *, broken: int | None = None, seed: int = 3) -> None:
    """Tokenizer and shards under `folder`; the pictures of Example `broken`, if given, do not decode."""
    tokenizer = VitaTokenizer.load(tokenizer_folder(folder / "tokenizer"))
    examples = packed.examples(40, seed=seed)
    if broken is not None:
        one = examples[broken]
        assert one.media, "choose an Example with pictures"
        media = tuple(MediaItem(item.data[:20], item.width, item.height) for item in one.media)
        examples[broken] = Example(one.tokens, one.labels, one.tiles, media)
    info = TokenizerInfo(sha256=tokenizer.sha256, vocab_size=packed.TOKENIZER.vocab_size, pad_id=0)
    prefix = folder / "shards" / "train"
    with ShardWriter(
        prefix, spec=packed.SPEC, seq_length=LENGTH, tokenizer=info, template_sha256=tokenizer.template_sha256
    ) as writer:
        for one_pack in pack([len(example.tokens) for example in examples], LENGTH):
            writer.add_pack([examples[i] for i in one_pack], [(0, i + 1) for i in one_pack])
        writer.finish([SourceCounts(name="made", files=("made.json",), read=40, used=40)])


def recipe(folder: Path, save: str, stages: tuple[dict[str, Any], ...] = STAGES, **sections: Any) -> RunConfig:
    """A run over the shards in `folder`, saving under folder/save."""
    settings = {
        "model": MODEL,
        "data": {
            "data_path": str(folder / "shards/train"),
            "tokenizer_model": str(folder / "tokenizer"),
            "seq_length": LENGTH,
        },
        "optimizer": {"lr": 1e-3, "min_lr": 1e-4, "lr_warmup_fraction": 0.0},
        "train": {"global_batch_size": 4, "train_iters": 3, "eval_iters": 2, "seed": 5},
        "checkpoint": {"save": str(folder / save)},
        "stages": list(stages),
    }
    for name, values in sections.items():
        settings[name] = {**settings.get(name, {}), **values}
    path = folder / f"{save}_{os.getpid()}.yaml"  # one file per rank, so that no rank reads a partly written one
    path.write_text(yaml.safe_dump(settings))
    return load_run(path)


def alone(stages: tuple[dict[str, Any], ...] = STAGES) -> tuple[dict[str, Any], ...]:
    """The same stages on one rank."""
    return tuple({**stage, "parallel": {}} for stage in stages)


def ledger(folder: Path, save: str, stage: str) -> list[dict[str, Any]]:
    """A stage's ledger lines."""
    return [json.loads(line) for line in (folder / save / stage / "ledger.jsonl").read_text().splitlines()]
