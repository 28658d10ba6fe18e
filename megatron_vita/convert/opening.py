"""Open a model in any format: a checkpoint of ours or a Hugging Face folder, found out by itself, under our names."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_vita.checkpoint.folder import TOKENIZER_FOLDER, finished, resolve
from megatron_vita.checkpoint.integrity import INTEGRITY_FILE
from megatron_vita.checkpoint.lazy import LazyTensors
from megatron_vita.checkpoint.offline import model_keys, read_tensors
from megatron_vita.checkpoint.state import RunState
from megatron_vita.config import IMAGE_NORMS, ModelConfig, VisionConfig
from megatron_vita.convert import decoders, intern_vit, internvl, long_vita, megatron_layouts, siglip_clip
from megatron_vita.convert.hf_config import read_json, refuse
from megatron_vita.convert.safetensors_folder import SafetensorsFolder
from megatron_vita.convert.views import OurView, Subset
from megatron_vita.data.spec import PreprocessSpec
from megatron_vita.errors import CheckpointError, ConfigError

MEGATRON = "megatron"
"""`kind` of Long-VITA's Megatron layouts."""
PROCESSOR = "preprocessor_config.json"
SIDECAR = "megatron_vita.json"
"""What an exported folder remembers beyond what stock files can say."""


@dataclass(frozen=True)
class OpenModel:
    """One model, wherever it lies."""

    path: Path
    """The checkpoint's or the Hugging Face folder."""
    kind: str
    """`checkpoint`, `internvl`, `long_vita`, `megatron`, or a decoder's model_type."""
    model: ModelConfig
    tensors: LazyTensors
    """Its weights by checkpoint key."""
    preprocess: PreprocessSpec | None
    """How it wants pictures; none for a decoder alone."""
    tokenizer_dir: Path
    """Where its tokenizer lies."""
    state: RunState | None = None
    """run.json of a checkpoint."""


def open_model(path: str | Path) -> OpenModel:
    """Open a checkpoint, a folder of checkpoints, a Hugging Face folder, or one of Long-VITA's Megatron layouts. No
    tensor is read yet.

    Raises:
        ConfigError: no such folder, or nothing of the kind there.
        CheckpointError: it is damaged, incomplete or not supported.
    """
    path = Path(path)
    if (path / INTEGRITY_FILE).is_file() or (not (path / "config.json").is_file() and finished(path)):
        return _open_checkpoint(resolve(path))
    if not path.is_dir():
        raise ConfigError(f"{path}: no such folder. Give a checkpoint or a downloaded Hugging Face folder.")
    step = megatron_layouts.find(path)
    if step is not None:
        return _open_megatron(step)
    if not (path / "config.json").is_file():
        raise ConfigError(f"{path}: neither a finished checkpoint nor a Hugging Face folder (no config.json).")
    return _open_hf(path)


def load_hf_for_inference(path: str | Path) -> tuple[ModelConfig, PreprocessSpec | None, LazyTensors]:
    """A Hugging Face folder for chat and evaluation: its shape, how it wants pictures, its weights by checkpoint key.

    Give the weights to checkpoint.load_tensors, which fills a model of any layout.
    """
    opened = open_model(path)
    return opened.model, opened.preprocess, opened.tensors


def open_tower(path: str | Path) -> tuple[VisionConfig, LazyTensors]:
    """The Hugging Face folder of a tower (or of a SigLIP or CLIP with its text half): its shape, its weights by
    checkpoint key. Pixels are normalised as its preprocessor_config.json says, if it has one.

    Raises:
        ConfigError: a whole model or a decoder.
        CheckpointError: not a tower that is supported, or incomplete.
    """
    path = Path(path)
    where = path / "config.json"
    config = read_json(where)
    if config.get("model_type") in _FAMILIES:
        raise ConfigError(f"{where}: is a whole model ({config['model_type']}). Use import --model, or give a tower.")
    kind = config.get("model_type")
    if kind not in siglip_clip.MODEL_TYPES and kind not in (None, *intern_vit.MODEL_TYPES):
        raise refuse(str(where), "model_type", kind, ", ".join([*intern_vit.MODEL_TYPES, *siglip_clip.MODEL_TYPES]))
    source: LazyTensors
    if kind in siglip_clip.MODEL_TYPES:
        vision = siglip_clip.read_config(config, str(where))
        source = siglip_clip.without_unused(vision, SafetensorsFolder(path))
        rules = siglip_clip.rules(vision, siglip_clip.prefix_of(list(source)))
    else:
        vision, names = intern_vit.read_config(config, str(where))
        source, rules = SafetensorsFolder(path), intern_vit.rules(vision, names)
    if (path / PROCESSOR).is_file():
        vision = dataclasses.replace(
            vision, image_norm=_norm_name(read_json(path / PROCESSOR), path, vision.image_norm)
        )
    return vision, OurView(rules, source, str(path))


