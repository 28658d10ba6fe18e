"""A table of rules laid over tensors: theirs under our names, ours under theirs. Nothing is copied until read."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from megatron_vita.checkpoint.lazy import LazyTensors, Region
from megatron_vita.convert.rules import Named, Rule, prove
from megatron_vita.errors import CheckpointError

log = logging.getLogger(__name__)

IGNORED_SUFFIXES = ("rotary_emb.inv_freq", "attn.masked_bias")
"""Buffers that old files carry and that are computed, not learned."""


class OurView(LazyTensors):
    """Their tensors under our names."""

    def __init__(
        self, rules: Sequence[Rule], source: LazyTensors, where: str, *, tied: tuple[str, str] | None = None
    ) -> None:
        """Check that the source holds exactly what the table speaks of.

        Args:
            where: names the source in errors.
            tied: (name, name of what it must equal): a head that some publishers write although it is tied.

        Raises:
            CheckpointError: a tensor is missing, extra or misshapen, or should be zero and is not; named.
        """
        prove(rules)
        self._source = source
        self._where = where
        self._rules = {rule.ours.name: rule for rule in rules if rule.ours is not None}
        _match([named for rule in rules for named in rule.theirs], source, where, tied)
        for rule in rules:
            self._check_types(rule)
            self._check_zeros(rule)

    def _check_types(self, rule: Rule) -> None:
        kinds = {self._source.dtype(one.name) for one in rule.theirs}
        if len(kinds) > 1:
            parts = ", ".join(one.name for one in rule.theirs)
            raise CheckpointError(f"{self._where}: {parts} become one tensor but have different types {kinds}.")

    def _check_zeros(self, rule: Rule) -> None:
        for index, named in enumerate(rule.theirs):
            if rule.uncovered(index):
                rest = self._source[named.name].clone()
                for copy in rule.copies:
                    if copy.theirs == index:
                        rest[copy.their_box] = 0
                if torch.count_nonzero(rest):
                    raise CheckpointError(
                        f"{self._where}: {named.name} holds values where this model has none and they must be zero."
                    )

    def shape(self, name: str) -> tuple[int, ...]:
        named = self._rules[name].ours
        assert named is not None
        return named.shape

    def dtype(self, name: str) -> torch.dtype:
        return self._source.dtype(self._rules[name].theirs[0].name)

    def read(self, name: str, region: Region | None = None) -> Tensor:
        return self._rules[name].read_ours(self._source.read, self.dtype(name), region)

    def __iter__(self) -> Iterator[str]:
        return iter(self._rules)

    def __len__(self) -> int:
        return len(self._rules)


class TheirView(LazyTensors):
    """Our tensors under their names."""

    def __init__(
        self, rules: Sequence[Rule], source: LazyTensors, where: str, dtype: torch.dtype | None = None
    ) -> None:
        """Check that the source holds exactly what the table speaks of.

        Args:
            dtype: convert every tensor to this type; by default each keeps its own.

        Raises:
            CheckpointError: a tensor is missing, extra or misshapen; named.
        """
        prove(rules)
        self._source = source
        self._dtype = dtype
        self._places = {named.name: (rule, index) for rule in rules for index, named in enumerate(rule.theirs)}
        _match([rule.ours for rule in rules if rule.ours is not None], source, where, None)

    def shape(self, name: str) -> tuple[int, ...]:
        rule, index = self._places[name]
        return rule.theirs[index].shape

    def dtype(self, name: str) -> torch.dtype:
        return self._dtype or self._own_dtype(name)

    def _own_dtype(self, name: str) -> torch.dtype:
        rule = self._places[name][0]
        if rule.ours is None:  # zeros of theirs take the type of their neighbours
            kinds = [self._source.dtype(one) for one in self._source if one.startswith("vision_projection.")]
            return kinds[0] if kinds else torch.float32
        return self._source.dtype(rule.ours.name)

    def read(self, name: str, region: Region | None = None) -> Tensor:
        rule, index = self._places[name]
        return rule.read_theirs(index, self._source.read, self._own_dtype(name), region).to(self.dtype(name))

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


class Subset(LazyTensors):
    """Some of the tensors of another source."""

    def __init__(self, source: LazyTensors, names: Sequence[str]) -> None:
        self._source = source
        self._names = dict.fromkeys(names)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._source.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        return self._source.dtype(name)

    def read(self, name: str, region: Region | None = None) -> Tensor:
        return self._source.read(name, region)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class Joined(LazyTensors):
    """Several sources as one; no name may stand in two of them."""

    def __init__(self, sources: Sequence[LazyTensors]) -> None:
        self._home: dict[str, LazyTensors] = {}
        for source in sources:
            for name in source:
                assert name not in self._home, f"{name} comes from two sources"
                self._home[name] = source

    def shape(self, name: str) -> tuple[int, ...]:
        return self._home[name].shape(name)

    def dtype(self, name: str) -> torch.dtype:
        return self._home[name].dtype(name)

    def read(self, name: str, region: Region | None = None) -> Tensor:
        return self._home[name].read(name, region)

    def __iter__(self) -> Iterator[str]:
        return iter(self._home)

    def __len__(self) -> int:
        return len(self._home)


def _match(expected: Sequence[Named], source: LazyTensors, where: str, tied: tuple[str, str] | None) -> None:
    """Compare names and shapes of a source with those that a table speaks of."""
    names = {one.name for one in expected}
    missing = [one for one in expected if one.name not in source]
    if missing:
        raise CheckpointError(
            f"{where}: {missing[0].name} {missing[0].shape} is missing{_more(missing)}. Its config and its weights do "
            "not belong together, or the download is incomplete."
        )
    extra = [name for name in source if name not in names and not name.endswith(IGNORED_SUFFIXES)]
    if tied is not None and tied[0] in extra:
        if not torch.equal(source[tied[0]], source[tied[1]]):
            raise CheckpointError(
                f"{where}: says tie_word_embeddings, but {tied[0]} differs from {tied[1]}. Correct its config.json."
            )
        extra.remove(tied[0])
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


def _more(items: Sequence[object]) -> str:
    return f" (and {len(items) - 1} more)" if len(items) > 1 else ""
