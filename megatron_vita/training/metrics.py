"""Progress output of rank 0: a progress bar on a terminal, else log lines; TensorBoard events."""

from __future__ import annotations

import logging
import sys
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

from megatron_vita.config import StageConfig
from megatron_vita.training.ledger import LedgerLine

log = logging.getLogger(__name__)


class Progress:
    """Progress output of one stage; on ranks other than 0 every method does nothing. A context manager."""

    def __init__(self, stage: StageConfig, *, start: int, rank: int) -> None:
        """Open progress bar and TensorBoard writer.

        Args:
            stage: logging.log_interval and logging.tensorboard_dir are used.
            start: steps done before a resume.
            rank: global rank.
        """
        self.stage = stage
        self.active = rank == 0
        self.began = time.monotonic()
        self.start = start
        self.bar = tqdm(
            total=stage.train.train_iters,
            initial=start,
            desc=stage.name,
            unit="step",
            disable=not (self.active and sys.stderr.isatty()),
            dynamic_ncols=True,
        )
        self.events: Any = None
        if self.active and stage.logging.tensorboard_dir:
            from torch.utils.tensorboard import SummaryWriter  # costs a second to import, so only where it is used

            folder = Path(stage.logging.tensorboard_dir) / stage.name
            self.events = SummaryWriter(str(folder), purge_step=start + 1)

    def step(self, line: LedgerLine) -> None:
        """Report one finished step."""
        if not self.active:
            return
        shown = "no labels" if line.loss is None else f"loss {line.loss:.4f}"
        self.bar.set_postfix_str(shown, refresh=False)
        self.bar.update(1)
        last = line.iteration == self.stage.train.train_iters
        if not sys.stderr.isatty() and (line.iteration % self.stage.logging.log_interval == 0 or last):
            self._log_line(line, shown)
        if self.events:
            values = {
                "loss": line.loss,
                "grad_norm": line.grad_norm,
                "lr": line.lr,
                "tokens_per_second": line.num_tokens / line.seconds,
                "labelled_tokens": line.num_labels,
            }
            for name, value in values.items():
                if value is not None:
                    self.events.add_scalar(name, value, line.iteration)

    def _log_line(self, line: LedgerLine, shown: str) -> None:
        total = self.stage.train.train_iters
        rate = (line.iteration - self.start) / max(time.monotonic() - self.began, 1e-9)
        norm = "" if line.grad_norm is None else f"  grad norm {line.grad_norm:.3f}"
        left = (total - line.iteration) / rate
        log.info(
            "%s %*d/%d  %s%s  lr %.2e  %.1f step/s  %.0f tokens/s  %.0f s left",
            self.stage.name,
            len(str(total)),
            line.iteration,
            total,
            shown,
            norm,
            line.lr,
            rate,
            line.num_tokens / line.seconds,
            left,
        )

    def validation(self, iteration: int, loss: float) -> None:
        """Report the validation loss measured after step `iteration`."""
        if self.active:
            log.info("%s step %d: validation loss %.4f", self.stage.name, iteration, loss)
            if self.events:
                self.events.add_scalar("validation_loss", loss, iteration)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()
        if self.events:
            self.events.close()
