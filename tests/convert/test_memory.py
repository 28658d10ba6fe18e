"""Conversion of models of several gigabytes in processes that may not use more memory than was promised."""

from __future__ import annotations

import argparse
import json
import math
import shutil
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from megatron_vita.checkpoint.storage import WrittenSlice, write_metadata, write_pieces

from megatron_vita import checkpoint
from megatron_vita.checkpoint.integrity import write_integrity
from megatron_vita.convert import open_model
from tests.convert.synthetic import write_wide_qwen2

_MIB = 1 << 20
_RANKS = 4
_LIMITED = """
import resource, sys

def status(key):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(key))

resource.setrlimit(resource.RLIMIT_DATA, (int(sys.argv[1]),) * 2)
from megatron_vita.convert import cli
code = cli.main(sys.argv[2:])
print("peak", status("VmHWM"))
sys.exit(code)
"""


def convert(limit: int, *arguments: object) -> int:
    """Run the converter in a process that may have `limit` bytes of memory of its own, imports included. What threads
    reserve and do not use counts, too; what it maps of files does not, and that is code.

    Returns:
        The peak of its resident set, in bytes.
    """
    name, *flags = map(str, arguments)
    command = [sys.executable, "-c", _LIMITED, str(limit), name, "--workers", "2", *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return int(done.stdout.split()[-1])


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_stays_below_a_gibibyte_and_two_tensors(tmp_path: Path) -> None:
    size = write_wide_qwen2(tmp_path / "hf", 2.0)
    assert size > 2.4e9
    tensors = open_model(tmp_path / "hf").tensors
    largest = sorted(math.prod(tensors.shape(name)) * 2 for name in tensors)[-2:]
    bound = (1 << 30) + sum(largest)
    assert bound < size / 1.3, "a model that fits as a whole would prove nothing"
    # The system enforces much less than the promise, and for an import less than one tensor.
    hf, imported, exported = tmp_path / "hf", tmp_path / "ckpt", tmp_path / "again"
    peaks = [
        convert(256 * _MIB, "import", "--llm", hf, "--output", imported),
        convert(448 * _MIB, "export", "--checkpoint", imported, "--output", exported, "--format", "llm"),
        convert(256 * _MIB, "verify", hf, exported),
        convert(448 * _MIB, "verify", hf, imported),
    ]
    shutil.rmtree(exported)
    other_type = ["--dtype", "float16", "--workers", "8"]  # as many threads as there may be, each with values at hand
    peaks.append(
        convert(bound, "export", "--checkpoint", imported, "--output", exported, "--format", "llm", *other_type)
    )
    assert peaks[-1] < 1280 * _MIB, peaks[-1] // _MIB
    shutil.rmtree(exported)
    write_as_training_does(imported, tmp_path / "run")
    peaks.append(
        convert(bound, "export", "--checkpoint", tmp_path / "run", "--output", exported, "--format", "llm"),
    )
    shutil.rmtree(tmp_path / "run")
    write_as_megatron_does(imported, hf, tmp_path / "megatron")
    shutil.rmtree(imported)
    peaks.append(
        convert(256 * _MIB, "import", "--model", tmp_path / "megatron", "--output", imported, "--tokenizer", hf)
    )
    assert max(peaks) < bound, [peak // _MIB for peak in peaks]


def _part(name: str, tensor: torch.Tensor, rank: int) -> tuple[torch.Tensor, tuple[int, ...]]:
    """(what one tensor-parallel rank has, where it begins)."""
    axis = 1 if "linear_proj" in name or "linear_fc2" in name else 0
    parts = tensor.tensor_split(_RANKS, axis)
    first = sum(one.shape[axis] for one in parts[:rank])
    return parts[rank].clone(memory_format=torch.contiguous_format), (0,) * axis + (first,) + (0,) * (
        tensor.dim() - axis - 1
    )


def write_as_training_does(source: Path, root: Path) -> None:
    """A step of several ranks, with one layer's moments of the optimizer."""
    tensors, old, step = checkpoint.read_tensors(source), source / "iter_0000000", root / "iter_0000007"
    step.mkdir(parents=True)
    for name in ("run.json", "common.pt", "metadata.json"):
        shutil.copy(old / name, step / name)
    shutil.copytree(old / "tokenizer", step / "tokenizer")
    written, digests = [], defaultdict(list)
    for rank in range(_RANKS):
        pieces = []
        for name in tensors:
            if "norm" not in name or not rank:
                whole = tensors[name]
                part, offsets = (whole, (0,)) if "norm" in name else _part(name, whole, rank)
                pieces.append(WrittenSlice(name, tuple(whole.shape), offsets, part))
                if "layers.0." in name:
                    pieces.append(WrittenSlice(f"optimizer.{name}", tuple(whole.shape), offsets, part.float()))
        written += write_pieces(step, f"__{rank}_0.distcp", pieces)
    write_metadata(step, written)
    for one in written:
        digests[one.file].append((one.length, one.digest))
    write_integrity(step, digests)


def write_as_megatron_does(source: Path, hf: Path, root: Path) -> None:
    """One file a rank. Gate and up are not interleaved by rank: only sizes matter here."""
    tensors, config = checkpoint.read_tensors(source), json.loads((hf / "config.json").read_text())
    settings = argparse.Namespace(
        num_layers=config["num_hidden_layers"],
        hidden_size=config["hidden_size"],
        ffn_hidden_size=config["intermediate_size"],
        num_attention_heads=config["num_attention_heads"],
        num_query_groups=config["num_key_value_heads"],
        norm_epsilon=1e-6,
        rotary_base=1000000,
        max_position_embeddings=4096,
        untie_embeddings_and_output_weights=True,
        swiglu=True,
        normalization="RMSNorm",
    )
    root.mkdir()
    shutil.copy(hf / "config.json", root / "config.json")
    for rank in range(_RANKS):
        weights = {}
        for name in tensors:
            whole = tensors[name]
            weights[name.removeprefix("language_model.")] = whole if "norm" in name else _part(name, whole, rank)[0]
        (root / f"mp_rank_{rank:02d}").mkdir()
        torch.save({"args": settings, "model": weights}, root / f"mp_rank_{rank:02d}/model_optim_rng.pt")
