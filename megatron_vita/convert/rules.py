"""Two-way slicing rules: which slice of which Hugging Face tensor is which slice of which megatron-core tensor.

A rule ties one megatron-core tensor to one or more Hugging Face tensors by a list of copies between slices. Everything
else follows from that list: import copies one way, export the other; a reader of some rows reads the slices that they
overlap; the proof that each element is used exactly once is arithmetic on slices. Rules are pure: they know no file,
no device and no process group.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from megatron_vita.checkpoint.boxes import Slices, move, overlap, shift, volume, whole
from megatron_vita.errors import CheckpointError


@dataclass(frozen=True)
class Named:
    """A tensor as it stands in a file: name and shape."""

    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Copy:
    """One slice of the megatron-core tensor that is one slice of a Hugging Face tensor, of the same extent."""

    hf: int
    """Index among the rule's Hugging Face tensors."""
    hf_slice: Slices
    mcore_slice: Slices


@dataclass(frozen=True)
class SourceSlice:
    """A slice of a source tensor, and its position in the slice of the target tensor that is being read."""

    name: str
    slices: Slices
    """With as many dimensions as the source tensor."""
    target: Slices
    """In the coordinates of the target slice, without leading dimensions of size 1."""


@dataclass(frozen=True)
class Rule:
    """One megatron-core tensor and its Hugging Face tensors; or, without the former, a Hugging Face tensor of zeros.

    Slices address both sides in `rank` dimensions; a tensor of either side with more has leading dimensions of size 1.
    What no copy covers of a Hugging Face tensor is zero: writing fills it with zeros, reading rejects anything else.
    """

    mcore: Named | None
    hf: tuple[Named, ...]
    copies: tuple[Copy, ...]

    def slices_of_mcore(self, slices: Slices) -> list[SourceSlice]:
        """The slices of Hugging Face tensors that a slice of the megatron-core tensor is made of."""
        return self._parts(slices, [(copy.mcore_slice, copy.hf_slice, self.hf[copy.hf]) for copy in self.copies])

    def slices_of_hf(self, index: int, slices: Slices) -> list[SourceSlice]:
        """The slices of the megatron-core tensor that make up a slice of a Hugging Face tensor; the rest is zero."""
        copies = [copy for copy in self.copies if copy.hf == index]
        return self._parts(slices, [(copy.hf_slice, copy.mcore_slice, self.mcore) for copy in copies if self.mcore])

    def _parts(self, slices: Slices, pairs: Iterable[tuple[Slices, Slices, Named]]) -> list[SourceSlice]:
        """Args: pairs: (slice of the one side, the same of the other, the other's tensor)."""
        inner, parts = slices[len(slices) - self.rank :], []
        for here, there, named in pairs:
            shared = overlap(here, inner)
            if shared is not None:
                found = move(shared, here, there)
                lead = (slice(0, 1),) * (len(named.shape) - len(found))
                parts.append(SourceSlice(named.name, lead + found, shift(shared, inner)))
        return parts

    @property
    def rank(self) -> int:
        """Dimensions of the slices; 0 without any copy."""
        return len(self.copies[0].mcore_slice) if self.copies else 0

    def uncovered(self, index: int) -> int:
        """Elements of one Hugging Face tensor that no copy takes: they must be zero."""
        return math.prod(self.hf[index].shape) - sum(volume(copy.hf_slice) for copy in self.copies if copy.hf == index)


def prove(rules: Iterable[Rule]) -> None:
    """Prove a table: no tensor named twice on either side, each megatron-core element filled once, each Hugging Face
    element used once.

    Hugging Face elements that no copy takes are zeros by rule and are checked when read. Raises CheckpointError: naming
    the first tensor that is not covered exactly. It is a defect of the table.
    """
    seen: set[tuple[str, str]] = set()
    for rule in rules:
        for side, named in [("mcore", rule.mcore), *(("hf", one) for one in rule.hf)]:
            if named is None:
                continue
            if (side, named.name) in seen:
                raise CheckpointError(f"{named.name}: appears in two rules of one conversion table.")
            seen.add((side, named.name))
        if rule.mcore is not None:
            covered = [copy.mcore_slice for copy in rule.copies]
            if not disjoint(covered) or sum(map(volume, covered)) != math.prod(rule.mcore.shape):
                raise CheckpointError(f"{rule.mcore.name}: its conversion rule does not fill every element once.")
        for index, named in enumerate(rule.hf):
            covered = [copy.hf_slice for copy in rule.copies if copy.hf == index]
            if not disjoint(covered) or rule.uncovered(index) < 0:
                raise CheckpointError(f"{named.name}: its conversion rule uses elements twice.")


