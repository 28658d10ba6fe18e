"""Ranges of numbers, checked before anything divides by one."""

from __future__ import annotations

from typing import Any

from megatron_vita.errors import ConfigError


def at_least(low: float, section: str, settings: Any, *names: str) -> None:
    """Refuse a number below `low`; a setting that is None keeps its default and passes.

    Raises:
        ConfigError: naming the setting and the smallest value that is allowed.
    """
    for name in names:
        value = getattr(settings, name)
        if value is not None and not value >= low:
            raise ConfigError(f"{section}.{name}={value} must be at least {low:g}.")


def positive(section: str, settings: Any, *names: str) -> None:
    """Refuse a number that is not above 0; a setting that is None keeps its default and passes.

    Raises:
        ConfigError: naming the setting.
    """
    for name in names:
        value = getattr(settings, name)
        if value is not None and not value > 0:
            raise ConfigError(f"{section}.{name}={value} must be above 0.")
