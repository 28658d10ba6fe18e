"""The options of the grid, and the stage settings of a case."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from megatron_vita.checks.tiny import IMAGES, LLMS, TOKENS, VITS, tiny_model
from megatron_vita.config import (
    CheckpointConfig,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    StageConfig,
    TrainConfig,
)
from megatron_vita.config.parallel import CP_COMM_TYPES
from megatron_vita.errors import ConfigError

DTYPES = ("float64", "float32", "bf16")

_FREEZE: dict[str, dict[str, bool]] = {
    "none": {},
    "stage-1": {"freeze_vision_model": True, "freeze_language_model": True},
    "tower": {"freeze_vision_model": True},
}
_RECOMPUTE: dict[str, dict[str, Any]] = {
    "none": {},
    "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
    "selective": {"recompute_granularity": "selective"},
    "block": {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": 1},
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """A value for every option; the fields' names are the names in a filter (`tp=2 cp=2 comm=p2p`)."""

    tp: int = 1
    """Tensor-parallel ranks."""
    sp: bool = False
    """Sequence parallelism."""
    pp: int = 1
    """Pipeline ranks."""
    vp: int = 1
    """Virtual stages of a pipeline rank."""
    split: str = "even"
    """Layers of the pipeline stages: `even`, or `uneven`: two on the second, one on the others."""
    cp: int = 1
    """Context-parallel ranks."""
    comm: str = "-"
    """cp_comm_type; `-` at cp 1."""
    dp: int = 1
    """Data-parallel ranks."""
    mb: int = 2
    """Micro-batches of a data rank."""
    mbs: int = 1
    """Micro-batch size: packs of a packed sequence."""
    images: str = "everywhere"
    """Positions of the tiles, see tiny.IMAGES."""
    reset: bool = True
    """Positions and attention restart at every document."""
    tied: bool = False
    """The head is the embedding table."""
    freeze: str = "none"
    """Frozen parts: `none`, `stage-1` (all but the projector), `tower`."""
    tower: str = "spread"
    """The vision tower: `spread` (replicated, tiles distributed over the ranks) or `split` (tensor-parallel)."""
    vit: str = "intern_vit"
    """Architecture of the tower, see tiny.VITS."""
    llm: str = "qwen2"
    """Architecture of the decoder, see tiny.LLMS."""
    recompute: str = "none"
    """Recomputed activations: `none`, `full` (every layer), `selective` (core attention), `block` (one layer)."""
    overlap: bool = False
    """overlap_grad_reduce."""
    dtype: str = "float64"
    """Dtype of weights and activations."""

    @property
    def world_size(self) -> int:
        """Number of ranks of the case."""
        return self.tp * self.pp * self.cp * self.dp

    @property
    def packs(self) -> int:
        """Packs of the global batch."""
        return self.mb * self.mbs * self.dp

    def __str__(self) -> str:
        """The case as a filter, without default values."""
        return " ".join(f"{name}={shown(value)}" for name, value in self.chosen().items()) or "one process"

    def chosen(self) -> dict[str, Any]:
        """The options that differ from their defaults."""
        return {name: getattr(self, name) for name, value in _DEFAULT.items() if getattr(self, name) != value}


_DEFAULT = dataclasses.asdict(Case())


def shown(value: Any) -> str:
    """An option's value as filters and tables write it."""
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else str(value)


def layout_options(worlds: Sequence[int]) -> dict[str, tuple[Any, ...]]:
    """Options that restrict one another, and all their values for worlds of these sizes. The first value is the default
    one."""
    degrees = tuple(sorted({degree for size in worlds for degree in range(1, size + 1) if size % degree == 0}))
    return {
        "tp": degrees,
        "sp": (False, True),
        "pp": degrees,
        "vp": (1, 2),
        "split": ("even", "uneven"),
        "cp": degrees,
        "comm": ("-", *CP_COMM_TYPES),
        "dp": degrees,
        "mb": (1, 2, 3, 4),
        "mbs": (1, 2),
        "images": IMAGES,
        "tower": ("spread", "split"),
    }


def free_options(dtypes: Sequence[str] = DTYPES) -> dict[str, tuple[Any, ...]]:
    """Options that are compatible with every layout."""
    return {
        "reset": (True, False),
        "tied": (False, True),
        "vit": tuple(VITS),
        "llm": tuple(LLMS),
        "freeze": tuple(_FREEZE),
        "recompute": tuple(_RECOMPUTE),
        "overlap": (False, True),
        "dtype": tuple(dtypes),
    }


