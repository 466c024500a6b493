"""Log the expected and hard budget, and warn early if the target will not be reached."""

from __future__ import annotations

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from secateur.pruning.protocols import LearnsMasks, learns_masks
from secateur.pruning.sites import split


class TrackBudget(Callback):
    """Log expected and hard budget, widths per kind of site, and the fraction of undecided gates.

    The final selection always meets the budget; but if the soft gates are far from it, the exported
    model differs from the trained one. A warning is given once, after half of the mask-learning
    steps, if the expected budget differs from its target and its trend will not reach it in time.

    Args:
        every_n_steps: Optimiser steps between two log entries, 1 or more.
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

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check at once that the module learns masks."""
        learns_masks(pl_module, "TrackBudget")

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: object,
        batch: object,
        batch_idx: int,
    ) -> None:
        """Log every `every_n_steps` optimiser steps."""
        step = trainer.global_step
        if step % self.every_n_steps or step in (seen for seen, _ in self._seen):
            return  # not due, or a further batch of the same optimiser step
        module = learns_masks(pl_module, "TrackBudget")
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
        if len(self._seen) < 2:  # no trend yet, as after resuming
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
            "Train longer, anneal over fewer steps, or use ExactBudget; the exported model "
            "meets the budget, but its masks were not trained at it."
        )


def _undecided(probability_N: Tensor) -> float:
    """Fraction of gates with 0.1 < P(keep) < 0.9."""
    return float(((probability_N > 0.1) & (probability_N < 0.9)).float().mean())
