"""`verify` says of any two models, in any two formats, which tensors differ and by how much."""

from __future__ import annotations

import itertools
import math
import shutil
from collections.abc import Iterator
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from megatron_vita.checkpoint.tensors import TensorsInMemory
from megatron_vita.convert import cli, verify
from megatron_vita.convert.verify import Difference, compare_tensors
from tests.convert import publishers
from tests.convert.megatron_files import write_layout, write_long_vita
from tests.ranks import run_ranks

pytest.importorskip("transformers")

INF, NAN = math.inf, math.nan


def compare(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], workers: int = 2) -> list[Difference]:
    return list(compare_tensors(TensorsInMemory(a), TensorsInMemory(b), workers=workers))


def one(a: torch.Tensor, b: torch.Tensor) -> Difference:
    (found,) = compare({"w": a}, {"w": b})
    return found


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("a", "b", "worst", "note"),
    [
        ([1.0, -2.0], [1.0, -2.0], 0.0, ""),
        ([1.0, -2.0], [1.0, -2.5], 0.5, ""),
        ([0.0, 1.0], [-0.0, 1.0], 0.0, "zeros of other signs"),
        ([INF, -INF], [INF, -INF], 0.0, ""),
        ([INF, 1.0], [INF, 2.0], 1.0, ""),
        ([INF, 1.0], [-INF, 1.0], INF, ""),
        ([INF, 1.0], [3.0, 1.0], INF, ""),
        ([NAN, 1.0], [NAN, 1.0], NAN, ""),
        ([-NAN, 1.0], [-NAN, 1.0], NAN, ""),
        ([NAN, 1.0], [0.0, 1.0], NAN, ""),
        ([NAN, INF], [0.0, 1.0], NAN, ""),
        ([], [], 0.0, ""),
    ],
)
def test_every_kind_of_number(dtype: torch.dtype, a: list[float], b: list[float], worst: float, note: str) -> None:
    found = one(torch.tensor(a, dtype=dtype), torch.tensor(b, dtype=dtype))
    assert (found.max_difference, found.note) == (pytest.approx(worst, nan_ok=True), note)
    assert found.equal == (worst == 0.0 and not note)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_no_bits_of_infinity_are_taken_for_no_number(dtype: torch.dtype) -> None:
    """All bits there are, of the upper half of a float32."""
    bits = torch.arange(1 << 16, dtype=torch.int32)
    every = (bits << 16).view(dtype) if dtype == torch.float32 else bits.to(torch.int16).view(dtype)
    for part in every.split(1 << 7):
        assert math.isnan(one(part, part).max_difference) == bool(part.isnan().any())


def test_types_and_shapes_that_differ_are_told() -> None:
    a = torch.randn(3, 5, dtype=torch.bfloat16)
    found = one(a, a.float())
    assert (found.max_difference, found.note, found.equal) == (0.0, "types bfloat16 and float32", False)
    assert found.cosine == pytest.approx(1.0, abs=1e-12)
    assert one(a.float() + 1, a).max_difference == 1.0
    found = one(a, a[:2])
    assert (found.max_difference, found.cosine, found.note) == (INF, 0.0, "shapes (3, 5) and (2, 5)")
    found = one(torch.tensor(2.0), torch.tensor(-1.0))
    assert (found.max_difference, found.cosine) == (3.0, -1.0)
    assert one(torch.zeros(2), torch.ones(2)).cosine == 0.0


def test_tensors_of_one_model_only_are_told_in_order() -> None:
    a, b = torch.ones(2), torch.zeros(2)
    found = compare({"x": a, "y": a, "z": a}, {"z": b, "v": a, "x": a, "u": a})
    assert [(one.name, one.max_difference, one.note) for one in found] == [
        ("x", 0.0, ""),
        ("y", INF, "only in the first model"),
        ("z", 1.0, ""),
        ("v", INF, "only in the second model"),
        ("u", INF, "only in the second model"),
    ]
    assert compare({}, {}) == []


