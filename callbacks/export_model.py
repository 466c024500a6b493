"""Leave a smaller model behind at the end of fit."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer

from pruning.protocols import exports


class ExportModel(Callback):
    """Finalise, export, verify and measure at the end of fit.

    Args:
        folder: Where the model goes, relative to `trainer.default_root_dir`. An export of ours that
            is there already is replaced; any other folder is left alone and refused at the start.
    """

    def __init__(self, folder: str = "model") -> None:
        self.folder = folder

    def check_first(self, trainer: Trainer, module: LightningModule) -> None:
        """Find out before training whether the export can be written.

        Raises:
            ValueError: The folder holds something else, or the module cannot export.
        """
        exports(module, "ExportModel").check_export_folder(self._path(trainer))

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """The same check for those who do without our command line."""
        if stage == "fit":
            self.check_first(trainer, pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Export what was learned."""
        module = exports(pl_module, "ExportModel")
        try:
            module.export(self._path(trainer), shlex.join(["python", *sys.argv]))
        except (OSError, ValueError) as error:
            error.add_note(
                "Training is complete. With a SaveCheckpoint callback, the same command and "
                "`--ckpt_path last` repeat the export without training."
            )
            raise

    def _path(self, trainer: Trainer) -> Path:
        return Path(trainer.default_root_dir) / self.folder
