"""Hugging Face folders -> a checkpoint that any layout can start from."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from megatron_vita.checkpoint.folder import step_folder
from megatron_vita.checkpoint.lazy import LazyTensors, Region, TensorsInMemory, extent, overlap, shift, whole
from megatron_vita.checkpoint.offline import write_tensors
from megatron_vita.checkpoint.state import RunState
from megatron_vita.config import ModelConfig, StageConfig, TrainConfig, VisionConfig
from megatron_vita.convert.opening import OpenModel, open_model, open_tower
from megatron_vita.convert.tokenizer_files import with_vision_tokens
from megatron_vita.convert.views import Joined
from megatron_vita.data.spec import PreprocessSpec
from megatron_vita.errors import CheckpointError, ConfigError

log = logging.getLogger(__name__)

_GROWING = ("language_model.embedding.word_embeddings.weight", "language_model.output_layer.weight")


def import_parts(
    llm: str | Path,
    vision: str | Path | None,
    output: str | Path,
    *,
    tokenizer: str | Path | None = None,
    seed: int = 1234,
    overwrite: bool = False,
) -> Path:
    """Join a decoder and a tower into a fresh model with a new projector; or take the decoder alone.

    The tokenizer gets the special tokens of pictures and videos that it lacks, after its last id and in the published
    order. Where the embedding has rows for them already (Qwen2.5 has 387 spare ones) those rows are kept as they are;
    where it has not, rows are appended that hold the mean of all others, so that a new token starts as an average one.

    Args:
        llm: Hugging Face folder of a decoder.
        vision: Hugging Face folder of an InternViT; none imports the decoder alone, tokenizer unchanged.
        output: folder of checkpoints; iteration 0 is written there.
        tokenizer: tokenizer folder, by default the decoder's.
        seed: of the projector's initial weights.

    Returns:
        The checkpoint.

    Raises:
        CheckpointError, ConfigError: a folder is not what it should be; nothing has been written then.
    """
    output = Path(output)
    _refuse_existing(output, overwrite)
    decoder = open_model(llm)
    if decoder.model.vision is not None:
        raise ConfigError(f"{llm}: is a whole model ({decoder.kind}), not a decoder. Use import --model {llm}.")
    source = Path(tokenizer) if tokenizer else decoder.tokenizer_dir
    if vision is None:
        return _write(output, decoder.model, decoder.tensors, None, source, {"llm": str(llm)}, seed)
    tower, tower_tensors = open_tower(vision)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        rows = with_vision_tokens(source, folder)
        model = replace(decoder.model, vision=tower, vocab_size=max(rows, decoder.model.vocab_size))
        language: LazyTensors = decoder.tensors
        if rows > decoder.model.vocab_size:
            log.info(
                "the tokenizer needs %d rows, the embedding has %d: mean rows added", rows, decoder.model.vocab_size
            )
            language = _Grown(language, rows)
        dtype = language.dtype("language_model.decoder.final_layernorm.weight")
        parts = Joined([language, tower_tensors, TensorsInMemory(fresh_projector(model, seed, dtype))])
        spec = PreprocessSpec.for_tower(tower)
        return _write(output, model, parts, spec, folder, {"llm": str(llm), "vision": str(vision)}, seed)


def import_model(folder: str | Path, output: str | Path, *, overwrite: bool = False) -> Path:
    """Import a whole model (native InternVL, Long-VITA, or a decoder), found out by itself.

    Returns:
        The checkpoint, iteration 0 below `output`.

    Raises:
        CheckpointError, ConfigError: the folder is not what it should be; nothing has been written then.
    """
    output = Path(output)
    _refuse_existing(output, overwrite)
    opened: OpenModel = open_model(folder)
    if opened.state is not None:
        raise ConfigError(f"{folder}: is a checkpoint already. Give a Hugging Face folder.")
    origin = {"model": str(folder)}
    return _write(output, opened.model, opened.tensors, opened.preprocess, opened.tokenizer_dir, origin, 0)


def fresh_projector(model: ModelConfig, seed: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Initial weights of a projector: normal linears with the decoder's spread, zero biases, the identity norm."""
    assert isinstance(model.vision, VisionConfig)
    shuffled, inner, width = 4 * model.vision.hidden_size, model.projector_width, model.hidden_size
    generator = torch.Generator().manual_seed(seed)

    def normal(rows: int, columns: int) -> Tensor:
        return (torch.randn(rows, columns, generator=generator) * model.init_method_std).to(dtype)

    prefix = "vision_projection."
    tensors = {
        prefix + "pre_proj_layernorm.weight": torch.ones(shuffled, dtype=dtype),
        prefix + "pre_proj_layernorm.bias": torch.zeros(shuffled, dtype=dtype),
        prefix + "encoder.linear_fc1.weight": normal(inner, shuffled),
        prefix + "encoder.linear_fc2.weight": normal(width, inner),
    }
    if model.projector.bias:
        tensors[prefix + "encoder.linear_fc1.bias"] = torch.zeros(inner, dtype=dtype)
        tensors[prefix + "encoder.linear_fc2.bias"] = torch.zeros(width, dtype=dtype)
    return tensors


@dataclass(frozen=True)
class _Grown(LazyTensors):
    """Tensors whose vocabulary has more rows: the new ones are the mean of the old."""

    source: LazyTensors
    rows: int

    def shape(self, name: str) -> tuple[int, ...]:
        shape = self.source.shape(name)
        return (self.rows, *shape[1:]) if name in _GROWING else shape

    def dtype(self, name: str) -> torch.dtype:
        return self.source.dtype(name)

    def read(self, name: str, region: Region | None = None) -> Tensor:
        if name not in _GROWING:
            return self.source.read(name, region)
        region = whole(self.shape(name)) if region is None else region
        held = whole(self.source.shape(name))
        old = overlap(held, region)
        out = torch.empty(extent(region), dtype=self.dtype(name))
        if old is not None:
            out[shift(old, region)] = self.source.read(name, old)
        if region[0].stop > held[0].stop:
            mean = self.source.read(name).float().mean(0)[region[1]].to(out.dtype)
            out[max(0, held[0].stop - region[0].start) :] = mean
        return out

    def __iter__(self) -> Iterator[str]:
        return iter(self.source)

    def __len__(self) -> int:
        return len(self.source)


def _write(
    output: Path,
    model: ModelConfig,
    tensors: LazyTensors,
    spec: PreprocessSpec | None,
    tokenizer: Path,
    origin: dict[str, str],
    seed: int,
) -> Path:
    if not (tokenizer / "tokenizer.json").is_file():
        raise CheckpointError(f"{tokenizer}: holds no tokenizer.json. Name a tokenizer folder with --tokenizer.")
    stage = StageConfig(name="import", model=model, train=TrainConfig(seed=seed))
    names = {key: Path(value).name for key, value in origin.items()}
    state = RunState(stage=stage, iteration=0, preprocess=spec, extra={"imported_from": names})
    return write_tensors(output, 0, tensors, state, tokenizer)


def _refuse_existing(output: Path, overwrite: bool) -> None:
    if not overwrite and step_folder(output, 0).exists():
        raise ConfigError(f"{step_folder(output, 0)}: exists. Choose another --output, or replace it with --overwrite.")
