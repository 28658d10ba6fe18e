"""What every rank of an engine does alike: queues, block tables, one step after the other.

All ranks hear the same news in the same order and get the same tokens: their block tables agree without more messages.
"""

from __future__ import annotations

import time
from collections.abc import Sequence as Sized
from dataclasses import dataclass

import torch

from megatron_vita.data.example import Example
from megatron_vita.data.media.video.open import VideoLimits
from megatron_vita.data.spec import PreprocessSpec
from megatron_vita.data.text.tokenizer import END_OF_TEXT, IM_END, VitaTokenizer
from megatron_vita.device import free_memory_bytes, torch_device
from megatron_vita.errors import ConfigError, DataError
from megatron_vita.inference.batch import build_batch
from megatron_vita.inference.blocks import BlockManager
from megatron_vita.inference.detokenize import TextStream
from megatron_vita.inference.guide import Guides
from megatron_vita.inference.prefix_cache import Key, PrefixCache
from megatron_vita.inference.prompt import FinishReason, Generation, Output, Request, TokenLogprob
from megatron_vita.inference.prompt_media import PromptMedia
from megatron_vita.inference.runner import ModelRunner, StepResult
from megatron_vita.inference.sampling import Sampled
from megatron_vita.inference.scheduler import Scheduler, StepPlan
from megatron_vita.inference.sequence import Sequence
from megatron_vita.inference.settings import EngineSettings
from megatron_vita.inference.visual import BlackTiles, Pixels, VisualTokens
from megatron_vita.inference.world import World
from megatron_vita.models.vita import VitaModel
from megatron_vita.parallel.kv_cache import KVCache


@dataclass(frozen=True, slots=True)
class New:
    """A request that the leader has prepared, as the other ranks get it."""

    request: Request
    example: Example
    """Its media carry no bytes."""
    keys: tuple[Key, ...]
    """Of the prompt's blocks that may be shared."""


@dataclass(frozen=True, slots=True)
class News:
    """What the leader tells the other ranks before a step."""

    new: tuple[New, ...] = ()
    aborted: tuple[str, ...] = ()
    pause: bool = False
    """There is no step; the others stop following."""


