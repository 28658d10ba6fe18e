"""The settings of one run of the data compiler, each proven by itself."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron_vita.data.compile.engines import ENGINES
from megatron_vita.data.compile.record import OVERLONG
from megatron_vita.data.media.video.open import BACKENDS, VideoLimits
from megatron_vita.data.spec import PreprocessSpec
from megatron_vita.errors import ConfigError


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
    """What decoding one video may cost."""
    video_backend: str = "auto"
    """What decodes videos; see `open_video`."""
    workers: int = 1
    resume: bool = False
    engine: str = "local"
    max_rejected: float = 1.0
    """Largest share of the records, 0..1, that may be refused; with more nothing is published."""
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
        if not 0 <= self.max_rejected <= 1:
            raise ConfigError(f"--max-rejected {self.max_rejected}: a share of the records, 0 to 1.")
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
