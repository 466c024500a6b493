"""Keep what is needed to resume, and find it again."""

from __future__ import annotations

import re
import zipfile
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

_NAME = re.compile(r"step=(\d+)\.ckpt")


class SaveCheckpoint(ModelCheckpoint):
    """Save every few steps into `<trainer.default_root_dir>/checkpoints`; keep the newest.

    A checkpoint holds what trains, the optimiser, the loops and the position in the data; the
    frozen base model is named by its fingerprint. Files are written whole or not at all.

    Args:
        every_n_steps: Optimiser steps between two checkpoints, 1 or more.
        keep: Number of newest checkpoints that stay, 1 or more.

    Raises:
        ValueError: A setting is outside its range.
    """

    def __init__(self, every_n_steps: int = 500, keep: int = 2) -> None:
        for name, value in (("every_n_steps", every_n_steps), ("keep", keep)):
            if value < 1:
                raise ValueError(f"`{name}` must be 1 or more, got {value}.")
        super().__init__(
            filename="{step}",
            monitor="step",
            mode="max",
            save_top_k=keep,
            every_n_train_steps=every_n_steps,
            enable_version_counter=False,
        )

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Fix the folder, which does not depend on how often a run was started."""
        self.dirpath = str(Path(trainer.default_root_dir) / "checkpoints")
        super().setup(trainer, pl_module, stage)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the last step too, so that what follows training can be repeated without it."""
        super().on_train_end(trainer, pl_module)
        if self._last_global_step_saved != trainer.global_step:
            self._save_topk_checkpoint(trainer, self._monitor_candidates(trainer))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from the folder as it is: it may hold newer files than the checkpoint knew."""
        super().load_state_dict(state_dict | {"dirpath": self.dirpath})


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest readable checkpoint below an output folder, None if there is none at all.

    A damaged file is passed over with a warning that names it.

    Raises:
        ValueError: There are checkpoints and none of them is readable.
    """
    found = {
        int(match[1]): path
        for path in (folder / "checkpoints").glob("step=*.ckpt")
        if (match := _NAME.fullmatch(path.name))
    }
    for step in sorted(found, reverse=True):
        if is_readable(found[step]):
            rank_zero_info(f"Resuming from {found[step]}")
            return found[step]
        rank_zero_warn(f"{found[step]} is damaged (truncated?); trying the one before it.")
    if found:
        raise ValueError(
            f"None of the {len(found)} checkpoints in {folder / 'checkpoints'} can be read."
        )
    return None


def is_readable(path: Path) -> bool:
    """Whether a file is a whole checkpoint archive: every member is there with its checksum."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except (OSError, zipfile.BadZipFile):
        return False
