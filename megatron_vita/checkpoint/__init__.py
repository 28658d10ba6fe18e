"""Checkpoints: saved from any layout, loaded into any other, whole or not at all; read offline in one process."""

from megatron_vita.checkpoint.folder import TOKENIZER_FOLDER, latest, resolve
from megatron_vita.checkpoint.offline import read_tensors, tensor_digests, write_tensors
from megatron_vita.checkpoint.saver import Saver, save
from megatron_vita.checkpoint.sharded import load_tensors, load_training, load_weights, read_state
from megatron_vita.checkpoint.state import RunState
from megatron_vita.checkpoint.tensors import LazyTensors

__all__ = [
    "TOKENIZER_FOLDER",
    "LazyTensors",
    "RunState",
    "Saver",
    "latest",
    "load_tensors",
    "load_training",
    "load_weights",
    "read_state",
    "read_tensors",
    "resolve",
    "save",
    "tensor_digests",
    "write_tensors",
]
