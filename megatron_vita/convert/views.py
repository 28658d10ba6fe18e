"""Views by rules: Hugging Face tensors under megatron-core names, and back. Nothing is copied until read."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_vita.checkpoint.boxes import Slices, overlap, runs, shift, volume, whole
from megatron_vita.checkpoint.tensors import ZEROS, LazyTensors, Origin, slice_of
from megatron_vita.convert.rules import Named, Rule, SourceSlice, prove
from megatron_vita.convert.values import same_tensors, type_name
from megatron_vita.errors import CheckpointError

IGNORED_SUFFIXES = ("rotary_emb.inv_freq", "attn.masked_bias")
"""Buffers in old files that are computed, not learned."""
_BLOCK_BYTES = 32 << 20
"""Size of a block that is read to check values."""


class _RuledView(LazyTensors):
    """What both directions share: a slice is put together from slices of the source, the rest being zeros."""

    _source: LazyTensors
    _by_name: Mapping[str, Any]
    """What each of its tensors is made by."""

    @abstractmethod
    def _source_slices(self, name: str, slices: Slices) -> tuple[int, list[SourceSlice]]:
        """(dimensions of the slices, the slices that make up a slice)."""

    def read_into(self, name: str, slices: Slices, out: Tensor) -> None:
        rank, parts = self._source_slices(name, slices)
        if sum(volume(one.target) for one in parts) < volume(slices):
            out.zero_()
        for one in parts:
            inner = slice_of(out[(0,) * (out.dim() - rank)], one.target)
            self._fill(one.name, one.slices, inner[(None,) * (len(one.slices) - rank)])

    def _fill(self, name: str, slices: Slices, out: Tensor) -> None:
        self._source.read_into(name, slices, out)

    def unused_keys(self) -> Mapping[str, str]:
        return self._source.unused_keys()

    def __iter__(self) -> Iterator[str]:
        return iter(self._by_name)

    def __len__(self) -> int:
        return len(self._by_name)

    def origins(self, name: str, slices: Slices) -> Iterator[Origin]:
        _, parts = self._source_slices(name, slices)
        for one in parts:
            yield from self._source.origins(one.name, one.slices)
        zeros = volume(slices) - sum(volume(one.target) for one in parts)
        if zeros:
            yield Origin(None, ZEROS, None, zeros)


class McoreView(_RuledView):
    """Hugging Face tensors under megatron-core names."""

    def __init__(
        self, rules: Sequence[Rule], source: LazyTensors, where: str, *, tied: tuple[str, str] | None = None
    ) -> None:
        """Check that the source holds exactly the tensors of the table. Raises CheckpointError: a tensor is missing,
        extra or misshapen, or should be zero and is not; named.

        Args:
            where: names the source in errors.
            tied: (name, name of the tensor it must equal): a head that some publishers write although it is tied.
        """
        prove(rules)
        self._source = source
        self._where = where
        self._by_name = {rule.mcore.name: rule for rule in rules if rule.mcore is not None}
        self._unused_keys = _match([named for rule in rules for named in rule.hf], source, where, tied)
        for rule in rules:
            self._check_types(rule)
            for index, named in enumerate(rule.hf):
                if rule.uncovered(index):
                    self._check_zeros(rule, index, named)
                    self._unused_keys[named.name] = "zeros, as the model asks, beyond what it has"

    def _check_types(self, rule: Rule) -> None:
        for one in rule.hf:
            if not self._source.dtype(one.name).is_floating_point:
                raise CheckpointError(
                    f"{self._where}: {one.name} has type {type_name(self._source.dtype(one.name))}, but weights are of "
                    "floating types. Quantised ones must be dequantised first."
                )
        kinds = {type_name(self._source.dtype(one.name)) for one in rule.hf}
        if len(kinds) > 1:
            parts, names = ", ".join(one.name for one in rule.hf), ", ".join(sorted(kinds))
            raise CheckpointError(f"{self._where}: {parts} become one tensor but have different types ({names}).")

    def _check_zeros(self, rule: Rule, index: int, named: Named) -> None:
        covered = [copy.hf_slice for copy in rule.copies if copy.hf == index]
        lead = len(named.shape) - (len(covered[0]) if covered else 0)
        for slices in runs(whole(named.shape), self._source.dtype(named.name).itemsize, _BLOCK_BYTES):
            rest = self._source.read(named.name, slices)
            for one in covered:
                shared = overlap((*(slice(0, 1) for _ in range(lead)), *one), slices)
                if shared is not None:
                    slice_of(rest, shift(shared, slices)).zero_()
            if rest.any():  # a negative zero is one, too
                raise CheckpointError(
                    f"{self._where}: {named.name} holds values where this model has none and they must be zero."
                )

    def shape(self, name: str) -> tuple[int, ...]:
        named = self._by_name[name].mcore
        assert named is not None
        return named.shape

    def dtype(self, name: str) -> torch.dtype:
        return self._source.dtype(self._by_name[name].hf[0].name)

    def _source_slices(self, name: str, slices: Slices) -> tuple[int, list[SourceSlice]]:
        rule = self._by_name[name]
        return rule.rank, rule.slices_of_mcore(slices)

    def unused_keys(self) -> Mapping[str, str]:
        return {**self._source.unused_keys(), **self._unused_keys}


class HfView(_RuledView):
    """megatron-core tensors under Hugging Face names."""

    def __init__(
        self, rules: Sequence[Rule], source: LazyTensors, where: str, dtype: torch.dtype | None = None
    ) -> None:
        """Check that the source holds exactly the tensors of the table. Raises CheckpointError: a tensor is missing,
        extra or misshapen; named.

        Args:
            dtype: convert every tensor to this type; by default each keeps its own. Reading a finite value that has
                no finite counterpart there raises CheckpointError.
        """
        prove(rules)
        self._source = source
        self._where = where
        self._dtype = dtype
        self._by_name = {named.name: (rule, index) for rule in rules for index, named in enumerate(rule.hf)}
        _match([rule.mcore for rule in rules if rule.mcore is not None], source, where, None)

    def shape(self, name: str) -> tuple[int, ...]:
        rule, index = self._by_name[name]
        return rule.hf[index].shape

    def dtype(self, name: str) -> torch.dtype:
        return self._dtype or self._own_dtype(name)

    def _own_dtype(self, name: str) -> torch.dtype:
        rule = self._by_name[name][0]
        if rule.mcore is None:  # zeros that only Hugging Face has take the type of their neighbours
            kinds = [self._source.dtype(one) for one in self._source if one.startswith("vision_projection.")]
            return kinds[0] if kinds else torch.float32
        return self._source.dtype(rule.mcore.name)

    def _source_slices(self, name: str, slices: Slices) -> tuple[int, list[SourceSlice]]:
        rule, index = self._by_name[name]
        return rule.rank, rule.slices_of_hf(index, slices)

    def _fill(self, name: str, slices: Slices, out: Tensor) -> None:
        if out.dtype == self._source.dtype(name):
            self._source.read_into(name, slices, out)
            return
        values = self._source.read(name, slices)
        out.copy_(values)
        if out.numel() == 0 or torch.stack(torch.aminmax(out)).isfinite().all():
            return
        lost = out.isinf().logical_and_(values.isfinite())
        if lost.any():
            raise CheckpointError(
                f"{self._where}: {name}: {values[lost][0].item():g} does not fit into {type_name(out.dtype)} and would "
                "become infinite. Choose another --dtype, or keep the type."
            )


def _match(expected: Sequence[Named], source: LazyTensors, where: str, tied: tuple[str, str] | None) -> dict[str, str]:
    """Compare names and shapes of a source with those of a table.

    Returns:
        Stored tensors that are not used, each with the reason.
    """
    names = {one.name for one in expected}
    missing = [one for one in expected if one.name not in source]
    if missing:
        raise CheckpointError(
            f"{where}: {missing[0].name} {missing[0].shape} is missing{_more(missing)}. Its config and its weights do "
            "not belong together, or the download is incomplete."
        )
    unused_keys = {
        name: "a buffer that is computed" for name in source if name not in names and name.endswith(IGNORED_SUFFIXES)
    }
    extra = [name for name in source if name not in names and name not in unused_keys]
    if tied is not None and tied[0] in extra:
        if not same_tensors(source, *tied):
            raise CheckpointError(
                f"{where}: says tie_word_embeddings, but {tied[0]} differs from {tied[1]}. Correct its config.json."
            )
        extra.remove(tied[0])
        unused_keys[tied[0]] = f"equal to {tied[1]}, to which it is tied"
    if extra:
        raise CheckpointError(
            f"{where}: holds {extra[0]} {source.shape(extra[0])}{_more(extra)}, which the model in its config has not. "
            "Nothing is dropped in silence: correct the config, or remove the tensor."
        )
    for one in expected:
        if source.shape(one.name) != one.shape:
            raise CheckpointError(
                f"{where}: {one.name} has shape {source.shape(one.name)}, the config asks for {one.shape}."
            )
    return unused_keys


def _more(items: Sequence[object]) -> str:
    return f" (and {len(items) - 1} more)" if len(items) > 1 else ""
