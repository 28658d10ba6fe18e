"""Long-VITA's published Megatron layouts: `_MG` (Transformer Engine's names) and MindSpeed's (norms beside linears).

Their files: rank_files.py. Names of tower and projector lie below `external_feature_model.`; layers are counted from 0
on each pipeline rank.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron_vita.checkpoint.tensors import LazyTensors
from megatron_vita.config import ModelConfig
from megatron_vita.convert.combined import Subset
from megatron_vita.convert.families import decoder, long_vita
from megatron_vita.convert.hf_config import check_layers
from megatron_vita.convert.megatron_settings import EMBEDDING, read_model
from megatron_vita.convert.rank_files import NOT_WEIGHTS, RankFiles, grid, read_rank
from megatron_vita.convert.rules import Named, Rule, rename, split_over_ranks, stacked
from megatron_vita.convert.values import same_tensors
from megatron_vita.errors import CheckpointError

log = logging.getLogger(__name__)

_PREFIXES = (
    ("external_feature_model.vit.", "vision_model."),
    ("external_feature_model.pre_proj_layernorm.", "vision_projection.pre_proj_layernorm."),
    ("external_feature_model.vision_projection.", "vision_projection."),
    ("", "language_model."),
)
_NORMS = {
    ".input_layernorm.": ".self_attention.linear_qkv.layer_norm_",
    ".pre_mlp_layernorm.": ".mlp.linear_fc1.layer_norm_",
}
"""MindSpeed's names of a layer's norms -> Transformer Engine's."""
_HEAD = "language_model.output_layer.weight"
_REPLICA_TOLERANCE = 2.0**-7
"""Allowed relative difference between replicas of a weight: one bfloat16 step."""


@dataclass(frozen=True)
class MegatronModel:
    """A checkpoint of either layout: the model, its weights as RANK:TENSOR, and rules to checkpoint keys."""

    model: ModelConfig
    source: RankFiles
    rules: list[Rule]

    def used(self) -> LazyTensors:
        """The tensors that the rules use."""
        return Subset(self.source, [named.name for rule in self.rules for named in rule.hf])


def open_layout(folder: Path, vocab_size: int | None = None) -> MegatronModel:
    """Read the directory of every rank's file and tie its tensors to checkpoint keys. No weight is read, save copies of
    one weight on several ranks, which are compared.

    The shape of the model is that of a config.json of Long-VITA's Hugging Face format, or of a decoder's for a run
    without a tower, beside the ranks or one folder above, if there is one; else that of the run's own settings, in
    which all rows of the embedding are kept.

    Raises:
        CheckpointError: a rank is missing, a tensor is missing, left over or misshapen, or the model is not supported.
    """
    files = grid(folder)
    ranks = 1 + max(tensor for _, tensor in files)
    stages = 1 + max(stage for stage, _ in files)
    stored: dict[str, Tensor] = {}
    found: dict[str, list[str]] = {}  # checkpoint key -> names of its shards, by tensor rank
    unused_keys: dict[str, str] = {}
    first_layer = 0
    settings: Mapping[str, Any] = {}
    for stage in range(stages):
        layers = 0
        for tensor in range(ranks):
            rank = files[stage, tensor]
            content = read_rank(rank)
            settings = settings or content.settings
            for name, one in content.tensors.items():
                stored[f"{rank.name}:{name}"] = one
                if NOT_WEIGHTS.fullmatch(name):
                    unused_keys[f"{rank.name}:{name}"] = "no weight of the model"
                    continue
                mcore, layer = _mcore_name(name, first_layer)
                layers = max(layers, layer + 1)
                found.setdefault(mcore, []).append(f"{rank.name}:{name}")
        first_layer += layers
    for rows in (row for name in (EMBEDDING, _HEAD) for row in found.get(name, ())):
        if len(stored[rows].shape) != 2:
            raise CheckpointError(f"{folder}: {rows} has shape {tuple(stored[rows].shape)}, no rows of a vocabulary.")
    model = read_model(folder, settings, found, stored, ranks, vocab_size)
    for part in (model, model.vision):
        if part is not None:
            check_layers(part.num_layers, len(stored), str(folder), key="num_layers")
    source = RankFiles(stored, unused_keys)
    if not model.untie_embeddings_and_output_weights and _HEAD in found:
        copies, firsts = found.pop(_HEAD), found.get(EMBEDDING, [])
        if len(copies) != len(firsts):
            raise CheckpointError(
                f"{folder}: the head stands on {len(copies)} ranks, the embedding that it is tied to on {len(firsts)}. "
                "The download is incomplete."
            )
        for copy, first in zip(copies, firsts, strict=True):
            _leave_copy(source, copy, first, unused_keys)
    for name in (EMBEDDING, _HEAD):
        if name in found:
            found[name] = _cut_vocabulary(found[name], model.vocab_size, stored, unused_keys, folder)
    source = RankFiles(stored, unused_keys)
    rules = [_rule(mcore, found, source, unused_keys, folder, ranks) for mcore in _expected(model)]
    extra = sorted(set(found) - {rule.mcore.name for rule in rules if rule.mcore})
    if extra:
        raise CheckpointError(f"{folder}: holds {found[extra[0]][0]} (of {len(extra)}), which the model has not.")
    return MegatronModel(model, RankFiles(stored, unused_keys), rules)


