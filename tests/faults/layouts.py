"""Every layout of up to four ranks, saved in one and resumed in the other: weights and moments are equal to the bit.

Each weight has a gradient of its own that layouts do not change (tests/checkpoint/tiny.py), and nothing is clipped, so
a step after resuming gives the same bits in every layout too.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_vita import checkpoint
from megatron_vita.config import ModelConfig, ParallelConfig, StageConfig
from megatron_vita.parallel.groups import destroy_groups
from tests.checkpoint import tiny
from tests.faults.disturbed import Outcome, read_outcomes, write_outcomes
from tests.faults.steps import contents
from tests.ranks import run_ranks

MODEL: ModelConfig = tiny.smaller(
    num_layers=3, num_query_groups=4, vision=dataclasses.replace(tiny.VISION, num_attention_heads=4, hidden_size=16)
)
STEPS = 2


def _layout(**settings: Any) -> ParallelConfig:
    full = {"tp": "tensor_model_parallel_size", "pp": "pipeline_model_parallel_size", "cp": "context_parallel_size"}
    full |= {"sp": "sequence_parallel", "stages": "pipeline_model_parallel_layout"}
    return ParallelConfig(**{full.get(name, name): value for name, value in settings.items()})


_UNEVEN = {"pp": 2, "decoder_first_pipeline_num_layers": 1}
_INTERLEAVED = {"pp": 2, "stages": "Et|t|t|L"}
LAYOUTS: dict[str, tuple[int, ParallelConfig]] = {
    "one": (1, _layout()),
    "dp2": (2, _layout()),
    "tp2": (2, _layout(tp=2)),
    "tp2 sp": (2, _layout(tp=2, sp=True)),
    "pp2": (2, _layout(**_UNEVEN)),
    "pp2 vpp2": (2, _layout(**_INTERLEAVED)),
    "cp2": (2, _layout(cp=2)),
    "dp4": (4, _layout()),
    "tp4 sp": (4, _layout(tp=4, sp=True)),
    "pp4": (4, _layout(pp=4, stages="Et|t|t|L")),
    "cp4": (4, _layout(cp=4)),
    "tp2 dp2": (4, _layout(tp=2)),
    "tp2 sp pp2": (4, _layout(tp=2, sp=True, **_UNEVEN)),
    "pp2 vpp2 dp2": (4, _layout(**_INTERLEAVED)),
    "tp2 cp2": (4, _layout(tp=2, cp=2)),
    "pp2 cp2": (4, _layout(cp=2, **_UNEVEN)),
}
"""Ranks and layout, by name."""


def settings(name: str, *, bf16: bool, seed: int) -> StageConfig:
    """A stage in one of the layouts."""
    stage = tiny.stage(LAYOUTS[name][1], model=MODEL, seed=seed, bf16=bf16)
    return dataclasses.replace(stage, optimizer=dataclasses.replace(stage.optimizer, clip_grad=0.0))


def pairs(root: Path, sources: Sequence[str], targets: Sequence[str], *, bf16: bool = False) -> list[Outcome]:
    """Save in each source, resume in each target.

    Returns:
        an outcome for each source, compared with the first, and one for each pair.
    """
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir(parents=True)
    for size in (1, 2, 4):
        if mine := [name for name in sources if LAYOUTS[name][0] == size]:
            run_ranks(size, _save_all, root, mine, bf16)
    found = []
    first = [contents(_step(root, sources[0], step), plain=False) for step in (STEPS, STEPS + 1)]
    for name in sources[1:]:
        here = [contents(_step(root, name, step), plain=False) for step in (STEPS, STEPS + 1)]
        found.append(Outcome(f"{name} as {sources[0]}", _difference(here, first)))
    target = root / "outcomes.txt"
    target.touch()
    for size in (1, 2, 4):
        if mine := [name for name in targets if LAYOUTS[name][0] == size]:
            run_ranks(size, _resume_all, root, sources, mine, bf16, first, target, timeout_s=600)
    return found + read_outcomes(target)


def _step(root: Path, name: str, iteration: int) -> Path:
    return root / name / f"iter_{iteration:07d}"


def _save(trainer: tiny.Trainer, root: Path, iteration: int) -> None:
    run = tiny.state(trainer.stage, iteration)
    checkpoint.save(root, trainer.wrapped, trainer.optimizer, trainer.scheduler, run, trainer.groups)


def _save_all(root: Path, names: Sequence[str], bf16: bool) -> None:
    for name in names:
        trainer = tiny.Trainer(settings(name, bf16=bf16, seed=1))
        for _ in range(STEPS):
            trainer.step()
        _save(trainer, root / name, STEPS)
        trainer.step()
        _save(trainer, root / name, STEPS + 1)
        destroy_groups()


def _resume_all(
    root: Path, sources: Sequence[str], targets: Sequence[str], bf16: bool, first: list[dict[str, str]], out: Path
) -> None:
    """One trainer for all sources of a target: what it loads must replace all that the one before has left in it."""
    for target in targets:
        trainer = tiny.Trainer(settings(target, bf16=bf16, seed=9))
        for source in sources:
            trainer.scheduler.num_steps = 0  # megatron-core's adds what it loads
            checkpoint.load_training(_step(root, source, STEPS), trainer.models, trainer.optimizer, trainer.scheduler)
            _save(trainer, root / "resumed", STEPS)
            trainer.step()
            _save(trainer, root / "resumed", STEPS + 1)
            if dist.get_rank() == 0:
                here = [contents(_step(root, "resumed", step), plain=False) for step in (STEPS, STEPS + 1)]
                write_outcomes(out, [Outcome(f"{source} -> {target}", _difference(here, first))])
                shutil.rmtree(root / "resumed")
            dist.barrier()
        destroy_groups()


def _difference(here: Sequence[dict[str, str]], there: Sequence[dict[str, str]]) -> tuple[str, ...]:
    found = []
    for when, (a, b) in zip(("saved", "a step later"), zip(here, there, strict=True), strict=True):
        if a.keys() != b.keys():
            found.append(f"{when}: other tensors: {sorted(a.keys() ^ b.keys())}")
        different = [name for name in a if name in b and a[name] != b[name]]
        if different:
            found.append(f"{when}: other values: {different}")
    return tuple(found)
