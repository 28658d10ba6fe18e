"""Sections of inference.py about ranks: the cache and its exchange, memory, decode attention, prefill's CPU time."""

from __future__ import annotations

import time
from typing import Any

import torch
import torch.distributed as dist
from figure import Figure
from inference_kit import (
    VOCAB_SIZE,
    PeakMemory,
    Received,
    drive,
    make_worker,
    on_ranks,
    peak_allocated,
    prompt,
    settings,
)

from megatron_vita.config import ModelConfig
from megatron_vita.inference.worker import News
from megatron_vita.parallel.cached_attention import cached_attention
from megatron_vita.parallel.decode_tables import DecodeTables
from megatron_vita.parallel.kv_cache import CacheStep, KVCache

FLAT_BAR, HEAD_BAR, DECODE_BAR, PREFILL_BAR = 1.1, 1 / 500, 1.6, 1.15


def small_model(**changed: Any) -> ModelConfig:
    """Grouped-query attention with four query heads to a key/value head, and an MLP 2.7 times as wide as the model."""
    sizes = {
        "num_layers": 2, "hidden_size": 256, "ffn_hidden_size": 688, "num_attention_heads": 8, "num_query_groups": 2,
        "vocab_size": 4096, "max_position_embeddings": 131072,
    }  # fmt: skip
    return ModelConfig(**{**sizes, **changed})


# ------------------------------------------------------------------------------------------------------- the cache


def cache_task(tp: int, cp: int, lengths: tuple[int, ...], steps: int) -> dict[str, Any]:
    """Prefill prompts in chunks, decode some steps, and count on this rank."""
    model = small_model(hidden_size=64, ffn_hidden_size=128)
    layout = {"tensor_model_parallel_size": tp, "context_parallel_size": cp}
    worker = make_worker(model, settings(**layout, chunked_prefill_size=96, kv_cache_memory="64MiB"))
    cache, cp_group = worker.cache, worker.model.groups.collection.cp
    worker.step(News(tuple(prompt(str(number), length, steps + 999) for number, length in enumerate(lengths))))
    while not all(sequence.decoding for sequence in worker.sequences.values()):
        worker.step(None)
    tables = [sequence.table for sequence in worker.sequences.values()]
    layers = [layer.layer_number for layer in worker.model.language_model.decoder.layers]
    slots = torch.cat([torch.arange(slot, slot + count) for table in tables for slot, count in table.runs])
    before = {layer: [side[slots].clone() for side in cache[layer]] for layer in layers}
    written: list[int] = []
    write = cache.write

    def watched(layer: int, key: torch.Tensor, value: torch.Tensor, step: CacheStep) -> None:
        written.extend(step.slots.tolist())
        write(layer, key, value, step)

    cache.write = watched  # type: ignore[method-assign]
    received = Received()
    for _ in range(steps):
        worker.step(None)
    now = torch.cat([torch.arange(slot, slot + count) for table in tables for slot, count in table.runs])
    assert set(slots.tolist()) <= set(now.tolist()), "a prompt's token got another slot"
    token_bytes = 2 * len(layers) * cache[layers[0]][0][0].nbytes
    different = [
        (old != new[slots]).flatten(1).any(1) for layer in layers
        for old, new in zip(before[layer], cache[layer], strict=True)
    ]  # fmt: skip
    heads = model.num_attention_heads // tp
    return {
        "tokens": [sum(table.tokens) for table in tables],
        "held": [len(table.blocks[worker.blocks.rank]) * cache.block_size * token_bytes for table in tables],
        "block": cache.block_size * token_bytes,
        "model": 2 * model.num_layers * model.num_query_groups * model.head_dim * 4,
        "prompt": len(slots) * token_bytes,
        "moved": int(torch.stack(different).any(0).sum()) * token_bytes,
        "rewritten": len(set(slots.tolist()).intersection(written)),
        "written": len(written) // len(layers),
        "received": received.on(cp_group) / steps,
        "formula": len(layers) * (cp - 1) * len(tables) * heads * 4 * (model.head_dim + 1),
    }


