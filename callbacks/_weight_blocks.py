"""The blocks of a pruning while they are worked on: where they are kept, what is shown."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from secateur.pruning.weights.loop import Progress as OnBlock
from secateur.pruning.weights.store import BlockStore, delete_blocks


def store_of(folder: Path, settings: Mapping[str, Any], step: int) -> BlockStore:
    """Where finished blocks are kept; those of this very pruning are there already.

    Args:
        folder: Of all prunings of a run, one after the other.
        settings: What decides the pruning.
        step: The step of the run before which it is made.

    Raises:
        ValueError: At step 0, the folder holds the blocks of another run.
    """
    settings = {**settings, "step": step}
    try:
        return BlockStore(folder, settings)
    except ValueError:
        if step == 0:
            raise
        delete_blocks(folder)  # of an earlier rise, or of one before the checkpoint
        return BlockStore(folder, settings)


@contextmanager
def shown_progress(trainer: Trainer) -> Iterator[OnBlock]:
    """A bar that moves with every block; lines in the log where bars are switched off."""
    if trainer.progress_bar_callback is None:
        yield lambda done, total: rank_zero_info(f"Pruned block {done} of {total}.")
        return
    columns = (TextColumn("Pruning blocks"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeRemainingColumn()) as bar:
        task = bar.add_task("", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
