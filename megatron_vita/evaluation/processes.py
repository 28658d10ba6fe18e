"""Work that is shared by several processes, each with a model of its own."""

from __future__ import annotations

import multiprocessing
import traceback
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from typing import TypeVar

import torch
import torch.distributed as dist

from megatron_vita.errors import ConfigError, VitaError

T = TypeVar("T")


def in_processes(workers: int, work: Callable[[int], Iterator[T]]) -> Iterator[T]:
    """Run `work(rank)` in forked processes and yield their results as they arrive.

    Forked, so that the slow imports are paid once. A worker's failure ends all of them and is raised here.

    Raises:
        ConfigError: a model was loaded in this process before: gloo does not survive a fork.
    """
    if dist.is_initialized():
        raise ConfigError("several evaluation processes must start before any model is loaded. Use workers=1 here.")
    context = multiprocessing.get_context("fork")
    receivers: list[Connection] = []
    processes = []
    for rank in range(workers):
        receiver, sender = context.Pipe(duplex=False)
        receivers.append(receiver)
        # The list as it is now: a child must hold no reading end, or it would not notice that the parent was killed.
        process = context.Process(target=_worker, args=(rank, sender, list(receivers), work), daemon=True)
        process.start()
        sender.close()
        processes.append(process)
    try:
        speaking = dict(enumerate(receivers))
        while speaking:
            ready = wait(list(speaking.values()))
            for rank, receiver in [(rank, one) for rank, one in speaking.items() if one in ready]:
                try:
                    kind, content = receiver.recv()
                except EOFError:
                    raise VitaError(
                        f"evaluation process {rank} died (out of memory?). Run again to continue."
                    ) from None
                if kind == "error":
                    raise content
                if kind == "done":
                    del speaking[rank]
                else:
                    yield content
    finally:
        for process in processes:
            process.terminate()
            process.join()


def _worker(
    rank: int,
    sender: Connection,
    inherited: Sequence[Connection],
    work: Callable[[int], Iterator[T]],
) -> None:
    for one in inherited:
        one.close()
    torch.set_num_threads(1)  # more would wait for the parent's pool, which the fork did not copy
    try:
        for result in work(rank):
            sender.send(("result", result))
        sender.send(("done", None))
    except BrokenPipeError:
        pass  # the parent was killed; what it had received is on disk
    except KeyboardInterrupt:
        pass  # the parent got the same signal and says so
    except VitaError as error:
        sender.send(("error", error))
    except BaseException:
        sender.send(("error", VitaError(f"evaluation process {rank} failed:\n{traceback.format_exc()}")))
