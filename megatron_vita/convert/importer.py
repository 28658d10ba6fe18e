"""Hugging Face folders -> a checkpoint that any layout can start from."""

from __future__ import annotations

import logging
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_vita.checkpoint.dtypes import DType, torch_dtype
from megatron_vita.checkpoint.folder import step_folder
from megatron_vita.checkpoint.lazy import LazyTensors, TensorsInMemory
from megatron_vita.checkpoint.offline import write_tensors
from megatron_vita.checkpoint.state import RunState
from megatron_vita.config import ModelConfig, StageConfig, TrainConfig, VisionConfig
from megatron_vita.convert.coverage import REPORT_FILE, account
from megatron_vita.convert.identity import identity_of
from megatron_vita.convert.opening import MEGATRON, OpenModel, open_model, open_tower
from megatron_vita.convert.tokenizer_files import with_vision_tokens
from megatron_vita.convert.views import Joined, MoreRows
from megatron_vita.data.spec import PreprocessSpec
from megatron_vita.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger(__name__)

_MATRIX = "language_model.decoder.layers.0.mlp.linear_fc1.weight"
"""Whose type a fresh projector takes. Not a norm's: some publishers keep those in float32."""
_GROWING = ("language_model.embedding.word_embeddings.weight", "language_model.output_layer.weight")


def import_parts(
    llm: str | Path,
    vision: str | Path | None,
    output: str | Path,
    *,
    tokenizer: str | Path | None = None,
    seed: int = 1234,
    overwrite: bool = False,
    workers: int | None = None,
    durable: bool = False,
    progress: bool = False,
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
        workers: threads, by default as many as there are cores.
        durable: wait until the disk has everything.
        progress: show a bar on standard error.

    Returns:
        The checkpoint.

    Raises:
        CheckpointError, ConfigError: a folder is not what it should be; nothing has been written then.
    """
    output = Path(output)
    _refuse_existing(output, overwrite)
    decoder = open_model(llm)
    if decoder.state is not None:
        raise ConfigError(f"{llm}: is a checkpoint already. Give a Hugging Face folder.")
    if decoder.model.vision is not None:
        raise ConfigError(f"{llm}: is a whole model ({decoder.kind}), not a decoder. Use import --model {llm}.")
    source = Path(tokenizer) if tokenizer else decoder.tokenizer_dir
    if vision is None:
        return _write(
            output, decoder.model, decoder.tensors, None, source, {"llm": str(llm)}, seed, workers, durable, progress
        )
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
            language = MoreRows(language, _GROWING, rows, mean=True)
        dtype = language.dtype(_MATRIX)
        parts = Joined([language, tower_tensors, TensorsInMemory(fresh_projector(model, seed, dtype))])
        spec = PreprocessSpec.for_tower(tower)
        origin = {"llm": str(llm), "vision": str(vision)}
        return _write(output, model, parts, spec, folder, origin, seed, workers, durable, progress)


def import_model(
    folder: str | Path,
    output: str | Path,
    *,
    tokenizer: str | Path | None = None,
    overwrite: bool = False,
    workers: int | None = None,
    durable: bool = False,
    progress: bool = False,
) -> Path:
    """Import a whole model (native InternVL, Long-VITA in any of its formats, or a decoder), found out by itself.

    Args:
        folder: where it lies.
        output: folder of checkpoints; iteration 0 is written there.
        tokenizer: tokenizer folder, by default the model's own. Long-VITA's Megatron layouts have none; theirs is
            Qwen2.5's, which gets the special tokens that it lacks.
        workers: threads, by default as many as there are cores.
        durable: wait until the disk has everything.
        progress: show a bar on standard error.

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
    source = Path(tokenizer) if tokenizer else opened.tokenizer_dir
    with tempfile.TemporaryDirectory() as scratch:
        if opened.kind == MEGATRON and opened.model.vision is not None and (source / "tokenizer.json").is_file():
            rows = with_vision_tokens(source, Path(scratch))
            if rows > opened.model.vocab_size:
                raise CheckpointError(
                    f"{source}: needs {rows} rows with its special tokens, the model has {opened.model.vocab_size}. "
                    "Give the tokenizer that it was trained with (Qwen2.5's)."
                )
            source = Path(scratch)
        return _write(
            output, opened.model, opened.tensors, opened.preprocess, source, origin, 0, workers, durable, progress
        )


def fresh_projector(model: ModelConfig, seed: int, dtype: DType) -> dict[str, Tensor]:
    """Initial weights of a projector: normal linears with the decoder's spread, zero biases, the identity norm."""
    import torch

    assert isinstance(model.vision, VisionConfig)
    kind = torch_dtype(dtype)
    shuffled, inner, width = 4 * model.vision.hidden_size, model.projector_width, model.hidden_size
    generator = torch.Generator().manual_seed(seed)

    def normal(rows: int, columns: int) -> Tensor:
        return (torch.randn(rows, columns, generator=generator) * model.init_method_std).to(kind)

    prefix = "vision_projection."
    tensors = {
        prefix + "pre_proj_layernorm.weight": torch.ones(shuffled, dtype=kind),
        prefix + "pre_proj_layernorm.bias": torch.zeros(shuffled, dtype=kind),
        prefix + "encoder.linear_fc1.weight": normal(inner, shuffled),
        prefix + "encoder.linear_fc2.weight": normal(width, inner),
    }
    if model.projector.bias:
        tensors[prefix + "encoder.linear_fc1.bias"] = torch.zeros(inner, dtype=kind)
        tensors[prefix + "encoder.linear_fc2.bias"] = torch.zeros(width, dtype=kind)
    return tensors


def _write(
    output: Path,
    model: ModelConfig,
    tensors: LazyTensors,
    spec: PreprocessSpec | None,
    tokenizer: Path,
    origin: dict[str, str],
    seed: int,
    workers: int | None,
    durable: bool,
    progress: bool,
) -> Path:
    if not (tokenizer / "tokenizer.json").is_file():
        raise CheckpointError(f"{tokenizer}: holds no tokenizer.json. Name a tokenizer folder with --tokenizer.")
    stage = StageConfig(name="import", model=model, train=TrainConfig(seed=seed))
    names = {key: Path(value).name for key, value in origin.items()}
    state = RunState(stage=stage, iteration=0, preprocess=spec, extra={"imported_from": names})
    coverage = account(tensors)
    folder = write_tensors(
        output,
        0,
        tensors,
        state,
        tokenizer,
        notes={REPORT_FILE: coverage.to_json()},
        source={"seed": seed, **{key: identity_of(value) for key, value in origin.items()}},
        workers=workers,
        durable=durable,
        progress=progress,
    )
    log.info("coverage: %s", coverage.summary())
    return folder


def _refuse_existing(output: Path, overwrite: bool) -> None:
    if not overwrite and step_folder(output, 0).exists():
        raise ConfigError(f"{step_folder(output, 0)}: exists. Choose another --output, or replace it with --overwrite.")