class Worker:
    """One rank of an engine."""

    def __init__(
        self,
        model: VitaModel,
        tokenizer: VitaTokenizer,
        spec: PreprocessSpec,
        settings: EngineSettings,
        world: World,
        *,
        video_backend: str = "auto",
    ) -> None:
        """Allocate the cache; collective over the world.

        Raises:
            ConfigError: the memory for keys and values holds no two blocks, or is not there.
        """
        self.model = model
        self.config = model.model
        self.tokenizer = tokenizer
        self.spec = spec
        self.ends = frozenset(tokenizer.token_id(name) for name in (IM_END, END_OF_TEXT))
        """Tokens with which the model ends an answer."""
        self.media: dict[str, PromptMedia] = {}
        """By request; the leader puts in what it opened to prepare the prompt."""
        self._video_backend = video_backend
        self._video_limits = VideoLimits(timeout=settings.video_timeout)
        self._world = world
        self.cache = allocate_cache(model, settings, world)
        manager = PrefixCache if settings.enable_prefix_caching else BlockManager
        self.blocks = manager(
            num_blocks=self.cache.num_blocks,
            block_size=settings.block_size,
            ranks=model.groups.cp_size,
            rank=model.groups.cp_rank,
        )
        self.scheduler = Scheduler(
            self.blocks,
            budget=settings.chunked_prefill_size * model.groups.cp_size,
            max_num_seqs=settings.max_num_seqs,
        )
        self.runner = ModelRunner(model, world, Guides(tokenizer, self.ends), lm_head=settings.lm_head)
        self.visual: VisualTokens | None = None
        if model.vision_model is not None:
            self.visual = VisualTokens(model, spec.tokens_per_tile, self._open_media)
        self.sequences: dict[str, Sequence] = {}
        """Requests that wait or run, by id."""
        self._texts: dict[str, TextStream] = {}
        self._numbers = 0

    @property
    def longest(self) -> int:
        """Tokens of prompt and answer that one request may have: positions of the model, or room in the cache."""
        return min(self.config.max_position_embeddings, self.blocks.capacity)

    def step(self, news: News | None, *, stream: bool = False) -> list[Output]:
        """One forward pass over all requests that have work.

        Args:
            news: what the leader said.
            stream: outputs carry text as it comes; else with the whole answer, which costs less.
        """
        if news is not None:
            for request_id in news.aborted:
                if request_id in self.sequences:
                    self._drop(self.sequences[request_id])
            for new in news.new:
                self._begin(new)
        plan = self.scheduler.plan()
        for chunk in plan.chunks:
            if chunk.sequence.started is None:
                chunk.sequence.started = time.monotonic()
        outputs: list[Output] = []
        if self.config.vision is not None and any(chunk.sequence.example.tiles for chunk in plan.chunks):
            plan, outputs = self._load_tiles(plan)
        if not plan.chunks and not plan.decodes:
            return outputs
        batch = build_batch(plan, self.blocks, self.cache, torch_device())
        visual = None
        if self.visual is not None and batch.layout is not None:
            with torch.inference_mode():
                visual = self.visual.encode(plan, batch.layout)
        return outputs + self._collect(plan, batch.sampled, self.runner.run(batch, visual), stream=stream)

    def close(self) -> None:
        """Let go of all requests."""
        for sequence in list(self.sequences.values()):
            self._drop(sequence)

    def _begin(self, new: New) -> None:
        room = self.longest - len(new.example.tokens)
        asked = new.request.max_new_tokens
        limit = room if asked is None else min(asked, room)
        sequence = Sequence(self._numbers, new.request, new.example, limit, self.blocks.table(), new.keys)
        self._numbers += 1
        self.sequences[new.request.id] = sequence
        self.runner.add(sequence, self.ends)
        self.scheduler.add(sequence)

    def _load_tiles(self, plan: StepPlan) -> tuple[StepPlan, list[Output]]:
        """Decode the tiles that the step needs; the plan without the sequences for which that failed on any rank."""
        failed = self._world.failures(self.visual.load(plan) if self.visual is not None else {})
        outputs = []
        for chunk in plan.chunks:
            if (error := failed.get(chunk.sequence.number)) is not None:
                outputs.append(Output(chunk.sequence.request.id, "", error))
                self._drop(chunk.sequence)
        kept = tuple(chunk for chunk in plan.chunks if chunk.sequence.number not in failed)
        return StepPlan(kept, plan.decodes, plan.slots), outputs

    def _collect(self, plan: StepPlan, sampled: Sized[Sequence], result: StepResult, *, stream: bool) -> list[Output]:
        """Append the new tokens, and finish the sequences that end."""
        for chunk in plan.chunks:
            chunk.sequence.computed = chunk.stop
            if chunk.last and (media := self.media.get(chunk.sequence.request.id)) is not None:
                media.close()  # a sequence that is preempted opens it again
            if (found := result.prompts.get(chunk.sequence.number)) is not None:
                chunk.sequence.prompt_logprobs[chunk.start :] = found  # a preempted prompt is begun again
        for sequence in plan.decodes:
            sequence.computed += 1
        details = result.details or [Sampled(token) for token in result.tokens]
        outputs = [self._append(sequence, one, stream=stream) for sequence, one in zip(sampled, details, strict=True)]
        return [output for output in outputs if output is not None]

    def _append(self, sequence: Sequence, chosen: Sampled, *, stream: bool) -> Output | None:
        """Append a token; what the caller hears of it, if anything."""
        if chosen.error is not None:
            self._drop(sequence)
            return Output(sequence.request.id, "", DataError(f"{sequence.request.sample.id}: {chosen.error}"))
        config, token = sequence.request.sampling, chosen.token
        reason: FinishReason | None = None
        stopped: str | int | None = None
        text = ""
        if not sequence.generated and sequence.started is not None:
            sequence.prefill_seconds = time.monotonic() - sequence.started
        if token in self.ends and not (config.ignore_eos and config.guide is None):
            reason = "stop"
        elif token in config.stop_token_ids:
            reason, stopped = "stop", token
        else:
            sequence.generated.append(token)
            if config.logprobs is not None and chosen.logprob is not None:
                sequence.logprobs.append(TokenLogprob(token, chosen.logprob, chosen.top))
            if stream or config.stop:
                text = self._new_text(sequence)
            if chosen.complete:
                reason = "stop"
            elif len(sequence.generated) >= sequence.limit:
                reason = "length"
        texts = self._texts.get(sequence.request.id)
        if texts is not None and texts.stopped is None and reason is not None:
            text += self._new_text(sequence) + texts.finish()
        if texts is not None and texts.stopped is not None:
            reason, stopped = "stop", texts.stopped
        sequence.text += text
        if reason is None:
            return Output(sequence.request.id, text, None, self._new_logprobs(sequence)) if text else None
        if texts is None:
            text = sequence.text = self.tokenizer.decode(sequence.generated)
        answer = Generation(
            text=sequence.text,
            ids=tuple(sequence.generated),
            finish_reason=reason,
            stop_reason=stopped,
            prompt_tokens=len(sequence.prompt),
            cached_tokens=sequence.shared,
            prefill_seconds=sequence.prefill_seconds,
            logprobs=tuple(sequence.logprobs) if config.logprobs is not None else None,
            prompt_logprobs=(None, *sequence.prompt_logprobs) if config.prompt_logprobs is not None else None,
        )
        self._drop(sequence)
        return Output(sequence.request.id, text, answer, self._new_logprobs(sequence))

    def _new_text(self, sequence: Sequence) -> str:
        """Text of the tokens that came since the last call, as far as it can be shown."""
        config, known = sequence.request.sampling, self._texts.get(sequence.request.id)
        if known is None:
            known = TextStream(self.tokenizer, config.stop, min_tokens=config.min_tokens)
            self._texts[sequence.request.id] = known
        new, sequence.told = sequence.generated[sequence.told :], len(sequence.generated)
        return "".join(known.append(token) for token in new)

    def _new_logprobs(self, sequence: Sequence) -> tuple[TokenLogprob, ...]:
        """Log-probabilities of the tokens that came since the last call."""
        new, sequence.told_logprobs = sequence.logprobs[sequence.told_logprobs :], len(sequence.logprobs)
        return tuple(new)

    def _drop(self, sequence: Sequence) -> None:
        """Forget a sequence that is finished or given up."""
        self.scheduler.remove(sequence)
        self.runner.forget(sequence)
        if self.visual is not None:
            self.visual.forget(sequence)
        if (media := self.media.pop(sequence.request.id, None)) is not None:
            media.close()
        self._texts.pop(sequence.request.id, None)
        del self.sequences[sequence.request.id]

    def _open_media(self, sequence: Sequence) -> Pixels:
        request_id = sequence.request.id
        if sequence.request.zero_tiles:
            return BlackTiles(self.spec.image_size)
        if request_id not in self.media:
            sample, spec = sequence.request.sample, sequence.request.preprocessing(self.spec)
            self.media[request_id] = PromptMedia.reopen(
                sample, sequence.example, spec, self._video_backend, self._video_limits
            )
        return self.media[request_id]


