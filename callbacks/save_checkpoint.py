"""Keep what is needed to resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities import rank_zero_warn

from pruning.checkpoints import FOLDER, newest_first


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
        if not self.last_model_path and (found := newest_first(_folder(trainer))):
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
        for old in newest_first(_folder(trainer))[self.keep :]:
            trainer.strategy.remove_checkpoint(old)


def _folder(trainer: Trainer) -> Path:
    return Path(trainer.default_root_dir) / FOLDER
