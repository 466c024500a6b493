"""Finished blocks while weights are pruned: where they are stored."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

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
