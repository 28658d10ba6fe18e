"""Settings of all tests: no property test depends on time, and ranks can be forked."""

from __future__ import annotations

import gc
import os

from hypothesis import settings

settings.register_profile("no deadline", deadline=None)  # Hypothesis' default of 200 ms fails on a busy machine
settings.load_profile("no deadline")

# torch.cuda.is_available, which libraries call when they are imported, then does not initialise CUDA.
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")

# What the parent has imported is not a forked rank's garbage: a full collection would traverse it and copy its pages.
os.register_at_fork(after_in_child=gc.freeze)


def pytest_collection_finish() -> None:
    """Here, too, collections pass over what was imported."""
    gc.freeze()
