"""Which checkpoints of a run stay."""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path

from megatron_vita.checkpoint.folder import DELETING, steps

log = logging.getLogger(__name__)


def prune(root: Path, *, keep_last: int, keep_every: int, verified: int) -> None:
    """Delete older checkpoints. What cannot be deleted is left, with a warning. Call on one rank.

    Args:
        keep_last: checkpoints to keep; 0: all.
        keep_every: steps whose multiples are kept for good; 0: none.
        verified: the newest step that is known to be whole, which is never deleted.
    """
    if not keep_last:
        return
    for step in steps(root)[keep_last:]:
        iteration = int(step.name.removeprefix("iter_"))
        if iteration == verified or (keep_every and iteration % keep_every == 0):
            continue
        try:
            going = root / (DELETING + step.name)
            os.replace(step, going)  # in one step, so that no half of it is ever found
            shutil.rmtree(going)
        except OSError as error:
            log.warning("%s: could not be deleted (%s)", step, error)
