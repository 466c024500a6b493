"""Gradually rising sparsity during training: "To prune, or not to prune", arXiv 1710.01878, eq. 1.

Differs from the paper: a removed weight is zero when masks are computed again, scores lowest, and
stays removed. Which parts help and how the sparsity is spread over the blocks is decided once,
before the first rise and at the final sparsity, so that the sparsity of a block never decreases.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from secateur.pruning.schedules import Cubic, Schedule


@dataclass(frozen=True)
class Gradually:
    """Raise the sparsity from 0 to that of the pattern; masks are computed again at every rise.

    Args:
        every_n_steps: Optimiser steps from one rise to the next, and before the first one, 1 or
            more.
        over: Fraction of the steps after which the sparsity is reached, in (0, 1).
        curve: Shape of the curve; `Cubic` if not given, as in the paper.
        after: Fraction of the steps before which nothing is removed, in [0, over).

    Raises:
        ValueError: A setting is outside its range.

    Example: every 10 steps over half of 60, 0.7 is approached in three rises, before steps 10, 20
    and 30: 0.7 (1 - (2/3)^3) = 0.493, 0.7 (1 - (1/3)^3) = 0.674, and 0.7.
    """

    every_n_steps: int
    over: float = 0.5
    curve: Schedule | None = None
    after: float = 0.0

    def __post_init__(self) -> None:
        if self.every_n_steps < 1:
            raise ValueError(f"`every_n_steps` must be 1 or more, got {self.every_n_steps}.")
        if not 0 < self.over < 1:
            raise ValueError(f"`over` must be in (0, 1), got {self.over}.")
        if not 0 <= self.after < self.over:
            raise ValueError(
                f"`after` must be in [0, {self.over}), below `over`, got {self.after}."
            )

    def first_step(self, steps: int) -> int:
        """The step, of `steps`, up to whose rise the sparsity stays 0."""
        return math.floor(self.after * steps / self.every_n_steps) * self.every_n_steps

    def last_step(self, steps: int) -> int:
        """The step, of `steps`, before which the sparsity of the pattern is reached."""
        return math.ceil(self.over * steps / self.every_n_steps) * self.every_n_steps

    def due(self, step: int, steps: int) -> int:
        """The step of the latest rise when a step begins; 0 before the first rise."""
        rise = min(step - step % self.every_n_steps, self.last_step(steps))
        return rise if rise > self.first_step(steps) else 0

    def sparsity(self, rise: int, steps: int, final: float) -> float:
        """Fraction removed after the rise at a step, in [0, final]."""
        first = self.first_step(steps)
        progress = max(0, rise - first) / (self.last_step(steps) - first)
        return final * (self.curve or Cubic())(progress)

    def settings(self) -> str:
        """The settings as text, to compare two schedules."""
        curve = type(self.curve or Cubic()).__name__
        return f"Gradually({self.every_n_steps}, {self.over}, {curve}, {self.after})"