def allocate_cache(model: VitaModel, settings: EngineSettings, world: World) -> KVCache:
    """This rank's cache: equally many blocks on every rank, and no more than could ever be used.

    Raises:
        ConfigError: the memory for keys and values holds no two blocks, or is not there.
    """
    config, groups = model.model, model.groups
    layers = [layer.layer_number for layer in model.language_model.decoder.layers]
    heads, dtype = config.num_query_groups // groups.tp_size, model.config.params_dtype
    block_size, head_dim = settings.block_size, config.head_dim
    block_bytes = KVCache.block_bytes(
        layers=max(1, len(layers)), block_size=block_size, groups=heads, head_dim=head_dim, dtype=dtype
    )
    budget = settings.kv_cache_bytes(free_memory_bytes())
    share = -(-config.max_position_embeddings // groups.cp_size)
    useful = settings.max_num_seqs * (-(-share // block_size) + 1)
    num_blocks = world.smallest(min(budget // block_bytes, useful))
    if num_blocks < 2:
        raise ConfigError(
            f"the key/value cache may take {budget} bytes of a rank, but two blocks of {block_size} tokens take "
            f"{2 * block_bytes}. Raise --kv-cache-memory."
        )
    return KVCache(
        layers,
        num_blocks=num_blocks,
        block_size=block_size,
        groups=heads,
        head_dim=head_dim,
        dtype=dtype,
        device=torch_device(),
    )
