"""What a callback does after optimiser steps, not after every batch."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer


class AfterStep(Callback):
    """Act once after every optimiser step, whatever the number of its batches."""

    _step = -1
    """The last step after which it has acted."""

    @abstractmethod
    def after_step(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Act after an optimiser step."""

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Act, unless this is a further batch of the same optimiser step."""
        if trainer.global_step != self._step:
            self._step = trainer.global_step
            self.after_step(trainer, pl_module)
