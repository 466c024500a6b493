"""Schedules of a quantity from its start to its end.

Sources: cubic, "To prune, or not to prune" (arXiv 1710.01878, eq. 1); the others are customary.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod


class Schedule(ABC):
    """A curve from 0 at the start to 1 at the end."""

    @abstractmethod
    def __call__(self, progress: float) -> float:
        """Value of the curve, in [0, 1].

        Args:
            progress: Fraction of the steps taken, in [0, 1].
        """

    def __repr__(self) -> str:  # settings are compared as text
        return f"{type(self).__name__}()"


class Linear(Schedule):
    """Equal steps."""

    def __call__(self, progress: float) -> float:
        return progress


class Cubic(Schedule):
    """Fast first, slow at the end: 1 - (1 - x)^3; it reaches 0.5 at x = 0.206."""

    def __call__(self, progress: float) -> float:
        return 1 - (1 - progress) ** 3


class Cosine(Schedule):
    """Slow at both ends: (1 - cos(pi x)) / 2; it reaches 0.5 at x = 0.5."""

    def __call__(self, progress: float) -> float:
        return (1 - math.cos(math.pi * progress)) / 2
