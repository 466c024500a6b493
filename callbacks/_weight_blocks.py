"""Finished blocks while weights are pruned: where they are stored, and a progress bar."""

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
    """The store of finished blocks; it keeps those of an interrupted run of the same pruning.

    Args:
        folder: Folder of all prunings of a run, one after the other.
        settings: All that the result of the pruning depends on.
        step: The optimiser step before which the pruning takes place.

    Raises:
        ValueError: At step 0, the folder holds the blocks of another run.
    """
    settings = {**settings, "step": step}
    try:
        return BlockStore(folder, settings)
    except ValueError:
        if step == 0:
            raise
        delete_blocks(folder)  # of an earlier gradual pruning, or from before the checkpoint
        return BlockStore(folder, settings)


@contextmanager
def shown_progress(trainer: Trainer) -> Iterator[OnBlock]:
    """A progress bar over the blocks; lines in the log if progress bars are switched off."""
    if trainer.progress_bar_callback is None:
        yield lambda done, total: rank_zero_info(f"Pruned block {done} of {total}.")
        return
    columns = (TextColumn("Pruning blocks"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeRemainingColumn()) as bar:
        task = bar.add_task("", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
