"""Assignment of decoder layers to pipeline stages, from Megatron's flags; checked before any rank starts.

All flags are converted to megatron-core's general form, `pipeline_model_parallel_layout` as a list of stages. Legend: a
*stage* is one model chunk; with virtual stages a rank holds several. Stages are in forward order: virtual stage 0 of
every rank, then virtual stage 1 of every rank, and so on.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from megatron_vita.config.parallel import ParallelConfig
from megatron_vita.errors import ConfigError

_MOST_COPIES = 10_000
"""Largest n in `x*n`; a larger one is a typing error and would exhaust memory."""


@dataclass(frozen=True, slots=True)
class PipelineSplit:
    """Number of decoder layers of each stage. Embedding and vision tower are on the first stage, the output layer on
    the last."""

    layers: tuple[int, ...]
    """Decoder layers of each stage, in forward order."""
    ranks: int
    """Pipeline-parallel size; divides the number of stages."""

    @property
    def virtual(self) -> int:
        """Virtual stages per rank; 1 without interleaving."""
        return len(self.layers) // self.ranks

    def on_rank(self, pp_rank: int) -> int:
        """Decoder layers of one pipeline rank, all virtual stages together."""
        return sum(self.layers[pp_rank :: self.ranks])

    def stages(self) -> list[list[str]]:
        """megatron-core's list form of the layout."""
        out = [["decoder"] * count for count in self.layers]
        out[0].insert(0, "embedding")
        out[-1].append("loss")
        return out

    def __str__(self) -> str:
        """Megatron's string form, e.g. `Ettt|tt|ttL`."""
        return "E" + "|".join("t" * count for count in self.layers) + "L"


