"""What led to some weights, told without the shards and the checkpoints of earlier stages: what a model card shows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any


@dataclass(frozen=True, kw_only=True)
class SourceSummary:
    """What one dataset gave to a shard set (data.manifest.SourceCounts without the file names of a machine)."""

    name: str
    read: int
    """Records offered."""
    used: int
    """Records that are in the set."""
    rejected: int
    """Records that are not; `read` = `used` + `rejected`."""
    truncated: int
    """Records that were used, but shortened."""
    tokens: int
    tiles: int


@dataclass(frozen=True, kw_only=True)
class DataSummary:
    """A shard set without its shards."""

    name: str
    """Its name, without the folder that it lies in."""
    seq_length: int
    """Most tokens of a pack."""
    layout: str
    """Token layout of pictures and videos."""
    sources: tuple[SourceSummary, ...]

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> DataSummary:
        """The inverse of dataclasses.asdict. Raises KeyError, TypeError or ValueError for anything else."""
        sources = tuple(SourceSummary(**_plain(SourceSummary, one)) for one in values["sources"])
        return cls(**_plain(cls, values), sources=sources)


@dataclass(frozen=True, kw_only=True)
class StageRecord:
    """What one stage did."""

    recipe: Mapping[str, Any]
    """Merged settings of the stage, its name among them; plain values, so that a later release with other settings can
    still read them."""
    iteration: int
    """Optimizer steps it did."""
    consumed_packs: int
    """Packs that its steps took."""
    manifest_digest: str | None
    """Digest of its shard set."""
    data: DataSummary | None
    """What that set was made of."""

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> StageRecord:
        """The inverse of dataclasses.asdict. Raises KeyError, TypeError or ValueError for anything else."""
        digest, data = values["manifest_digest"], values["data"]
        return cls(
            **_plain(cls, values),
            recipe=dict(values["recipe"]),
            manifest_digest=None if digest is None else str(digest),
            data=None if data is None else DataSummary.from_dict(data),
        )


def _plain(kind: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """The text and the whole numbers among the fields of a dataclass."""
    as_type = {"str": str, "int": int}
    return {one.name: as_type[str(one.type)](values[one.name]) for one in fields(kind) if one.type in as_type}
