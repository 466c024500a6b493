"""Let masks settle before their time when the program is told to."""

from __future__ import annotations

import signal
import threading
from typing import Any

from lightning.pytorch import LightningModule, Trainer

from secateur.callbacks._after_step import AfterStep
from secateur.pruning.protocols import learns_masks


class SettleNow(AfterStep):
    """Learn masks no longer once SIGUSR2 arrives on any rank: they settle, and the rest follows.

    The model is cut after the present step, and as many steps train it as were planned; log,
    checkpoints and model card record it. Send it by `kill -USR2 PID`, or under SLURM by
    `scancel --signal=USR2 JOB`. The command line adds this callback by itself.
    """

    def __init__(self) -> None:
        self._asked = False
        self._before: Any = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check at once that the module learns masks."""
        learns_masks(pl_module, "SettleNow")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record the signal from now on; only in the main thread, other threads change nothing."""
        self._step = trainer.global_step
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGUSR2, self._note)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR2})  # see program.py

    def after_step(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let the masks settle if any rank has been told to; ranks agree on it."""
        if trainer.strategy.reduce_boolean_decision(self._asked, all=False):
            self._asked = False
            learns_masks(pl_module, "SettleNow").settle_now()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Restore the former handler."""
        self._restore()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Restore the former handler: not sooner, since by default the signal ends a program."""
        self._restore()

    def _restore(self) -> None:
        if self._before is not None:
            signal.signal(signal.SIGUSR2, self._before)
            self._before = None

    def _note(self, *_: Any) -> None:
        self._asked = True
