"""Compile a data mix into a packed shard set: read, compile in many processes, pack, write, publish.

Examples are spooled to disk by the processes that make them; this process holds only their lengths, packs those, and
then copies the Examples into the shards pack by pack. What comes out depends on the mix, the settings and the seed
alone: chunks are fixed beforehand and their results are taken in order, whatever number of processes there is.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from tqdm import tqdm

from megatron_vita.data.compile import OVERLONG, Entry, Rules, load_spooled
from megatron_vita.data.manifest import Manifest, Reject, SourceCounts, TokenizerInfo, load_manifest
from megatron_vita.data.packing import pack
from megatron_vita.data.pool import Chunk, WorkerPool
from megatron_vita.data.records import file_info
from megatron_vita.data.sources.mix import MixFile, load_mix
from megatron_vita.data.spec import PreprocessSpec
from megatron_vita.data.tokenizer import (
    IM_END,
    PATCH,
    PATCH_CONTEXT,
    PATCH_END,
    VID,
    VID_CONTEXT,
    VID_END,
    VitaTokenizer,
)
from megatron_vita.errors import ConfigError, DataError

CHUNK = 128
"""Records that a process takes at once."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """The settings of one run; field names are the command line's flags."""

    data_config: str
    tokenizer: str
    output: str
    seq_length: int
    spec: PreprocessSpec = PreprocessSpec()
    overlong: str = "reduce-frames"
    seed: int = 0
    media: str = "embed"
    verify_media: str = "structure"
    workers: int = 1
    resume: bool = False
    engine: str = "local"
    progress: bool = True

    def __post_init__(self) -> None:
        for name, known in (
            ("overlong", OVERLONG),
            ("media", ("embed", "reference")),
            ("verify_media", ("structure", "decode")),
        ):
            if getattr(self, name) not in known:
                flag = name.replace("_", "-")
                raise ConfigError(f"--{flag} {getattr(self, name)}: choose one of {', '.join(known)}.")
        if self.engine != "local":
            raise ConfigError(f"--engine {self.engine} is not supported yet. Use --engine local with --workers N.")
        if self.seq_length < 2:
            raise ConfigError(f"--seq-length {self.seq_length}: a pack needs at least 2 tokens.")
        if self.workers < 1:
            raise ConfigError(f"--workers {self.workers}: at least one process must do the work.")
        if self.seed < 0:
            raise ConfigError(f"--seed {self.seed} must not be negative.")
        name = Path(self.output).name
        if not name or self.output.endswith("/") or Path(self.output).is_dir():
            raise ConfigError(
                f"--output {self.output} must be DIR/PREFIX, not a folder. For instance {self.output}/train"
            )


@dataclass(slots=True)
class _Counts:
    read: int = 0
    used: int = 0
    shortened: int = 0
    cleaned: int = 0


def run(options: Options) -> Manifest:
    """Compile a mix.

    Nothing stands under the final names until all of it is written, and the manifest is published last; an earlier set
    of the same name stays whole until then.

    Returns:
        The manifest of the set, just written or (with `resume`) found finished.

    Raises:
        ConfigError: settings, mix or tokenizer are wrong; nothing was written.
        DataError: a data file cannot be read, or no record is left.
    """
    files = load_mix(options.data_config)
    tokenizer = VitaTokenizer.load(options.tokenizer)
    if options.spec.layout == "long_vita":
        for token in (VID, VID_END, VID_CONTEXT, PATCH, PATCH_END, PATCH_CONTEXT):
            tokenizer.token_id(token)
    tokenizer.token_id(IM_END)
    inputs = _inputs_digest(options, tokenizer, files)
    if options.resume:
        finished = _finished(options.output, inputs)
        if finished is not None:
            log.info("%s is finished and its inputs are the same: kept", options.output)
            return finished
    prefix = Path(options.output)
    spool = prefix.parent / f".{prefix.name}.spool-{os.getpid()}"
    try:
        prefix.parent.mkdir(parents=True, exist_ok=True)
        spool.mkdir()
    except OSError as error:
        raise ConfigError(f"--output {prefix}: cannot be written ({error}). Choose another.") from None
    for stale in prefix.parent.glob(f".{prefix.name}.spool-*"):
        if not _alive(stale.name.rpartition("-")[2]):
            shutil.rmtree(stale, ignore_errors=True)
    try:
        return _compile(options, files, tokenizer, inputs, spool)
    finally:
        shutil.rmtree(spool, ignore_errors=True)


