"""Output layer and loss: chunked over labelled tokens (parallel/loss.py) against all logits at once.

    OMP_NUM_THREADS=1 python benchmarks/loss.py [--tokens 8192] [--width 256] [--vocab 32768] [--repeats 3]

Forward and backward of output layer and cross entropy, float32, one thread, for one packed sequence of which a fraction
of the tokens is labelled. *Unfused*: logits of all tokens, torch's cross_entropy with ignore_index, autograd. *Ours*:
parallel/loss.py. Memory is the peak of a forked process per side, minus its start value and the two returned gradients.
Time is CPU seconds, sides interleaved, minimum of the repeats.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from megatron_vita.parallel.groups import init_distributed
from megatron_vita.parallel.loss import vocab_parallel_loss

FRACTIONS = (1.0, 0.5, 0.25, 0.125)
MEMORY_BAR, TIME_BAR = 1 / 16, 1.05


def make_sides(tokens: int, width: int, vocab: int, fraction: float) -> dict[str, Callable[[], Any]]:
    """Functions that run forward and backward and return the gradients of hidden states and output layer weight."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, width, generator=generator, requires_grad=True)
    weight = (torch.randn(vocab, width, generator=generator) / width**0.5).requires_grad_()
    labels = torch.randint(0, vocab, (tokens,), generator=generator)
    labels[torch.randperm(tokens, generator=generator)[round(tokens * fraction) :]] = -100
    group = dist.group.WORLD  # this process alone
    assert group is not None

    def unfused() -> Any:
        loss = F.cross_entropy(hidden @ weight.t(), labels, ignore_index=-100, reduction="sum")
        return torch.autograd.grad(loss, (hidden, weight))

    def ours() -> Any:
        labelled = (labels >= 0).nonzero().squeeze(1)
        losses = vocab_parallel_loss(
            hidden.index_select(0, labelled),
            weight,
            labels.index_select(0, labelled),
            vocab_size=vocab,
            group=group,
        )
        return torch.autograd.grad(losses.sum(), (hidden, weight))

    return {"unfused": unfused, "ours": ours}


def resident(field: str) -> int:
    """Bytes that this process holds (`VmRSS`) or held at most (`VmHWM`)."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    except OSError:
        raise SystemExit("memory is read from /proc/self/status, which Linux alone has") from None
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def peak_main(settings: tuple[int, int, int, float], side: str, out: Any) -> None:
    """Send the bytes that one run of `side` held at most, beyond the start and the gradients."""
    torch.set_num_threads(1)
    init_distributed()
    tokens, width, vocab, _ = settings
    run = make_sides(*settings)[side]
    make_sides(64, 32, 64, 1.0)[side]()  # libraries' own buffers
    before = resident("VmRSS")
    run()
    out.send(resident("VmHWM") - before - 4 * width * (tokens + vocab))


def peak(settings: tuple[int, int, int, float], side: str) -> int:
    """`peak_main` in a process of its own."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=peak_main, args=(settings, side, there))
    process.start()
    there.close()  # so that a child that dies ends the wait
    found: int = here.recv()
    process.join()
    return found


def best_seconds(sides: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Least CPU seconds of each side, interleaved, after one run that warms up."""
    best = dict.fromkeys(sides, float("inf"))
    for repeat in range(repeats + 1):
        for name, side in sides.items():
            began = time.process_time()
            side()
            if repeat:
                best[name] = min(best[name], time.process_time() - began)
    return best


def main() -> int:
    """Measure every fraction; 0 where the bars are kept."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--vocab", type=int, default=32768)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    init_distributed()
    size = arguments.tokens, arguments.width, arguments.vocab
    full = 4 * arguments.tokens * arguments.vocab
    print(f"{size[0]} tokens, width {size[1]}, vocabulary {size[2]}: all logits are {full / 2**20:.0f} MiB")
    kept = True
    for fraction in FRACTIONS:
        held = {side: peak((*size, fraction), side) for side in ("unfused", "ours")}
        seconds = best_seconds(make_sides(*size, fraction), arguments.repeats)
        line = f"{fraction:6.1%} labelled: "
        line += ", ".join(f"{side} {held[side] / 2**20:.0f} MiB {seconds[side]:.2f} CPU s" for side in held)
        share, ratio = held["ours"] / full, seconds["ours"] / seconds["unfused"]
        print(f"{line}; memory 1/{1 / share:.0f} of all logits (bar 1/16), time ratio {ratio:.2f} (bar {TIME_BAR})")
        kept &= share <= MEMORY_BAR and ratio <= TIME_BAR
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main())
