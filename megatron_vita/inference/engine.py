"""Answers from a model on one rank: prompts joined as documents of one packed sequence, then decoded together.

The prompt of a question is an Example made by the functions that training used, so ids and pixels are the same. Many
prompts make one packed sequence; attention and positions restart at each, so none sees its neighbours. The first pass
fills a key/value cache and gives the last token's logits only; every later pass carries one token for each
prompt that is not finished.
"""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from pathlib import Path

import numpy as np
import torch

from megatron_vita import checkpoint
from megatron_vita.config import ModelConfig, StageConfig
from megatron_vita.convert import open_model
from megatron_vita.data.media.open import read_items
from megatron_vita.data.media.tiling import render_tiles
from megatron_vita.data.rejects import reject
from megatron_vita.data.sample import Sample
from megatron_vita.data.spec import PreprocessSpec
from megatron_vita.data.text.chat import build_example
from megatron_vita.data.text.tokenizer import END_OF_TEXT, IM_END, VitaTokenizer
from megatron_vita.device import empty_cache, torch_device
from megatron_vita.errors import ConfigError, DataError
from megatron_vita.inference.groups import one_rank_groups
from megatron_vita.inference.prompt import Generation, Prompt
from megatron_vita.inference.sampling import GREEDY, SamplingConfig, choose, generators_for
from megatron_vita.layout import SequenceLayout, TileRoutes
from megatron_vita.models.build import build_model
from megatron_vita.models.vita import VitaModel
from megatron_vita.parallel.context import KVCache


