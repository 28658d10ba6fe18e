"""Vision CPU time of a rank: tiles spread over two ranks against every rank encoding all of them.

    OMP_NUM_THREADS=1 python benchmarks/vision_sharding.py [--tiles 24] [--repeats 5]

Two forked context-parallel ranks share the tiles of one packed sequence. Spread: each encodes half of the tiles,
forward and backward, and visual tokens are sent to the ranks that own them. Replicated: each encodes all tiles and
keeps the visual tokens it owns, as systems without an all-to-all do. Trained and frozen tower; the projector is
trained. Reported is the CPU time of the rank that takes longer, communication included; runs are interleaved, minimum
of the repeats. 24 tiles of 256 patches are one encoder micro-batch: with more tiles the replicated side would
recompute, the spread side not.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megatron_vita.config import ModelConfig, ParallelConfig, StageConfig, TrainConfig, VisionConfig
from megatron_vita.layout import SequenceLayout, TileRoutes
from megatron_vita.models.build import build_model
from megatron_vita.parallel.groups import build_groups, destroy_groups, init_distributed
from megatron_vita.parallel.tiles import build_exchange, exchange_features

RANKS, BAR = 2, 1.9
VISION = VisionConfig(
    num_layers=4, hidden_size=192, ffn_hidden_size=768, num_attention_heads=4, image_size=64, patch_size=4
)
MODEL = ModelConfig(
    num_layers=1,
    hidden_size=256,
    ffn_hidden_size=64,
    num_attention_heads=4,
    num_query_groups=4,
    vocab_size=64,
    vision=VISION,
)


def measure(tiles: int, frozen: bool, repeats: int) -> tuple[float, float]:
    """(spread, replicated): minimum CPU seconds of one forward and backward, on the slower rank."""
    stage = StageConfig(
        model=MODEL,
        parallel=ParallelConfig(context_parallel_size=RANKS),
        train=TrainConfig(freeze_vision_model=frozen),
    )
    groups = build_groups(stage.parallel)
    (model,) = build_model(stage, groups)
    per_tile = VISION.tokens_per_tile
    layout = SequenceLayout((tiles * per_tile,), cp=RANKS)
    routes = TileRoutes(layout, np.arange(tiles, dtype=np.int64) * per_tile, per_tile)
    size = VISION.image_size
    pixels = torch.randint(
        0, 256, (tiles, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    own = routes.tiles_of(groups.group_rank)
    needed = torch.from_numpy(layout.local_positions(groups.cp_rank))  # every token is a visual token

    def spread() -> None:
        exchange = build_exchange(routes, groups.group_rank, pixels.device)
        visual = exchange_features(model.encode(pixels[own.start : own.stop]), exchange, groups)
        visual.sum().backward()

    def replicated() -> None:
        model.encode(pixels).index_select(0, needed).sum().backward()

    best = [float("inf")] * 2
    for repeat in range(repeats + 1):
        for index, side in enumerate((spread, replicated)):
            seconds = torch.tensor(_cpu_seconds(side))
            dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
            if repeat:
                best[index] = min(best[index], float(seconds))
    destroy_groups()
    return best[0], best[1]


def _cpu_seconds(side: Callable[[], None]) -> float:
    dist.barrier()
    began = time.process_time()
    side()
    return time.process_time() - began


def _rank(rank: int, store: str, arguments: argparse.Namespace, results: Any) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(RANKS), LOCAL_RANK=str(rank))
    torch.set_num_threads(1)
    init_distributed(init_method=f"file://{store}")
    for frozen in (False, True):
        seconds = measure(arguments.tiles, frozen, arguments.repeats)
        if rank == 0:
            results.put((frozen, *seconds))
    os._exit(0)


def main() -> int:
    """Fork the ranks and print the ratios."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--tiles", type=int, default=24)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        ranks = [
            context.Process(target=_rank, args=(rank, f"{folder}/store", arguments, results)) for rank in range(RANKS)
        ]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join()
    if any(process.exitcode for process in ranks):
        return 1
    while not results.empty():
        frozen, spread, replicated = results.get()
        print(
            f"tower {'frozen' if frozen else 'trained'}, {arguments.tiles} tiles, {RANKS} ranks: {spread:.3f} s of CPU "
            f"on the busier rank, replicated {replicated:.3f} s: 1/{replicated / spread:.2f} (bar 1/{BAR})"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
