"""Settings of all tests: no property test depends on time, and ranks can be forked."""

from __future__ import annotations

import os

from hypothesis import settings

settings.register_profile("no deadline", deadline=None)  # Hypothesis' default of 200 ms fails on a busy machine
settings.load_profile("no deadline")

# torch.cuda.is_available, which libraries call when they are imported, then does not initialise CUDA.
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
