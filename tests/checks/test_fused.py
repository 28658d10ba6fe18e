"""Checks of fused kernels: they say what is not there, fail when something differs, and survive a broken package."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_vita.checks import fused

without_accelerator = pytest.mark.skipif(torch.cuda.is_available(), reason="says what is missing on CPU")


@without_accelerator
def test_what_is_not_there_is_named_and_does_not_pass() -> None:
    results = {name: check() for name, check in fused.checks()}
    assert len(results) >= 6
    assert set(results.values()) == {fused.NOT_INSTALLED}


def test_kernels_that_need_no_package_agree_with_their_references() -> None:
    assert fused._check_torch_norm() == fused.OK
    assert fused._check_adam() == fused.OK


@pytest.mark.parametrize("wrong", [1.5, float("nan")])
def test_a_difference_is_found_and_named(wrong: float) -> None:
    right = torch.ones(3)
    assert fused.compare({"same": (right, right)}) == fused.OK
    found = fused.compare({"same": (right, right), "output": (right * wrong, right)})
    assert found.startswith("output differs by")


def test_a_broken_package_is_an_answer() -> None:
    def broken() -> Any:
        raise ImportError("libcudart.so.13")

    assert fused._guarded(True, broken)() == "ImportError: libcudart.so.13"
