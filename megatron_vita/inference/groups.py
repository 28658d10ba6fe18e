"""Process groups of a program that runs in one process."""

from __future__ import annotations

import os

from megatron_vita.config import ParallelConfig
from megatron_vita.errors import ConfigError
from megatron_vita.parallel.groups import Groups, build_groups, destroy_groups, init_distributed

_groups: Groups | None = None


def one_rank_groups() -> Groups:
    """The groups of a world of one rank; shared by all engines of the process.

    Raises:
        ConfigError: started by torchrun on several ranks.
    """
    global _groups
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("chat and evaluation run in one process. Start without torchrun.")
    init_distributed()
    from megatron.core import parallel_state

    if parallel_state.model_parallel_is_initialized():
        if _groups is not None and parallel_state.get_tensor_model_parallel_group() is _groups.collection.tp:
            return _groups
        destroy_groups()
    _groups = build_groups(ParallelConfig())
    return _groups
