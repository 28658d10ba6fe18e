"""Section about inference: a long prompt through the engine."""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from harness import Figure
from sizes import Size
from training import fill, world

from megatron_vita import device
from megatron_vita.config import ParallelConfig, StageConfig, TrainConfig
from megatron_vita.data.spec import PreprocessSpec
from megatron_vita.data.text.tokenizer import VitaTokenizer
from megatron_vita.inference.engine import Engine
from megatron_vita.inference.settings import EngineSettings
from megatron_vita.inference.world import inference_groups
from megatron_vita.models.build import build_model

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from inference_kit import drive, prompt

from tests.data.kit import tokenizer_folder


def prefill(size: Size, within_s: float) -> Iterator[Figure]:
    """A prompt of 128K tokens of text through the engine, and tokens decoded behind it."""
    gpu = device.num_accelerators() > 0
    dtype = torch.bfloat16 if gpu else torch.float32
    settings = EngineSettings(
        kv_cache_memory=size.cache, block_size=size.block_size, dtype=str(dtype).removeprefix("torch.")
    )
    with world(), tempfile.TemporaryDirectory() as folder:
        parallel = ParallelConfig()
        stage = StageConfig(model=size.decoder, parallel=parallel, train=TrainConfig(seed=1))
        model = build_model(stage, inference_groups(parallel), dtype=dtype, fresh=False)[0]
        fill(model.named_parameters())
        tokenizer = VitaTokenizer.load(tokenizer_folder(Path(folder)))
        worker = Engine(model, tokenizer, PreprocessSpec(), Path("random weights"), settings).worker
        drive(worker, prompt("warm", min(1024, size.prompt), 2))
        if gpu:
            torch.cuda.reset_peak_memory_stats()
        seconds = []
        for answer in (1, size.answer):
            device.synchronize()
            began = time.perf_counter()
            drive(worker, prompt(f"answer {answer}", size.prompt, answer))
            device.synchronize()
            seconds.append(time.perf_counter() - began)
            if answer == 1:
                yield Figure("prefill", seconds[0], "s", note=f"{size.prompt} tokens, {size.decoder.num_layers} layers")
                yield Figure("prefill speed", size.prompt / seconds[0], "tokens/s")
        yield Figure("decoded token", 1e3 * (seconds[1] - seconds[0]) / (size.answer - 1), "ms", note="a batch of one")
        if gpu:
            yield Figure("peak memory, allocated", torch.cuda.max_memory_allocated() / 2**30, "GiB")
