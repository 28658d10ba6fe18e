"""Sections `train`, `optimizer`, `checkpoint` and `logging`."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_vita.config.bounds import at_least, positive
from megatron_vita.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """Duration, batch size and frozen parts of one stage."""

    micro_batch_size: int = 1
    """Packs of one micro-batch, concatenated into one packed sequence."""
    global_batch_size: int = 1
    """Packs of one optimizer step, over all ranks."""
    train_iters: int = 1
    """Optimizer steps of the stage."""
    seed: int = 1234
    """Seed of data order and weight initialisation."""
    bf16: bool = False
    """bfloat16 weights and activations with float32 master weights; otherwise float32."""
    freeze_vision_model: bool = False
    """Freeze the vision tower."""
    freeze_vision_projection: bool = False
    """Freeze the projector."""
    freeze_language_model: bool = False
    """Freeze the decoder with its embedding and output layer."""
    eval_interval: int = 0
    """Steps between validations on data.valid_data_path; 0: only before the first and after the last step."""
    eval_iters: int = 8
    """Global batches per validation."""

    def __post_init__(self) -> None:
        at_least(1, "train", self, "micro_batch_size", "global_batch_size", "train_iters", "eval_iters")
        at_least(0, "train", self, "seed", "eval_interval")
        if self.freeze_vision_model and self.freeze_vision_projection and self.freeze_language_model:
            raise ConfigError("train: tower, projector and decoder are all frozen, so nothing would train.")


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerConfig:
    """AdamW and its learning-rate schedule."""

    lr: float = 1e-3
    """Peak learning rate."""
    min_lr: float = 0.0
    """Learning rate at the last step."""
    lr_decay_style: str = "cosine"
    """`cosine`, `linear` or `constant`."""
    lr_warmup_fraction: float = 0.03
    """Fraction of the steps over which the learning rate rises linearly from 0 to lr."""
    weight_decay: float = 0.0
    """AdamW's weight decay; not applied to biases and 1-D parameters."""
    adam_beta1: float = 0.9
    """Decay of the first moment."""
    adam_beta2: float = 0.999
    """Decay of the second moment."""
    adam_eps: float = 1e-8
    """Added to the root of the second moment."""
    clip_grad: float = 1.0
    """Gradient clipping by global norm; 0: no clipping."""
    vision_model_lr_mult: float = 1.0
    """Learning-rate multiplier of the vision tower (Long-VITA stage 2: 0.1)."""
    vision_model_lr_decay_rate: float = 1.0
    """Layer-wise learning-rate decay of the vision tower, a factor per layer below the top (Long-VITA stage 2: 0.9)."""

    def __post_init__(self) -> None:
        at_least(0, "optimizer", self, "weight_decay", "adam_beta1", "adam_beta2", "clip_grad")
        positive("optimizer", self, "adam_eps")
        for name in ("adam_beta1", "adam_beta2"):
            if getattr(self, name) >= 1:
                raise ConfigError(f"optimizer.{name}={getattr(self, name)} must be below 1.")
        if self.lr_decay_style not in ("cosine", "linear", "constant"):
            raise ConfigError(f"optimizer.lr_decay_style={self.lr_decay_style!r}: choose cosine, linear or constant.")
        if self.lr <= 0 or self.min_lr < 0 or self.min_lr > self.lr:
            raise ConfigError(f"optimizer: need 0 <= min_lr <= lr and lr > 0, got lr={self.lr}, min_lr={self.min_lr}.")
        if not 0 <= self.lr_warmup_fraction < 1:
            raise ConfigError(f"optimizer.lr_warmup_fraction={self.lr_warmup_fraction} must lie in [0, 1).")
        if not 0 < self.vision_model_lr_decay_rate <= 1 or self.vision_model_lr_mult < 0:
            raise ConfigError("optimizer: vision_model_lr_decay_rate must lie in (0, 1] and vision_model_lr_mult >= 0.")


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointConfig:
    """Checkpoint folder, interval and initial weights."""

    save: str = ""
    """Folder of the run; each stage saves in save/<stage name>."""
    save_interval: int = 0
    """Steps between checkpoints; 0: only after the last step."""
    pretrained_checkpoint: str | None = None
    """Initial weights of the first stage: a checkpoint (e.g. of convert_ckpt.py import), or the Hugging Face folder of
    a whole model; None: random initialisation."""
    keep_optimizer: bool = True
    """Save the optimizer state too; without it a stage cannot be resumed exactly."""
    async_save: bool = True
    """Copy the state to host memory and write it while training goes on; otherwise training waits for each save."""
    keep_last: int = 3
    """Newest checkpoints of a stage that are kept; older ones are deleted. 0: all are kept."""
    keep_every: int = 0
    """Checkpoints of every so many steps are kept for good; 0: of none."""
    on_damage: str = "fallback"
    """What happens when a stage's newest checkpoint is damaged. `fallback`: it is renamed (iter_0000100.damaged), and
    the run goes on from the newest one that is whole; `fail`: the run is refused."""

    def __post_init__(self) -> None:
        at_least(0, "checkpoint", self, "save_interval", "keep_last", "keep_every")
        if self.on_damage not in ("fallback", "fail"):
            raise ConfigError(f"checkpoint.on_damage={self.on_damage!r}: choose fallback or fail.")


@dataclass(frozen=True, kw_only=True, slots=True)
class LoggingConfig:
    """Log lines and TensorBoard."""

    log_interval: int = 1
    """Steps between log lines."""
    tensorboard_dir: str | None = None
    """Folder of TensorBoard events; None: no events."""

    def __post_init__(self) -> None:
        at_least(1, "logging", self, "log_interval")