def cache_figures(*, quick: bool) -> list[Figure]:
    """Bytes held, moved and received at several layouts."""
    lengths, steps = ((5, 300, 1000), 3) if quick else ((1, 15, 16, 17, 31, 100, 333, 1000, 4099), 20)
    figures = []
    for tp, cp in ((1, 2), (2, 1)) if quick else ((1, 1), (1, 2), (1, 4), (2, 1), (2, 2)):
        ranks = on_ranks(tp * cp, cache_task, tp, cp, lengths, steps)
        name = f"TP {tp}, CP {cp}: "
        excess = [
            (held - tokens * rank["model"] / (tp * cp)) / rank["block"]
            for rank in ranks for held, tokens in zip(rank["held"], rank["tokens"], strict=True)
        ]  # fmt: skip
        held, total = max(sum(rank["held"]) for rank in ranks), sum(ranks[0]["tokens"]) * ranks[0]["model"]
        figures.append(Figure(
            f"{name}bytes of keys and values on the fullest rank",
            f"{held} = total {total} / {total / held:.3f}; {min(excess):+.2f}, {max(excess):+.2f} blocks",
            f"total / {tp * cp} within a block of each sequence", max(map(abs, excess)) <= 1,
        ))  # fmt: skip
        moved, rewritten = sum(rank["moved"] for rank in ranks), sum(rank["rewritten"] for rank in ranks)
        written, expected = sum(rank["written"] for rank in ranks), tp * steps * len(lengths)
        figures.append(Figure(
            f"{name}bytes of the prompts' cache moved by {steps} decode steps",
            f"{moved} of {sum(rank['prompt'] for rank in ranks)}; {rewritten} slots written again, {written} new",
            f"0, {expected} new", moved == rewritten == 0 and written == expected,
        ))  # fmt: skip
        if cp > 1:
            got, formula = {rank["received"] for rank in ranks}, ranks[0]["formula"]
            figures.append(Figure(
                f"{name}bytes received in a decode step over the context ranks",
                " / ".join(f"{one:.0f}" for one in sorted(got)), f"{formula} by the formula", got == {formula},
            ))  # fmt: skip
    return figures


# ---------------------------------------------------------------------------------------------------------- memory


def prefill_memory_task(cp: int, tokens: int, chunk: int, model: ModelConfig) -> tuple[int, int]:
    """Bytes that prefill of a prompt takes on this rank, at most, beyond weights and cache: tensors, and resident."""
    worker = make_worker(
        model, settings(context_parallel_size=cp, chunked_prefill_size=chunk, max_num_seqs=1, kv_cache_memory="512MiB")
    )
    drive(worker, prompt("warm", 2 * chunk * cp, 1))  # libraries' own buffers
    for layer in worker.model.language_model.decoder.layers:
        for side in worker.cache[layer.layer_number]:
            side.zero_()  # all of the cache is resident from here on
    new = prompt("measured", tokens, 1)
    dist.barrier()
    memory = PeakMemory()
    return peak_allocated(lambda: drive(worker, new)), memory.gained()


def head_memory_task(head: str, tokens: int, chunk: int) -> int:
    """Bytes that logits and sampling of a prompt's last step take, beyond the hidden states."""
    model = small_model(num_layers=1, hidden_size=64, ffn_hidden_size=64, vocab_size=VOCAB_SIZE)
    worker = make_worker(model, settings(chunked_prefill_size=chunk, lm_head=head))
    drive(worker, prompt("warm", 4, 2))
    forward = worker.runner._forward
    found: list[PeakMemory] = []

    def watched(*inputs: Any) -> torch.Tensor | None:
        hidden = forward(*inputs)
        found.append(PeakMemory())
        return hidden

    worker.runner._forward = watched  # type: ignore[method-assign]
    drive(worker, prompt("measured", tokens, 1))
    return found[-1].gained()


def memory_figures(*, quick: bool) -> list[Figure]:
    """Activations of prefill, and the head's memory."""
    figures = []
    chunk, sizes = (256, (1024, 4096)) if quick else (2048, (8192, 32768, 65536))
    model = small_model()
    for cp in (1, 2):
        ranks = [on_ranks(cp, prefill_memory_task, cp, tokens, chunk, model) for tokens in sizes]
        peaks, resident = ([max(one[kind] for one in found) for found in ranks] for kind in (0, 1))
        worst = max(peaks) / peaks[0]
        figures.append(Figure(
            f"CP {cp}: tensors of prefill, chunks of {chunk} a rank: " + ", ".join(f"{size >> 10}K" for size in sizes),
            ", ".join(f"{peak / 2**20:.1f}" for peak in peaks) + f" MiB, x {worst:.3f} (resident "
            + ", ".join(f"{peak / 2**20:.0f}" for peak in resident) + ")",
            f"x {FLAT_BAR}", None if quick else worst <= FLAT_BAR,
        ))  # fmt: skip
    tokens = 512 if quick else 8192
    full = 4 * tokens * VOCAB_SIZE
    for head in ("masked",) if quick else ("masked", "chunked"):
        (gained,) = on_ranks(1, head_memory_task, head, tokens, tokens)
        figures.append(Figure(
            f"{head} head, {tokens} tokens, vocabulary {VOCAB_SIZE}: memory",
            f"{gained / 2**20:.1f} MiB = 1/{full / max(gained, 1):.0f} of full logits ({full / 2**20:.0f} MiB)",
            f"1/{1 / HEAD_BAR:.0f}" if head == "masked" else "",
            None if quick or head != "masked" else gained <= full * HEAD_BAR,
        ))  # fmt: skip
    return figures


