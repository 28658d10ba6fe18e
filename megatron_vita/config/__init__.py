"""Settings: one frozen, self-validating dataclass per section of a recipe. Does not import torch."""

from megatron_vita.config.data import LAYOUTS, DataConfig
from megatron_vita.config.load import check_keys, load_model, load_run, read_yaml, to_dict
from megatron_vita.config.model import ModelConfig, ProjectorConfig
from megatron_vita.config.parallel import ParallelConfig
from megatron_vita.config.rope_scaling import rope_scaling_json, with_rope_scaling
from megatron_vita.config.run import RunConfig, StageConfig
from megatron_vita.config.train import CheckpointConfig, LoggingConfig, OptimizerConfig, TrainConfig
from megatron_vita.config.vision import IMAGE_NORMS, VisionConfig

__all__ = [
    "IMAGE_NORMS",
    "LAYOUTS",
    "CheckpointConfig",
    "DataConfig",
    "LoggingConfig",
    "ModelConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "ProjectorConfig",
    "RunConfig",
    "StageConfig",
    "TrainConfig",
    "VisionConfig",
    "check_keys",
    "load_model",
    "load_run",
    "read_yaml",
    "rope_scaling_json",
    "to_dict",
    "with_rope_scaling",
]
