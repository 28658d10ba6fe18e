"""Tests that load a model into the test process come last."""

from __future__ import annotations

import pytest

LAST = ("test_evaluate", "test_evaluate_again", "test_evaluate_sweep")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A process that was a gloo rank once cannot fork ranks (they die in new_group), and the other rooms do."""
    items.sort(key=lambda item: item.path.parent.name == "evaluation" and item.path.stem in LAST)
