"""Sections of inference.py about scheduling: continuous batching, prefix caching, and transformers' generate."""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from figure import Figure
from inference_kit import FULL_LENGTH, drive, make_engine, make_worker, on_ranks, prompt, settings

from megatron_vita import checkpoint
from megatron_vita.config import ModelConfig, VisionConfig
from megatron_vita.convert.exporter import export
from megatron_vita.data.spec import PreprocessSpec
from megatron_vita.inference.engine import Engine
from megatron_vita.inference.prompt import Request
from megatron_vita.inference.worker import New
from tests.inference import tiny

BATCHING_BAR = 1.5
GENERATE_BARS = {1: 1.0, 16: 2.0}
GROUP = 16
"""Requests of a static batch, and most that the engine runs at once."""


def model(**changed: Any) -> ModelConfig:
    """A decoder wide enough that matrix products are most of its time, with the test tokenizer's vocabulary."""
    sizes = {
        "num_layers": 4, "hidden_size": 256, "ffn_hidden_size": 688, "num_attention_heads": 8, "num_query_groups": 2,
        "vocab_size": 1024, "max_position_embeddings": 8192,
    }  # fmt: skip
    return ModelConfig(**{**sizes, **changed})


# -------------------------------------------------------------------------------------------------------- batching


def mixed_requests(count: int, mean: int) -> list[New]:
    """Prompts and answers of exponentially distributed lengths, as chats roughly have; prompts are longer by half."""
    random = np.random.default_rng(0)
    prompts = np.clip(random.exponential(1.5 * mean, count), 16, 8 * mean).astype(int)
    answers = np.clip(random.exponential(mean, count), 4, 8 * mean).astype(int)
    return [prompt(str(number), int(prompts[number]), int(answers[number])) for number in range(count)]


