"""megatron_vita: a 3D-parallel trainer for long-context vision-language models, built on megatron-core."""

__version__ = "0.1.0"
