"""Keep what is needed to resume, and find it again."""

from __future__ import annotations

import re
import zipfile
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

_NAME = re.compile(r"step=(\d+)\.ckpt")


class SaveCheckpoint(Checkpoint):
    """Save every few steps, and at the end, into `<trainer.default_root_dir>/checkpoints`.

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
        self.every_n_steps, self.keep = every_n_steps, keep
        self.last_model_path = ""
        """The newest checkpoint of this run, under the name that Lightning looks for."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say so if the run starts over where an earlier one could be resumed."""
        self.last_model_path = str(trainer.ckpt_path or "")
        if not self.last_model_path and (found := _newest_first(_folder(trainer))):
            rank_zero_warn(
                f"{found[0]} is of an earlier run. This run starts from scratch, and its "
                "checkpoints will take the place of the earlier ones; to go on with the earlier "
                "run, stop now and add `--ckpt_path last`."
            )

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Save every `every_n_steps` optimiser steps."""
        if trainer.global_step and trainer.global_step % self.every_n_steps == 0:
            self._save(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save what training ended with, from which an export can be repeated."""
        self._save(trainer)

    def _save(self, trainer: Trainer) -> None:
        path = str(_folder(trainer) / f"step={trainer.global_step}.ckpt")
        if path == self.last_model_path:  # a later batch of the same optimiser step
            return
        trainer.save_checkpoint(path, weights_only=False)
        self.last_model_path = path
        for old in _newest_first(_folder(trainer))[self.keep :]:
            trainer.strategy.remove_checkpoint(old)


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest readable checkpoint below an output folder, None if there is none at all.

    A damaged file is passed over with a warning that names it.

    Raises:
        ValueError: There are checkpoints and none of them is readable.
    """
    found = _newest_first(folder / "checkpoints")
    for path in found:
        if is_readable(path):
            rank_zero_info(f"Resuming from {path}")
            return path
        rank_zero_warn(f"{path} is damaged (truncated?); trying the one before it.")
    if found:
        raise ValueError(
            f"None of the {len(found)} checkpoints in {folder / 'checkpoints'} can be read."
        )
    return None


def check_readable(path: Path) -> None:
    """Check a checkpoint before anything is loaded.

    Raises:
        ValueError: It is missing or damaged; names the newest good one beside it.
    """
    if is_readable(path):
        return
    what = "is damaged (truncated?)" if path.exists() else "does not exist"
    good = [other for other in _newest_first(path.parent) if is_readable(other)]
    cure = f"resume from {good[0]}" if good else "there is no good one beside it; start again"
    raise ValueError(f"`ckpt_path` {path} {what}; {cure}.")


def is_readable(path: Path) -> bool:
    """Whether a checkpoint is whole: every member of its archives is there with its checksum."""
    archives = sorted(path.rglob("*.pt")) if path.is_dir() else [path]  # sharded: a folder of them
    try:
        return bool(archives) and all(zipfile.ZipFile(a).testzip() is None for a in archives)
    except (OSError, zipfile.BadZipFile):
        return False


def _folder(trainer: Trainer) -> Path:
    return Path(trainer.default_root_dir) / "checkpoints"


def _newest_first(folder: Path) -> list[Path]:
    """Checkpoints by the time they were written: an earlier run may have got further in steps."""
    steps = {
        path: int(match[1])
        for path in folder.glob("step=*.ckpt")
        if (match := _NAME.fullmatch(path.name))
    }
    return sorted(steps, key=lambda path: (path.stat().st_mtime_ns, steps[path]), reverse=True)
