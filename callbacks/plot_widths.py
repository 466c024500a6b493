"""Draw which widths would be kept, as training goes on."""

from __future__ import annotations

from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer

from secateur.callbacks._output import check_folder
from secateur.callbacks._trial import is_trial
from secateur.pruning.measure.plots import plot_widths
from secateur.pruning.protocols import learns_masks


class PlotWidths(Callback):
    """Write a picture of the kept widths per block after every validation and at the end of fit.

    Args:
        folder: Where the pictures go, below `trainer.default_root_dir`.

    Raises:
        ValueError: `folder` is elsewhere, or a run keeps something else there.
    """

    def __init__(self, folder: str = "plots") -> None:
        check_folder("PlotWidths", folder, "plots")
        self.folder = folder

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check at once that the module learns masks."""
        learns_masks(pl_module, "PlotWidths")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw the plan as it would be exported now."""
        if not trainer.sanity_checking:
            self._draw(trainer, pl_module, f"widths_step_{trainer.global_step:06d}.png")

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw the final plan."""
        self._draw(trainer, pl_module, "widths.png")

    def _draw(self, trainer: Trainer, pl_module: LightningModule, name: str) -> None:
        plan = learns_masks(pl_module, "PlotWidths").plan()
        if trainer.is_global_zero and not is_trial(trainer):
            plot_widths(plan, Path(trainer.default_root_dir) / self.folder / name)
