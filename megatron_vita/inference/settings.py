"""Settings of the inference engine. Nothing here imports torch, so that a command line is checked before it is slow."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from megatron_vita.errors import ConfigError
from megatron_vita.files import readable_size

DTYPES = ("float32", "bfloat16", "float16")
"""Names of torch's types in which a model can be run."""
LM_HEADS = ("masked", "chunked", "full")
"""`masked`: only the rows that are asked for reach the vocabulary product; `chunked`: all rows, a chunk at a time;
`full`: all rows at once. The last two are the paper's comparison; the logits that are used are the same."""
OVERRIDES = ("rope_scaling", "rotary_base", "max_position_embeddings", "max_frames")
"""Settings that replace the model's own, if they are not None."""
DEFAULT_KV_CACHE_SHARE = Fraction(1, 2)
"""Share of the free memory that keys and values may fill if nothing else is said; activations need the rest."""

_SIZE = re.compile(r"(\d+(?:\.\d+)?|\.\d+)\s*([kmgt]i?b?|b|)", re.IGNORECASE)
_POWERS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}
_MOST_BYTES = 1 << 60
"""More than any machine has; a larger number is a slip."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineSettings:
    """How a model is laid out over ranks, how requests are scheduled, and overrides of the model's own settings.

    Answers depend on the dtype and the overrides only.
    """

    tensor_model_parallel_size: int = 1
    """Ranks that split each weight matrix and the heads of the cache."""
    context_parallel_size: int = 1
    """Ranks that split the tokens of a prompt and of its cache."""
    pipeline_model_parallel_size: int = 1
    """Ranks that hold a run of layers each."""
    dtype: str = "float32"
    """Of weights, activations and cache: float32, bfloat16 or float16."""
    kv_cache_memory: str | None = None
    """Memory of keys and values on a rank: a share of what is free (`0.5`) or a size (`4GiB`); None: half."""
    block_size: int = 16
    """Tokens of a cache block."""
    chunked_prefill_size: int = 8192
    """Most prompt tokens that a context-parallel rank computes in one step."""
    max_num_seqs: int = 256
    """Most sequences that are decoded in one step."""
    lm_head: str = "masked"
    """Which rows reach the vocabulary product, see LM_HEADS."""
    enable_prefix_caching: bool = False
    """Requests that begin with the same blocks of tokens and pictures share their keys and values."""
    video_timeout: float = 600.0
    """Seconds that decoding one video may take; meanwhile all requests of a step wait."""
    rope_scaling: Mapping[str, Any] | None = None
    """Scaling of the rotary embedding, as transformers' rope_scaling; None: the model's. See with_rope_scaling."""
    rotary_base: float | None = None
    """Base of the rotary embedding (rope_theta); None: the model's."""
    max_position_embeddings: int | None = None
    """Tokens of the longest prompt with its answer; None: the model's, or what follows from `rope_scaling`."""
    max_frames: int | None = None
    """Most frames taken from a video; None: as many as the model was trained with."""

    def __post_init__(self) -> None:
        for name in (
            "tensor_model_parallel_size", "context_parallel_size", "pipeline_model_parallel_size", "block_size",
            "chunked_prefill_size", "max_num_seqs", "max_position_embeddings", "max_frames",
        ):  # fmt: skip
            value = getattr(self, name)
            if value is None and name in OVERRIDES:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"{name}={value!r} must be a whole number of at least 1.")
        if not self.video_timeout > 0:
            raise ConfigError(f"video_timeout={self.video_timeout} must be a positive number of seconds.")
        for name, known in (("dtype", DTYPES), ("lm_head", LM_HEADS)):
            if getattr(self, name) not in known:
                raise ConfigError(f"{name}={getattr(self, name)!r} is not known. Choose one of {', '.join(known)}.")
        self._kv_cache()

    @property
    def overrides(self) -> dict[str, Any]:
        """Settings that replace the model's own, by name."""
        return {name: value for name in OVERRIDES if (value := getattr(self, name)) is not None}

    @property
    def world_size(self) -> int:
        """Ranks that the layout takes."""
        return self.tensor_model_parallel_size * self.context_parallel_size * self.pipeline_model_parallel_size

    def kv_cache_bytes(self, free: int) -> int:
        """Bytes that keys and values may take on a rank.

        Args:
            free: bytes that are free for this rank once the weights are loaded.

        Raises:
            ConfigError: a size is asked for that is not free.
        """
        wanted = self._kv_cache()
        if isinstance(wanted, Fraction):
            return int(wanted * free)
        if wanted > free:
            raise ConfigError(
                f"kv_cache_memory={self.kv_cache_memory} is {readable_size(wanted)}, but {readable_size(free)} are "
                "free on this rank. Ask for less, or for a share such as 0.5."
            )
        return wanted

    def _kv_cache(self) -> Fraction | int:
        """A share of free memory, or bytes."""
        text = self.kv_cache_memory
        if text is None:
            return DEFAULT_KV_CACHE_SHARE
        match = _SIZE.fullmatch(text.strip()) if isinstance(text, str) else None
        if match:
            number, unit = Fraction(match[1]), match[2].lower()
            if not unit and 0 < number <= 1:
                return number
            base = 1024 if "i" in unit else 1000
            size = number * base ** _POWERS[unit.rstrip("b").rstrip("i")]
            if 1 <= size <= _MOST_BYTES and (unit or size.denominator == 1):
                return int(size)
        raise ConfigError(
            f"kv_cache_memory={text!r} is neither a share of the free memory in (0, 1], such as 0.5, nor a size, such "
            "as 4GiB, 512MiB or a number of bytes."
        )
