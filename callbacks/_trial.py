"""Whether a run only tries its steps."""

from __future__ import annotations

from lightning.pytorch import Trainer


def is_trial(trainer: Trainer) -> bool:
    """Whether `fast_dev_run` is set: such a run leaves nothing behind."""
    return bool(trainer.fast_dev_run)  # type: ignore[attr-defined] # set by a helper of Trainer