def _compile(options: Options, files: list[MixFile], tokenizer: VitaTokenizer, inputs: str, spool: Path) -> Manifest:
    from megatron_vita.data.shard_writer import (
        ShardWriter,  # imports torch: late, so that wrong settings are told at once
    )

    chunks: list[Chunk] = []
    for number, file in enumerate(files):
        reader = file.reader()
        chosen = file.choose(reader.index(), options.seed)
        chunks += ((number, chunk) for chunk in reader.chunks(chosen, CHUNK))
    rules = Rules(
        spec=options.spec,
        seq_length=options.seq_length,
        overlong=options.overlong,
        verify_media=options.verify_media,
        reference=options.media == "reference",
    )
    counts = [_Counts() for _ in files]
    rejects: list[Reject] = []
    entries: list[tuple[int, Entry]] = []
    total = sum(len(places) for _, places in chunks)
    bar = tqdm(total=total, unit=" records", desc="compile", disable=not options.progress, mininterval=0.5)
    with bar, WorkerPool(options.workers, (str(options.tokenizer), rules, files, spool)) as pool:
        for (number, places), result in pool.map(chunks):
            count = counts[number]
            count.read += len(places)
            count.used += len(result.entries)
            count.shortened += result.shortened
            count.cleaned += result.cleaned
            entries += ((number, entry) for entry in result.entries)
            rejects += (
                Reject(source=files[number].name, line=line, code=code, message=f"{files[number].written}: {message}")
                for line, code, message in result.rejects
            )
            bar.update(len(places))
    for file, count in zip(files, counts, strict=True):
        if count.cleaned:
            log.info("%s: %d answers lost leading line breaks", file.name, count.cleaned)
    if not entries:
        raise DataError(
            f"{options.data_config}: none of {total} records can be used. {_first_rejects(rejects)} Nothing is written."
        )
    writer = ShardWriter(
        options.output,
        spec=options.spec,
        seq_length=options.seq_length,
        tokenizer=TokenizerInfo(sha256=tokenizer.sha256, vocab_size=tokenizer.vocab_size, pad_id=tokenizer.pad_id),
        template_sha256=tokenizer.template_sha256,
        media=options.media,
        packing={"seed": options.seed, "inputs": inputs},
    )
    # Shuffled before they are packed: packs of one length else come from one file, as the files follow one another.
    order = np.random.default_rng(options.seed).permutation(len(entries)).tolist()
    entries = [entries[place] for place in order]
    packs = pack([entry.length for _, entry in entries], options.seq_length)
    bar = tqdm(total=len(entries), unit=" samples", desc="write", disable=not options.progress, mininterval=0.5)
    with writer, bar, _Spool(spool) as spooled:
        for members in packs:
            loaded = [load_spooled(spooled.read(entries[member][1])) for member in members]
            writer.add_pack(
                [example for example, _ in loaded],
                [(entries[member][0], entries[member][1].line) for member in members],
                [references for _, references in loaded] if options.media == "reference" else None,
            )
            bar.update(len(members))
        return writer.finish(_sources(files, counts, rejects), rejects)


def _sources(files: Sequence[MixFile], counts: Sequence[_Counts], rejects: Sequence[Reject]) -> list[SourceCounts]:
    codes: dict[str, dict[str, int]] = {}
    for reject in rejects:
        by_code = codes.setdefault(reject.source, {})
        by_code[reject.code] = by_code.get(reject.code, 0) + 1
    out = []
    for file, count in zip(files, counts, strict=True):
        rejected = dict(sorted(codes.get(file.name, {}).items()))
        assert count.read == count.used + sum(rejected.values()), (file.name, count, rejected)
        out.append(
            SourceCounts(
                name=file.name,
                files=(file.written,),
                read=count.read,
                used=count.used,
                rejected=rejected,
                truncated=count.shortened,
            )
        )
    return out


def _first_rejects(rejects: Sequence[Reject]) -> str:
    return " ".join(f"{reject.source}, record {reject.line}: {reject.code}: {reject.message}" for reject in rejects[:3])


def _inputs_digest(options: Options, tokenizer: VitaTokenizer, files: Sequence[MixFile]) -> str:
    """Digest of all that decides the set, but the media files' contents: settings, tokenizer, template, data files."""
    described: dict[str, Any] = {
        "spec": options.spec.to_dict(),
        "seq_length": options.seq_length,
        "overlong": options.overlong,
        "seed": options.seed,
        "media": options.media,
        "verify_media": options.verify_media,
        "tokenizer": tokenizer.sha256,
        "template": tokenizer.template_sha256,
        "files": [],
    }
    for file in files:
        content = file_info(file.path)["sha256"]
        described["files"].append([file.name, file.written, file.ratio, file.num, repr(file.row), content])
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()


def _finished(output: str, inputs: str) -> Manifest | None:
    """The set under this name, if it is whole and was made from the same inputs."""
    from megatron_vita.data.shards import ShardSet

    try:
        manifest = load_manifest(output)
        if manifest.packing.get("inputs") != inputs:
            return None
        ShardSet(output).verify()
    except (ConfigError, DataError):
        return None
    return manifest


def _alive(pid: str) -> bool:
    """Is there a process of that number? Signal 0 asks and does nothing, on every Unix."""
    try:
        os.kill(int(pid), 0)
    except (ValueError, ProcessLookupError):
        return False
    except PermissionError:
        pass  # somebody else's process
    return True


class _Spool:
    """Reads spooled Examples back."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._open: dict[str, IO[bytes]] = {}

    def __enter__(self) -> _Spool:
        return self

    def __exit__(self, *_: object) -> None:
        for stream in self._open.values():
            stream.close()

    def read(self, entry: Entry) -> bytes:
        if entry.spool not in self._open:
            self._open[entry.spool] = (self._folder / entry.spool).open("rb")
        stream = self._open[entry.spool]
        stream.seek(entry.offset)
        return stream.read(entry.size)
