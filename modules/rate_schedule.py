"""How learning rates move: that of weights, and those of gates and settled model in mask learning.

`RateSchedule` is constant, linear, cosine, or warm-up-stable-decay once the warm-up is over. After
`start` of the steps the rate falls from its peak to `floor` of it, along a curve:

    factor(x) = 1                                             for x <= start
    factor(x) = 1 - (1 - floor) curve((x - start) / (1 - start))   else.

Sources: cosine, "SGDR" (arXiv 1608.03983); a stable phase before the decay, "MiniCPM" (arXiv
2404.06395), for training whose length is not known in advance.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from secateur.pruning.schedules import Cosine, Schedule

_WARM_UP = 0.1  # fraction of the settled steps in which the learning rate rises


@dataclass(frozen=True)
class RateSchedule:
    """Learning rate after the warm-up, as a factor of its peak.

    Args:
        curve: Shape of the fall: `Cosine` (if not given), `Linear` or `Cubic`.
        start: Fraction of the steps after the warm-up in which the rate stays at its peak, in
            [0, 1]: 0 for a fall from the first, 0.9 for warm-up-stable-decay, 1 for a constant
            rate.
        floor: Fraction of the peak at which the fall ends, in [0, 1].

    Raises:
        ValueError: A setting is outside its range.

    Worked by hand: `RateSchedule(Linear(), start=0.5, floor=0.2)` is 1 up to the middle, 0.6 at
    three quarters, and 0.2 at the end.
    """

    curve: Schedule | None = None
    start: float = 0.0
    floor: float = 0.0

    def __post_init__(self) -> None:
        for name in ("start", "floor"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"`{name}` must be in [0, 1], got {getattr(self, name)}.")

    def __call__(self, progress: float) -> float:
        """Factor of the peak.

        Args:
            progress: Fraction taken of the steps after the warm-up, in [0, 1].
        """
        if progress <= self.start:
            return 1.0
        curve = self.curve or Cosine()
        return 1 - (1 - self.floor) * curve((progress - self.start) / (1 - self.start))

    def of(self, optimizer: Optimizer, warmup_steps: int, steps: int) -> LambdaLR:
        """The schedule of an optimiser: a rise from 0 over the warm-up, then this one.

        Args:
            optimizer: The optimiser.
            warmup_steps: Steps of the warm-up, 0 or more.
            steps: All steps, 1 or more.
        """
        return LambdaLR(optimizer, partial(self._factor, warmup_steps, steps))

    def _factor(self, warmup_steps: int, steps: int, step: int) -> float:
        if step < warmup_steps:
            return step / warmup_steps
        return self(min((step - warmup_steps) / max(steps - warmup_steps, 1), 1.0))


def rate_of_masks(step: int, mask_steps: int) -> float:
    """Factor of the learning rate of gates: it falls to 0 along a cosine until masks settle.

    Args:
        step: Optimiser step, 0 or more.
        mask_steps: Steps in which masks are learned, 0 or more.
    """
    return _falling(step / mask_steps) if step < mask_steps else 0.0


def rate_of_settled(step: int, mask_steps: int, steps: int) -> float:
    """Factor of the learning rate of the settled model: 0 while masks are learned; then it rises
    over the first tenth of the steps that are left, and falls to 0 along a cosine.

    Args:
        step: Optimiser step, 0 or more.
        mask_steps: Steps in which masks are learned, 0 or more.
        steps: All steps, 1 or more.
    """
    if step < mask_steps:
        return 0.0
    done, left = step - mask_steps, steps - mask_steps
    return min(1.0, (done + 1) / max(1.0, _WARM_UP * left)) * _falling(done / max(1, left))


def _falling(progress: float) -> float:
    return (1 + math.cos(math.pi * progress)) / 2
