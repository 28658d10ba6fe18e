"""Plain values that torch.save has pickled (an optimizer's and a schedule's), read so that nothing runs."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from megatron_vita.errors import CheckpointError


def load_pickled(stream: Any, where: Path) -> Any:
    """torch.load that builds tensors and plain values only, whatever the environment says.

    Args:
        stream: of bytes that can be sought.

    Raises:
        CheckpointError: the content names anything else, or is damaged.
    """
    import torch

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(stream, map_location="cpu", weights_only=True)
    except Exception as error:
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise CheckpointError(f"{where}: refused, {first_line}. Do not use this checkpoint.") from None
