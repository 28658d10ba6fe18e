"""Writes a planned set in a work folder beside its place, in many processes, and publishes it: its files first, its
manifest last, after any kill again.

The format is described in shards/reader.py.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Protocol

from megatron_vita.data.shards.format import MEDIA_SUFFIXES, SUFFIXES
from megatron_vita.data.shards.manifest import Manifest, Reject, SetInfo, SourceCounts, image_block, load_manifest
from megatron_vita.data.shards.writer.packs import PackJob, create_files, done_path, out_path
from megatron_vita.data.shards.writer.plan import Plan
from megatron_vita.errors import ConfigError, DataError
from megatron_vita.files import FollowingDigests, file_info, lock_file, sync, write_atomic

log = logging.getLogger(__name__)

_FOLLOWED = {"tokens.bin": ("token", 4), "labels.bin": ("token", 4), "media.bin": ("byte", 1)}
"""Large files: which column of a range says where its part ends, and bytes of one."""


class Engine(Protocol):
    """Who writes the ranges: an executor of data/compile/engines.py."""

    def map(self, job: PackJob, tasks: Iterable[int]) -> Iterator[tuple[int, Any]]:
        """Write every range of `tasks` in some process; (range, nothing of interest), as they finish."""


class _ThisProcess:
    """One range after the other, here."""

    def map(self, job: PackJob, tasks: Iterable[int]) -> Iterator[tuple[int, Any]]:
        write = job.open()
        for number in tasks:
            yield number, write(number)


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
        rejects: every rejected record.
        engine: who writes; by default this process.
        progress: called with the number of samples whenever a range is finished.

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
        for number in itertools.chain(finished, (number for number, _ in (engine or _ThisProcess()).map(job, todo))):
            frontier.add(number)
            progress(int(plan.ranges["samples"][number]))
        files = digests.result()
    sources, totals = _counted(plan, prefix, sources, write_rejects(out_path(work, "rejects.jsonl"), rejects))
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
            **({"decoder": info.video_decoder} if info.video_decoder and not absent else {}),
        },
        packing={"policy": "best-fit-decreasing", "seed": 0, **info.packing, "fill": round(fill, 6)},
        media="none" if absent else info.media,
        sources=tuple(sources),
        totals=totals,
        files={suffix: files.get(suffix) or infos[suffix] for suffix in present},
        digest="",
    ).sealed()
    make_ready(work, present, manifest)
    return publish(work, prefix)


class _Frontier:
    """Tracks how far the files are final: up to the first range that is not written."""

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


def write_rejects(path: Path, rejects: Iterable[Reject]) -> dict[str, int]:
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
        DataError: records read are not records packed plus records rejected.
    """
    if set(plan.by_source) - set(range(len(sources))):
        raise DataError(f"{prefix}: samples of source {max(plan.by_source)}, but {len(sources)} are listed.")
    out = []
    for index, source in enumerate(sources):
        packed = plan.by_source.get(index, {})
        used, rejects = packed.get("samples", 0), sum(source.rejected.values())
        if source.used != used or source.read != used + rejects or rejected.get(source.name, 0) != rejects:
            raise DataError(
                f"{prefix}: the counts of {source.name} do not add up: read {source.read}, said to be used "
                f"{source.used}, packed {used}, rejected {rejects}, lines of rejects {rejected.get(source.name, 0)}."
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


# ---- from the work folder to the set's own names ----


def work_folder(prefix: Path) -> Path:
    """Where a set is made: beside its place, so that moving it there is instant."""
    return prefix.parent / f".{prefix.name}.work"


def make_ready(work: Path, suffixes: Sequence[str], manifest: Manifest) -> None:
    """Bring a written set to the disk; from here on nothing is left to do but to publish it."""
    for suffix in suffixes:
        sync(out_path(work, suffix))
    write_atomic(_ready(work), manifest.dumps(), durable=True)


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
    write_atomic(final, manifest.dumps(), durable=True, partial=work / "manifest.partial")
    shutil.rmtree(work, ignore_errors=True)
    return manifest


def _place(made: Path, final: Path, wanted: bool) -> None:
    """Move one file to its name, if that is not done already; remove an older set's that has no successor."""
    if not wanted:
        final.unlink(missing_ok=True)
    elif made.exists():
        os.replace(made, final)


def _ready(work: Path) -> Path:
    return work / "ready.json"


@contextmanager
def hold_work_folder(prefix: Path, described: str, *, resume: bool) -> Iterator[Manifest | None]:
    """The work folder of a set, for this run alone. Left where it is when the run is cut short.

    Args:
        prefix: folder and name of the set.
        described: of what the folder is made; what an earlier run left of anything else is started over.
        resume: keep what an earlier run of the same has left.

    Returns:
        The set's manifest if nothing was left to do but to publish it.

    Raises:
        ConfigError: nothing can be written there, or another run holds it.
    """
    work = work_folder(prefix)
    lock_path = Path(f"{work}.lock")
    with ExitStack() as stack:
        try:
            prefix.parent.mkdir(parents=True, exist_ok=True)
            held = stack.enter_context(lock_file(lock_path))
        except OSError as error:
            raise ConfigError(f"--output {prefix}: cannot be written ({error}). Choose another.") from None
        if not held:
            raise ConfigError(f"--output {prefix}: another run is writing it. Wait, or choose another.")
        stack.callback(lock_path.unlink, missing_ok=True)
        note = work / "inputs"
        left = note.read_text() if note.exists() else None
        if is_ready(work):  # cut short between the old set and the new one
            manifest = publish(work, prefix)
            if left == described and resume:
                yield manifest
                return
        if left != described or not work.exists() or not resume:
            if work.exists():
                log.info("%s is of %s: started over", work, "other inputs" if resume else "an earlier run")
            shutil.rmtree(work, ignore_errors=True)
            for folder in ("active", "sources"):
                (work / folder).mkdir(parents=True)
            note.write_text(described)
        yield None