class Engine:
    """A model with its tokenizer and preprocessing, on one rank."""

    def __init__(
        self,
        model: VitaModel,
        config: ModelConfig,
        tokenizer: VitaTokenizer,
        spec: PreprocessSpec,
        path: Path,
        *,
        video_backend: str = "auto",
    ) -> None:
        """Build an engine of loaded parts; `Engine.load` loads them."""
        self.model = model.eval()
        self.config = config
        self.tokenizer = tokenizer
        self.spec = spec
        self.path = path
        self._video_backend = video_backend
        self._ends = frozenset(tokenizer.token_id(name) for name in (IM_END, END_OF_TEXT))

    @classmethod
    def load(cls, path: str | Path, *, dtype: torch.dtype = torch.float32, video_backend: str = "auto") -> Engine:
        """Open a checkpoint (a step's folder or the folder above) or a Hugging Face folder of any format we convert.

        Args:
            path: which it is shows in its files.
            dtype: of weights and activations.
            video_backend: what decodes videos; see `open_video`.

        Raises:
            ConfigError: no such folder, or no tokenizer in it.
            CheckpointError: nothing loadable in it, or tensors of another shape than its settings promise.
        """
        path = Path(path)
        if not path.is_dir():
            raise ConfigError(f"{path}: no such folder. Give a checkpoint or a Hugging Face folder.")
        opened = open_model(path)
        tokenizer = VitaTokenizer.load(opened.tokenizer_dir)
        model = build_model(StageConfig(model=opened.model), one_rank_groups(), dtype=dtype, fresh=False)[0]
        checkpoint.load_tensors(opened.tensors, [model], str(path))
        vision = opened.model.vision
        spec = opened.preprocess or (PreprocessSpec.for_tower(vision) if vision else PreprocessSpec())
        return cls(model, opened.model, tokenizer, spec, path, video_backend=video_backend)

    def close(self) -> None:
        """Free the memory of the weights for the next model."""
        del self.model
        gc.collect()
        empty_cache()

    def prepare(self, sample: Sample, *, zero_tiles: bool = False) -> Prompt:
        """Ids and pixels of a question, by the functions that made the training shards.

        Args:
            sample: its last turn is the user's.
            zero_tiles: black tiles instead of the pictures'; lengths and ids stay.

        Raises:
            ConfigError: pictures for a model without a tower.
            DataError: a damaged medium, or a conversation that does not end with a question.
        """
        sample.check()
        if sample.messages[-1].role != "user":
            raise reject("bad_order", f"{sample.id}: the last turn is an answer already; end with a question.")
        if (sample.images or sample.videos) and self.config.vision is None:
            raise ConfigError(
                f"{self.path}: a text-only model; it cannot look at pictures. Use one with a vision tower."
            )
        images, videos = read_items(sample, self.spec, video_backend=self._video_backend)
        example = build_example(
            sample, images, videos, tokenizer=self.tokenizer, spec=self.spec, generation_prompt=True
        )
        if len(example.tokens) >= self.config.max_position_embeddings:
            raise reject(
                "overlong",
                f"{sample.id}: a prompt of {len(example.tokens)} tokens, but the model handles "
                f"{self.config.max_position_embeddings} with the answer. Shorten it, or show fewer pictures.",
            )
        side = self.spec.image_size
        tiles = np.zeros((len(example.tiles), 3, side, side), dtype=np.uint8)
        if not zero_tiles:
            for media, run in groupby(range(len(tiles)), key=lambda tile: example.tiles[tile].media):
                members = list(run)
                slots = [example.tiles[tile] for tile in members]
                tiles[members[0] : members[-1] + 1] = render_tiles(example.media[media], slots, self.spec)
        return Prompt(example, torch.from_numpy(tiles))

    def generate(
        self,
        samples: Sequence[Sample],
        *,
        max_new_tokens: int = 64,
        sampling: SamplingConfig = GREEDY,
        zero_tiles: bool = False,
        batch_tokens: int = 4096,
    ) -> list[Generation]:
        """Answer every sample; see `stream`.

        Raises:
            DataError: the first sample that cannot be read.
        """
        answers: list[Generation] = []
        for _, outcome in self.stream(
            samples, max_new_tokens=max_new_tokens, sampling=sampling, zero_tiles=zero_tiles, batch_tokens=batch_tokens
        ):
            if isinstance(outcome, DataError):
                raise outcome
            answers.append(outcome)
        return answers

    def stream(
        self,
        samples: Iterable[Sample],
        *,
        max_new_tokens: int = 64,
        sampling: SamplingConfig = GREEDY,
        zero_tiles: bool = False,
        batch_tokens: int = 4096,
    ) -> Iterator[tuple[int, Generation | DataError]]:
        """Answer samples batch by batch, in order, reading each sample only when its batch is filled.

        Args:
            samples: questions.
            max_new_tokens: longest answer.
            sampling: how tokens are chosen.
            zero_tiles: show the model black tiles.
            batch_tokens: prompt tokens of one batch; a longer prompt gets a batch of its own.

        Yields:
            (number of the sample, its answer or why it cannot be read).
        """
        batch: list[tuple[int, Prompt | DataError]] = []
        tokens = 0
        for number, sample in enumerate(samples):
            prompt: Prompt | DataError
            try:
                prompt = self.prepare(sample, zero_tiles=zero_tiles)
            except DataError as error:
                batch.append((number, error))
                continue
            length = len(prompt.example.tokens)
            if tokens and tokens + length > batch_tokens:
                yield from self._answer_batch(batch, max_new_tokens, sampling)
                batch, tokens = [], 0
            batch.append((number, prompt))
            tokens += length
        yield from self._answer_batch(batch, max_new_tokens, sampling)

    def _answer_batch(
        self, batch: Sequence[tuple[int, Prompt | DataError]], max_new_tokens: int, sampling: SamplingConfig
    ) -> Iterator[tuple[int, Generation | DataError]]:
        readable = [prompt for _, prompt in batch if isinstance(prompt, Prompt)]
        answers = iter(self.answer(readable, max_new_tokens=max_new_tokens, sampling=sampling) if readable else ())
        for number, prompt in batch:
            yield number, (prompt if isinstance(prompt, DataError) else next(answers))

    @torch.inference_mode()
    def answer(
        self, prompts: Sequence[Prompt], *, max_new_tokens: int, sampling: SamplingConfig = GREEDY
    ) -> list[Generation]:
        """Answer prompts as one packed sequence.

        Args:
            prompts: at least one.
            max_new_tokens: longest answer; shorter where a prompt leaves fewer positions.
            sampling: how tokens are chosen.
        """
        device = torch_device()
        lengths = [len(prompt.example.tokens) for prompt in prompts]
        limits = [min(max_new_tokens, self.config.max_position_embeddings - length) for length in lengths]
        generated: list[list[int]] = [[] for _ in prompts]
        ended = [False] * len(prompts)
        generators = generators_for(len(prompts), sampling)
        active = list(range(len(prompts)))
        cache = KVCache(len(prompts))
        logits = self.prefill(prompts, cache)
        while True:
            chosen = choose(logits, sampling, [generators[i] for i in active]).tolist()
            going = []
            for place, (i, token) in enumerate(zip(active, chosen, strict=True)):
                ended[i] = token in self._ends
                if not ended[i]:
                    generated[i].append(token)
                    if len(generated[i]) < limits[i]:
                        going.append(place)
            if not going:
                break
            if len(going) < len(active):
                cache.keep(going)
            active = [active[place] for place in going]
            tokens = torch.tensor([[generated[i][-1] for i in active]], device=device)
            positions = torch.tensor([[lengths[i] + len(generated[i]) - 1 for i in active]], device=device)
            logits = self._decode(tokens, positions, cache)
        return [
            Generation(self.tokenizer.decode(ids), tuple(ids), "stop" if done else "length", prompt_tokens=length)
            for ids, done, length in zip(generated, ended, lengths, strict=True)
        ]

    def prefill(self, prompts: Sequence[Prompt], cache: KVCache | None) -> torch.Tensor:
        """Logits after the last token of each prompt, float [n, v]; fills the cache."""
        device = torch_device()
        examples = [prompt.example for prompt in prompts]
        layout = SequenceLayout(tuple(len(example.tokens) for example in examples))
        first = [
            slot.first_token + start
            for example, start in zip(examples, layout.starts.tolist(), strict=True)
            for slot in example.tiles
        ]
        tokens = np.concatenate([example.tokens for example in examples]).astype(np.int64)
        last = layout.starts + np.asarray(layout.documents) - 1
        return self.model(
            tokens=torch.from_numpy(tokens)[None].to(device),
            positions=torch.from_numpy(layout.positions_in_document)[None].to(device),
            layout=layout,
            routes=TileRoutes(layout, np.asarray(first, dtype=np.int64), self.spec.tokens_per_tile),
            tiles=torch.cat([prompt.tiles for prompt in prompts]).to(device),
            logits_indices=torch.from_numpy(last).to(device),
            cache=cache,
        )

    def _decode(self, tokens: torch.Tensor, positions: torch.Tensor, cache: KVCache) -> torch.Tensor:
        """Logits after one more token of each sequence in the cache; tokens and positions [1, n] -> [n, v]."""
        count = tokens.shape[1]
        layout = SequenceLayout((1,) * count)
        side = self.spec.image_size
        return self.model(
            tokens=tokens,
            positions=positions,
            layout=layout,
            routes=TileRoutes(layout, np.empty(0, dtype=np.int64), self.spec.tokens_per_tile),
            tiles=torch.empty((0, 3, side, side), dtype=torch.uint8, device=tokens.device),
            logits_indices=torch.arange(count, device=tokens.device),
            cache=cache,
        )


def model_name(path: str | Path) -> str:
    """Name of a model in tables: the stage that trained it, or the name of its folder.

    Raises:
        ConfigError: no such folder.
    """
    path = Path(path)
    if not path.is_dir():
        raise ConfigError(f"{path}: no such folder. Give a checkpoint or a Hugging Face folder.")
    opened = open_model(path)
    return opened.state.stage.name if opened.state else opened.path.resolve().name
