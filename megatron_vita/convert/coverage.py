"""Proof of coverage: a conversion uses each stored element exactly once and fills each element of its result once.

It traces every element of the result through all views to the slice of the stored tensor that it is read from, and
compares these slices with the tensors of the source. A view must give a reason for every unused key; an unused key
without one is an error that names it. The proof needs names and shapes alone and runs before any data is copied.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron_vita.checkpoint.boxes import Slices, volume, whole
from megatron_vita.checkpoint.tensors import LazyTensors
from megatron_vita.convert.rules import disjoint
from megatron_vita.convert.values import FreshTensors
from megatron_vita.errors import CheckpointError

REPORT_FILE = "conversion.json"
"""Name of the report beside the weights that a conversion wrote."""
_VERSION = 1
INITIALISED = "initialised from the seed"


@dataclass(frozen=True)
class Coverage:
    """How a conversion used the tensors of its source."""

    source_tensors: int
    source_bytes: int
    used_bytes: int
    """Of source_bytes."""
    target_bytes: int
    parts: Mapping[str, Sequence[str]]
    """Names of the stored tensors of each tensor of the result, in order of first use."""
    initialised_keys: Mapping[str, str]
    """Tensors of the result with elements from no file: how many, and their values. `made_up` in conversion.json."""
    unused_keys: Mapping[str, str]
    """Stored tensors that are used in part or not at all, and why. `left_out` in conversion.json."""

    def summary(self) -> str:
        """One line for people."""
        partly = len(self.unused_keys.keys() & {name for names in self.parts.values() for name in names})
        used = self.source_tensors - len(self.unused_keys) + partly
        line = (
            f"{self.source_tensors} source tensors, {self.source_bytes} bytes: {used} used, {self.used_bytes} bytes, "
            "each element once"
        )
        if self.unused_keys:
            line += f"; {len(self.unused_keys) - partly} unused, each for a reason"
            line += f", and a part of {partly} of the used ones" if partly else ""
        line += f". {len(self.parts)} targets, {self.target_bytes} bytes: each element filled once"
        if self.initialised_keys:
            line += f"; {len(self.initialised_keys)} of them initialised by rule, in whole or in part"
        return line

    def to_json(self) -> str:
        """The text of conversion.json."""
        values = {
            "format_version": _VERSION,
            "source": {"tensors": self.source_tensors, "bytes": self.source_bytes, "used_bytes": self.used_bytes},
            "target": {"tensors": len(self.parts), "bytes": self.target_bytes},
            "left_out": dict(self.unused_keys),
            "made_up": dict(self.initialised_keys),
            "tensors": {name: list(parts) for name, parts in self.parts.items()},
        }
        return json.dumps(values, indent=1) + "\n"


def account(target: LazyTensors) -> Coverage:
    """Trace every element of the result to its stored tensor.

    Raises:
        CheckpointError: a stored tensor is used twice, or some of it by nothing and for no reason; or a tensor of the
            result is not filled. Named.
    """
    used: dict[tuple[int, str], list[Slices]] = {}
    leaves: dict[int, LazyTensors] = {}
    parts: dict[str, list[str]] = {}
    initialised_keys: dict[str, str] = {}
    for name in target:
        shape = target.shape(name)
        filled, mine = 0, dict[str, None]()
        for origin in target.origins(name, whole(shape)):
            filled += origin.elements
            if origin.leaf is None or isinstance(origin.leaf, FreshTensors):
                initialised_keys[name] = (
                    f"{origin.elements} elements: {origin.name if origin.leaf is None else INITIALISED}"
                )
                continue
            assert origin.slices is not None
            leaves[id(origin.leaf)] = origin.leaf
            used.setdefault((id(origin.leaf), origin.name), []).append(origin.slices)
            mine[origin.name] = None
        if filled != math.prod(shape):
            raise CheckpointError(
                f"{name}: {filled} of its {math.prod(shape)} elements are filled. Nothing was written."
            )
        parts[name] = list(mine)
    reasons = target.unused_keys()
    unused_keys: dict[str, str] = {}
    used_bytes = 0
    for number, leaf in leaves.items():
        for name in leaf:
            used_slices, total = used.get((number, name), []), math.prod(leaf.shape(name))
            taken = sum(volume(one) for one in used_slices)
            if taken > total or not disjoint(used_slices):
                raise CheckpointError(f"{name}: elements of it are used twice. Nothing was written.")
            used_bytes += taken * leaf.dtype(name).itemsize
            if taken == total:
                continue
            if name not in reasons:
                raise CheckpointError(
                    f"{name}: {total - taken} of its {total} elements are used by nothing. Nothing was written."
                )
            unused_keys[name] = f"{total - taken} of {total} elements: {reasons[name]}"
    return Coverage(
        source_tensors=sum(len(leaf) for leaf in leaves.values()),
        source_bytes=sum(map(_bytes, leaves.values())),
        used_bytes=used_bytes,
        target_bytes=_bytes(target),
        parts=parts,
        initialised_keys=initialised_keys,
        unused_keys=unused_keys,
    )


def _bytes(tensors: LazyTensors) -> int:
    return sum(map(tensors.nbytes, tensors))