@functools.cache
def layouts(worlds: tuple[int, ...]) -> tuple[tuple[Case, str | None], ...]:
    """Every combination of layout options that takes as many ranks as there are, with the reason why there is no such
    case, if so; the simplest first. Computed once: there are tens of thousands."""
    options = layout_options(worlds)
    degrees = ("tp", "pp", "cp", "dp")
    rest = [name for name in options if name not in degrees]
    cases = [
        Case(**dict(zip((*degrees, *rest), (*sizes, *values), strict=True)))
        for sizes in product(*(options[name] for name in degrees))
        if math.prod(sizes) in worlds
        for values in product(*(options[name] for name in rest))
    ]
    cases.sort(key=lambda case: (case.world_size, len(case.chosen())))
    return tuple((case, why_not(case)) for case in cases)


def why_not(case: Case) -> str | None:
    """Why a case is excluded: an option has no effect, or the settings reject it."""
    if (case.comm == "-") != (case.cp == 1):
        return "comm says nothing at cp=1, and must be chosen above"
    if case.pp == 1 and (case.vp, case.split) != (1, "even"):
        return "vp or split says nothing at pp=1"
    if case.tower == "split" and case.tp == 1:
        return "tower says nothing at tp=1"
    if case.images == "one-batch" and case.mb * case.dp == 1:
        return "images=one-batch needs two rows in the global batch"
    try:
        case_stage(case)
    except ConfigError as error:
        return str(error)
    return None


def case_stage(case: Case) -> StageConfig:
    """The case as a stage of a recipe.

    Raises:
        ConfigError: the settings reject it.
    """
    parallel = ParallelConfig(
        tensor_model_parallel_size=case.tp,
        sequence_parallel=case.sp,
        pipeline_model_parallel_size=case.pp,
        num_virtual_stages_per_pipeline_rank=case.vp if case.vp > 1 and case.split == "even" else None,
        pipeline_model_parallel_layout=_uneven(case) if case.split == "uneven" else None,
        context_parallel_size=case.cp,
        overlap_grad_reduce=case.overlap,
        cp_comm_type=case.comm if case.cp > 1 else CP_COMM_TYPES[0],
        **_RECOMPUTE[case.recompute],
    )
    stage = make_stage(
        parallel, case_model(case), case.packs, case.mbs, case.reset, bf16=case.dtype == "bf16", **_FREEZE[case.freeze]
    )
    stage.check(case.world_size)
    return stage


def case_model(case: Case) -> ModelConfig:
    """The smallest model that the layout can split."""
    heads = math.lcm(4, case.tp * (case.cp if case.comm == "a2a" else 1))
    stages = case.pp * case.vp
    layers = math.lcm(4, stages) if case.split == "even" else stages + 1
    split = case.tower == "split"
    return tiny_model(heads=heads, layers=layers, tied=case.tied, vit=case.vit, llm=case.llm, split=split)


def _uneven(case: Case) -> str:
    """A layer on every stage but two on the second, in Megatron's notation."""
    return "|".join(["Et", *("tt" if stage == 1 else "t" for stage in range(1, case.pp * case.vp))]) + "L"


def make_stage(
    parallel: ParallelConfig,
    model: ModelConfig,
    packs: int,
    micro_batch_size: int,
    reset: bool,
    seq_length: int = TOKENS + 1,
    **train: Any,
) -> StageConfig:
    """A stage of one step over `packs` packs. Gradients are clipped, and AdamW's epsilon is large: with a small one the
    first update is the gradient's sign, which would hide a wrong factor and turn over where the gradient is noise.
    Packs are padded to the next length from `seq_length` on that the layout can split."""
    shards = parallel.context_parallel_size * parallel.sequence_shards
    return StageConfig(
        name="check",
        model=model,
        parallel=parallel,
        data=DataConfig(
            data_path="-", seq_length=-(-seq_length // shards) * shards, reset_per_document=reset, num_workers=0
        ),
        optimizer=OptimizerConfig(
            lr=1e-2,
            lr_decay_style="constant",
            lr_warmup_fraction=0.0,
            weight_decay=0.1,
            adam_eps=1e-3,
            clip_grad=0.5,
        ),
        train=TrainConfig(micro_batch_size=micro_batch_size, global_batch_size=packs, **train),
        checkpoint=CheckpointConfig(save="-"),
    )
