"""The three output heads: longest prompt before memory runs out, prefill time and peak memory; a table and a plot.

    OMP_NUM_THREADS=1 python benchmarks/lm_head.py [--memory 1GiB] [--heads masked chunked full] [--plot lm_head.png]

`masked`, the logits-masked head of Long-VITA, multiplies only the rows that are asked for by the vocabulary; `chunked`
multiplies all rows, 1,024 at a time; `full` all at once. Vocabulary 152,064. Each prompt is prefilled by the engine's
worker, and its first token sampled, in a process of its own that may allocate `--memory` for weights, cache,
activations and logits: RLIMIT_DATA, set to the writable memory of the process before the model is built, plus the
budget. A prompt is too long if an allocation fails there. The search ends with a prompt that fits and one at most 3 %
longer that does not. Times are CPU seconds: of a prompt of 90 % of the longest, and for all heads alike of one of 90 %
of the shortest of these. Peak is resident memory (VmHWM) without files, beyond that before the model is built.

The paper prefills a prompt at once, so its comparison is that with `--chunked-prefill-size` as long as the prompt. The
second one, with the default of 8,192 tokens, has no logits but those of one chunk at a time under any head. How much
longer a prompt may be depends on the model: logits take 4 bytes x vocabulary for a token, activations are proportional
to `--hidden-size`.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from inference_kit import VOCAB_SIZE, PeakMemory, drive, make_engine, prompt, settings

from megatron_vita.config import ModelConfig
from megatron_vita.inference.engine import Engine
from megatron_vita.inference.settings import LM_HEADS, EngineSettings
from megatron_vita.inference.worker import Worker
from megatron_vita.inference.world import World
from megatron_vita.parallel.kv_cache import KVCache

PRECISION = 1.03
ONCE, DEFAULT = "prompt at once", "chunks of 8,192"
COLOURS = {"masked": "tab:green", "chunked": "tab:orange", "full": "tab:red"}


@dataclass(frozen=True, slots=True)
class Trial:
    """One prompt that was prefilled."""

    tokens: int
    seconds: float
    peak: int
    """Bytes."""


class Bench:
    """Prefills prompts in processes with a memory budget."""

    def __init__(self, model: ModelConfig, budget: int) -> None:
        """Build the model; processes are forked from this one and share its weights."""
        self.budget = budget
        tiny = ModelConfig(num_layers=1, hidden_size=64, ffn_hidden_size=64, vocab_size=1024)
        drive(make_engine(tiny, settings(kv_cache_memory="1MiB")).worker, prompt("warm", 4, 2))  # libraries' own memory
        PeakMemory()  # sets glibc up, so that freed memory is given back
        self._data, self._resident = PeakMemory.resident("VmData"), PeakMemory.resident("RssAnon")
        self._engine: Engine = make_engine(model, settings(kv_cache_memory="1MiB"))
        self.trials: dict[tuple[str, str], dict[int, Trial]] = {}

    def trial(self, chunks: str, head: str, tokens: int) -> Trial | None:
        """Prefill a prompt; None if memory runs out."""
        known = self.trials.setdefault((chunks, head), {})
        if tokens not in known:
            context = multiprocessing.get_context("fork")
            here, there = context.Pipe(duplex=False)
            process = context.Process(target=self._main, args=(chunks, head, tokens, there))
            process.start()
            there.close()
            try:
                found = here.recv()
            except EOFError as error:
                process.join()
                raise RuntimeError(f"{head}, {tokens} tokens: the process ended with {process.exitcode}") from error
            process.join()
            if isinstance(found, str):
                raise RuntimeError(found)
            if found is None:
                return None
            known[tokens] = found
        return known[tokens]

    def longest(self, chunks: str, head: str, limit: int) -> tuple[int, bool]:
        """Tokens of the longest prompt that fits, at most `limit`; False if an even longer one may."""
        fits, fails = 0, limit + 1
        guess = min(256, limit)
        while fails - fits > 1 and fails > fits * PRECISION:
            if self.trial(chunks, head, guess) is None:
                fails = guess
            else:
                fits = guess
            if fits == limit:
                return limit, False
            guess = self._guess(chunks, head, fits, fails, limit)
        return fits, True

    def _guess(self, chunks: str, head: str, fits: int, fails: int, limit: int) -> int:
        """Where memory runs out by the line through two trials, but well between `fits` and `fails`."""
        known = sorted(self.trials[chunks, head].values(), key=lambda one: one.tokens)
        guess = 2 * fits if fails > limit else (fits + fails) // 2
        if len(known) > 1 and (slope := (known[-1].peak - known[-2].peak) / (known[-1].tokens - known[-2].tokens)) > 0:
            guess = fits + int((self.budget - known[-1].peak) / slope)
            # A guess just short of the line, then just beyond it, brackets the answer in two trials.
            guess = int(guess / 1.01 if guess / 1.01 > fits * 1.01 else fits * 1.02)
        narrow = max(1, (min(fails, limit) - fits) // 8) if fails <= limit else 1
        return max(fits + 1, min(guess, fails - narrow, 8 * fits if fits else limit, limit))

    def _main(self, chunks: str, head: str, tokens: int, out: Any) -> None:
        try:
            out.send(self._prefill(chunks, head, tokens))
        except (RuntimeError, MemoryError) as error:
            short = isinstance(error, MemoryError) or "allocate memory" in str(error)
            out.send(None if short else f"{head}, {tokens} tokens: {error!r}")

    def _prefill(self, chunks: str, head: str, tokens: int) -> Trial:
        resource.setrlimit(resource.RLIMIT_DATA, (self._data + self.budget, resource.RLIM_INFINITY))
        model = self._engine.model
        block = KVCache.block_bytes(
            layers=model.model.num_layers, block_size=16, groups=model.model.num_query_groups,
            head_dim=model.model.head_dim, dtype=model.config.params_dtype,
        )  # fmt: skip
        changed = {"chunked_prefill_size": tokens} if chunks == ONCE else {}
        engine = EngineSettings(
            lm_head=head, kv_cache_memory=str((tokens // 16 + 2) * block), max_num_seqs=1, **changed
        )
        worker = Worker(model, self._engine.tokenizer, self._engine.spec, engine, World(model.groups))
        began = time.process_time()
        drive(worker, prompt("prompt", tokens, 1))
        return Trial(tokens, time.process_time() - began, self._peak())

    def _peak(self) -> int:
        """Bytes, without the libraries' files, which a forked process maps anew."""
        return PeakMemory.resident("VmHWM") - PeakMemory.resident("RssFile") - self._resident


