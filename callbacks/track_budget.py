"""Log the expected and hard budget, and warn early if the target will not be reached."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from secateur.callbacks._after_step import AfterStep
from secateur.pruning.protocols import LearnsMasks, learns_masks
from secateur.pruning.sites import split

_LOOKS = 10  # at least, while masks are learned


class TrackBudget(AfterStep):
    """Log expected and hard budget, widths per kind of site, and the fraction of undecided gates.

    The final selection always meets the budget; but if the soft gates are far from it, the exported
    model differs from the trained one. A warning is given once, after half of the mask-learning
    steps, if the expected budget differs from its target and its trend will not reach it in time. A
    resumed run continues from the last two log entries before it.

    Args:
        every_n_steps: Most optimiser steps between two log entries, 1 or more; there are at least
            ten entries while masks are learned, the last one at the end.
        tolerance: Distance of the expected kept fraction from its target above which to warn, above
            0.

    Raises:
        ValueError: A setting is outside its range.
    """

    def __init__(self, every_n_steps: int = 50, tolerance: float = 0.05) -> None:
        if every_n_steps < 1:
            raise ValueError(f"`every_n_steps` must be 1 or more, got {every_n_steps}.")
        if tolerance <= 0:
            raise ValueError(f"`tolerance` must be above 0, got {tolerance}.")
        self.every_n_steps, self.tolerance = every_n_steps, tolerance
        self._seen: list[tuple[int, float]] = []
        self._warned = False

    # Not as state of the callback, which Lightning misses where a checkpoint is only measured.
    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Store the last two looks: step and expected kept fraction."""
        checkpoint["budget_seen"] = self._seen

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Go on from the looks of a checkpoint."""
        self._seen = [*checkpoint.get("budget_seen", [])]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check at once that the module learns masks."""
        learns_masks(pl_module, "TrackBudget")

    def after_step(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log every `every_n_steps` optimiser steps."""
        step, module = trainer.global_step, learns_masks(pl_module, "TrackBudget")
        every = min(self.every_n_steps, max(1, module.mask_steps // _LOOKS))
        if (step % every and step != module.mask_steps) or step in (s for s, _ in self._seen):
            return  # not yet, or before this run was resumed
        probability = split(module.keep_probability(), module.sites)
        expected = float(module.table.fraction(torch.stack([p.sum() for p in probability])))
        hard = torch.stack([(p >= 0.5).sum() for p in probability])
        figures = {
            "budget/expected": expected,
            "budget/hard": float(module.table.fraction(hard.double())),
            "budget/undecided": _undecided(torch.cat(probability)),
        }
        for name in dict.fromkeys(site.name for site in module.sites):
            kept = [
                float(p.mean())
                for p, site in zip(probability, module.sites, strict=True)
                if site.name == name
            ]
            figures[f"widths/{name}"] = sum(kept) / len(kept)
        pl_module.log_dict(figures)
        self._warn(trainer, module, expected)

    def _warn(self, trainer: Trainer, module: LearnsMasks, expected: float) -> None:
        step, total = trainer.global_step, module.mask_steps
        self._seen = [*self._seen[-1:], (step, expected)]
        if len(self._seen) < 2 and step < total:  # no trend yet
            return
        distance = expected - module.keep_target
        if self._warned or not total <= 2 * step <= 2 * total or abs(distance) <= self.tolerance:
            return
        (step_before, before), (_, now) = self._seen[0], self._seen[-1]
        trend = (now - before) / max(1, step - step_before) * (total - step)
        if abs(now + trend - module.budget.keep) <= self.tolerance:
            return
        self._warned = True
        rank_zero_warn(
            f"At step {step} of {total} the gates are expected to keep {expected:.3f} of the cost, "
            f"the target is {module.keep_target:.3f}, and at this rate it will not be reached. "
            "Raise `trainer.max_steps`, anneal over fewer steps, or use ExactBudget; the export "
            "meets the budget, but its masks were not trained at it."
        )


def _undecided(probability_N: Tensor) -> float:
    """Fraction of gates with 0.1 < P(keep) < 0.9."""
    return float(((probability_N > 0.1) & (probability_N < 0.9)).float().mean())
