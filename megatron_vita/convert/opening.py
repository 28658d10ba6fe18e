"""Open a model and detect its format: a checkpoint, a Hugging Face folder or a Megatron layout."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_vita.checkpoint.folder import TOKENIZER_FOLDER, finished, resolve
from megatron_vita.checkpoint.integrity import INTEGRITY_FILE
from megatron_vita.checkpoint.offline import model_keys, read_tensors
from megatron_vita.checkpoint.state import RunState
from megatron_vita.checkpoint.tensors import LazyTensors
from megatron_vita.config import ModelConfig, VisionConfig
from megatron_vita.convert import megatron_layouts, processor_files, rank_files
from megatron_vita.convert.combined import Subset
from megatron_vita.convert.families import DECODERS, MODELS, TOWER_TYPES, TOWERS, decoder
from megatron_vita.convert.hf_config import check_layers, check_not_quantised, choice, read_json, string, unsupported
from megatron_vita.convert.safetensors_folder import SafetensorsFolder
from megatron_vita.convert.views import McoreView
from megatron_vita.data.spec import PreprocessSpec
from megatron_vita.errors import ConfigError

MEGATRON = "megatron"
"""`kind` of Long-VITA's Megatron layouts."""


DECODER = "decoder"
"""Key of RunState.extra: OpenModel.decoder."""


@dataclass(frozen=True)
class OpenModel:
    """An opened model of any format."""

    path: Path
    """Folder of the checkpoint or the Hugging Face model."""
    kind: str
    """`checkpoint`, `internvl`, `long_vita`, `megatron`, or a decoder's model_type."""
    model: ModelConfig
    tensors: LazyTensors
    """Its weights by checkpoint key."""
    preprocess: PreprocessSpec | None
    """Preprocessing of pictures; none for a decoder alone."""
    tokenizer_dir: Path
    """Folder of its tokenizer."""
    state: RunState | None = None
    """run.json of a checkpoint."""
    image_token_id: int | None = None
    """Image token, if the config names it (InternVL's)."""
    decoder: str | None = None
    """model_type of the decoder's family, if known: several families can hold the same decoder."""


@dataclass(frozen=True)
class OpenTower:
    """A vision tower alone."""

    path: Path
    """Its Hugging Face folder."""
    kind: str
    """Its model_type."""
    vision: VisionConfig
    tensors: LazyTensors
    """Its weights by checkpoint key, all below `vision_model.`."""


def open_model(path: str | Path, *, vocab_size: int | None = None) -> OpenModel:
    """Open a checkpoint, a folder of checkpoints, a Hugging Face folder, or one of Long-VITA's Megatron layouts. No
    tensor is read yet.

    Args:
        vocab_size: rows of the embedding that are no padding, for a Megatron layout that does not say.

    Raises:
        ConfigError: no such folder, nothing of the kind there, or a vision tower alone.
        CheckpointError: it is damaged, incomplete or not supported.
    """
    opened = open_any(path, vocab_size=vocab_size)
    if isinstance(opened, OpenTower):
        raise ConfigError(f"{path}: is a vision tower ({opened.kind}) alone. Give it as --vision, beside an --llm.")
    return opened


def open_any(path: str | Path, *, vocab_size: int | None = None) -> OpenModel | OpenTower:
    """Open what open_model opens, or the Hugging Face folder of a tower: whatever has weights to compare.

    Raises:
        ConfigError: no such folder, or nothing of the kind there.
        CheckpointError: it is damaged, incomplete or not supported.
    """
    path = Path(path)
    if _is_checkpoint(path):
        return _open_checkpoint(resolve(path))
    step = rank_files.find(path) if path.is_dir() else None
    if step is not None:
        return _open_megatron(step, vocab_size)
    if vocab_size is not None:
        raise ConfigError(f"--vocab-size is for Megatron layouts: {path} says its own. Leave the flag out.")
    config = _read_config(path)
    if (kind := _tower_kind(config)) is not None:
        return OpenTower(path, kind, *_open_tower(path, config))
    return _open_hf(path, config)


def open_tower(path: str | Path) -> tuple[VisionConfig, LazyTensors]:
    """The Hugging Face folder of a tower (or of a SigLIP or CLIP with its text half): its shape, its weights by
    checkpoint key. Pixels are normalised as its processor settings say, if it has any.

    Raises:
        ConfigError: a whole model or a decoder.
        CheckpointError: not a tower that is supported, or incomplete.
    """
    path = Path(path)
    if _is_checkpoint(path):
        raise ConfigError(f"{path}: is a checkpoint. Give the Hugging Face folder of a vision tower.")
    config, where = _read_config(path), str(path / "config.json")
    kind = string(config, "model_type", _tower_kind(config), where)
    if kind in DECODERS:
        raise ConfigError(f"{path}: is a decoder ({kind}). Give it as --llm, and a vision tower as --vision.")
    if kind in MODELS:
        raise ConfigError(f"{path}: is a whole model ({kind}). Give it as --model, or a vision tower as --vision.")
    return _open_tower(path, {**config, "model_type": choice(config, "model_type", TOWER_TYPES, kind, where)})


