"""What led to some weights, told without the shards and the checkpoints of earlier stages: what a model card shows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
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
        return cls(
            name=str(values["name"]),
            seq_length=int(values["seq_length"]),
            layout=str(values["layout"]),
            sources=tuple(
                SourceSummary(
                    name=str(one["name"]),
                    read=int(one["read"]),
                    used=int(one["used"]),
                    rejected=int(one["rejected"]),
                    truncated=int(one["truncated"]),
                    tokens=int(one["tokens"]),
                    tiles=int(one["tiles"]),
                )
                for one in values["sources"]
            ),
        )


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
            recipe=dict(values["recipe"]),
            iteration=int(values["iteration"]),
            consumed_packs=int(values["consumed_packs"]),
            manifest_digest=None if digest is None else str(digest),
            data=None if data is None else DataSummary.from_dict(data),
        )
