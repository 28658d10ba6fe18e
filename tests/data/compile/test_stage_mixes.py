"""The four stage mixes of examples/, compiled from fixtures of all datasets: every record is accounted for."""

from __future__ import annotations

import collections
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_vita.data.shards.manifest import load_manifest
from megatron_vita.data.shards.reader import ShardSet
from megatron_vita.data.sources import load_mix
from tests.data.fixtures import Published, publish_everything
from tests.data.fixtures_kit import Good
from tests.data.kit import tokenizer_folder

ROOT = Path(__file__).parents[3]
STAGES = ROOT / "examples" / "long_vita_14b" / "mixes"
SEQ_LENGTH = {1: 512, 2: 256, 3: 1024, 4: 2048}
SEED = 3
# Rows of the reference's table: group, files, ratio of stages 1 to 4, cap. Its groups are split where sources differ.
REFERENCE: list[tuple[str, int, tuple[float, float, float, float], int | None]] = [
    ("LLaVA$", 1, (0, 0, 0, 0), None),
    ("LLaVA-ReCap$", 3, (1, 1, 0.1, 0.1), None),
    ("ALLaVA", 7, (1, 1, 0.1, 0.1), None),
    ("LVIS$", 1, (0, 1, 0.1, 0.1), None),
    ("ShareGPT4V$", 2, (1, 1, 0.1, 0.1), None),
    ("the_cauldron$", 29, (0, 1, 0.1, 0.1), None),
    ("Docmatix$", 1, (1, 1, 0.1, 0.1), None),
    ("LLaVA-OneVision-Mid-Data", 4, (1, 1, 0.1, 0.1), None),
    ("LLaVA-OneVision-Data", 65, (0, 1, 0.1, 0.1), None),
    ("M4-Instruct-Data", 2, (0, 1, 0.1, 0.1), None),
    ("OpenHermes$", 1, (0, 1, 0.1, 0.1), 300000),
    ("lima$", 1, (0, 1, 0.1, 0.1), None),
    ("databricks-dolly-15k$", 1, (0, 1, 0.1, 0.1), None),
    ("MetaMathQA$", 1, (0, 1, 0.1, 0.1), 100000),
    ("MathInstruct$", 1, (0, 1, 0.1, 0.1), 80000),
    ("orca-math-word-problems-200k$", 1, (0, 1, 0.1, 0.1), 50000),
    ("atlas-math-sets$", 1, (0, 1, 0.1, 0.1), 100000),
    ("goat$", 1, (0, 1, 0.1, 0.1), 30000),
    ("camel-ai$", 1, (0, 1, 0.1, 0.1), 30000),
    ("Long-Instruction-with-Paraphrasing$", 11, (0, 0, 1, 1), None),
    ("Long/", 8, (0, 0, 1, 1), None),
    ("VideoGPT-plus_Training_Dataset$", 11, (0, 1, 0.1, 0.1), None),
    ("Share14/ShareGemini_cap$", 2, (0, 1, 0.1, 0.1), None),
    ("Movie$", 1, (0, 0, 0, 1), None),
    ("Comic-9K$", 1, (0, 0, 1, 1), None),
    ("lmms-lab/LLaVA-Video-178K_", 39, (0, 0, 1, 1), None),
]


def test_the_mixes_are_the_references() -> None:
    base = yaml.safe_load((STAGES / "datasets.yaml").read_text())["dataset"]
    stages = [yaml.safe_load((STAGES / f"stage{number}.yaml").read_text())["dataset"] for number in (1, 2, 3, 4)]
    seen = []
    for prefix, files, ratios, num in REFERENCE:
        exact = prefix.endswith("$")
        groups = [name for name in base if (name == prefix[:-1] if exact else name.startswith(prefix))]
        seen += groups
        assert sum(len(base[name]["data_paths"]) for name in groups) == files, prefix
        for name in groups:
            assert base[name].get("num") == num
            assert "ratio" not in base[name]
            assert tuple(stage[name]["ratio"] for stage in stages) == ratios, name
    assert sorted(seen) == sorted(base)
    assert all(list(stage) == list(base) for stage in stages)


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Published:
    return publish_everything(tmp_path_factory.mktemp("datasets"))


def compiled(published: Published, stage: int, prefix: Path) -> subprocess.CompletedProcess[str]:
    arguments = {
        "data-config": STAGES / f"stage{stage}.yaml", "tokenizer": tokenizer_folder(prefix.parent / "tokenizer"),
        "output": prefix, "seq-length": SEQ_LENGTH[stage], "image-size": 16, "patch-size": 4, "max-tiles": 4,
        "max-frames": 8, "seed": SEED, "workers": 2,
    }  # fmt: skip
    flags = [text for name, value in arguments.items() for text in (f"--{name}", str(value))]
    return subprocess.run(
        [sys.executable, str(ROOT / "tools" / "preprocess_data.py"), *flags],
        capture_output=True, text=True, timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1", "DATASETS": str(published.root)},
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3, 4])
def test_a_stage_compiles_and_its_counts_add_up(
    published: Published, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: int
) -> None:
    monkeypatch.setenv("DATASETS", str(published.root))
    files = load_mix(STAGES / f"stage{stage}.yaml")
    wanted: dict[str, tuple[int, dict[str, int], list[tuple[int, str]]]] = {}
    asked: dict[tuple[str, ...], Any] = {}
    for file in files:
        promise = published.files[file.path]
        assert file.row.name == promise.source
        reader = file.reader(tmp_path / "work")
        offsets = reader.index()
        assert len(offsets) == len(promise.wanted), file.path
        chosen = file.choose(offsets, SEED)[:, 0].tolist()
        codes = [(line, code) for line in chosen if isinstance(code := promise.wanted[line - 1], str)]
        good = sum(isinstance(promise.wanted[line - 1], Good) for line in chosen)
        wanted[file.name] = (good, dict(collections.Counter(code for _, code in codes)), codes)
        one = asked.setdefault(tuple(map(str, file.shards or (file.path,))), [0, 0, file])
        one[0] += len(offsets)
        one[1] += len(chosen)
    for total, taken, file in asked.values():
        assert taken == min(int(total * file.ratio + 1e-9), total if file.num is None else file.num)

    done = compiled(published, stage, tmp_path / "out" / "set")
    assert done.returncode == 0, done.stderr
    manifest = load_manifest(tmp_path / "out" / "set")
    made = {source.name: (source.used, dict(source.rejected)) for source in manifest.sources}
    assert made == {name: (good, codes) for name, (good, codes, _) in wanted.items()}
    assert all(source.read == source.used + sum(source.rejected.values()) for source in manifest.sources)
    rejects = [json.loads(line) for line in (tmp_path / "out" / "set.rejects.jsonl").read_text().splitlines()]
    listed = collections.Counter((one["source"], one["line"], one["code"]) for one in rejects)
    assert listed == collections.Counter((name, *one) for name, (_, _, codes) in wanted.items() for one in codes)
    shards = ShardSet(tmp_path / "out" / "set")
    shards.verify()
    assert manifest.totals["samples"] == sum(good for good, _, _ in wanted.values()) == len(shards.samples)
    assert manifest.totals["rejected"] == len(rejects)
    if stage == 4:
        assert len({file.row.name for file in files}) == 36  # every dataset and variant but mix665k and the old zips
