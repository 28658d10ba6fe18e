"""The writer of the packed format that shards.py describes and reads: from a plan to a published set.

Everything is written in a work folder beside the set. `publish` moves the files to their names, the manifest last.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_vita.data.digests import FollowingDigests
from megatron_vita.data.engines import Engine, InProcess
from megatron_vita.data.example import IGNORE_INDEX, Example, MediaItem
from megatron_vita.data.manifest import Manifest, Reject, SourceCounts, TokenizerInfo, image_block, load_manifest
from megatron_vita.data.pack_writer import PackJob, create_files, done_path, out_path
from megatron_vita.data.plan import EntryTable, Plan, chunk_path
from megatron_vita.data.records import MEDIA_SUFFIXES, REFERENCE, SUFFIXES, file_info, starts
from megatron_vita.data.spec import PreprocessSpec
from megatron_vita.data.spool import Body, ChunkFile, ChunkWriter
from megatron_vita.errors import ConfigError, DataError

_FOLLOWED = {"tokens.bin": ("token", 4), "labels.bin": ("token", 4), "media.bin": ("byte", 1)}
"""Large files: which column of a range says where its part ends, and bytes of one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SetInfo:
    """What the manifest says besides what was counted."""

    spec: PreprocessSpec
    """How the pictures were cut."""
    seq_length: int
    """Most tokens of a pack."""
    tokenizer: TokenizerInfo
    """Which tokenizer made the ids, and the id that pads."""
    template_sha256: str
    """Digest of the chat template."""
    media: str = "embed"
    """`embed` or `reference`."""
    packing: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Further facts for the manifest's packing block (`seed`, `inputs`)."""


def work_folder(prefix: Path) -> Path:
    """Where a set is made: beside its place, so that moving it there is instant."""
    return prefix.parent / f".{prefix.name}.work"


def write_set(
    plan: Plan,
    prefix: Path,
    info: SetInfo,
    sources: Sequence[SourceCounts],
    rejects: Iterable[Reject],
    *,
    engine: Engine | None = None,
    progress: Callable[[int], object] = lambda samples: None,
) -> Manifest:
    """Write a planned set and publish it. Ranges that an earlier, killed run has finished are kept.

    Args:
        plan: what goes where.
        prefix: folder and name of the set.
        info: settings for the manifest.
        sources: counts of each dataset, in the order that the plan's sources refer to.
        rejects: every refused record.
        engine: who writes; by default this process.
        progress: told the number of samples whenever a range is finished.

    Raises:
        DataError: the counts do not add up, or a picture changed since it was compiled.
    """
    work = plan.work
    if not (work / "created").exists():
        create_files(plan, info.spec.tokens_per_tile)
        (work / "created").touch()
    job = PackJob(work, info.spec.tokens_per_tile)
    finished = [number for number in range(len(plan.ranges)) if done_path(work, number).exists()]
    todo = sorted(set(range(len(plan.ranges))) - set(finished))
    with FollowingDigests({suffix: out_path(work, suffix) for suffix in _FOLLOWED}) as digests:
        frontier = _Frontier(plan, digests)
        for number in itertools.chain(finished, (number for number, _ in (engine or InProcess()).map(job, todo))):
            frontier.add(number)
            progress(int(plan.ranges["samples"][number]))
        files = digests.result()
    sources, totals = _counted(plan, prefix, sources, _write_rejects(out_path(work, "rejects.jsonl"), rejects))
    absent = () if totals["media"] or totals["tiles"] else MEDIA_SUFFIXES
    present = [suffix for suffix in SUFFIXES if suffix not in absent]
    rest = [suffix for suffix in present if suffix not in files]
    with ThreadPoolExecutor(4) as threads:
        infos = dict(zip(rest, threads.map(lambda suffix: file_info(out_path(work, suffix)), rest), strict=True))
    fill = totals["tokens"] / (totals["packs"] * info.seq_length)
    manifest = Manifest(
        seq_length=info.seq_length,
        layout=info.spec.layout,
        tokenizer=info.tokenizer,
        template_sha256=info.template_sha256,
        image=image_block(info.spec),
        video={
            "max_frames": info.spec.max_frames,
            "max_fps": info.spec.max_fps,
            "timestamps": info.spec.video_timestamps,
        },
        packing={"policy": "best-fit-decreasing", "seed": 0, **info.packing, "fill": round(fill, 6)},
        media="none" if absent else info.media,
        sources=tuple(sources),
        totals=totals,
        files={suffix: files.get(suffix) or infos[suffix] for suffix in present},
        digest="",
    ).sealed()
    partial = work / "manifest.partial"
    partial.write_text(manifest.dumps(), encoding="utf-8")
    for path in (*(out_path(work, suffix) for suffix in present), partial):
        _sync(path)
    partial.replace(_ready(work))  # from here on nothing is left to do but to publish
    return publish(work, prefix)


