"""Export the smaller model at the end of fit."""

from __future__ import annotations

import sys
from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from secateur.callbacks._output import check_folder
from secateur.callbacks._trial import is_trial
from secateur.pruning.commands import typed_command
from secateur.pruning.protocols import exports


class ExportModel(Callback):
    """Finalise, export, verify and measure at the end of fit.

    Args:
        folder: Where the model goes, below `trainer.default_root_dir`. An earlier export of ours is
            replaced; any other existing folder is refused at the start.

    Raises:
        ValueError: `folder` is elsewhere, or a run keeps something else there.
    """

    def __init__(self, folder: str = "model") -> None:
        check_folder("ExportModel", folder, "model")
        self.folder = folder

    def check_first(self, trainer: Trainer, module: LightningModule) -> None:
        """Check before training that the export can be written.

        Raises:
            ValueError: The folder holds something else, or the module cannot export.
        """
        exports(module, "ExportModel").check_export_folder(self._path(trainer))

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Make the same check without our command line."""
        if stage == "fit":
            self.check_first(trainer, pl_module)

    def phases(self, trainer: Trainer) -> list[tuple[int, str]]:
        """The export, after the last step."""
        last = int(trainer.estimated_stepping_batches)
        return [(last, "export the model, prove it, and measure it beside the base model")]

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Export what was learned."""
        module = exports(pl_module, "ExportModel")
        if is_trial(trainer):
            rank_zero_info("`fast_dev_run` only tries the steps of a run and exports no model.")
            return
        if trainer.global_step < (planned := trainer.estimated_stepping_batches):
            rank_zero_warn(
                f"Training ended after {trainer.global_step} of {planned} steps: the exported "
                "model differs from that of the complete run."
            )
        try:
            module.export(self._path(trainer), typed_command(sys.argv))
        except Exception as error:
            error.add_note(
                "Training is complete. With a SaveCheckpoint callback, the same command and "
                "`--ckpt_path last` repeat the export without training."
            )
            raise
        if trainer.is_global_zero:
            rank_zero_info(_whereabouts(self._path(trainer)))

    def _path(self, trainer: Trainer) -> Path:
        return Path(trainer.default_root_dir) / self.folder


def _whereabouts(folder: Path) -> str:
    """Where the model is, and the line that loads it."""
    trusted = ", trust_remote_code=True" if any(folder.glob("modeling_*.py")) else ""
    report = folder.parent / "report.html"
    told = f" Report: {report}." if report.is_file() else ""
    return (
        f"The model is in {folder}.{told} Load it with\n"
        f'  AutoModelForCausalLM.from_pretrained("{folder}"{trusted})'
    )
