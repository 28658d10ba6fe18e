"""Settings of all tests: no property test depends on time."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("no deadline", deadline=None)  # Hypothesis' default of 200 ms fails on a busy machine
settings.load_profile("no deadline")