def _mcore_name(name: str, first_layer: int) -> tuple[str, int]:
    """(checkpoint key, number of its decoder layer on its stage or -1)."""
    stored, prefix = next(pair for pair in _PREFIXES if name.startswith(pair[0]))
    mcore = prefix + name.removeprefix(stored)
    for old, new in _NORMS.items():
        mcore = mcore.replace(old, new)
    layer = re.match(r"language_model\.decoder\.layers\.(\d{1,6})\.", mcore)
    if layer is None:
        return mcore, -1
    number = int(layer[1])
    return f"language_model.decoder.layers.{first_layer + number}.{mcore[layer.end() :]}", number


def _expected(model: ModelConfig) -> list[Named]:
    """Every tensor of the model by its checkpoint key."""
    table = long_vita.rules(model) if model.vision else decoder.rules(model)
    return [rule.mcore for rule in table if rule.mcore is not None]


def _split(name: str) -> tuple[int, bool] | None:
    """(axis that tensor ranks split, whether in two halves), or none for what each rank has whole."""
    if name in (EMBEDDING, _HEAD) or ".linear_qkv.weight" in name or ".linear_qkv.bias" in name:
        return 0, False
    if re.search(r"\.linear_fc1\.(weight|bias)$", name):
        return 0, name.startswith("language_model.")
    return (1, False) if re.search(r"\.linear_(proj|fc2)\.weight$", name) else None


def _rule(
    mcore: Named, found: dict[str, list[str]], source: RankFiles, unused_keys: dict[str, str], folder: Path, ranks: int
) -> Rule:
    parts = found.get(mcore.name, [])
    split = _split(mcore.name)
    vocabulary = mcore.name in (EMBEDDING, _HEAD)
    if len(parts) != ranks and not (vocabulary and parts):
        has = f"stands on {len(parts)} of {ranks} tensor ranks" if parts else "is missing"
        raise CheckpointError(f"{folder}: {mcore.name} {mcore.shape} {has}. The config and the weights do not fit.")
    if vocabulary:
        return _stacked_rows(mcore, parts, source)
    if split is None:
        for copy in parts[1:]:
            _leave_copy(source, copy, parts[0], unused_keys)
        shape = source.shape(parts[0])
        same = math.prod(shape) == math.prod(mcore.shape) and shape[-len(mcore.shape) :] == mcore.shape[-len(shape) :]
        return rename(mcore.name, parts[0], mcore.shape, hf_shape=shape if same else None)
    axis, halves = split
    if mcore.shape[axis] % (ranks * (2 if halves else 1)):
        raise CheckpointError(f"{folder}: {mcore.name} {mcore.shape} does not split over {ranks} tensor ranks.")
    return split_over_ranks(mcore.name, parts, mcore.shape, axis, halves=halves)


def _stacked_rows(mcore: Named, parts: Sequence[str], source: RankFiles) -> Rule:
    """Rows of the vocabulary: the last ranks may have fewer, once the padding is cut."""
    rule = stacked(mcore.name, parts, [source.shape(part)[0] for part in parts], mcore.shape[1])
    return replace(rule, mcore=mcore)


def _leave_copy(source: RankFiles, copy: str, first: str, unused_keys: dict[str, str]) -> None:
    """Mark a replica of a weight as unused, after checking that it is one."""
    if source.shape(copy) != source.shape(first) or source.dtype(copy) != source.dtype(first):
        raise CheckpointError(f"{copy} and {first} should be copies, but differ in shape or type.")
    unused_keys[copy] = f"a copy of {first}"
    if same_tensors(source, copy, first):
        return
    a, b = source[copy], source[first]
    gap, scale = (a.double() - b.double()).abs().max().item(), b.double().abs().max().item()
    if not gap <= _REPLICA_TOLERANCE * scale:
        raise CheckpointError(f"{copy} and {first} should be copies, but differ by {gap:.3g} (of {scale:.3g}).")
    log.warning("%s differs from %s by %.3g (of %.3g): the latter is taken", copy, first, gap, scale)
    unused_keys[copy] = f"nearly a copy of {first}: differs by {gap:.3g}"


def _cut_vocabulary(
    parts: list[str], rows: int, stored: dict[str, Tensor], unused_keys: dict[str, str], folder: Path
) -> list[str]:
    """The shards of the embedding, cut to the vocabulary; further rows are Megatron's padding."""
    kept, left = [], rows
    for part in parts:
        have = min(left, stored[part].shape[0])
        left -= have
        if have == stored[part].shape[0]:
            kept.append(part)
            continue
        if not have:
            unused_keys[part] = "pads the vocabulary"
            continue
        kept.append(part)
        whole, rest = stored[part], f"{part}[{have}:]"
        stored[part], stored[rest] = whole[:have], whole[have:]
        unused_keys[rest] = "pads the vocabulary"
    if left:
        raise CheckpointError(f"{folder}: the embedding has {rows - left} rows, config.json's vocab_size is {rows}.")
    return kept
