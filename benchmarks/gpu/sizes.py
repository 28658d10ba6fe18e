"""What is measured: at real width on one GPU, or tiny, so that the script itself is tested on a CPU."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path

from megatron_vita.checks.tiny import tiny_model
from megatron_vita.config import ModelConfig, ParallelConfig, StageConfig, load_run

RECIPE = Path(__file__).resolve().parents[2] / "examples/long_vita_14b/run.yaml"
_LAYERS = 12
"""Of the slice of the 14B decoder: with the whole vocabulary 5.2 billion parameters, 93 GB of training state; without
recomputation a dry run has 133 GiB live at 16K, of the 139 GiB of an H200."""


@dataclass(frozen=True)
class Size:
    """Everything that differs between the real and the tiny measurement."""

    name: str
    short: StageConfig
    """Training at 16K: packed pictures, everything trained; half of the layers recomputed, for memory."""
    long: StageConfig
    """Training at 128K: one video, the tower frozen, every layer recomputed; a fifth of the vocabulary: with all of
    it a dry run has 136 GiB live."""
    steps: int
    """Of training, at most: a section stops when its time is used up."""
    resumed: StageConfig
    """For saving and resuming."""
    ranks_of_64: tuple[StageConfig, ...]
    """Shallow stages whose rank is tried alone, with the collectives of `world_size` ranks answered."""
    world_size: int
    heads: tuple[int, int]
    """Query and key/value heads of attention alone: those of a rank at TP 8."""
    head_dim: int
    short_row: tuple[int, ...]
    """Documents of a row that is compared with plain attention."""
    row: tuple[int, ...]
    """Documents of the emulated row that is timed."""
    ranks: int
    """Context-parallel ranks that are emulated."""
    grid: str
    """Cases of tools/check_parallel.py."""
    decoder: ModelConfig
    """For prefill and decode."""
    prompt: int
    """Tokens of the prompt."""
    answer: int
    """Tokens that are decoded behind it."""
    block_size: int
    """Tokens of a block of the cache."""
    cache: str
    """Memory of the cache."""
    shortest_s: float
    """Seconds below which no section is begun."""


def _alone(stage: StageConfig, model: ModelConfig, recomputed: int, length: int | None = None) -> StageConfig:
    """A stage for one rank and one row a step, with other sizes."""
    parallel = ParallelConfig()
    if recomputed:
        parallel = ParallelConfig(
            recompute_granularity="full", recompute_method="block", recompute_num_layers=recomputed
        )
    return dataclasses.replace(
        stage,
        model=model,
        parallel=parallel,
        data=dataclasses.replace(stage.data, data_path="", seq_length=length or stage.data.seq_length),
        # A rate at which fresh weights learn a row within a few steps, in bfloat16 too.
        optimizer=dataclasses.replace(stage.optimizer, lr=3e-4, min_lr=3e-5, lr_warmup_fraction=0.0),
        train=dataclasses.replace(stage.train, global_batch_size=1, train_iters=1000),
    )


def _shallow(stage: StageConfig, layers: int = 2) -> StageConfig:
    """A stage of the recipe in its own layout, with few layers, so that its dry run takes seconds."""
    parallel, vision = stage.parallel, stage.model.vision
    assert vision is not None
    if parallel.recompute_num_layers:
        parallel = dataclasses.replace(parallel, recompute_num_layers=layers)
    return dataclasses.replace(
        stage,
        model=dataclasses.replace(
            stage.model, num_layers=layers, vision=dataclasses.replace(vision, num_layers=2 * layers)
        ),
        parallel=parallel,
        data=dataclasses.replace(stage.data, data_path=""),
    )


def size_of(name: str) -> Size:
    """`real` or `tiny`."""
    for variable in ("START", "TOKENIZER", "SHARDS", "RUN"):
        os.environ.setdefault(variable, "not-used")
    _, two, three, four = load_run(RECIPE).stages
    if name == "real":
        decoder = dataclasses.replace(two.model, num_layers=_LAYERS)
        fewer = dataclasses.replace(three.model, num_layers=_LAYERS, vocab_size=32768)
        small = dataclasses.replace(two.model, num_layers=2, vocab_size=32768)
        return Size(
            name="real",
            short=_alone(two, decoder, _LAYERS // 2),
            long=_alone(three, fewer, _LAYERS),
            steps=20,
            resumed=_alone(two, small, 0, 4096),
            ranks_of_64=tuple(_shallow(one) for one in (two, four)),
            world_size=64,
            heads=(5, 1),
            head_dim=128,
            short_row=(900, 3, 128, 500, 1, 516),
            row=(21_000, 700, 90, 9_000, 1_500, 300, 12_000, 2_048, 40, 16_000, 2_858),
            ranks=8,
            grid="dtype=float64,float32,bf16 vit=intern_vit,siglip llm=qwen2,qwen3 recompute=none,full",
            decoder=dataclasses.replace(decoder, vision=None),
            prompt=131_072,
            answer=33,
            block_size=256,
            cache="8GiB",
            shortest_s=15.0,
        )
    tiny = dataclasses.replace(tiny_model(layers=2), vocab_size=512)
    return Size(
        name="tiny",
        short=_alone(two, tiny, 1, 1024),
        long=_alone(three, tiny, 2, 1024),
        steps=4,
        resumed=_alone(two, tiny, 0, 1024),
        ranks_of_64=(
            dataclasses.replace(
                _alone(two, tiny, 0, 256),
                parallel=ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True),
            ),
        ),
        world_size=2,
        heads=(4, 2),
        head_dim=16,
        short_row=(40, 3, 20, 1),
        row=(100, 7, 60, 9, 1, 70, 9),
        ranks=4,
        grid="dtype=float32",
        decoder=dataclasses.replace(tiny, vision=None),
        prompt=300,
        answer=3,
        block_size=16,
        cache="16MiB",
        shortest_s=1.0,
    )