def pipeline_split(parallel: ParallelConfig, num_layers: int) -> PipelineSplit:
    """Assign the decoder's layers to pipeline stages.

    Args:
        parallel: one of three alternatives: `pipeline_model_parallel_layout`; or `decoder_first_pipeline_num_layers`
            and/or `decoder_last_pipeline_num_layers`, the other ranks even; or all ranks even. The latter two combine
            with `num_layers_per_virtual_pipeline_stage` or `num_virtual_stages_per_pipeline_rank`.
        num_layers: of the decoder.

    Raises:
        ConfigError: the layers do not divide as requested; names the rule and a layout that works.
    """
    ranks = parallel.pipeline_model_parallel_size
    if parallel.pipeline_model_parallel_layout is not None:
        return _from_layout(parallel.pipeline_model_parallel_layout, ranks, num_layers)
    per_rank = _per_rank(parallel, num_layers)
    virtual = parallel.num_virtual_stages_per_pipeline_rank or 1
    each = parallel.num_layers_per_virtual_pipeline_stage
    if each is not None:
        if len(set(per_rank)) > 1 or per_rank[0] % each:
            raise ConfigError(
                f"parallel.num_layers_per_virtual_pipeline_stage={each} does not divide the "
                f"{_ways(per_rank)} layers of a pipeline rank. {_instead(num_layers, ranks, per_rank[0] // each or 2)}"
            )
        virtual = per_rank[0] // each
    if any(count % virtual for count in per_rank):
        raise ConfigError(
            f"parallel.num_virtual_stages_per_pipeline_rank={virtual} does not divide the {_ways(per_rank)} layers of "
            f"a pipeline rank. {_instead(num_layers, ranks, virtual)}"
        )
    return PipelineSplit(tuple(count // virtual for _ in range(virtual) for count in per_rank), ranks)


def nearly_even(num_layers: int, ranks: int, virtual: int = 1) -> PipelineSplit:
    """Split any number of layers over ranks * virtual stages, with sizes that differ by at most one.

    First and last stage, which hold embedding and output layer too, get the smaller sizes first.
    """
    stages = ranks * virtual
    base, rest = divmod(num_layers, stages)
    by_need = sorted(range(stages), key=lambda stage: (stage == 0, stage == stages - 1, stage))
    more = set(by_need[:rest])
    return PipelineSplit(tuple(base + (stage in more) for stage in range(stages)), ranks)


def _per_rank(parallel: ParallelConfig, num_layers: int) -> list[int]:
    """Decoder layers of each pipeline rank, all virtual stages together."""
    ranks = parallel.pipeline_model_parallel_size
    first, last = parallel.decoder_first_pipeline_num_layers, parallel.decoder_last_pipeline_num_layers
    rest = num_layers - (first or 0) - (last or 0)
    middle = ranks - (first is not None) - (last is not None)
    even = rest == 0 if middle <= 0 else rest > 0 and rest % middle == 0
    if not even or middle < 0:
        flags = (("decoder_first_pipeline_num_layers", first), ("decoder_last_pipeline_num_layers", last))
        given = "".join(f", parallel.{name}={value}" for name, value in flags if value is not None)
        raise ConfigError(
            f"model.num_layers={num_layers} is not a multiple of parallel.pipeline_model_parallel_size={ranks}{given}: "
            f"{rest} layers are left for {middle} ranks. {_instead(num_layers, ranks, 1)}"
            if given
            else f"model.num_layers={num_layers} is not a multiple of parallel.pipeline_model_parallel_size={ranks}. "
            f"{_instead(num_layers, ranks, 1)}"
        )
    out = [rest // middle if middle else 0] * ranks
    out[0] = out[0] if first is None else first
    out[-1] = out[-1] if last is None else last
    return out


def _ways(per_rank: list[int]) -> str:
    return " or ".join(str(count) for count in sorted(set(per_rank)))


def _instead(num_layers: int, ranks: int, virtual: int) -> str:
    """Suggestion for an error message: settings that work."""
    sizes = [size for size in range(1, num_layers + 1) if num_layers % (size * virtual) == 0]
    sizes = sorted(sorted(sizes, key=lambda size: abs(size - ranks))[:2])
    named = " or ".join(str(size) for size in sizes)
    evenly = f"pipeline_model_parallel_size {named} divides evenly; " if sizes else ""
    return (
        f"{evenly}parallel.pipeline_model_parallel_layout={str(nearly_even(num_layers, ranks, virtual))!r} works too."
    )


def _from_layout(layout: str, ranks: int, num_layers: int) -> PipelineSplit:
    """Parse Megatron's layout string, e.g. `Et*3|(tt|)*29,ttL`."""
    stages = _unrolled(layout).split("|")
    where = f"parallel.pipeline_model_parallel_layout={layout!r}"
    works = f"For example {str(nearly_even(num_layers, ranks))!r}."
    if unknown := set("".join(stages)) - set("EtL"):
        raise ConfigError(
            f"{where}: {sorted(unknown)} is not known. E is the embedding, t a decoder layer, L the head and its loss, "
            f"| ends a stage, (..)*n repeats. {works}"
        )
    if len(stages) % ranks:
        raise ConfigError(
            f"{where} has {len(stages)} stages, which is no multiple of parallel.pipeline_model_parallel_size={ranks}. "
            + works
        )
    flat = "".join(stages)
    if flat.count("E") != 1 or not stages[0].startswith("E") or flat.count("L") != 1 or not stages[-1].endswith("L"):
        raise ConfigError(f"{where}: the first stage must begin with the only E, the last end with the only L. {works}")
    if flat.count("t") != num_layers:
        raise ConfigError(f"{where} has {flat.count('t')} layers, but model.num_layers={num_layers}. {works}")
    if "" in stages:
        raise ConfigError(f"{where}: stage {stages.index('')} is empty. Give it a layer, or use fewer stages. {works}")
    return PipelineSplit(tuple(stage.count("t") for stage in stages), ranks)


def _unrolled(layout: str) -> str:
    """Expand repetitions and drop commas and blanks, as megatron-core does."""

    def copies(match: re.Match[str]) -> str:
        if int(match.group(2)) > _MOST_COPIES:
            raise ConfigError(f"parallel.pipeline_model_parallel_layout={layout!r}: *{match.group(2)} is too many.")
        return match.group(1) * int(match.group(2))

    text = re.sub(r"[,\s]", "", layout)
    return re.sub(r"(.)\*(\d+)", copies, re.sub(r"\(([^)]+)\)\*(\d+)", copies, text))
