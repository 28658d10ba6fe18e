"""Context-parallel attention: CPU time against one process, bytes against the formula, blocks against the ideal.

    OMP_NUM_THREADS=1 python benchmarks/attention_cp.py [--tokens 8192] [--repeats 5] [--layouts]

Forward and backward of attention alone (8 query heads, 2 key/value heads of 64, float32, gloo) over one packed
sequence, as one document and as many, on two ranks of one thread each, for every cp_comm_type. Cost = CPU seconds of
both ranks together, communication threads included, divided by those of one process that computes the whole sequence.
The one-process side runs on both ranks at the same time, because the two cores may share execution units; its mean is
used. Sides are interleaved and the minimum of the repeats is reported. Bytes are those received per rank.

`--layouts` computes no attention but counts, for packed sequences of 131,072 tokens: query-key pairs that the kernels
compute / pairs of the causal mask, maximum / mean over the ranks, and padding tokens.
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

import torch
import torch.distributed as dist

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from megatron_vita.layout import SequenceLayout
from megatron_vita.parallel import exchange
from megatron_vita.parallel.attention import document_attention
from megatron_vita.parallel.groups import init_distributed
from megatron_vita.parallel.schedule import build_schedule
from tests.packed_lengths import MIXES, packed_documents

HEADS, GROUPS, SIZE, SCALE = 8, 2, 64, 0.125
KINDS = ("p2p", "all_gather", "a2a")
CPU = torch.device("cpu")
BAR = 1.10


def formula(kind: str, ranks: int, tokens: int, size: int = 4) -> int:
    """Bytes that a rank with `tokens` tokens receives, forward and backward (the table in parallel/exchange.py)."""
    if kind == "a2a":
        return 2 * (ranks - 1) * tokens // ranks * (2 * HEADS + 2 * GROUPS) * SIZE * size
    return (ranks - 1) * tokens * 2 * GROUPS * SIZE * (size + size + 4)


def count_bytes() -> dict[str, int]:
    """Count the bytes that the collectives of parallel/exchange.py receive from other ranks, in `bytes`."""
    counted = {"bytes": 0}

    def watch(name: str, share: Callable[[int, torch.Tensor], float]) -> None:
        original = getattr(exchange, name)

        def watched(tensor: torch.Tensor, *rest: Any, **options: Any) -> Any:
            counted["bytes"] += int(share(dist.get_world_size(), tensor) * tensor.numel() * tensor.element_size())
            return original(tensor, *rest, **options)

        setattr(exchange, name, watched)

    watch("gather_tokens", lambda ranks, _: ranks - 1)
    watch("reduce_scatter_tokens", lambda ranks, _: (ranks - 1) / ranks)
    watch("exchange_tokens", lambda ranks, _: (ranks - 1) / ranks)
    watch("ring_send_recv", lambda *_: 1)
    return counted


def rank_main(rank: int, store: str, sequences: dict[str, tuple[int, ...]], repeats: int, out: Any) -> None:
    """Measure every side on one of two ranks; put {sequence: {side: (CPU seconds, bytes)}} into `out`."""
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank))
    torch.set_num_threads(1)
    init_distributed(init_method=f"file://{store}")
    counted = count_bytes()
    found: dict[str, dict[str, tuple[float, int]]] = {}
    for name, documents in sequences.items():
        sides = {"one process": (SequenceLayout(documents), 0, "all_gather", None)}
        sides |= {kind: (SequenceLayout(documents, cp=2), rank, kind, dist.group.WORLD) for kind in KINDS}
        best = dict.fromkeys(sides, (float("inf"), 0))
        for repeat in range(repeats + 1):
            for side, (layout, cp_rank, kind, group) in sides.items():
                generator = torch.Generator().manual_seed(rank)
                shapes = ((HEADS, True), (GROUPS, True), (GROUPS, True), (HEADS, False))
                q, k, v, grad = (
                    torch.randn(layout.local_length, heads, SIZE, generator=generator, requires_grad=wants)
                    for heads, wants in shapes
                )
                schedule = build_schedule(layout, cp_rank, CPU, kind)  # once per packed sequence, not per layer
                dist.barrier()
                counted["bytes"] = 0
                began = time.process_time()
                document_attention(q, k, v, schedule, group, SCALE).backward(grad)
                seconds = time.process_time() - began
                if repeat:
                    best[side] = min(best[side], (seconds, counted["bytes"]))
        found[name] = best
    out.put((rank, found))
    dist.barrier()


def measure(tokens: int, repeats: int) -> bool:
    """Print CPU time and bytes of every cp_comm_type; True if all ratios are within BAR."""
    sequences = {"one document": (tokens,)}
    sequences |= {f"packed, {mix}": packed_documents(mix, tokens, count=1)[0] for mix in ("pictures", "text")}
    context = multiprocessing.get_context("fork")
    out = context.SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        ranks = [
            context.Process(target=rank_main, args=(r, f"{folder}/store", sequences, repeats, out)) for r in range(2)
        ]
        for process in ranks:
            process.start()
        found = dict(out.get() for _ in ranks)
        for process in ranks:
            process.join()
    kept = True
    for name, documents in sequences.items():
        one = sum(found[rank][name]["one process"][0] for rank in found) / 2
        print(f"{name} ({len(documents)} of {tokens} tokens together): one process {one:.3f} CPU s")
        for kind in KINDS:
            seconds = sum(found[rank][name][kind][0] for rank in found)
            got = {found[rank][name][kind][1] for rank in found}
            kept &= seconds <= BAR * one
            print(
                f"  cp 2, {kind:10} {seconds:7.3f} CPU s, ratio {seconds / one:.3f} (bar {BAR}); received a rank: "
                f"{' / '.join(str(one) for one in sorted(got))} bytes, formula {formula(kind, 2, tokens // 2)}"
            )
    return kept


def count_layouts(tokens: int = 131072) -> None:
    """Print computed / ideal pairs and maximum / mean over ranks for packed sequences."""
    print(f"packed sequences of {tokens} tokens; padding for cp x sp 8: maximum over mixes and cp")
    padding = 0.0
    for mix in MIXES:
        (documents,) = packed_documents(mix, tokens, count=1)
        ideal = sum(n * (n + 1) // 2 for n in documents)
        for cp in (2, 4, 8, 16, 32, 64):
            layout = SequenceLayout(documents, cp=cp, sp=8)
            padding = max(padding, layout.length / tokens - 1)
            line = f"{mix:16} {len(documents):4} documents, cp {cp:2}:"
            for kind in ("p2p", "all_gather"):
                pairs = [build_schedule(layout, rank, CPU, kind).pairs for rank in range(cp)]
                line += (
                    f"  {kind} computed/ideal {sum(pairs) / ideal:.4f}, busiest/mean {max(pairs) * cp / sum(pairs):.4f}"
                )
            print(line)
        pairs = build_schedule(SequenceLayout(documents, cp=2), 0, CPU, "a2a").pairs
        print(f"{mix:16} a2a, any cp: computed/ideal {pairs / ideal:.4f}, busiest/mean 1.0000")
    print(f"alignment adds {padding:.2%} tokens")


def main() -> int:
    """Measure, or count."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--layouts", action="store_true", help="count blocks instead of measuring time")
    arguments = parser.parse_args()
    if arguments.layouts:
        count_layouts()
        return 0
    return 0 if measure(arguments.tokens, arguments.repeats) else 1


if __name__ == "__main__":
    sys.exit(main())