def batching_task(width: int, count: int, mean: int, repeats: int) -> list[tuple[float, int]]:
    """(CPU seconds, steps) of all requests, each at its best: static groups, continuous with as many at once, and with
    as many as the engine takes by default."""
    requests = mixed_requests(count, mean)
    groups = [requests[first : first + GROUP] for first in range(0, count, GROUP)]
    wide = model(hidden_size=width, ffn_hidden_size=width * 11 // 4)
    worker, unlimited = (make_worker(wide, settings(**limit)) for limit in ({"max_num_seqs": GROUP}, {}))
    sides = [(worker, groups), (worker, [requests]), (unlimited, [requests])]
    best = [(float("inf"), 0)] * len(sides)
    for _ in range(repeats):
        for number, (one, batches) in enumerate(sides):
            began = time.process_time()
            steps = sum(drive(one, *batch) for batch in batches)
            best[number] = min(best[number], (time.process_time() - began, steps))
    return best


def batching_figures(*, quick: bool) -> list[Figure]:
    """Requests that come and go against groups that wait for their longest."""
    width, count, mean = (64, 24, 8) if quick else (512, 64, 64)
    (((static, static_steps), *found),) = on_ranks(1, batching_task, width, count, mean, 1 if quick else 3)
    tokens = sum(new.request.max_new_tokens or 0 for new in mixed_requests(count, mean))
    figures = []
    for (continuous, steps), limit in zip(found, (f"{GROUP} at once", "no limit"), strict=True):
        figures.append(Figure(
            f"4 layers of {width}, {count} requests, {tokens} answer tokens: static {GROUP}, continuous {limit}",
            f"{static:.2f}, {continuous:.2f} s ({static_steps}, {steps} steps): {static / continuous:.2f} times as "
            "fast", f"{BATCHING_BAR}", None if quick else static / continuous >= BATCHING_BAR,
        ))  # fmt: skip
    return figures


# --------------------------------------------------------------------------------------------------- prefix caching


def write_video(path: Path, frames: int, side: int) -> Path:
    """A video of one frame a second, each of another colour."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=1)
        stream.width = stream.height = side
        stream.pix_fmt = "yuv420p"
        for number in range(frames):
            pixels = np.full((side, side, 3), (number * 37 % 256, number * 91 % 256, number * 13 % 256), dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return path


def prefix_task(reuse: bool, path: Path, frames: int, questions: int) -> tuple[float, int, int, int, list[Any]]:
    """Seconds, prompt tokens, cached ones, encoded tiles and answers of questions on one video, asked one by one."""
    tower = VisionConfig(
        num_layers=3, hidden_size=128, ffn_hidden_size=512, num_attention_heads=4, image_size=112, patch_size=14
    )
    spec = PreprocessSpec(image_size=112, patch_size=14, max_frames=frames)
    engine = make_engine(model(vision=tower), settings(enable_prefix_caching=reuse), spec)
    samples = [tiny.question(f"Which digit is this? {'the ' * number}", videos=[path]) for number in range(questions)]
    began = time.perf_counter()
    answers = [engine.generate([one], max_new_tokens=4, sampling=FULL_LENGTH)[0] for one in samples]
    seconds = time.perf_counter() - began
    assert engine.worker.visual is not None, "the model has a tower"
    tokens, cached = (sum(getattr(one, name) for one in answers) for name in ("prompt_tokens", "cached_tokens"))
    return seconds, tokens, cached, engine.worker.visual.encoded, [one.ids for one in answers]


def prefix_figures(*, quick: bool) -> list[Figure]:
    """Questions on one video with and without reuse of its keys and values."""
    frames, questions = (4, 2) if quick else (128, 8)
    with tempfile.TemporaryDirectory() as folder:
        path = write_video(Path(folder) / "video.mp4", frames, 112)
        (without,), (reused,) = (on_ranks(1, prefix_task, reuse, path, frames, questions) for reuse in (False, True))
    return [Figure(
        f"{questions} questions on one video of {frames} frames: recomputed, prefix reused",
        f"{without[0]:.2f}, {reused[0]:.2f} s: {without[0] / reused[0]:.2f} times as fast; {without[1] - without[2]}, "
        f"{reused[1] - reused[2]} tokens and {without[3]}, {reused[3]} tiles computed", "the same answers",
        without[4] == reused[4],
    )]  # fmt: skip


# ------------------------------------------------------------------------------------------- transformers' generate


@dataclass(frozen=True)
class Workload:
    """Requests of one batch."""

    name: str
    words: tuple[int, ...]
    """Words of each prompt."""
    limits: tuple[int, ...]
    """Tokens of each answer."""
    bar: float | None
    """Tokens a second to transformers', at least."""


def _workloads(new_tokens: int) -> list[Workload]:
    """One request; sixteen of nearly one length, the best case of padding; sixteen as they come."""
    order = [(7 * number) % 16 for number in range(16)]  # long prompts do not get the long answers
    mixed = tuple(round(4 * 100 ** (number / 15)) for number in range(16))
    answers = tuple(max(1, new_tokens * (place + 1) // 8) for place in order)
    return [
        Workload("batch 1", (0,), (new_tokens,), GENERATE_BARS[1]),
        Workload("batch 16, equal lengths", tuple(3 * number for number in range(16)), (new_tokens,) * 16, None),
        Workload("batch 16, prompts and answers of mixed length", mixed, answers, GENERATE_BARS[16]),
    ]


def generate_task(folder: Path, layers: int, width: int, new_tokens: int, repeats: int) -> list[tuple[Any, ...]]:
    """Per workload: CPU seconds of our engine and of transformers, and how many answers are equal."""
    from transformers import AutoModelForImageTextToText

    stage = tiny.stage

    def wider(*args: Any, **options: Any) -> Any:
        one = stage(*args, **options)
        sizes = {"num_layers": layers, "hidden_size": width, "ffn_hidden_size": 2 * width, "num_attention_heads": 8}
        return replace(one, model=replace(one.model, **sizes, max_position_embeddings=4096, init_method_std=0.05))

    tiny.stage = wider
    root = tiny.save_checkpoint(folder)
    export(checkpoint.resolve(root), folder / "exported", "internvl")
    stock = AutoModelForImageTextToText.from_pretrained(folder / "exported", dtype=torch.float32).eval()
    engine = Engine.load(root, settings())
    return [_compare(engine, stock, one, repeats) for one in _workloads(new_tokens)]


def _compare(engine: Engine, stock: Any, work: Workload, repeats: int) -> tuple[float, float, int]:
    """The batch of transformers is padded on the left, and runs until its longest answer is complete."""
    questions = [tiny.question("Which digit is this? " + "the " * words) for words in work.words]
    requests = [
        Request(str(number), question, FULL_LENGTH, limit)
        for number, (question, limit) in enumerate(zip(questions, work.limits, strict=True))
    ]
    ids = [engine.prepare(request)[0].tokens.tolist() for request in requests]
    longest, most = max(map(len, ids)), max(work.limits)
    inputs = {
        "input_ids": torch.tensor([[0] * (longest - len(one)) + one for one in ids]),
        "attention_mask": torch.tensor([[0] * (longest - len(one)) + [1] * len(one) for one in ids]),
    }
    best = [float("inf"), float("inf")]
    same = 0
    for repeat in range(repeats + 1):
        began = time.process_time()
        ours = {request.id: outcome for request, outcome in engine.run(requests)}
        middle = time.process_time()
        with torch.inference_mode():
            theirs = stock.generate(
                **inputs, max_new_tokens=most, min_new_tokens=most, do_sample=False, eos_token_id=None, pad_token_id=0
            )
        ended = time.process_time()
        if repeat:
            best = [min(best[0], middle - began), min(best[1], ended - middle)]
        said = [theirs[row, longest : longest + limit].tolist() for row, limit in enumerate(work.limits)]
        same = sum(one == list(ours[str(row)].ids) for row, one in enumerate(said))
    return best[0], best[1], same


def generate_figures(*, quick: bool) -> list[Figure]:
    """Our engine against transformers' generate on the same weights and prompts; tokens that were asked for count."""
    figures = []
    layers, width, new_tokens = (2, 64, 4) if quick else (4, 256, 64)
    with tempfile.TemporaryDirectory() as folder:
        (found,) = on_ranks(1, generate_task, Path(folder), layers, width, new_tokens, 1 if quick else 3)
    for work, (ours, theirs, same) in zip(_workloads(new_tokens), found, strict=True):
        tokens = sum(work.limits)
        bar = None if work.bar is None or quick else theirs / ours >= work.bar
        figures.append(Figure(
            f"tokens a CPU second, {layers} layers of {width}, {work.name}: ours, transformers",
            f"{tokens / ours:.0f}, {tokens / theirs:.0f}: {theirs / ours:.2f}; {same} of {len(work.words)} equal",
            f"{work.bar or 'none'}", bar,
        ))  # fmt: skip
    return figures
