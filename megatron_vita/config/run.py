"""The merged settings of a training stage and of a run, and the rules between sections."""

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
    """All settings of one training stage: the recipe's common sections with the stage's overrides applied."""

    name: str = "train"
    """Name of the stage; its checkpoints and ledger are in checkpoint.save/<name>."""
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    parallel: ParallelConfig = ParallelConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig = TrainConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    logging: LoggingConfig = LoggingConfig()

    def check(self, world_size: int) -> None:
        """Check the rules between sections, before any process group is created.

        Raises:
            ConfigError: names the violated rule and the nearest values that satisfy it.
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
        """Check that model, sequence length and global batch divide over the ranks as `parallel` says.

        Raises:
            ConfigError: names the violated rule and the nearest values that satisfy it.
        """
        pp, cp = self.parallel.pipeline_model_parallel_size, self.parallel.context_parallel_size
        where = f"stage {self.name!r}: "
        model = self.model
        try:
            dp = self.parallel.data_parallel_size(world_size)
            self.parallel.check_heads(model.num_query_groups)
            split = pipeline_split(self.parallel, model.num_layers)
            self.check_tensor_parallel()
        except ConfigError as error:
            raise ConfigError(where + str(error)) from None
        self._check_recompute(where, split.layers)
        length = self.data.seq_length * self.train.micro_batch_size
        sp = self.parallel.sequence_shards
        fewer = "change the latter"
        if length % sp == 0:
            fewer = f"context_parallel_size {_nearest_divisors(length // sp, cp)}"
        name = "data.seq_length x train.micro_batch_size"
        _divides(where, name, length, "context x sequence-parallel ranks", cp * sp, fewer)
        per_step = self.train.micro_batch_size * dp
        _divides(
            where, "train.global_batch_size", self.train.global_batch_size, "micro_batch_size x data ranks", per_step
        )
        if split.virtual > 1:  # megatron-core's interleaved schedule runs micro-batches in groups of one per rank
            micro_batches = self.train.global_batch_size // per_step
            rule = "micro-batches of a data rank (global_batch_size / micro_batch_size / data ranks)"
            _divides(where, rule, micro_batches, "parallel.pipeline_model_parallel_size", pp)

    def check_tensor_parallel(self) -> None:
        """Check that heads and MLP widths divide over the tensor ranks.

        Raises:
            ConfigError: names the one that does not, and the nearest sizes that work.
        """
        model, vision, tp = self.model, self.model.vision, self.parallel.tensor_model_parallel_size
        split = {
            "model.num_attention_heads": model.num_attention_heads,
            "model.num_query_groups": model.num_query_groups,
            "model.ffn_hidden_size": model.ffn_hidden_size,
        }
        if vision is not None and vision.tensor_parallel:
            split["model.vision.num_attention_heads"] = vision.num_attention_heads
            split["model.vision.ffn_hidden_size"] = vision.ffn_hidden_size
        for name, value in split.items():
            if value % tp:
                works = _nearest_divisors(math.gcd(*split.values()), tp)
                raise ConfigError(
                    f"{name}={value} is not a multiple of parallel.tensor_model_parallel_size={tp}. "
                    f"Use tensor_model_parallel_size {works}."
                )

    def _check_recompute(self, where: str, layers: tuple[int, ...]) -> None:
        """Check that uniform recomputation's unit divides the layers of every pipeline stage."""
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
    """A run: its training stages, in order."""

    stages: tuple[StageConfig, ...]

    def check(self, world_size: int) -> None:
        """Check all stages, so that no later stage fails on its settings after earlier stages have been trained.

        Raises:
            ConfigError: as StageConfig.check; duplicate stage names; a pretrained_checkpoint that no stage would read.
        """
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
    """Raise ConfigError unless `by` divides `value`; suggests the nearest multiples and `instead`."""
    if value % by:
        low, high = value // by * by, -(-value // by) * by
        nearest = f"{low} or {high}" if low else f"{high}"
        raise ConfigError(f"{where}{name}={value} is not a multiple of {by_name}={by}. Use {nearest}, or {instead}.")


def _nearest_divisors(value: int, to: int) -> str:
    """The divisors of `value` nearest to `to`, below and above, for an error message."""
    small = [one for one in range(1, math.isqrt(value) + 1) if value % one == 0]
    divisors = {*small, *(value // one for one in small)}
    near = [
        max((one for one in divisors if one < to), default=None),
        min((one for one in divisors if one > to), default=None),
    ]
    return " or ".join(str(one) for one in near if one is not None)
