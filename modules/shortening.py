"""End a run sooner than planned: what that changes in the trainer, and how it is recorded.

A record is a dictionary: the step at which the run was shortened, and every setting that changed,
before and after.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning.pytorch import Trainer

Record = dict[str, Any]


def end_at(trainer: Trainer, max_steps: int) -> None:
    """Let training end after `max_steps` optimiser steps in all."""
    trainer.fit_loop.epoch_loop.max_steps = max_steps


def reschedule(trainer: Trainer) -> None:
    """Compute the learning rates of the next step again, after a schedule has changed."""
    for config in trainer.lr_scheduler_configs:
        schedule: Any = config.scheduler  # LambdaLR
        groups, rates = schedule.optimizer.param_groups, schedule.base_lrs
        for group, rate, factor in zip(groups, rates, schedule.lr_lambdas, strict=True):
            group["lr"] = rate * factor(schedule.last_epoch)


def asked_before(records: Sequence[Record], max_steps: int) -> Record | None:
    """The record of a run that was told to settle now, if the settings are still those from before.

    Args:
        records: All records of the run.
        max_steps: The present setting.
    """
    last = records[-1] if records else {}
    return last if "settled_at" in last and last["max_steps_before"] == max_steps else None
