"""The time of a run in plain steps, measured during the run.

A plain step is a forward pass with labels and a backward pass to the embeddings of the same frozen
stock model, on a batch of windows. Steps are timed before, during and after the run, in the
same process, so that other load of the machine affects both alike; the cost of a run is its CPU
seconds over their median.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from benchmarks.disp_step import plain_step
from secateur.pruning.blocks.refit import LayerRefit, refit

BATCH_SIZE = 8


class PlainSteps(Callback):
    """Time a run, from reading the model to the final model, without the export.

    Put it before ExportModel in the list of callbacks, and after the others.

    Args:
        model: Folder of the model.
        every_n_steps: Training steps between two plain ones, 1 or more.
        batch_size: Windows of a plain step, 1 or more.
        dtype: Type of the weights of a plain step, such as bfloat16.
    """

    def __init__(
        self,
        model: str,
        every_n_steps: int = 50,
        batch_size: int = BATCH_SIZE,
        dtype: str = "float32",
    ) -> None:
        self.folder, self.every_n_steps = model, every_n_steps
        self.batch_size, self.dtype = batch_size, getattr(torch, dtype)
        self.times: list[float] = []
        self._start = self.total = 0.0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Time a few plain steps, and start the clock."""
        self._step = plain_step(self.folder, self.dtype)
        windows = trainer.datamodule.train_windows  # type: ignore[attr-defined]
        self._input_BT = torch.stack([windows[place] for place in range(self.batch_size)])
        self._time(4)
        self._start = time.process_time()

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Time a plain step every few steps, with the clock stopped."""
        if trainer.global_step % self.every_n_steps == 0:
            begin = time.process_time()
            self._time(2)
            self._start += time.process_time() - begin

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock, and time a few plain steps."""
        self.total = time.process_time() - self._start
        self._time(4)

    @property
    def steps(self) -> float:
        """The time of the run in plain steps."""
        return self.total / self.step_seconds

    @property
    def step_seconds(self) -> float:
        """Median time of a plain step, seconds on the CPU."""
        return statistics.median(self.times)

    def _time(self, count: int) -> None:
        for number in range(count):
            begin = time.process_time()
            self._step(self._input_BT)
            if number:  # the first step after other work is slower
                self.times.append(time.process_time() - begin)


def clock_of(trainer: Trainer) -> PlainSteps:
    """The clock among the callbacks of a trainer."""
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    return next(callback for callback in callbacks if isinstance(callback, PlainSteps))


@contextmanager
def timed_refits() -> Iterator[list[float]]:
    """The CPU seconds of every refit in a `with` block."""
    seconds: list[float] = []

    def timed(*args: Any) -> list[LayerRefit]:
        begin = time.process_time()
        records = refit(*args)
        seconds.append(time.process_time() - begin)
        return records

    with mock.patch("secateur.pruning.blocks.refit.refit", timed):
        yield seconds