@settings(max_examples=60, deadline=None)
@given(
    shapes=st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=3), min_size=1, max_size=4),
    changes=st.integers(0, 3),
    seed=st.integers(0, 1000),
    workers=st.integers(1, 3),
)
def test_the_figures_are_those_of_whole_tensors(shapes: list[list[int]], changes: int, seed: int, workers: int) -> None:
    """Also where a tensor is compared in many blocks of which some are equal."""
    generator = torch.Generator().manual_seed(seed)
    a = {str(n): torch.randn(shape, generator=generator) for n, shape in enumerate(shapes)}
    b = {name: one.clone() for name, one in a.items()}
    for name in b:
        for _ in range(changes if b[name].numel() else 0):
            at = int(torch.randint(0, b[name].numel(), (), generator=generator))
            b[name].view(-1)[at] += torch.randn((), generator=generator)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verify, "_BLOCK_BYTES", 64)
        patch.setattr(verify, "_ELEMENTS", 4)
        found = compare(a, b, workers)
    for name, difference in zip(a, found, strict=True):
        x, y = a[name].double().view(-1), b[name].double().view(-1)
        if not x.numel() or torch.equal(x, y):
            assert (difference.max_difference, difference.cosine, difference.equal) == (0.0, 1.0, True)
            continue
        assert difference.max_difference == (x - y).abs().max()
        assert difference.cosine == pytest.approx(float(x @ y / x.norm() / y.norm()), abs=1e-12)


@pytest.fixture(scope="module")
def formats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One Long-VITA in every format, below `pictures`; its decoder in every format, below `text`."""
    root = tmp_path_factory.mktemp("formats")
    (root / "pictures").mkdir()
    (root / "text").mkdir()
    published = write_long_vita(root)
    publishers.write_tokenizer(root / "tokenizer")

    def run(*arguments: object) -> None:
        assert cli.main([str(one) for one in arguments]) == 0

    run("import", "--model", published, "--output", root / "pictures/checkpoint")
    for name in ("long_vita", "internvl"):
        run(
            "export", "--checkpoint", root / "pictures/checkpoint", "--format", name,
            "--output", root / "pictures" / name,
        )  # fmt: skip
    run("import", "--llm", root / "llm", "--output", root / "text/checkpoint")
    run("export", "--checkpoint", root / "text/checkpoint", "--format", "llm", "--output", root / "text/llm")
    for kind, hf in (("pictures", published), ("text", root / "llm")):
        for mindspeed in (False, True):
            folder = root / kind / ("mindspeed" if mindspeed else "megatron")
            write_layout(folder, hf, ranks=8, mindspeed=mindspeed)
            shutil.copy(hf / "config.json", folder)
            for file in (root / kind / "checkpoint/iter_0000000/tokenizer").iterdir():
                shutil.copy(file, folder)
    return root


def _pairs(folder: Path) -> Iterator[tuple[str, str]]:
    for a, b in itertools.combinations(sorted(folder.iterdir()), 2):
        yield str(a), str(b)


def _run_all(folder: Path, flags: list[str]) -> None:
    for a, b in _pairs(folder):
        assert cli.main(["verify", a, b, *flags]) == 0, (a, b)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["pictures", "text"])
@pytest.mark.parametrize("flags", [[], ["--logits"]], ids=["tensors", "logits"])
def test_one_model_in_all_formats_is_one_model(formats: Path, kind: str, flags: list[str]) -> None:
    run_ranks(1, _run_all, formats / kind, flags)


def test_logits_that_cannot_be_compared_are_refused_before_any_work(
    formats: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["verify", str(formats / "pictures/long_vita"), str(formats / "text/llm"), "--logits"]) == 2
    printed = capsys.readouterr()
    assert "has a vision tower" in printed.err
    assert "B/s" not in printed.err
    assert not printed.out
