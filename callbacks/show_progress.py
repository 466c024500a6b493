"""Tell in a log how training goes, and have the metrics on disk while it does."""

from __future__ import annotations

import math
import time
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from rich import get_console

from secateur.callbacks._after_step import AfterStep
from secateur.pruning.progress import EVERY_SECONDS, FIRST_SECONDS, duration
from secateur.pruning.protocols import HasPhases

_FLUSH_SECONDS = 60.0


class ShowProgress(AfterStep):
    """Write a line every half minute where no bar is seen; write metrics to disk every minute.

    Before a run begins, its phases are listed, and after the first seconds of training when those
    that come later begin.

    A line has the step, the figures of the progress bar (loss, fraction kept) and the time that is
    left of training, by the mean time of the steps so far. Metrics are written with every
    checkpoint, too: a run that is killed leaves what they were. The command line adds this callback
    by itself.
    """

    def __init__(self) -> None:
        self._phases: list[tuple[int, str]] = []

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """List the phases of the run."""
        if not math.isfinite(trainer.estimated_stepping_batches):  # what needs an end refuses it
            return
        # Lightning gives a trainer its callbacks at run time, which types do not show.
        tell: list[Any] = [*trainer.callbacks, pl_module]  # type: ignore[attr-defined]
        phases = [
            phase for one in tell if isinstance(one, HasPhases) for phase in one.phases(trainer)
        ]
        self._phases = sorted(phases, key=lambda phase: phase[0])
        if phases:
            lines = [f"  {place}. {text}" for place, (_, text) in enumerate(self._phases, start=1)]
            rank_zero_info("\n".join(["Phases of this run:", *lines]))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at the clock."""
        self._begun = now = time.monotonic()
        self._first = self._step = trainer.global_step
        self._next_line, self._next_flush = now + FIRST_SECONDS, now + _FLUSH_SECONDS

    def after_step(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Tell, and write, if it is time."""
        now = time.monotonic()
        if now >= self._next_line:
            is_first = self._next_line == self._begun + FIRST_SECONDS
            self._next_line = now + EVERY_SECONDS
            pace = (now - self._begun) / (self._step - self._first)
            if trainer.progress_bar_callback is None or not get_console().is_terminal:
                rank_zero_info(self._line(trainer, pace))
            if is_first and (ahead := self._ahead(pace)):
                rank_zero_info(f"At the pace of these steps, {ahead}.")
        if now >= self._next_flush:
            self._next_flush = now + _FLUSH_SECONDS
            self._flush(trainer)

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Write the metrics up to the checkpoint."""
        self._flush(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write all metrics before the export, which draws them."""
        self._flush(trainer)

    def _ahead(self, pace: float) -> str:
        """When the later phases begin, by the seconds of a step; of those that begin at the same
        step the first one.
        """
        begins: dict[int, int] = {}
        for place, (step, _) in enumerate(self._phases, start=1):
            if step > self._step:
                begins.setdefault(step, place)
        return ", ".join(
            f"phase {place} begins in {duration(pace * (step - self._step))}"
            for step, place in begins.items()
        )

    def _line(self, trainer: Trainer, pace: float) -> str:
        total = int(trainer.estimated_stepping_batches)
        left = pace * (total - self._step)
        figures = [f"{name} {value:.4g}" for name, value in trainer.progress_bar_metrics.items()]
        return ", ".join([f"Step {self._step} of {total}", *figures, f"{duration(left)} left."])

    def _flush(self, trainer: Trainer) -> None:
        for logger in trainer.loggers:
            logger.save()
