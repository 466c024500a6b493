"""Lower the budget, and the temperature of the gates, while masks are learned."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from secateur.pruning.files.settings import refuse_other
from secateur.pruning.protocols import learns_masks
from secateur.pruning.schedules import Cubic, Linear, Schedule


class AnnealSparsity(Callback):
    """Move the target from dense to the budget, and the temperature from its start to its end.

    Both are pure functions of the optimiser step, so a resumed run follows the same curves.

    Args:
        over: Fraction of the steps that learn masks after which the target has reached the budget,
            in [0, 1]; 0 applies the full budget from the first step, as in the paper.
        curve: Shape of the curve of the target.
        end_temperature: Temperature at the end of mask learning, above 0; None leaves it unchanged.
        temperature_curve: Shape of the curve of the temperature.

    Raises:
        ValueError: A setting is outside its range.
    """

    def __init__(
        self,
        over: float = 0.4,
        curve: Schedule | None = None,
        end_temperature: float | None = None,
        temperature_curve: Schedule | None = None,
    ) -> None:
        if not 0 <= over <= 1:
            raise ValueError(f"`over` must be in [0, 1], got {over}.")
        if end_temperature is not None and end_temperature <= 0:
            raise ValueError(f"`end_temperature` must be above 0, got {end_temperature}.")
        self.over, self.curve = over, curve or Cubic()
        self.end_temperature = end_temperature
        self.temperature_curve = temperature_curve or Linear()
        self._total = 0
        self._start_temperature = 0.0
        self._saved: dict[str, Any] | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note where the curves begin and how many steps they have."""
        module = learns_masks(pl_module, "AnnealSparsity")
        self._total = module.mask_steps
        self._start_temperature = module.temperature
        if self.end_temperature is not None:  # let the gates refuse an invalid temperature now
            module.temperature = self.end_temperature
            module.temperature = self._start_temperature

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse to resume with different curves; the number of steps is known only now.

        Raises:
            ValueError: The checkpoint was written under other settings.
        """
        if self._saved is not None:
            saved = dict(self._saved)
            if isinstance(saved.get("steps"), int):  # the module knows of a shorter run
                saved["steps"] = min(saved["steps"], self._total)
            refuse_other(saved, self.state_dict(), "AnnealSparsity")

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Set target and temperature of this step."""
        module = learns_masks(pl_module, "AnnealSparsity")
        progress = min(1.0, trainer.global_step / max(1, self._total))
        module.annealed = self.curve(min(1.0, progress / self.over)) if self.over else 1.0
        if self.end_temperature is not None:
            start, end = self._start_temperature, self.end_temperature
            module.temperature = start + (end - start) * self.temperature_curve(progress)

    def state_dict(self) -> dict[str, Any]:
        """The settings; the curves are functions of the step."""
        return {
            "over": self.over,
            "curve": type(self.curve).__name__,
            "end_temperature": self.end_temperature,
            "temperature_curve": type(self.temperature_curve).__name__,
            "steps": self._total,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Store the settings of the checkpoint until training starts."""
        self._saved = state_dict
