"""Which packed shards a stage reads, and how."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_vita.config.bounds import at_least
from megatron_vita.errors import ConfigError

LAYOUTS = ("internvl", "long_vita")


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """The packed shards of one stage."""

    data_path: str = ""
    """Prefix of the training shards (what preprocess_data.py was given as --output)."""
    valid_data_path: str | None = None
    """Prefix of held-out shards for the validation loss; none: no validation."""
    tokenizer_model: str = ""
    """Hugging Face tokenizer folder (or SentencePiece model); its digest must be the shards'."""
    seq_length: int = 4096
    """Tokens of one pack, padding included. The shards must have been packed to this length."""
    layout: str = "internvl"
    """Token layout of pictures and videos: `internvl` or `long_vita`; must be the shards'."""
    reset_per_document: bool = False
    """Positions and attention restart at every sample of a pack (Megatron's --reset-position-ids and
    --reset-attention-mask, which must not differ)."""
    num_workers: int = 1
    """Threads that decode tiles ahead of the step; 0 decodes in the step."""
    max_failed_samples: int = 100
    """Samples whose pictures may fail to decode in a stage before it stops."""

    def __post_init__(self) -> None:
        if self.layout not in LAYOUTS:
            raise ConfigError(f"data.layout={self.layout!r}: choose one of {', '.join(LAYOUTS)}.")
        at_least(1, "data", self, "seq_length")
        at_least(0, "data", self, "num_workers", "max_failed_samples")
