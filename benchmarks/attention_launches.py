"""Kernel launches of one layer's attention over packed rows: the most of any rank, counted without a GPU.

python -m benchmarks.attention_launches        the table of docs/gpu.md
"""

from __future__ import annotations

from megatron_vita.layout import SequenceLayout
from megatron_vita.parallel.schedule import build_schedule
from tests.packed_lengths import packed_documents
from tests.parallel.launches import GPU, calls, launches, sixty_documents


def rows() -> dict[str, list[tuple[int, ...]]]:
    """Packed rows by name."""
    return {
        "16K, 60 documents": [sixty_documents(seed=seed) for seed in range(8)],
        "32K, pictures (stage 1)": packed_documents("pictures", 32768, count=8),
        "128K, videos (stage 3, reset)": packed_documents("videos", 131072, count=8),
        "1,024K, one document (stage 4)": [(1 << 20,)],
    }


def main() -> None:
    """Print the most over rows and ranks."""
    print(f"{'row':32} {'cp':>3} {'kind':10} {'calls':>6} {'of a step':>9} {'forward':>8} {'backward':>8}")
    for name, some in rows().items():
        for cp in (1, 2, 8):
            for kind in ("p2p", "all_gather", "a2a") if cp > 1 else ("p2p",):
                most = [0] * 4
                for documents in some:
                    for rank in range(cp):
                        schedule = build_schedule(SequenceLayout(documents, cp=cp), rank, GPU, kind)
                        forward, backward = launches(schedule, cp, heads=(40, 8) if kind == "a2a" else (5, 1))
                        each = calls(schedule)
                        found = sum(each), max(each), sum(forward.values()), sum(backward.values())
                        most = [max(pair) for pair in zip(most, found, strict=True)]
                print(f"{name:32} {cp:3} {kind:10} {most[0]:6} {most[1]:9} {most[2]:8} {most[3]:8}", flush=True)


if __name__ == "__main__":
    main()
