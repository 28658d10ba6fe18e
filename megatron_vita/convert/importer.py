"""Import Hugging Face folders as a checkpoint that any layout can load."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from megatron_vita.checkpoint.offline import write_tensors
from megatron_vita.checkpoint.state import RunState
from megatron_vita.checkpoint.tensors import LazyTensors
from megatron_vita.config import ModelConfig, ProjectorConfig, StageConfig, TrainConfig, VisionConfig
from megatron_vita.convert.card import public_name
from megatron_vita.convert.combined import Joined, MoreRows
from megatron_vita.convert.coverage import REPORT_FILE, account
from megatron_vita.convert.effort import USUAL, Effort
from megatron_vita.convert.opening import DECODER, OpenModel, open_model, open_tower
from megatron_vita.convert.outputs import check_import
from megatron_vita.convert.recipe import Recipe
from megatron_vita.convert.text_files import into_checkpoint
from megatron_vita.convert.values import FreshTensors
from megatron_vita.data.spec import PreprocessSpec
from megatron_vita.errors import CheckpointError, ConfigError

log = logging.getLogger(__name__)

_PROJECTOR = ProjectorConfig()
_MATRIX = "language_model.decoder.layers.0.mlp.linear_fc1.weight"
"""The tensor whose dtype a new projector takes. Not a norm: some publishers keep those in float32."""
_GROWING = ("language_model.embedding.word_embeddings.weight", "language_model.output_layer.weight")


def import_parts(
    llm: str | Path,
    vision: str | Path | None,
    output: str | Path,
    *,
    tokenizer: str | Path | None = None,
    projector: ProjectorConfig = _PROJECTOR,
    recipe: Recipe | None = None,
    seed: int = 1234,
    overwrite: bool = False,
    effort: Effort = USUAL,
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
        projector: its shape; by default InternVL's.
        recipe: the model that a training recipe wants: its projector is the one that is made, and the rest must be what
            the folders hold.
        seed: of the projector's initial weights.

    Returns:
        The checkpoint.

    Raises:
        CheckpointError, ConfigError: a folder is not what it should be; nothing has been written then.
    """
    output = Path(output)
    check_import(output, (llm, vision, tokenizer), overwrite=overwrite)
    decoder = open_model(llm)
    if decoder.state is not None:
        raise ConfigError(f"{llm}: is a checkpoint already. Give a Hugging Face folder.")
    if decoder.model.vision is not None:
        raise ConfigError(f"{llm}: is a whole model ({decoder.kind}), not a decoder. Use import --model {llm}.")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        rows = into_checkpoint(decoder, Path(tokenizer) if tokenizer else None, folder, joined=vision is not None)
        if vision is None:
            model = recipe.fit(decoder.model) if recipe else decoder.model
            content = _Content(model, decoder.tensors, None, folder, {"llm": llm}, seed, decoder.decoder)
            return _write(output, content, overwrite, effort)
        tower, tower_tensors = open_tower(vision)
        model = replace(
            decoder.model,
            vision=tower,
            vocab_size=max(rows, decoder.model.vocab_size),
            projector=recipe.model.projector if recipe else projector,
        )
        model = recipe.fit(model) if recipe else model
        language: LazyTensors = decoder.tensors
        if rows > decoder.model.vocab_size:
            log.info(
                "the tokenizer needs %d rows, the embedding has %d: mean rows added", rows, decoder.model.vocab_size
            )
            language = MoreRows(language, _GROWING, rows, mean=True)
        dtype = language.dtype(_MATRIX)
        parts = Joined([language, tower_tensors, FreshTensors(fresh_projector(model, seed, dtype))])
        spec = PreprocessSpec.for_tower(tower)
        content = _Content(model, parts, spec, folder, {"llm": llm, "vision": vision}, seed, decoder.decoder)
        return _write(output, content, overwrite, effort)


def import_model(
    folder: str | Path,
    output: str | Path,
    *,
    tokenizer: str | Path | None = None,
    vocab_size: int | None = None,
    recipe: Recipe | None = None,
    overwrite: bool = False,
    effort: Effort = USUAL,
) -> Path:
    """Import a whole model (native InternVL, Long-VITA in any of its formats, or a decoder); the format is detected.

    Args:
        folder: where it lies.
        output: folder of checkpoints; iteration 0 is written there.
        tokenizer: tokenizer folder, by default the model's own. For Long-VITA's Megatron layouts,
            which have none, it is Qwen2.5's; the special tokens that it lacks are added.
        vocab_size: rows of the embedding that are no padding, which such a layout does not always say.
        recipe: the model that a training recipe wants, which must be this one.

    Returns:
        The checkpoint, iteration 0 below `output`.

    Raises:
        CheckpointError, ConfigError: the folder is not what it should be; nothing has been written then.
    """
    output = Path(output)
    check_import(output, (folder, tokenizer), overwrite=overwrite)
    opened: OpenModel = open_model(folder, vocab_size=vocab_size)
    if opened.state is not None:
        raise ConfigError(f"{folder}: is a checkpoint already. Give a Hugging Face folder.")
    with tempfile.TemporaryDirectory() as scratch:
        files = Path(scratch)
        rows = into_checkpoint(opened, Path(tokenizer) if tokenizer else None, files)
        if rows > opened.model.vocab_size:
            raise CheckpointError(
                f"{tokenizer or opened.tokenizer_dir}: needs {rows} rows with its special tokens, the model has "
                f"{opened.model.vocab_size}. Give the tokenizer that it was trained with (Qwen2.5's)."
            )
        model = recipe.fit(opened.model) if recipe else opened.model
        content = _Content(model, opened.tensors, opened.preprocess, files, {"model": folder}, 0, opened.decoder)
        return _write(output, content, overwrite, effort)


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
class _Content:
    """Contents of an imported checkpoint."""

    model: ModelConfig
    tensors: LazyTensors
    preprocess: PreprocessSpec | None
    tokenizer: Path
    """Its folder."""
    origin: Mapping[str, str | Path]
    """Folders that were read, by part."""
    seed: int
    decoder: str | None
    """model_type of the decoder's family."""


def _write(output: Path, content: _Content, overwrite: bool, effort: Effort) -> Path:
    state = RunState(
        stage=StageConfig(name="import", model=content.model, train=TrainConfig(seed=content.seed)),
        iteration=0,
        preprocess=content.preprocess,
        base_models={part: public_name(folder) for part, folder in content.origin.items()},
        extra={DECODER: content.decoder} if content.decoder else {},
    )
    coverage = account(content.tensors)
    folder = write_tensors(
        output,
        0,
        content.tensors,
        state,
        content.tokenizer,
        notes={REPORT_FILE: coverage.to_json()},
        replace=overwrite,
        workers=effort.workers,
        durable=effort.durable,
        progress=effort.progress,
    )
    log.info("coverage: %s", coverage.summary())
    return folder