def _is_checkpoint(path: Path) -> bool:
    """Whether a path is a checkpoint, or a folder of them."""
    return (path / INTEGRITY_FILE).is_file() or (not (path / "config.json").is_file() and bool(finished(path)))


def _read_config(folder: Path) -> dict[str, Any]:
    """config.json of a Hugging Face folder."""
    if not folder.is_dir():
        raise ConfigError(f"{folder}: no such folder. Give a checkpoint or a downloaded Hugging Face folder.")
    if not (folder / "config.json").is_file():
        if (folder / "snapshots").is_dir():  # huggingface_hub's; refs/main names the newest one
            ref = folder / "refs/main"
            commit = ref.read_text(encoding="utf-8", errors="replace").strip() if ref.is_file() else "HASH"
            raise ConfigError(f"{folder}: is a cache of downloads. Give {folder}/snapshots/{commit}.")
        raise ConfigError(f"{folder}: neither a finished checkpoint nor a Hugging Face folder (no config.json).")
    return read_json(folder / "config.json")


def _tower_kind(config: Mapping[str, Any]) -> str | None:
    """model_type of a tower, or none for anything else."""
    return next((kind for tower in TOWERS if (kind := tower.kind_of(config)) is not None), None)


def _open_tower(path: Path, config: Mapping[str, Any]) -> tuple[VisionConfig, LazyTensors]:
    where = str(path / "config.json")
    tower = next(one for one in TOWERS if one.kind_of(config) is not None)
    vision, used = tower.read_tower(config, where)
    stored = SafetensorsFolder(path)
    check_layers(vision.num_layers, len(stored), where)
    source, rules = used(stored)
    return processor_files.with_norm(path, vision), McoreView(rules, source, str(path))


def _open_checkpoint(folder: Path) -> OpenModel:
    tensors = read_tensors(folder)  # verifies all other files, too: what is read of them next is what was written
    state = RunState.read(folder)
    return OpenModel(
        path=folder,
        kind="checkpoint",
        model=state.stage.model,
        tensors=Subset(tensors, model_keys(tensors)),
        preprocess=state.preprocess,
        tokenizer_dir=folder / TOKENIZER_FOLDER,
        state=state,
        decoder=state.extra.get(DECODER),
    )


def _open_megatron(folder: Path, vocab_size: int | None) -> OpenModel:
    opened = megatron_layouts.open_layout(folder, vocab_size)
    spec = None
    if opened.model.vision is not None:
        spec = dataclasses.replace(PreprocessSpec.for_tower(opened.model.vision), layout="long_vita")
    places = [one for one in (folder, folder.parent) if (one / "tokenizer.json").is_file()]
    return OpenModel(
        path=folder,
        kind=MEGATRON,
        model=opened.model,
        tensors=McoreView(opened.rules, opened.used(), str(folder)),
        preprocess=spec,
        tokenizer_dir=places[0] if places else folder,
    )


def _open_hf(folder: Path, config: Mapping[str, Any]) -> OpenModel:
    where = str(folder / "config.json")
    kind = string(config, "model_type", None, where)
    if kind is None or kind not in MODELS:
        decoder.check_features(config, where)  # a reason says more than a name
        raise unsupported(where, "model_type", kind, ", ".join(MODELS))
    check_not_quantised(config, where)
    family = MODELS[kind]
    model = family.read_config(config, where)
    preprocess = family.processor(folder, model)
    if model.vision is not None and preprocess is not None:
        model = dataclasses.replace(model, vision=dataclasses.replace(model.vision, image_norm=preprocess.image_norm))
    source = SafetensorsFolder(folder)
    for part in (model, model.vision):
        if part is not None:
            check_layers(part.num_layers, len(source), where)
    model = family.completed(model, config, folder, source)
    inner = config.get("text_config")
    text = inner.get("model_type") if kind not in DECODERS and isinstance(inner, Mapping) else kind
    known = text if isinstance(text, str) and text in DECODERS else None
    rules = family.rules(model, list(source), known)
    embedding = rules[0].hf[0].name
    heads = [name for name in (decoder.HEAD, "language_model." + decoder.HEAD) if name in source]
    tied = (heads[0], embedding) if heads and not model.untie_embeddings_and_output_weights else None
    return OpenModel(
        path=folder,
        kind=kind,
        model=model,
        tensors=McoreView(rules, source, str(folder), tied=tied),
        preprocess=preprocess,
        tokenizer_dir=folder,
        image_token_id=family.image_token_id(config, where),
        decoder=known,
    )
