"""Section `data`: the packed shards that a stage reads."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_vita.config.bounds import at_least
from megatron_vita.errors import ConfigError

LAYOUTS = ("internvl", "long_vita")


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """Packed shards and token layout of one stage."""

    data_path: str = ""
    """Prefix of the training shards (what preprocess_data.py was given as --output)."""
    valid_data_path: str | None = None
    """Prefix of held-out shards for the validation loss; None: no validation."""
    tokenizer_model: str = ""
    """Hugging Face tokenizer folder (or SentencePiece model); its digest must be the shards'."""
    seq_length: int = 4096
    """Tokens of one pack, padding included. The shards must have been packed to this length."""
    layout: str = "internvl"
    """Token layout of images and videos: `internvl` or `long_vita`; must be the shards'."""
    reset_per_document: bool = False
    """Document masking: position ids and attention restart at every sample of a pack (Megatron's --reset-position-ids
    and --reset-attention-mask together)."""
    num_workers: int = 1
    """Threads that prefetch and decode tiles; 0 decodes in the training step."""
    max_failed_samples: int = 100
    """Number of samples with undecodable images in a stage above which training stops."""

    def __post_init__(self) -> None:
        if self.layout not in LAYOUTS:
            raise ConfigError(f"data.layout={self.layout!r}: choose one of {', '.join(LAYOUTS)}.")
        at_least(1, "data", self, "seq_length")
        at_least(0, "data", self, "num_workers", "max_failed_samples")
