"""Answers from a model on any layout of ranks: requests come and go between steps (continuous batching).

The prompt of a question is an Example made by the functions that training used, so ids and pixels are the same. Every
rank keeps the same queues and block tables; rank 0 takes requests, prepares prompts, and tells the others what is new
before each step.
"""

from __future__ import annotations

import gc
from collections.abc import Generator, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_vita import checkpoint
from megatron_vita.config import ParallelConfig, StageConfig
from megatron_vita.data.example import Example
from megatron_vita.data.sample import Sample
from megatron_vita.data.spec import PreprocessSpec
from megatron_vita.data.text.tokenizer import VitaTokenizer
from megatron_vita.device import empty_cache
from megatron_vita.errors import ConfigError, VitaError
from megatron_vita.inference.opening import model_name, open_for_inference
from megatron_vita.inference.prepare import Preparation, Prepared
from megatron_vita.inference.prompt import Generation, Output, Request
from megatron_vita.inference.prompt_media import PromptMedia
from megatron_vita.inference.sampling import GREEDY, SamplingConfig
from megatron_vita.inference.settings import EngineSettings
from megatron_vita.inference.worker import New, News, Worker
from megatron_vita.inference.world import World, inference_groups, together
from megatron_vita.models.build import build_model
from megatron_vita.models.vita import VitaModel

__all__ = ["Engine", "Output", "model_name"]


@dataclass(frozen=True, slots=True)
class EngineStats:
    """What an engine has to do."""

    waiting: int
    """Requests that have not begun."""
    running: int
    """Requests that are being computed."""
    cache_usage: float
    """Share of the key/value cache that requests hold, on the context rank that has fewest free blocks."""
    preemptions: int
    """Sequences that gave their blocks back, so far."""


