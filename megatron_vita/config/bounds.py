"""Range checks for numeric settings."""

from __future__ import annotations

from typing import Any

from megatron_vita.errors import ConfigError


def at_least(low: float, section: str, settings: Any, *names: str) -> None:
    """Check `value >= low` for the named fields of a config dataclass; None (use the default) passes, NaN does not.

    Args:
        low: smallest allowed value.
        section: of the recipe, for the message.
        settings: the dataclass instance.
        names: its fields.

    Raises:
        ConfigError: names the setting and the smallest allowed value.
    """
    for name in names:
        value = getattr(settings, name)
        if value is not None and not value >= low:
            raise ConfigError(f"{section}.{name}={value} must be at least {low:g}.")


def positive(section: str, settings: Any, *names: str) -> None:
    """Check `value > 0` for the named fields of a config dataclass; None (use the default) passes, NaN does not.

    Raises:
        ConfigError: names the setting.
    """
    for name in names:
        value = getattr(settings, name)
        if value is not None and not value > 0:
            raise ConfigError(f"{section}.{name}={value} must be above 0.")
