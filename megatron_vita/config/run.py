"""The merged settings of one stage, and the rules between sections."""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_vita.config.data import DataConfig
from megatron_vita.config.model import ModelConfig
from megatron_vita.config.parallel import ParallelConfig
from megatron_vita.config.pipeline import pipeline_split
from megatron_vita.config.train import CheckpointConfig, LoggingConfig, OptimizerConfig, TrainConfig
from megatron_vita.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class StageConfig:
    """One stage of a run: the common sections with this stage's overlay applied."""

    name: str = "train"
    """Name of the stage; its checkpoints and ledger lie in checkpoint.save/<name>."""
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    parallel: ParallelConfig = ParallelConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig = TrainConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    logging: LoggingConfig = LoggingConfig()

    def check(self, world_size: int) -> None:
        """Refuse, before any process group exists, settings that cannot work together.

        Raises:
            ConfigError: naming the rule that is broken and the nearest values that keep it.
        """
        self.check_layout(world_size)
        where, model = f"stage {self.name!r}: ", self.model
        if model.vocab_size < 1:
            raise ConfigError(where + "model.vocab_size is not set. Copy it from the decoder's config.json.")
        if self.data.seq_length > model.max_position_embeddings:
            raise ConfigError(
                f"{where}data.seq_length={self.data.seq_length} exceeds model.max_position_embeddings="
                f"{model.max_position_embeddings}. Raise the latter."
            )
        if model.vision is None and self.train.freeze_language_model:
            raise ConfigError(where + "a text-only model with train.freeze_language_model has nothing to train.")
        for name, value in (("data.data_path", self.data.data_path), ("checkpoint.save", self.checkpoint.save)):
            if not value:
                raise ConfigError(f"{where}{name} is not set. Give it in the recipe or on the command line.")

    def check_layout(self, world_size: int) -> None:
        """Refuse a model, rows or a global batch that this many ranks cannot share out as `parallel` says.

        Raises:
            ConfigError: naming the rule that is broken and the nearest values that keep it.
        """
        tp, pp, cp = (
            self.parallel.tensor_model_parallel_size,
            self.parallel.pipeline_model_parallel_size,
            self.parallel.context_parallel_size,
        )
        where = f"stage {self.name!r}: "
        model = self.model
        try:
            dp = self.parallel.data_parallel_size(world_size)
            self.parallel.check_heads(model.num_query_groups)
            split = pipeline_split(self.parallel, model.num_layers)
        except ConfigError as error:
            raise ConfigError(where + str(error)) from None
        self._check_tensor_parallel(where, tp)
        self._check_recompute(where, split.layers)
        row = self.data.seq_length * self.train.micro_batch_size
        sp = self.parallel.sequence_shards
        fewer = f"context_parallel_size {_nearest_divisors(row // sp, cp)}" if row % sp == 0 else "change the latter"
        name = "data.seq_length x train.micro_batch_size"
        _divides(where, name, row, "context x sequence-parallel ranks", cp * sp, fewer)
        per_step = self.train.micro_batch_size * dp
        _divides(
            where, "train.global_batch_size", self.train.global_batch_size, "micro_batch_size x data ranks", per_step
        )
        if split.virtual > 1:  # megatron-core's interleaved schedule runs micro-batches in groups of one per rank
            micro_batches = self.train.global_batch_size // per_step
            rule = "micro-batches of a data rank (global_batch_size / micro_batch_size / data ranks)"
            _divides(where, rule, micro_batches, "parallel.pipeline_model_parallel_size", pp)

    def _check_tensor_parallel(self, where: str, tp: int) -> None:
        """Heads and inner widths are dealt evenly."""
        model, vision = self.model, self.model.vision
        dealt = {
            "model.num_attention_heads": model.num_attention_heads,
            "model.num_query_groups": model.num_query_groups,
            "model.ffn_hidden_size": model.ffn_hidden_size,
        }
        if vision is not None and vision.tensor_parallel:
            dealt["model.vision.num_attention_heads"] = vision.num_attention_heads
            dealt["model.vision.ffn_hidden_size"] = vision.ffn_hidden_size
        for name, value in dealt.items():
            if value % tp:
                works = _nearest_divisors(math.gcd(*dealt.values()), tp)
                raise ConfigError(
                    f"{where}{name}={value} is not a multiple of parallel.tensor_model_parallel_size={tp}. "
                    f"Use tensor_model_parallel_size {works}."
                )

    def _check_recompute(self, where: str, layers: tuple[int, ...]) -> None:
        """Uniform recomputation cuts every pipeline stage, of so many `layers`, into units of equal size."""
        unit = self.parallel.recompute_num_layers
        if self.parallel.recompute_method != "uniform" or unit is None:
            return
        if uneven := [count for count in layers if count % unit]:
            raise ConfigError(
                f"{where}parallel.recompute_method=uniform recomputes {unit} layers at a time, but a pipeline stage "
                f"has {uneven[0]}. Use recompute_num_layers {_nearest_divisors(math.gcd(*layers), unit)}, or "
                "recompute_method block."
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """A whole run: its stages, in order."""

    stages: tuple[StageConfig, ...]

    def check(self, world_size: int) -> None:
        """Check every stage, so that stage 4 cannot fail on its layout after stages 1 to 3 have trained."""
        names = [stage.name for stage in self.stages]
        if len(set(names)) != len(names):
            raise ConfigError(f"stages: the names {names} are not all different, but each names a folder.")
        first = self.stages[0].checkpoint.pretrained_checkpoint
        for stage in self.stages:
            stage.check(world_size)
            if stage.checkpoint.pretrained_checkpoint not in (None, first):
                raise ConfigError(
                    f"stage {stage.name!r}: checkpoint.pretrained_checkpoint would not be read, because a stage starts "
                    "from the one before it. Set it for the first stage, or make this stage a recipe of its own."
                )


def _divides(where: str, name: str, value: int, by_name: str, by: int, instead: str = "change the latter") -> None:
    """Raise unless `by` divides `value`, naming the nearest multiples, and what else would do."""
    if value % by:
        low, high = value // by * by, -(-value // by) * by
        nearest = f"{low} or {high}" if low else f"{high}"
        raise ConfigError(f"{where}{name}={value} is not a multiple of {by_name}={by}. Use {nearest}, or {instead}.")


def _nearest_divisors(value: int, to: int) -> str:
    """The nearest divisor of `value` below `to` and the nearest above, where there is one."""
    divisors = [one for one in range(1, value + 1) if value % one == 0]
    near = [
        max((one for one in divisors if one < to), default=None),
        min((one for one in divisors if one > to), default=None),
    ]
    return " or ".join(str(one) for one in near if one is not None)
