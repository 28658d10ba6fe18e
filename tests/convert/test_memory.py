"""Conversion of a model that is larger than the memory in processes that may not use more memory than was promised."""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_vita import checkpoint
from megatron_vita.checkpoint import folder as folders
from megatron_vita.checkpoint.boxes import Slices, extent, whole
from megatron_vita.checkpoint.parts import Part
from megatron_vita.checkpoint.writer import Planner, Writer, write
from tests.convert.synthetic import write_wide_qwen2

_MIB = 1 << 20
_RANKS = 4
_LIMITED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_DATA, (int(sys.argv[1]),) * 2)
from megatron_vita.convert import cli
sys.exit(cli.main(sys.argv[2:]))
"""


def convert(limit: int, *arguments: object, maps: tuple[Path, ...] = ()) -> None:
    """Run the converter in a process that may have `limit` bytes of memory of its own, imports included. What threads
    reserve and do not use counts, too.

    Args:
        maps: folders whose weights it maps. The system counts them although they are no memory of its own, but the
            disk's, so that much is added.
    """
    name, *flags = map(str, arguments)
    limit += sum(path.stat().st_size for folder in maps for path in folder.rglob("*") if path.is_file())
    command = [sys.executable, "-c", _LIMITED, str(limit), name, "--workers", "2", *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the system enforces it nowhere else")
def test_memory_stays_below_a_gibibyte(tmp_path: Path) -> None:
    """The promise allows the two largest tensors beside it, which the blocks of these conversions do not need."""
    size = write_wide_qwen2(tmp_path / "hf", 1.1, width=2048)
    limit = 960 * _MIB
    assert limit < size / 1.3, "a model that fits as a whole would prove nothing"
    hf, imported, exported = tmp_path / "hf", tmp_path / "ckpt", tmp_path / "again"
    export = ["--output", exported, "--format", "llm"]
    convert(limit, "import", "--llm", hf, "--output", imported, maps=(hf,))
    convert(limit, "verify", hf, imported, maps=(hf,))
    other_type = ["--dtype", "float16", "--workers", "8"]  # as many threads as there may be, each with values at hand
    convert(limit, "export", "--checkpoint", imported, *export, *other_type)
    shutil.rmtree(exported)
    write_as_training_does(imported, tmp_path / "run")
    convert(limit, "export", "--checkpoint", tmp_path / "run", *export)
    shutil.rmtree(tmp_path / "run")
    convert(limit, "verify", hf, exported, maps=(hf, exported))
    shutil.rmtree(exported)
    write_as_megatron_does(imported, hf, tmp_path / "megatron")
    shutil.rmtree(imported)
    megatron = tmp_path / "megatron"
    convert(limit, "import", "--model", megatron, "--output", imported, "--tokenizer", hf, maps=(megatron,))


def _box(name: str, shape: tuple[int, ...], rank: int) -> Slices:
    """What one tensor-parallel rank has."""
    axis, box = 1 if "linear_proj" in name or "linear_fc2" in name else 0, list(whole(shape))
    box[axis] = slice(shape[axis] * rank // _RANKS, shape[axis] * (rank + 1) // _RANKS)
    return tuple(box)


def write_as_training_does(source: Path, root: Path) -> None:
    """A step of several ranks, with one layer's moments of the optimizer."""
    tensors, state = checkpoint.read_tensors(source), checkpoint.read_state(source)
    parts = []
    for name in tensors:
        shape = tensors.shape(name)
        boxes = [whole(shape)] if "norm" in name else [_box(name, shape, rank) for rank in range(_RANKS)]
        for box in boxes:
            place = torch.empty(extent(box), dtype=tensors.dtype(name), device="meta")
            parts.append(Part(name, shape, box, place))
            if "layers.0." in name:
                parts.append(Part(f"optimizer.{name}", shape, box, place.float()))

    def read(key: str, box: Slices) -> Tensor:
        values = tensors.read(key.removeprefix("optimizer."), box)
        return values.float() if key.startswith("optimizer.") else values

    staging = folders.staging_folder(root, 7)
    writer = Writer(
        staging,
        start=lambda: folders.start_staging(root, 7),
        publish=lambda pieces: (
            folders.write_files(staging, state, source / "iter_0000000/tokenizer", pieces),
            folders.publish(root, 7),
        ),
        durable=False,
        finite=False,
    )
    write(Planner(parts, source=read), writer, {}, alone=True)


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
            box = None if "norm" in name else _box(name, tensors.shape(name), rank)
            weights[name.removeprefix("language_model.")] = tensors.read(name, box)
        (root / f"mp_rank_{rank:02d}").mkdir()
        torch.save({"args": settings, "model": weights}, root / f"mp_rank_{rank:02d}/model_optim_rng.pt")
