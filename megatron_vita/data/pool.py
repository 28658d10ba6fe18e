"""Chunks of records mapped over processes, in order, whatever a record does to its process."""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from megatron_vita.data.compile import ChunkResult, Rules, Worker
from megatron_vita.data.sources.mix import MixFile
from megatron_vita.data.sources.readers import Places

Chunk = tuple[int, Places]
"""(number of the file in the mix, which of its records)."""
WorkerArguments = tuple[str, Rules, list[MixFile], Path]
"""What each process makes its Worker of."""

_worker: Worker | None = None
"""This process's Worker, in processes of the pool."""


def _start_worker(arguments: WorkerArguments) -> None:
    global _worker  # a process of the pool is one worker and nothing else
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _worker = Worker(*arguments)


def _run_chunk(chunk: Chunk) -> ChunkResult:
    assert _worker is not None
    return _worker.run(*chunk)


class WorkerPool:
    """Maps chunks in order over processes; with one worker, in this process.

    A decoder may crash on a broken file and take its process along. Then the first chunk without a result is done again
    alone, halved until the record that kills its process is found, and that is refused as media_crash. (With one worker
    nothing can be caught.)
    """

    def __init__(self, workers: int, arguments: WorkerArguments) -> None:
        self._workers, self._arguments = workers, arguments
        self._executor: concurrent.futures.ProcessPoolExecutor | None = None
        self._local: Worker | None = None

    def __enter__(self) -> WorkerPool:
        if self._workers == 1:
            self._local = Worker(*self._arguments)
        else:
            self._executor = self._start(self._workers)
        return self

    def __exit__(self, *_: object) -> None:
        if self._local is not None:
            self._local.close()
        if self._executor is not None:
            self._executor.shutdown(wait=True, cancel_futures=True)

    def _start(self, workers: int) -> concurrent.futures.ProcessPoolExecutor:
        # spawn: this process may hold threads (tokenizers, torch), which a fork would copy in the middle of their work
        return concurrent.futures.ProcessPoolExecutor(
            workers, multiprocessing.get_context("spawn"), _start_worker, (self._arguments,)
        )

    def map(self, chunks: Sequence[Chunk]) -> Iterator[tuple[Chunk, ChunkResult]]:
        """Every chunk with its result, in order; a few for each process are submitted ahead."""
        if self._local is not None:
            for chunk in chunks:
                yield chunk, self._local.run(*chunk)
            return
        assert self._executor is not None
        waiting = deque(chunks)
        running: deque[tuple[Chunk, concurrent.futures.Future[ChunkResult]]] = deque()
        while waiting or running:
            try:
                while waiting and len(running) < 4 * self._workers:
                    running.append((waiting[0], self._executor.submit(_run_chunk, waiting[0])))
                    waiting.popleft()
                chunk, result = running[0][0], running[0][1].result()
                running.popleft()
            except BrokenProcessPool:  # when a result is asked for, or already when a chunk is submitted
                self._executor.shutdown(wait=True, cancel_futures=True)
                waiting.extendleft(again for again, _ in reversed(running))
                running.clear()
                chunk = waiting.popleft()
                result = self._alone(chunk)
                self._executor = self._start(self._workers)
            yield chunk, result

    def _alone(self, chunk: Chunk) -> ChunkResult:
        """A chunk in a process of its own; where that dies too, its halves, down to the one record that kills it."""
        number, places = chunk
        with self._start(1) as executor:
            try:
                return executor.submit(_run_chunk, chunk).result()
            except BrokenProcessPool:
                if len(places) == 1:
                    line = int(places[0, 0])
                    return ChunkResult(rejects=[(line, "media_crash", "decoding its media killed the process.")])
        out = ChunkResult()
        half = len(places) // 2
        for part in (places[:half], places[half:]):
            result = self._alone((number, part))
            out.entries += result.entries
            out.rejects += result.rejects
            out.shortened += result.shortened
            out.cleaned += result.cleaned
        return out
