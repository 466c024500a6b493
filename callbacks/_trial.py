"""Recognise a trial run."""

from __future__ import annotations

from lightning.pytorch import Trainer


def is_trial(trainer: Trainer) -> bool:
    """Test whether `fast_dev_run` is set: such a run writes no results."""
    return bool(trainer.fast_dev_run)  # type: ignore[attr-defined] # set by a helper of Trainer
