"""Export a checkpoint as a complete Hugging Face folder."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path

import torch

from megatron_vita.checkpoint.streams import Workers, byte_bar, default_workers, digest_of
from megatron_vita.checkpoint.tensors import LazyTensors
from megatron_vita.convert.card import Subject, public_name, write_card
from megatron_vita.convert.combined import MoreRows, Subset
from megatron_vita.convert.coverage import REPORT_FILE, account
from megatron_vita.convert.effort import USUAL, Effort
from megatron_vita.convert.families import EXPORTS
from megatron_vita.convert.hf_config import write_json
from megatron_vita.convert.opening import open_model
from megatron_vita.convert.outputs import DIGESTS_FILE, check_export
from megatron_vita.convert.processor_files import processor_files
from megatron_vita.convert.publish import new_folder
from megatron_vita.convert.safetensors_writer import MAX_SHARD_BYTES, plan_shards, write_safetensors
from megatron_vita.convert.text_files import out_of_checkpoint, tokens_for_export
from megatron_vita.convert.values import type_name
from megatron_vita.convert.views import HfView
from megatron_vita.data.spec import PreprocessSpec

log = logging.getLogger(__name__)

VOCABULARY = ("language_model.embedding.word_embeddings.weight", "language_model.output_layer.weight")
FORMATS = tuple(EXPORTS)


def export(
    checkpoint: str | Path,
    output: str | Path,
    format_name: str,
    *,
    tokenizer: str | Path | None = None,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    vocabulary_multiple: int = 1,
    overwrite: bool = False,
    effort: Effort = USUAL,
) -> Path:
    """Write the weights of a checkpoint (or of any model that open_model opens) as a Hugging Face folder.

    Args:
        format_name: `internvl` (stock transformers loads it), `long_vita` (the published names) or `llm` (the decoder).
        tokenizer: tokenizer folder, by default the one inside the checkpoint.
        dtype: convert the weights; by default they keep their types. Either way config.json names one type that holds
            every value, because stock code casts all weights to it.
        max_shard_bytes: most bytes of tensors in one file.
        vocabulary_multiple: pad the vocabulary with rows of zeros to a multiple of this; by default no row is padding.

    Returns:
        `output`.

    Raises:
        CheckpointError, ConfigError: the model does not fit the format, or the checkpoint is damaged. Nothing is
            published then.
    """
    output = Path(output)
    check_export(output, (), overwrite=overwrite)
    opened = open_model(checkpoint)
    sources = (opened.path, tokenizer)
    check_export(output, sources, overwrite=overwrite)
    model, family = opened.model, EXPORTS[format_name]
    source: LazyTensors = opened.tensors
    if format_name == "llm":
        source = Subset(source, [name for name in source if name.startswith("language_model.")])
    family.check_exportable(model)
    rows = -(-model.vocab_size // vocabulary_multiple) * vocabulary_multiple
    if rows != model.vocab_size:
        model, source = replace(model, vocab_size=rows), MoreRows(source, VOCABULARY, rows, mean=False)
    tensors = HfView(family.rules(model, decoder=opened.decoder), source, str(opened.path), dtype)
    coverage = account(tensors)
    files = plan_shards(tensors, max_shard_bytes)
    vision = None if format_name == "llm" else model.vision
    tokens = tokens_for_export(opened, Path(tokenizer) if tokenizer else None, vision=vision is not None)
    size = sum(one.size for one in files)
    with new_folder(output, sources, overwrite=overwrite, size=size, durable=effort.durable) as folder:
        ids = out_of_checkpoint(opened, tokens, folder, vision=vision is not None)
        kinds = {tensors.dtype(name) for name in tensors}
        stored = type_name(holds_all(kinds))
        write_json(folder / "config.json", family.write_config(model, stored, ids, opened.decoder))
        spec = (opened.preprocess or PreprocessSpec.for_tower(vision)) if vision is not None else None
        if vision is not None and spec is not None:
            for name, values in processor_files(model, spec).items():
                write_json(folder / name, values)
        state = opened.state
        subject = Subject(
            title=output.resolve().name,
            format_name=format_name,
            model=model,
            layout=spec.layout if spec else None,
            types={type_name(one) for one in kinds},
            config_type=stored,
            weight_bytes=coverage.target_bytes,
            base_models=state.base_models if state else {"model": public_name(opened.path)},
            state=state,
            files={
                DIGESTS_FILE: f"holds the digests of all files (`xxh128sum --check {DIGESTS_FILE}`).",
                REPORT_FILE: "says which stored tensors each tensor was made of.",
            },
        )
        (folder / "README.md").write_text(write_card(subject), encoding="utf-8")
        (folder / REPORT_FILE).write_text(coverage.to_json(), encoding="utf-8")
        total = sum(one.data_bytes for one in files)
        with Workers(effort.workers or default_workers()) as pool, byte_bar(total, show=effort.progress) as bar:
            digests = write_safetensors(folder, tensors, files, pool, bar.update)
        write_digests(folder, digests)
    log.info("coverage: %s", coverage.summary())
    return output


def holds_all(kinds: Collection[torch.dtype]) -> torch.dtype:
    """The dtype in config.json, to which stock code casts all weights: one that holds them without loss.

    Returns:
        The only type there is, or the smallest one that has every value of all of them.
    """
    wide = max(kinds, key=lambda one: one.itemsize)
    same_size = {one for one in kinds if one.itemsize == wide.itemsize}
    return wide if len(same_size) == 1 else torch.float32  # bfloat16 and float16 hold neither each other's values


def write_digests(folder: Path, known: Mapping[str, str]) -> None:
    """Write XXH128SUMS of all files of a folder, hashing those whose digest is not known yet."""
    lines = []
    for path in sorted(one for one in folder.rglob("*") if one.is_file() and one.name != DIGESTS_FILE):
        name = path.relative_to(folder).as_posix()
        digest = known.get(name) or digest_of(path, 0, path.stat().st_size)
        lines.append(f"{digest}  {name}\n")
    (folder / DIGESTS_FILE).write_text("".join(lines), encoding="utf-8")