class _Frontier:
    """How far the files are final: up to the first range that is not written."""

    def __init__(self, plan: Plan, digests: FollowingDigests) -> None:
        self._ends = {
            suffix: [size * end for end in plan.range_ends(name)] for suffix, (name, size) in _FOLLOWED.items()
        }
        self._digests = digests
        self._finished: set[int] = set()
        self._next = 0

    def add(self, number: int) -> None:
        """One more range is written."""
        self._finished.add(number)
        while self._next in self._finished:
            self._finished.remove(self._next)
            for suffix, ends in self._ends.items():
                self._digests.advance(suffix, ends[self._next])
            self._next += 1


def is_ready(work: Path) -> bool:
    """All of a set is written, but it was not (wholly) published."""
    return _ready(work).exists()


def publish(work: Path, prefix: Path) -> Manifest:
    """Move a finished set to its names, the manifest last; may be done again when it was cut short.

    In between there is no set under the name, rather than one of mixed files.
    """
    manifest = load_manifest(_ready(work).with_suffix(""))
    final = Path(f"{prefix}.json")
    final.unlink(missing_ok=True)
    for suffix in SUFFIXES:
        _place(out_path(work, suffix), Path(f"{prefix}.{suffix}"), suffix in manifest.files)
    shutil.copyfile(_ready(work), work / "manifest.copy")
    _sync(work / "manifest.copy")
    (work / "manifest.copy").replace(final)
    _sync(final.parent)
    shutil.rmtree(work, ignore_errors=True)
    return manifest


def _place(made: Path, final: Path, wanted: bool) -> None:
    """Move one file to its name, if that is not done already; remove an older set's that has no successor."""
    if not wanted:
        final.unlink(missing_ok=True)
    elif made.exists():
        made.replace(final)


def check_example(example: Example, info: SetInfo, where: str) -> None:
    """Prove that an Example keeps the format's rules.

    Raises:
        DataError: saying which it breaks.
    """
    length = len(example.tokens)
    if not length or len(example.labels) != length or example.labels[-1] != IGNORE_INDEX:
        raise DataError(
            f"{where}: {length} tokens, {len(example.labels)} labels; an Example has as many labels as tokens and "
            f"its last label is {IGNORE_INDEX}."
        )
    if int(example.tokens.min()) < 0 or int(example.tokens.max()) >= info.tokenizer.vocab_size:
        raise DataError(f"{where}: token ids must lie in 0..{info.tokenizer.vocab_size - 1} (the vocabulary).")
    firsts = [slot.first_token for slot in example.tiles]
    ends = [first + info.spec.tokens_per_tile for first in firsts]
    if ends and (firsts[0] < 0 or ends[-1] > length or any(a > b for a, b in zip(ends, firsts[1:], strict=False))):
        raise DataError(f"{where}: its tiles overlap, are out of order, or lie outside its {length} tokens.")
    if any(not 0 <= slot.media < len(example.media) for slot in example.tiles):
        raise DataError(f"{where}: a tile refers to a picture beyond its {len(example.media)}.")


def reference_record(item: MediaItem, path: Path, folder: Path, offset: int | None = None) -> bytes:
    """What stands in a set of `--media reference` for a picture that stays where it is.

    Args:
        item: the picture.
        path: the file that holds it.
        folder: the set's; paths are relative to it.
        offset: where in the file it begins, if it is not the whole file.
    """
    record: dict[str, Any] = {
        "path": os.path.relpath(path, folder),
        "bytes": len(item.data),
        "width": item.width,
        "height": item.height,
        "sha256": hashlib.sha256(item.data).hexdigest(),
    }
    if offset is not None:
        record["offset"] = offset
    return REFERENCE + json.dumps(record, ensure_ascii=False).encode("utf-8", "surrogateescape")


