"""A request becomes a prompt: ids, opened media, keys of blocks that it may share. Any thread of rank 0 may do it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from megatron_vita.config import ModelConfig
from megatron_vita.data.example import Example
from megatron_vita.data.media.video.open import VideoLimits
from megatron_vita.data.rejects import reject
from megatron_vita.data.spec import PreprocessSpec
from megatron_vita.data.text.tokenizer import VitaTokenizer
from megatron_vita.errors import ConfigError
from megatron_vita.inference.grammar import check_guide
from megatron_vita.inference.guide import Guides
from megatron_vita.inference.length import check_length
from megatron_vita.inference.openai.limits import Limits
from megatron_vita.inference.prefix_cache import Key, block_keys
from megatron_vita.inference.prompt import Request
from megatron_vita.inference.prompt_media import PromptMedia
from megatron_vita.inference.settings import EngineSettings


@dataclass(frozen=True, slots=True)
class Prepared:
    """A request that an engine can take (`Engine.enqueue`). Close its media if it is not given to one."""

    request: Request
    example: Example
    """The prompt; its media carry no bytes."""
    media: PromptMedia
    keys: tuple[Key, ...]
    """Of the prompt's blocks that may be shared."""


@dataclass(frozen=True, slots=True)
class Preparation:
    """What turns requests into prompts; nothing in it changes, so threads may share it."""

    path: Path
    """The model's folder, for messages."""
    config: ModelConfig
    tokenizer: VitaTokenizer
    spec: PreprocessSpec
    settings: EngineSettings
    capacity: int
    """Tokens that the cache holds for one sequence."""
    video_backend: str = "auto"
    guides: Guides | None = None
    """Of the engine, if this rank chooses tokens: what a schema needs is made while its request is prepared, not
    between two steps."""

    def __call__(self, request: Request, limits: Limits | None = None, like: Prepared | None = None) -> Prepared:
        """Ids of a prompt and its media, by the functions that made the training shards. No pixels yet.

        Args:
            request: what is asked.
            limits: of pixels, frames, seconds and tokens, which only the media's headers tell.
            like: another choice of the same conversation with the same settings, whose ids and keys are taken over: a
                prompt is written once, however many answers are asked for.

        Raises:
            ConfigError: pictures for a model without a tower, or sampling names a token that the model does not have.
            DataError: a damaged medium, a conversation that does not end with a question, or a prompt that is too long.
            LimitError: a prompt that holds too much.
        """
        request.sampling.check_vocabulary(self.config.vocab_size)
        if (guide := request.sampling.guide) is not None:
            check_guide(guide)
            if self.guides is not None:
                self.guides.learn(guide)
        sample = request.sample
        if sample.messages and sample.messages[-1].role != "user":
            raise reject("bad_order", f"{sample.id}: the last turn is an answer already; end with a question.")
        if (sample.images or sample.videos) and self.config.vision is None:
            raise ConfigError(
                f"{self.path}: a text-only model; it cannot look at pictures. Use one with a vision tower."
            )
        spec = request.preprocessing(self.spec)
        video_limits = VideoLimits(timeout=self.settings.video_timeout)
        if like is not None:
            media = PromptMedia.reopen(sample, like.example, spec, self.video_backend, video_limits)
            media.close()
            return Prepared(request, like.example, media, like.keys)
        fits = partial(check_length, request, positions=self.config.max_position_embeddings, held=self.capacity)
        example, media = PromptMedia.open(
            sample,
            spec,
            tokenizer=self.tokenizer,
            video_backend=self.video_backend,
            video_limits=video_limits,
            limits=limits,
            check=partial(fits, whole=False),
        )
        try:
            if limits is not None:
                limits.check("prompt_tokens", len(example.tokens))
                if (alternatives := request.sampling.prompt_logprobs) is not None:
                    limits.check("prompt_logprobs", len(example.tokens) * (1 + alternatives), param="prompt_logprobs")
            fits(len(example.tokens))
            return Prepared(request, example, media, self._keys(request, example, media))
        finally:
            media.close()  # a prompt that waits holds no file, and the thread that reads its pixels has its own decoder

    def _keys(self, request: Request, example: Example, media: PromptMedia) -> tuple[Key, ...]:
        if not self.settings.enable_prefix_caching or request.sampling.prompt_logprobs is not None:
            return ()
        digests = [b""] * len(example.media) if request.zero_tiles else media.digests()
        size = self.settings.block_size
        return tuple(block_keys(example.tokens, size, example.tiles, digests, self.spec.tokens_per_tile))