def plot(bench: Bench, path: Path) -> None:
    """Peak memory and prefill time over the length of the prompt, if matplotlib is installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no plot: matplotlib is not installed (it is in the extra `quickstart`)")
        return
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    memory, seconds = figure.subplots(1, 2)
    for (chunks, head), trials in bench.trials.items():
        ordered = sorted(trials.values(), key=lambda one: one.tokens)
        ordered = [one for one in ordered if one.tokens <= 0.9 * ordered[-1].tokens]
        style = {
            "color": COLOURS[head], "marker": "o", "markersize": 3, "linestyle": "-" if chunks == ONCE else ":",
            "label": f"{head}, {chunks}",
        }  # fmt: skip
        tokens = [one.tokens for one in ordered]
        memory.plot(tokens, [one.peak / 2**20 for one in ordered], **style)
        seconds.plot(tokens, [one.seconds for one in ordered], **style)
    memory.axhline(bench.budget / 2**20, color="grey", linewidth=0.8)
    for axes, name in ((memory, "peak memory (MiB)"), (seconds, "prefill (CPU seconds)")):
        axes.set(xlabel="tokens of the prompt", ylabel=name, xscale="log", yscale="log")
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=150)
    print(f"plot: {path}")


def main() -> int:
    """Print the table, write the plot."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--memory", default="1GiB", help="budget of weights, cache, activations and logits")
    parser.add_argument("--heads", nargs="+", choices=LM_HEADS, default=list(LM_HEADS))
    parser.add_argument("--hidden-size", type=int, default=512)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--longest", type=int, default=32768, help="where the search ends")
    parser.add_argument("--plot", type=Path, default=Path("lm_head.png"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    budget = EngineSettings(kv_cache_memory=arguments.memory).kv_cache_bytes(1 << 60)
    width = arguments.hidden_size
    bench = Bench(
        ModelConfig(
            num_layers=arguments.layers, hidden_size=width, ffn_hidden_size=width * 11 // 4,
            num_attention_heads=max(1, width // 64), num_query_groups=max(1, width // 256), vocab_size=VOCAB_SIZE,
            max_position_embeddings=arguments.longest + 2, untie_embeddings_and_output_weights=False,
        ),
        budget,
    )  # fmt: skip
    print(f"{arguments.layers} layers of {width}, vocabulary {VOCAB_SIZE}, budget {budget / 2**20:.0f} MiB")
    found = {
        (chunks, head): bench.longest(chunks, head, arguments.longest)
        for chunks in (ONCE, DEFAULT)
        for head in arguments.heads
    }
    if not all(tokens for tokens, _ in found.values()):
        print("the weights alone do not fit the budget; raise --memory")
        return 1
    common = min(tokens for tokens, _ in found.values()) * 9 // 10
    print(f"{'':16} {'head':8} {'longest prompt':>16} {'tokens a CPU s':>15} | {common} tokens: prefill, peak memory")
    for (chunks, head), (tokens, ended) in found.items():
        # Just below the budget MKL gets no buffers and is slow.
        near, short = bench.trial(chunks, head, tokens * 9 // 10), bench.trial(chunks, head, common)
        assert near is not None, "memory ran out below the longest prompt"
        assert short is not None, "memory ran out below the longest prompt"
        longest = f"{'' if ended else 'at least '}{tokens}"
        print(
            f"{chunks:16} {head:8} {longest:>16} {near.tokens / near.seconds:15.0f} "
            f"| {short.seconds:7.2f} s {short.peak / 2**20:7.0f} MiB"
        )
    plot(bench, arguments.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