# ------------------------------------------------------------------------------------------------------------ time


def decode_attention_task(cached: int, batch: int, repeats: int) -> list[tuple[float, float]]:
    """Least wall and CPU seconds of a step's attention: all on one rank while the other waits, then spread over both.

    Each is measured over ten calls.
    """
    heads, groups, size = 8, 2, 128
    rank = dist.get_rank()
    generator = torch.Generator().manual_seed(rank)
    best = [(float("inf"), float("inf"))] * 2

    def inputs(tokens: int, owner: bool) -> tuple[list[torch.Tensor], CacheStep]:
        cache = KVCache(
            [1], num_blocks=batch * tokens // 16, block_size=16, groups=groups, head_dim=size, dtype=torch.float32,
            device=torch.device("cpu"),
        )  # fmt: skip
        for side in cache[1]:
            side.normal_(generator=generator)
        own = torch.arange(batch if owner else 0)
        step = CacheStep(
            cache=cache, prefill_tokens=0, prefixes=(), slots=(own + 1) * tokens - 1, rows=own,
            decodes=DecodeTables.build(
                [((one * tokens, tokens),) for one in range(batch)], token_bytes=2 * cache[1][0][0].nbytes,
                block_size=16, dtype=torch.float32, device=torch.device("cpu"),
            ),
        )  # fmt: skip
        q, k, v = (torch.randn(batch, count, size, generator=generator) for count in (heads, groups, groups))
        return [q, k, v], step

    sides = [(*inputs(cached, owner=True), None), (*inputs(cached // 2, owner=rank == 0), dist.group.WORLD)]
    for repeat in range(repeats + 1):
        for number, (qkv, step, group) in enumerate(sides):
            dist.barrier()
            if group is None and rank:
                continue
            began, cpu = time.perf_counter(), time.process_time()
            for _ in range(10):
                cached_attention(*qkv, step=step, schedule=None, layer=1, cp_group=group, scale=size**-0.5)
            wall, cpu = (time.perf_counter() - began) / 10, (time.process_time() - cpu) / 10
            if repeat:
                best[number] = min(best[number][0], wall), min(best[number][1], cpu)
    return best


def prefill_cpu_task(cp: int, tokens: int, chunk: int, repeats: int, model: ModelConfig) -> float:
    """CPU seconds of this rank, communication included, for the prefill of one prompt: least of the repeats."""
    worker = make_worker(
        model, settings(context_parallel_size=cp, chunked_prefill_size=chunk // cp, kv_cache_memory="256MiB")
    )
    drive(worker, prompt("warm", 2 * chunk, 1))
    seconds = []
    for repeat in range(repeats):
        dist.barrier()
        began = time.process_time()
        drive(worker, prompt(str(repeat), tokens, 1))
        seconds.append(time.process_time() - began)
    return min(seconds)


def time_figures(*, quick: bool) -> list[Figure]:
    """Decode attention on two ranks against one, prefill on two ranks against one."""
    figures = []
    cached = 4096 if quick else 65536
    for batch in (1,) if quick else (1, 4):
        ranks = on_ranks(2, decode_attention_task, cached, batch, 2 if quick else 10)
        (one, one_cpu), (two, two_cpu) = ranks[0][0], (max(rank[1][kind] for rank in ranks) for kind in (0, 1))
        figures.append(Figure(
            f"decode attention, {cached >> 10}K cached tokens, batch {batch}: one rank, two",
            f"{one * 1e3:.2f}, {two * 1e3:.2f} ms: {one / two:.2f} times the throughput "
            f"(CPU {one_cpu * 1e3:.2f}, {two_cpu * 1e3:.2f} ms a rank: {one_cpu / two_cpu:.2f})",
            f"{DECODE_BAR}", None if quick else one / two >= DECODE_BAR,
        ))  # fmt: skip
    tokens, chunk = (1024, 512) if quick else (16384, 4096)
    sizes = {"num_layers": 1} if quick else {"hidden_size": 512, "ffn_hidden_size": 1376}
    one = two = float("inf")
    for _ in range(1 if quick else 3):  # interleaved
        task = prefill_cpu_task, 1, tokens, chunk, 1 if quick else 2, small_model(**sizes)
        alone = on_ranks(1, *task, worlds=2)
        one = min(one, sum(alone) / 2)
        two = min(two, sum(on_ranks(2, task[0], 2, *task[2:])))
    figures.append(Figure(
        f"prefill of {tokens} tokens, chunks of {chunk}: CPU time on one rank, two",
        f"{one:.2f}, {two:.2f} s: ratio {two / one:.3f}", f"{PREFILL_BAR}", None if quick else two / one <= PREFILL_BAR,
    ))  # fmt: skip
    return figures
