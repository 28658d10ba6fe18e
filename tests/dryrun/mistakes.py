"""Plants a mistake in the program and runs it dry: `python -m tests.dryrun.mistakes`; prints a report a line.

A script of its own, because the dry run's library must be loaded before torch.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from typing import Any

from megatron_vita.config import load_run
from megatron_vita.dryrun import library
from megatron_vita.dryrun.jobs import DryRunJob

RECIPE = "examples/long_vita_0.5b/run.yaml"
FLAGS = ("--num-layers", "2", "--vision-num-layers", "2", "--seq-length", "4096")


def main() -> None:
    """Run every mistake in a child."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    library.load(library.build())
    from megatron_vita.dryrun import fake_cuda, worker
    from megatron_vita.dryrun.collectives import Collectives

    counted = Collectives(real=False)
    counted.install()
    fake_cuda.install(worker.MEMORY_BYTES)
    import torch._dynamo  # noqa: F401

    import megatron_vita.dryrun.train_steps  # noqa: F401  imported once, for all children

    stage = load_run(RECIPE, FLAGS, expand=False).stages[1]
    job = DryRunJob(stage=stage, world_size=8, steps=1).to_json()
    for name, plant in MISTAKES.items():
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            plant()
            with os.fdopen(writing, "w") as out:
                json.dump({"mistake": name, "report": worker._answer(job, counted, fake=True)}, out)
            os._exit(0)
        os.close(writing)
        with os.fdopen(reading) as answer:
            print(answer.read(), file=answers, flush=True)
        os.waitpid(child, 0)


def _index_on_the_host() -> None:
    from megatron_vita.models.vita import VitaModel

    plain = VitaModel._embed

    def embed(self: Any, tokens: Any, visual: Any) -> Any:
        features, index = visual
        return plain(self, tokens, (features, index.cpu()))

    VitaModel._embed = embed  # type: ignore[method-assign]


def _wide_input() -> None:
    from megatron.core.transformer.mlp import MLP

    plain = MLP.forward

    def forward(self: Any, hidden: Any, *args: Any, **kwargs: Any) -> Any:
        return plain(self, hidden.float(), *args, **kwargs)

    MLP.forward = forward


def _turned_lse() -> None:
    from megatron_vita.parallel import block_kernels

    plain = block_kernels.backward

    def backward(grad: Any, q: Any, k: Any, v: Any, out: Any, lse: Any, *rest: Any, **more: Any) -> Any:
        return plain(grad, q[:, :-1], k, v, out, lse, *rest, **more)

    block_kernels.backward = backward


def _host_buffer_in_a_collective() -> None:
    import torch

    from megatron_vita.parallel import grads

    def reduce_(tensors: Any, group: Any) -> None:
        torch.distributed.all_reduce(torch.zeros(4, device="cpu"))

    grads.tensor_parallel_sum_ = reduce_


MISTAKES: dict[str, Callable[[], None]] = {
    "none": lambda: None,
    "an index on the host": _index_on_the_host,
    "float32 into a bfloat16 product": _wide_input,
    "the wrong shape of a kernel's argument": _turned_lse,
    "a host buffer in a collective": _host_buffer_in_a_collective,
}

if __name__ == "__main__":
    sys.exit(main())
