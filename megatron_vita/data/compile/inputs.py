"""Inputs of a run, read and checked before anything is written: settings, files of the mix, tokenizer."""

from __future__ import annotations

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_vita.data.compile.engines import ENGINES, open_executor
from megatron_vita.data.compile.record import OVERLONG
from megatron_vita.data.compile.reuse import source_key
from megatron_vita.data.media.video.open import BACKENDS, VideoLimits, decoder_name
from megatron_vita.data.shards.manifest import SetInfo, TokenizerInfo
from megatron_vita.data.shards.writer.publish import work_folder
from megatron_vita.data.sources.mix import MixFile, load_mix
from megatron_vita.data.spec import PreprocessSpec
from megatron_vita.data.text.tokenizer import (
    IM_END,
    PATCH,
    PATCH_CONTEXT,
    PATCH_END,
    VID,
    VID_CONTEXT,
    VID_END,
    VitaTokenizer,
)
from megatron_vita.errors import ConfigError
from megatron_vita.files import file_info


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
    video_limits: VideoLimits = VideoLimits()
    """Time and memory limits of decoding one video."""
    video_backend: str = "auto"
    """The video decoder; see `open_video`."""
    workers: int = 1
    resume: bool = False
    engine: str = "local"
    max_rejected: float | None = None
    """Largest share of a source's records, 0..1, that may be rejected; with more nothing is published. None: the
    default of `rejected.py`, which passes over sources of a few records."""
    progress: bool = True

    def __post_init__(self) -> None:
        for name, known in (
            ("overlong", OVERLONG),
            ("media", ("embed", "reference")),
            ("verify_media", ("structure", "decode")),
            ("video_backend", BACKENDS),
            ("engine", ENGINES),
        ):
            if getattr(self, name) not in known:
                flag = name.replace("_", "-")
                raise ConfigError(f"--{flag} {getattr(self, name)}: choose one of {', '.join(known)}.")
        if self.max_rejected is not None and not 0 <= self.max_rejected <= 1:
            raise ConfigError(f"--max-rejected {self.max_rejected}: a share of a source's records, 0 to 1.")
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


@dataclass(frozen=True, kw_only=True, slots=True)
class Inputs:
    """The checked inputs of a run."""

    options: Options
    files: list[MixFile]
    info: SetInfo
    keys: list[str]
    """`source_key` of each file: files of the same key have the same Examples."""

    @property
    def prefix(self) -> Path:
        """Folder and name of the set."""
        return Path(self.options.output)

    @property
    def work(self) -> Path:
        """Folder in which the set is made."""
        return work_folder(self.prefix)

    @property
    def digest(self) -> str:
        """SHA-256 of mix, data files, settings and seed."""
        return str(self.info.packing["inputs"])


def read_inputs(options: Options) -> Inputs:
    """Read and check mix, tokenizer and settings, and digest the data files.

    Raises:
        ConfigError: settings, mix or tokenizer are wrong.
    """
    files = load_mix(options.data_config)
    tokenizer = VitaTokenizer.load(options.tokenizer)
    if options.spec.layout == "long_vita":
        for token in (VID, VID_END, VID_CONTEXT, PATCH, PATCH_END, PATCH_CONTEXT):
            tokenizer.token_id(token)
    tokenizer.token_id(IM_END)
    open_executor(options.engine, options.workers)  # complains if ray is missing
    decoder = decoder_name(options.video_backend)
    settings: dict[str, Any] = {
        "spec": options.spec.to_dict(),
        "seq_length": options.seq_length,
        "overlong": options.overlong,
        "media": options.media,
        "verify_media": options.verify_media,
        "video_decoder": decoder,
        "video_limits": [options.video_limits.timeout, options.video_limits.memory],
        "tokenizer": tokenizer.sha256,
        "template": tokenizer.template_sha256,
    }
    with ThreadPoolExecutor(options.workers) as threads:  # hashlib frees the GIL
        contents = list(threads.map(lambda file: file_info(file.path)["sha256"], files))
    keys = [source_key(file, content, settings) for file, content in zip(files, contents, strict=True)]
    named = [[file.name, file.written, file.ratio, file.num, key] for file, key in zip(files, keys, strict=True)]
    inputs = hashlib.sha256(json.dumps([options.seed, named], sort_keys=True).encode()).hexdigest()
    info = SetInfo(
        spec=options.spec,
        seq_length=options.seq_length,
        tokenizer=TokenizerInfo(sha256=tokenizer.sha256, vocab_size=tokenizer.vocab_size, pad_id=tokenizer.pad_id),
        template_sha256=tokenizer.template_sha256,
        media=options.media,
        video_decoder=decoder,
        packing={"seed": options.seed, "inputs": inputs},
    )
    return Inputs(options=options, files=files, info=info, keys=keys)
