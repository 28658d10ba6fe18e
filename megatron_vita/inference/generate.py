"""Answers a batch file with a model, on any layout of ranks."""

from __future__ import annotations

import logging
from contextlib import ExitStack
from pathlib import Path

from megatron_vita.data.media.video.open import decoder_name
from megatron_vita.inference.answer_key import model_key, run_key
from megatron_vita.inference.batch_file import BatchRun, BatchSummary
from megatron_vita.inference.engine import Engine, model_name
from megatron_vita.inference.leader import from_leader, leads
from megatron_vita.inference.opening import open_for_inference
from megatron_vita.inference.settings import EngineSettings

log = logging.getLogger(__name__)


def generate(
    model: str,
    source: Path,
    output: Path,
    settings: EngineSettings,
    *,
    media_root: Path | None = None,
    video_backend: str = "auto",
) -> BatchSummary | None:
    """Answer the requests of a file that have no answer yet; see `BatchRun`. Every rank calls it.

    Args:
        model: checkpoint or Hugging Face folder.
        source: requests, in the format of OpenAI's batch files.
        output: answers, appended as they come.
        settings: of the engine. The dtype and the overrides decide answers.
        media_root: folder of the media; by default that of the requests.
        video_backend: what decodes videos; see `open_video`.

    Returns:
        What was done; None on a rank that is not the first.

    Raises:
        ConfigError, CheckpointError, DataError: a missing path, a model that cannot be opened, an output that another
            run writes or that holds something else. What is wrong with a request is written, not raised.
    """
    with ExitStack() as held:
        runs: list[BatchRun] = []

        def prepare() -> int:
            opened = open_for_inference(model, settings)
            run = BatchRun(
                source,
                output,
                model=model_name(model),
                identity=lambda: run_key(
                    model_key(opened, settings.dtype), {"video_backend": decoder_name(video_backend)}, ""
                ),
                media_root=media_root,
                vocab_size=opened.model.vocab_size,
            )
            runs.append(held.enter_context(run))
            if run.kept:
                log.info("%s: %d of %d answers are there already", output, run.kept, run.total)
            return run.left

        left = from_leader(prepare)
        if not left:
            return BatchSummary(runs[0].kept, 0, 0) if leads() else None
        engine = Engine.load(model, settings, video_backend=video_backend)
        if leads():
            return runs[0].answer(engine, engine.tokenizer.token_bytes)
        for _ in engine.run(()):
            pass
        return None