def rename(mcore: str, hf: str, shape: Sequence[int], *, hf_shape: Sequence[int] | None = None) -> Rule:
    """The same tensor under two names; one of the two may have extra leading dimensions of size 1."""
    hf_shape = shape if hf_shape is None else hf_shape
    all_of_it = whole(min(shape, hf_shape, key=len))
    return Rule(Named(mcore, tuple(shape)), (Named(hf, tuple(hf_shape)),), (Copy(0, all_of_it, all_of_it),))


def stacked(mcore: str, hf: Sequence[str], rows: Sequence[int], columns: int | None) -> Rule:
    """The megatron-core tensor is the Hugging Face tensors one below the other (gate above up)."""
    return _gathered(mcore, hf, [(index, 0, size) for index, size in enumerate(rows)], columns)


def grouped_qkv(mcore: str, hf: Sequence[str], *, heads: int, groups: int, head_dim: int, columns: int | None) -> Rule:
    """Separate q, k, v against megatron-core's order: for each key/value group its query heads, then its k, then its v.

    Args:
        hf: names of q, k, v.
        columns: width of the weight, or none for a bias.
    """
    sizes = (heads // groups * head_dim, head_dim, head_dim)
    parts = [(index, group * size, size) for group in range(groups) for index, size in enumerate(sizes)]
    return _gathered(mcore, hf, parts, columns)


def joint_qkv(mcore: str, hf: str, *, heads: int, head_dim: int, columns: int | None) -> Rule:
    """One tensor [all Q; all K; all V] against megatron-core's order: q, k, v of each head."""
    parts = [(0, (part * heads + head) * head_dim, head_dim) for head in range(heads) for part in range(3)]
    return _gathered(mcore, [hf], parts, columns)


def split_over_ranks(mcore: str, hf: Sequence[str], shape: Sequence[int], axis: int, *, halves: bool = False) -> Rule:
    """A tensor that is stored in equal shards along one axis, those of tensor rank 0, 1 and so on.

    Args:
        mcore: name of the whole tensor.
        hf: names of the shards; their number divides the axis.
        shape: of the whole tensor.
        axis: 0 or 1.
        halves: each rank has its shard of the first half, then its part of the second (gate above up); axis 0.
    """
    part = list(shape)
    part[axis] //= len(hf)
    count = 2 if halves else 1
    size = part[axis] // count
    copies = []
    for index in range(len(hf)):
        for half in range(count):
            there, here = list(whole(part)), list(whole(shape))
            there[axis] = slice(half * size, (half + 1) * size)
            start = half * (shape[axis] // count) + index * size
            here[axis] = slice(start, start + size)
            copies.append(Copy(index, tuple(there), tuple(here)))
    return Rule(Named(mcore, tuple(shape)), tuple(Named(name, tuple(part)) for name in hf), tuple(copies))


def zero_padded(mcore: str, hf: str, shape: Sequence[int], hf_shape: Sequence[int]) -> Rule:
    """The megatron-core tensor is the first corner of a larger Hugging Face tensor, whose rest is zero."""
    all_of_it = whole(shape)
    return Rule(Named(mcore, tuple(shape)), (Named(hf, tuple(hf_shape)),), (Copy(0, all_of_it, all_of_it),))


def all_zero(hf: str, shape: Sequence[int]) -> Rule:
    """A tensor that only Hugging Face has, and that must be zero (the biases of a projector without biases)."""
    return Rule(None, (Named(hf, tuple(shape)),), ())


def _gathered(mcore: str, hf: Sequence[str], parts: Iterable[tuple[int, int, int]], columns: int | None) -> Rule:
    """The megatron-core tensor is `parts` one below the other: (index among `hf`, first row there, rows)."""
    rest, copies, start, rows = () if columns is None else (columns,), [], 0, [0] * len(hf)
    for index, first, size in parts:
        there, here = slice(first, first + size), slice(start, start + size)
        copies.append(Copy(index, (there, *whole(rest)), (here, *whole(rest))))
        start, rows[index] = start + size, rows[index] + size
    named = tuple(Named(name, (count, *rest)) for name, count in zip(hf, rows, strict=True))
    return Rule(Named(mcore, (start, *rest)), named, tuple(copies))


def disjoint(slices: Sequence[Slices]) -> bool:
    """No two slices share an element. Sweeps along the first dimension, where slices rarely overlap."""
    ordered = sorted((one for one in slices if one), key=lambda one: one[0].start)
    for index, one in enumerate(ordered):
        for other in ordered[index + 1 :]:
            if other[0].start >= one[0].stop:
                break
            if overlap(one, other) is not None:
                return False
    return True
