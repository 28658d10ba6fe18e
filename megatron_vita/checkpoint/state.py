"""What a checkpoint remembers besides tensors: run.json."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_vita.checkpoint.history import DataSummary, StageRecord
from megatron_vita.checkpoint.integrity import Integrity
from megatron_vita.config import StageConfig, to_dict
from megatron_vita.config.load import stage_from_dict
from megatron_vita.data.spec import PreprocessSpec
from megatron_vita.errors import CheckpointError, ConfigError

FORMAT_VERSION = 1
"""Of the folder as a whole. A reader refuses a newer one rather than guess."""

RUN_FILE = "run.json"


@dataclass(frozen=True, kw_only=True)
class RunState:
    """Where a run stands. The order of data follows from (seed, manifest digest, consumed packs): there is no more."""

    stage: StageConfig
    """Merged settings of the stage that wrote the checkpoint; `stage.model` is the model's shape."""
    iteration: int
    """Optimizer steps done in that stage; 0 for freshly imported weights."""
    consumed_packs: int = 0
    """Packs that the stage's steps have taken so far, over all ranks."""
    preprocess: PreprocessSpec | None = None
    """How pictures and videos became tokens; none for a text-only model."""
    manifest_digest: str | None = None
    """Digest of the shard set that the consumed packs belong to."""
    data: DataSummary | None = None
    """What that set was made of."""
    base_models: Mapping[str, str] = field(default_factory=dict)
    """What the first weights were imported from: name by part (`llm`, `vision`, or `model` for a whole)."""
    earlier: tuple[StageRecord, ...] = ()
    """The stages before this one that led to these weights, oldest first."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Anything else in JSON values that its writer wants back."""

    def to_json(self) -> str:
        """The text of run.json."""
        values = {
            "format_version": FORMAT_VERSION,
            "iteration": self.iteration,
            "consumed_packs": self.consumed_packs,
            "manifest_digest": self.manifest_digest,
            "data": None if self.data is None else dataclasses.asdict(self.data),
            "base_models": dict(self.base_models),
            "earlier": [dataclasses.asdict(one) for one in self.earlier],
            "preprocess": self.preprocess.to_dict() if self.preprocess else None,
            "stage": to_dict(self.stage),
            "extra": dict(self.extra),
        }
        return json.dumps(values, indent=1) + "\n"

    @property
    def history(self) -> tuple[StageRecord, ...]:
        """Every stage that led to these weights, oldest first, this one included once it has taken a step."""
        if not self.iteration:
            return self.earlier
        this = StageRecord(
            recipe=to_dict(self.stage),
            iteration=self.iteration,
            consumed_packs=self.consumed_packs,
            manifest_digest=self.manifest_digest,
            data=self.data,
        )
        return (*self.earlier, this)

    @classmethod
    def read(cls, folder: Path) -> RunState:
        """Read run.json of a checkpoint folder, verified. Raises CheckpointError as `parse`."""
        return cls.parse(Integrity.read(folder, check=False))

    @classmethod
    def parse(cls, integrity: Integrity) -> RunState:
        """Read run.json of an opened checkpoint, verified.

        Raises:
            DamagedError: the file is not what was written.
            CheckpointError: it is missing, of a newer format, or does not hold what it should.
        """
        path = integrity.folder / RUN_FILE
        try:
            values = json.loads(integrity.read_file(RUN_FILE))
            version = values["format_version"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise CheckpointError(f"{path}: not a readable run.json ({error}). Use another checkpoint.") from None
        if version != FORMAT_VERSION:
            raise CheckpointError(
                f"{path}: format_version {version}, this program reads {FORMAT_VERSION}. Use the release that wrote it."
            )
        try:
            preprocess = values["preprocess"]
            return cls(
                stage=stage_from_dict(values["stage"], str(path)),
                iteration=int(values["iteration"]),
                consumed_packs=int(values["consumed_packs"]),
                preprocess=None if preprocess is None else PreprocessSpec.from_dict(preprocess),
                manifest_digest=values["manifest_digest"],
                data=DataSummary.from_dict(values["data"]) if values.get("data") else None,
                base_models={str(part): str(name) for part, name in dict(values.get("base_models", {})).items()},
                earlier=tuple(StageRecord.from_dict(one) for one in values.get("earlier", ())),
                extra=values.get("extra", {}),
            )
        except (KeyError, TypeError, ValueError, ConfigError) as error:
            raise CheckpointError(
                f"{path}: {error!r}. The file does not hold what its format version promises."
            ) from None
