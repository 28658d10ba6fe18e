"""Prefill and decoding of the inference engine on one rank, dry."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from megatron_vita.config import ParallelConfig
from megatron_vita.data.example import IGNORE_INDEX, Example, TileSlot
from megatron_vita.data.sample import Sample
from megatron_vita.data.spec import PreprocessSpec
from megatron_vita.dryrun.collectives import Collectives
from megatron_vita.dryrun.jobs import DryRunJob
from megatron_vita.dryrun.report import Report
from megatron_vita.dryrun.rows import made_rows
from megatron_vita.dryrun.session import Watch
from megatron_vita.inference.prompt import Request
from megatron_vita.inference.sampling_config import SamplingConfig
from megatron_vita.inference.settings import EngineSettings
from megatron_vita.inference.worker import New, News, Worker
from megatron_vita.inference.world import World
from megatron_vita.models.build import build_model
from megatron_vita.parallel.groups import build_groups

_ANSWER = 3
"""Tokens that are generated."""


class _World(World):
    """Ranks that need not agree on values: tokens are not chosen, since fake logits have none."""

    @property
    def samples(self) -> bool:
        """No rank does."""
        return False

    def tokens(self, chosen: Any, count: int) -> list[int]:
        """Zeros."""
        return [0] * count

    def failures(self, own: dict[int, Any]) -> dict[int, Any]:
        """This rank's."""
        return own

    def smallest(self, value: int) -> int:
        """This rank's: all ranks are alike."""
        return value


class _Tokens:
    """Stands for the tokenizer: no text is made."""

    def token_id(self, _: str) -> int:
        """An id that nothing generates."""
        return -1

    def decode(self, ids: Any) -> str:
        """No text."""
        return ""


def generate(job: DryRunJob, counted: Collectives, *, fake: bool) -> Report:
    """Prefill a prompt of `job.prompt_tokens` tokens in chunks and decode a few, as inference/worker.py does.

    The prompt is that of the stage's rows: frames of a video and a question, or text. Sampling is left out.

    Args:
        job: its stage gives model and layout; one replica without data parallelism.
        counted: the installed collectives.
        fake: on fake CUDA tensors; else on the tensors of this process's device.

    Raises:
        FakeOperationError: an operation that a GPU would refuse.
    """
    trained = job.stage.parallel
    parallel = ParallelConfig(  # as inference/engine.py lays a model out: no sequence parallelism, no recomputation
        tensor_model_parallel_size=trained.tensor_model_parallel_size,
        context_parallel_size=trained.context_parallel_size,
        pipeline_model_parallel_size=trained.pipeline_model_parallel_size,
        cp_comm_type="p2p",
    )
    stage = dataclasses.replace(job.stage, parallel=parallel)
    settings = EngineSettings(
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        context_parallel_size=parallel.context_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        dtype="bfloat16" if stage.train.bf16 else "float32",
        max_num_seqs=1,
    )
    request = Request("dry run", Sample(messages=()), SamplingConfig(ignore_eos=True), _ANSWER, zero_tiles=True)
    example = _prompt(job)
    with Watch(job, counted, fake=fake) as watch:
        groups = build_groups(parallel)
        models = build_model(stage, groups, fresh=False)
        watch.built(models)
        models[0].eval()
        spec = PreprocessSpec.for_tower(stage.model.vision) if stage.model.vision else PreprocessSpec()
        worker = Worker(models[0], _Tokens(), spec, settings, _World(groups))  # type: ignore[arg-type]
        layers = [layer.layer_number for layer in models[0].language_model.decoder.layers]
        watch.memory.part((one for layer in layers for one in worker.cache[layer]), "cache")
        watch.restart()
        news: News | None = News(new=(New(request, example, ()),))
        while news is not None or worker.sequences:
            sequence = next(iter(worker.sequences.values()), None)
            watch.phase("decode" if sequence is not None and sequence.decoding else "prefill")
            worker.step(news)
            news = None
        return watch.report(
            groups, models, documents=1, tiles=worker.visual.encoded if worker.visual else 0, labelled=0
        )


def _prompt(job: DryRunJob) -> Example:
    """A prompt with the frames that a row of the stage would have."""
    data = dataclasses.replace(job.stage.data, seq_length=job.prompt_tokens, reset_per_document=False)
    train = dataclasses.replace(job.stage.train, micro_batch_size=1)
    (row,) = made_rows(dataclasses.replace(job.stage, data=data, train=train), 1)
    slots = tuple(TileSlot(int(first), media, 0, 0, 1, 1) for media, first in enumerate(row.first_token))
    return Example(
        tokens=np.zeros(job.prompt_tokens, dtype=np.int32),
        labels=np.full(job.prompt_tokens, IGNORE_INDEX, dtype=np.int32),
        tiles=slots,
    )