class ShardWriter:
    """Writes a shard set from packs of Examples in memory. (`preprocess.py` makes them in many processes.)

    The same packs give the same bytes. Used as a context manager it removes what it wrote when the block fails,
    and an earlier set under the same prefix stays as it was until `finish`.
    """

    def __init__(
        self,
        prefix: str | Path,
        *,
        spec: PreprocessSpec,
        seq_length: int,
        tokenizer: TokenizerInfo,
        template_sha256: str,
        media: str = "embed",
        packing: Mapping[str, Any] | None = None,
    ) -> None:
        """Open the work folder; the set's folder is made. The arguments are those of `SetInfo`, and:

        Args:
            prefix: folder and name of the set, without any suffix.
        """
        if media not in ("embed", "reference"):
            raise ConfigError(f"media={media!r}: choose embed or reference.")
        self.prefix = Path(prefix)
        self._info = SetInfo(
            spec=spec,
            seq_length=seq_length,
            tokenizer=tokenizer,
            template_sha256=template_sha256,
            media=media,
            packing=dict(packing or {}),
        )
        self._work = work_folder(self.prefix)
        shutil.rmtree(self._work, ignore_errors=True)
        chunk_path(self._work, 0).parent.mkdir(parents=True)
        self._chunk = ChunkWriter(chunk_path(self._work, 0))
        self._origins: list[int] = []
        self._packs: list[int] = []

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._chunk.abort()
        shutil.rmtree(self._work, ignore_errors=True)

    def add_pack(
        self,
        examples: Sequence[Example],
        origins: Sequence[tuple[int, int]],
        references: Sequence[Sequence[Path | None]] | None = None,
    ) -> None:
        """Append one pack.

        Args:
            examples: its Examples in order; together at most seq_length tokens.
            origins: (index into the manifest's sources, record number) of each.
            references: with `media="reference"`, for each Example and media item the file that holds exactly these
                bytes, or None to embed them (video frames).

        Raises:
            DataError: the Examples break the format's rules; nothing of the pack was written.
        """
        tokens = sum(len(example.tokens) for example in examples)
        if not examples or len(origins) != len(examples) or tokens > self._info.seq_length:
            raise DataError(
                f"pack {len(self._packs)}: {len(examples)} Examples with {len(origins)} origins and {tokens} tokens; a "
                f"pack takes at least one Example and at most {self._info.seq_length} tokens."
            )
        for example, (source, line) in zip(examples, origins, strict=True):
            check_example(example, self._info, f"pack {len(self._packs)}, sample {source}:{line}")
        for number, (example, (source, line)) in enumerate(zip(examples, origins, strict=True)):
            paths = references[number] if references else [None] * len(example.media)
            bodies: list[Body] = [
                item.data if path is None else reference_record(item, path, self.prefix.parent)
                for item, path in zip(example.media, paths, strict=True)
            ]
            self._chunk.add(line, example, bodies)
            self._origins.append(source)
        self._packs.append(len(examples))

    def finish(self, sources: Sequence[SourceCounts], rejects: Iterable[Reject] = ()) -> Manifest:
        """Write the set and publish it.

        Args:
            sources: counts of each dataset, in the order that `origins` refer to; tokens and tiles are filled in here.
            rejects: every refused record.

        Raises:
            DataError: no pack was added, or the counts do not add up.
        """
        if not self._packs:
            raise DataError(f"{self.prefix}: no sample was left to pack. The rejects say why; nothing was written.")
        self._chunk.publish()
        table = EntryTable(self._work)
        table.add(0, ChunkFile(chunk_path(self._work, 0)), np.array(self._origins))
        plan = table.as_given(starts(np.array(self._packs, dtype=np.int64)))
        return write_set(plan, self.prefix, self._info, sources, rejects)


def _write_rejects(path: Path, rejects: Iterable[Reject]) -> dict[str, int]:
    """Write the rejects file; lines of each source."""
    lines: dict[str, int] = {}
    with path.open("w", encoding="utf-8", errors="backslashreplace") as stream:
        for reject in rejects:
            stream.write(json.dumps(dataclasses.asdict(reject), ensure_ascii=False) + "\n")
            lines[reject.source] = lines.get(reject.source, 0) + 1
    return lines


def _counted(
    plan: Plan, prefix: Path, sources: Sequence[SourceCounts], rejected: Mapping[str, int]
) -> tuple[list[SourceCounts], dict[str, int]]:
    """Sources with what was packed of them, and the totals.

    Raises:
        DataError: what was read is not what was packed and what was refused.
    """
    if set(plan.by_source) - set(range(len(sources))):
        raise DataError(f"{prefix}: samples of source {max(plan.by_source)}, but {len(sources)} are listed.")
    out = []
    for index, source in enumerate(sources):
        packed = plan.by_source.get(index, {})
        used, refused = packed.get("samples", 0), sum(source.rejected.values())
        if source.used != used or source.read != used + refused or rejected.get(source.name, 0) != refused:
            raise DataError(
                f"{prefix}: the counts of {source.name} do not add up: read {source.read}, said to be used "
                f"{source.used}, packed {used}, rejected {refused}, lines of rejects {rejected.get(source.name, 0)}."
            )
        out.append(
            dataclasses.replace(
                source,
                rejected=dict(source.rejected),
                truncated=packed.get("shortened", 0),
                cleaned=packed.get("cleaned", 0),
                dropped=packed.get("dropped", 0),
                tokens=packed.get("tokens", 0),
                tiles=packed.get("tiles", 0),
            )
        )
    names = ("packs", "samples", "tokens", "labels", "tiles", "media")
    totals = {name: plan.totals[name] for name in names}
    totals["read"] = sum(source.read for source in out)
    totals["rejected"] = sum(sum(source.rejected.values()) for source in out)
    totals["truncated"] = sum(source.truncated for source in out)
    totals["cleaned"] = sum(source.cleaned for source in out)
    totals["dropped"] = sum(source.dropped for source in out)
    return out, totals


def _ready(work: Path) -> Path:
    return work / "ready.json"


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