class Engine:
    """A model with its tokenizer and preprocessing, and the requests that it answers. Every rank has one."""

    def __init__(
        self,
        model: VitaModel,
        tokenizer: VitaTokenizer,
        spec: PreprocessSpec,
        path: Path,
        settings: EngineSettings,
        *,
        video_backend: str = "auto",
    ) -> None:
        """Build an engine of loaded parts; `Engine.load` loads them."""
        self.model = model.eval()
        self.config = model.model
        self.tokenizer = tokenizer
        self.spec = spec
        self.path = path
        self.settings = settings
        self._world = World(model.groups)
        self.worker = Worker(model, tokenizer, spec, settings, self._world, video_backend=video_backend)
        capacity = self.worker.blocks.capacity
        guides = self.worker.runner.guides if self._world.samples else None
        self.open = Preparation(path, self.config, tokenizer, spec, settings, capacity, video_backend, guides)
        """Prepares a request for `enqueue`, in any thread of the leader."""
        self._new: list[New] = []
        self._aborted: list[str] = []
        self._between_steps = True

    @classmethod
    @together()
    def load(cls, path: str | Path, settings: EngineSettings | None = None, *, video_backend: str = "auto") -> Engine:
        """Open a checkpoint (a step's folder or the folder above) or a Hugging Face folder of any format we convert.

        Every rank of the layout calls it, and loads its own part.

        Args:
            path: which it is shows in its files.
            settings: layout over ranks, dtype, cache and scheduling.
            video_backend: what decodes videos; see `open_video`.

        Raises:
            ConfigError: no such folder, no tokenizer in it, or a layout that does not fit the model or the ranks.
            CheckpointError: nothing loadable in it, or tensors of another shape than its settings promise.
        """
        settings = settings or EngineSettings()
        path = Path(path)
        if not path.is_dir():
            raise ConfigError(f"{path}: no such folder. Give a checkpoint or a Hugging Face folder.")
        opened = open_for_inference(path, settings)
        tokenizer = VitaTokenizer.load(opened.tokenizer_dir)
        parallel = ParallelConfig(
            tensor_model_parallel_size=settings.tensor_model_parallel_size,
            context_parallel_size=settings.context_parallel_size,
            pipeline_model_parallel_size=settings.pipeline_model_parallel_size,
        )
        stage = StageConfig(model=opened.model, parallel=parallel)
        stage.check_tensor_parallel()
        model = build_model(stage, inference_groups(parallel), dtype=getattr(torch, settings.dtype), fresh=False)[0]
        checkpoint.load_tensors(opened.tensors, [model], str(path))
        vision = opened.model.vision
        spec = opened.preprocess or (PreprocessSpec.for_tower(vision) if vision else PreprocessSpec())
        return cls(model, tokenizer, spec, path, settings, video_backend=video_backend)

    def close(self) -> None:
        """Free the memory of weights and cache for the next model."""
        self.worker.close()
        del self.model, self.worker
        gc.collect()
        empty_cache()

    @property
    def leader(self) -> bool:
        """This rank takes requests and gives answers; the others follow it."""
        return self._world.leader

    @property
    def busy(self) -> bool:
        """Requests are waiting or being answered."""
        return bool(self._new or self._aborted) or self.worker.scheduler.busy

    def stats(self) -> EngineStats:
        """Queue and cache between two steps."""
        scheduler, blocks = self.worker.scheduler, self.worker.blocks
        used = 1 - blocks.free_blocks() / blocks.num_blocks
        return EngineStats(len(self._new) + len(scheduler.waiting), len(scheduler.running), used, scheduler.preemptions)

    def prepare(self, request: Request) -> tuple[Example, PromptMedia]:
        """Ids of a prompt and its media; see `open`."""
        prepared = self.open(request)
        return prepared.example, prepared.media

    def add(self, request: Request) -> None:
        """Take a request; `step` works on it. The leader calls it.

        Raises:
            ConfigError, DataError: as in `open` and `enqueue`.
        """
        self._check_new(request)
        self.enqueue(self.open(request))

    def enqueue(self, prepared: Prepared) -> None:
        """Take a request that `open` has prepared. The leader calls it.

        Raises:
            ConfigError: an id that is being worked on.
        """
        request = prepared.request
        self._check_new(request)
        self.worker.media[request.id] = prepared.media
        self._new.append(New(request, prepared.example, prepared.keys))

    def _check_new(self, request: Request) -> None:
        if request.id in self.worker.sequences or any(new.request.id == request.id for new in self._new):
            raise ConfigError(f"request {request.id!r} is being answered already. Give every request its own id.")

    def abort(self, request_id: str) -> None:
        """Give up a request; nothing more is heard of it. The leader calls it; unknown ids are ignored."""
        waiting = [new for new in self._new if new.request.id != request_id]
        if len(waiting) == len(self._new):
            self._aborted.append(request_id)
        else:  # no rank has heard of it yet
            self._new = waiting
            self.worker.media.pop(request_id).close()

    def step(self, *, stream: bool = True) -> list[Output]:
        """One forward pass over all requests that have work. The leader calls it, while the others `follow`.

        Args:
            stream: outputs carry text as it comes; else with the whole answer only, which costs less.

        Raises:
            VitaError: another rank has ended.
        """
        news = News(tuple(self._new), tuple(self._aborted)) if self._new or self._aborted else None
        self._new, self._aborted = [], []
        self._between_steps = False
        with together():
            self._world.tell(news)
            outputs = self.worker.step(news, stream=stream)
        self._between_steps = True
        return outputs

    def follow(self) -> None:
        """Take part in the leader's steps until it pauses. Every rank but the leader calls it.

        Raises:
            VitaError: another rank has ended.
        """
        with together():
            while True:
                news = self._world.tell(None)
                if news is not None and news.pause:
                    return
                self.worker.step(news)

    def pause(self) -> None:
        """Let the other ranks return from `follow`. The leader calls it between steps."""
        with together():
            self._world.tell(News(pause=True))

    def run(self, requests: Iterable[Request]) -> Generator[tuple[Request, Generation | VitaError], None, None]:
        """Answer requests. Every rank calls it; the leader with the requests, which it takes one by one when it has
        room, the others with nothing.

        Yields:
            on the leader, a request and its answer, or why there is none, as soon as it is known.

        Raises:
            ConfigError: the engine is busy with requests of `add`, whose answers nobody would hear.
            VitaError: another rank has ended.
        """
        if not self.leader:
            self.follow()
            return
        if self.busy:
            raise ConfigError("the engine works on other requests. Call step() until it is not busy, or abort them.")
        source = iter(requests)
        asked: dict[str, Request] = {}
        more = True
        try:
            while more or self.busy:
                while more and self._wants_more():
                    request = next(source, None)
                    if request is None:
                        more = False
                        break
                    try:
                        self.add(request)
                    except VitaError as error:
                        yield request, error
                        continue
                    asked[request.id] = request
                if self.busy:
                    for output in self.step(stream=False):
                        if output.outcome is not None:
                            yield asked.pop(output.request_id), output.outcome
        except BaseException:  # of the caller, of its requests, or of a step: then nobody knows where other ranks are
            if self._between_steps:
                for request_id in asked:
                    self.abort(request_id)
                if self._aborted:
                    self.step(stream=False)
                self.pause()
            raise
        self.pause()

    def generate(
        self,
        samples: Sequence[Sample],
        *,
        max_new_tokens: int | None = 64,
        sampling: SamplingConfig = GREEDY,
        zero_tiles: bool = False,
    ) -> list[Generation]:
        """Answer samples, in order; [] on a rank that is not the leader.

        Raises:
            VitaError: the first sample that cannot be answered.
        """
        requests = [
            Request(str(number), sample, sampling, max_new_tokens, zero_tiles) for number, sample in enumerate(samples)
        ]
        answers: dict[str, Generation] = {}
        with closing(self.run(requests)) as outcomes:  # an error gives up the other samples
            for request, outcome in outcomes:
                if isinstance(outcome, VitaError):
                    raise outcome
                answers[request.id] = outcome
        return [answers[request.id] for request in requests] if self.leader else []

    def _wants_more(self) -> bool:
        """A request taken now could soon be computed: prepared prompts hold memory and open files."""
        free = self.settings.max_num_seqs - len(self.worker.scheduler.running)
        return len(self._new) + len(self.worker.scheduler.waiting) < min(16, max(1, free))