def _open_checkpoint(folder: Path) -> OpenModel:
    tensors = read_tensors(folder)
    state = RunState.read(folder)
    return OpenModel(
        path=folder,
        kind="checkpoint",
        model=state.stage.model,
        tensors=Subset(tensors, model_keys(tensors)),
        preprocess=state.preprocess,
        tokenizer_dir=folder / TOKENIZER_FOLDER,
        state=state,
    )


def _open_megatron(folder: Path) -> OpenModel:
    opened = megatron_layouts.open_layout(folder)
    spec = None
    if opened.model.vision is not None:
        spec = dataclasses.replace(PreprocessSpec.for_tower(opened.model.vision), layout="long_vita")
    places = [one for one in (folder, folder.parent) if (one / "tokenizer.json").is_file()]
    return OpenModel(
        path=folder,
        kind=MEGATRON,
        model=opened.model,
        tensors=OurView(opened.rules, opened.used(), str(folder)),
        preprocess=spec,
        tokenizer_dir=places[0] if places else folder,
    )


def _open_hf(folder: Path) -> OpenModel:
    where = folder / "config.json"
    config = read_json(where)
    kind = config.get("model_type")
    if kind not in _FAMILIES:
        decoders.check_features(config, str(where))  # a reason says more than a name
        raise refuse(str(where), "model_type", kind, ", ".join(_FAMILIES))
    model = _FAMILIES[kind].read_config(config, str(where))
    preprocess = _preprocess(folder, model, str(kind)) if model.vision else None
    if model.vision is not None and preprocess is not None:
        model = dataclasses.replace(model, vision=dataclasses.replace(model.vision, image_norm=preprocess.image_norm))
    source = SafetensorsFolder(folder)
    if kind == internvl.MODEL_TYPE:
        model = internvl.with_head_of(model, config, source)
        rules = internvl.rules(model, list(source))
    elif kind == long_vita.MODEL_TYPE:
        rules = long_vita.rules(model)
    else:
        rules = decoders.rules(model)
    embedding = rules[0].theirs[0].name
    heads = [name for name in (decoders.HEAD, "language_model." + decoders.HEAD) if name in source]
    tied = (heads[0], embedding) if heads and not model.untie_embeddings_and_output_weights else None
    return OpenModel(
        path=folder,
        kind=str(kind),
        model=model,
        tensors=OurView(rules, source, str(folder), tied=tied),
        preprocess=preprocess,
        tokenizer_dir=folder,
    )


_FAMILIES: dict[str, Any] = {
    internvl.MODEL_TYPE: internvl,
    long_vita.MODEL_TYPE: long_vita,
    **dict.fromkeys(decoders.ARCHITECTURES, decoders),
}


def _preprocess(folder: Path, model: ModelConfig, kind: str) -> PreprocessSpec:
    """From our own side file where we wrote the folder, else from the stock processor settings; Long-VITA's published
    models were trained in its own token layout."""
    assert model.vision is not None
    try:
        if (folder / SIDECAR).is_file():
            return PreprocessSpec.from_dict(read_json(folder / SIDECAR)["preprocess"])
        default = PreprocessSpec.for_tower(model.vision)
        if kind == long_vita.MODEL_TYPE:
            default = dataclasses.replace(default, layout="long_vita")
        if not (folder / PROCESSOR).is_file():
            return default
        values = read_json(folder / PROCESSOR)
        return dataclasses.replace(
            default,
            image_norm=_norm_name(values, folder, default.image_norm),
            min_tiles=int(values.get("min_patches", default.min_tiles)),
            max_tiles=int(values.get("max_patches", default.max_tiles)) if values.get("crop_to_patches", True) else 1,
        )
    except (ConfigError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{folder}: its processor settings are not usable: {error}") from None


def _norm_name(values: Mapping[str, Any], folder: Path, default: str) -> str:
    pair = (values.get("image_mean"), values.get("image_std"))
    if pair == (None, None):
        return default
    for name, (mean, std) in IMAGE_NORMS.items():
        if list(mean) == pair[0] and list(std) == pair[1]:
            return name
    raise CheckpointError(f"{folder / PROCESSOR}: unknown image_mean and image_std {pair}.")
