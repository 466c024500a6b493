"""How the gradient of the gates is estimated: through the model, or by forward passes alone.

"Bypass Back-propagation: Optimization-based Structural Pruning for Large Language Models via Policy
Gradient" (arXiv 2406.10576): no gradient passes through the language model. With L(m) the loss of
masks m that are drawn with log-probability log p(m; a) from logits a,

    grad_a E[L] = E[(L(m) - b) grad_a log p(m; a)]

for every baseline b that does not depend on m. `LeaveOneOut` takes the mean loss of the other masks
on the same batch, which removes the difficulty of the batch: b_k = mean of L_j over j != k.
`MovingAverage` is that of the paper, over batches.

Worked by hand: one gate with P(keep) = 0.25, masks (1, 0) with losses (2, 3). Baselines (3, 2);
the gradient of the logit is ((2 - 3) (1 - 0.25) + (3 - 2) (0 - 0.25)) / 2 = -0.5: it rises. Only
unequal pairs, of probability 0.375, contribute, so the mean is -0.1875 = s (1 - s) (2 - 3).

What it is worth: with 5,632 gates of a LLaMA of 7 M parameters, a pair of forward passes has a
cosine of 0.008 with the direction that back-propagation finds, which itself has 0.56 after one
backward pass: about 5,000 pairs replace one backward pass. So use it where a backward pass is not
possible: it stores no activations, and works on packed weights.

Differs from the paper: its code takes a step on P(keep) with the score divided by its standard
deviation; here the gradient of the logits is exact in the mean, and a hypernetwork may train.

Legend: K = masks of a step, N = gates.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from secateur.pruning.losses import TokenLosses


@dataclass(frozen=True)
class Draw:
    """One draw of all gates.

    Args:
        gates_N: The gates, in [0, 1].
        log_probability: Computes the scalar log p(gates; logits), up to a constant.
    """

    gates_N: Float[Tensor, " N"]
    log_probability: Callable[[], Tensor]


@dataclass(frozen=True)
class Estimate:
    """The result of a step.

    Args:
        surrogate: A scalar whose gradient is that of the loss.
        losses: Losses of the step, for the log.
        gates_N: Gates of the first draw.
        average: The state of the baseline after this step.
    """

    surrogate: Tensor
    losses: TokenLosses
    gates_N: Float[Tensor, " N"]
    average: Tensor


class Estimator(ABC):
    """How the gradient of the gates is estimated.

    Attributes:
        back_propagates: Whether `evaluate` needs a gradient.
    """

    back_propagates: ClassVar[bool]

    @abstractmethod
    def estimate(
        self,
        draw: Callable[[int], Draw],
        evaluate: Callable[[Tensor], TokenLosses],
        average: Tensor,
    ) -> Estimate:
        """Estimate one step.

        Args:
            draw: Returns the draw of a number, 0 or more; the same number gives the same draw.
            evaluate: Computes the losses of the masked model on the batch of this step.
            average: The state of the baseline, a scalar on the CPU; NaN before the first step.
        """


@dataclass(frozen=True)
class Pathwise(Estimator):
    """Back-propagate through the model to the gates of one draw."""

    back_propagates: ClassVar[bool] = True

    def estimate(
        self,
        draw: Callable[[int], Draw],
        evaluate: Callable[[Tensor], TokenLosses],
        average: Tensor,
    ) -> Estimate:
        gates_N = draw(0).gates_N
        losses = evaluate(gates_N)
        return Estimate(losses.total, losses, gates_N, average)


class Baseline(ABC):
    """What losses are compared with."""

    @abstractmethod
    def of(self, losses_K: Float[Tensor, " K"], average: Tensor) -> tuple[Tensor, Tensor]:
        """The baseline of every draw, shape (K,) or a scalar, and the new state.

        Args:
            losses_K: Losses of the draws of one step.
            average: The state, a scalar; NaN before the first step.
        """


@dataclass(frozen=True)
class LeaveOneOut(Baseline):
    """The mean loss of the other draws of the step."""

    def of(self, losses_K: Float[Tensor, " K"], average: Tensor) -> tuple[Tensor, Tensor]:
        return (losses_K.sum() - losses_K) / (len(losses_K) - 1), average


@dataclass(frozen=True)
class MovingAverage(Baseline):
    """A moving average of the mean losses of the steps, as in the paper.

    Args:
        window: Steps that it remembers, 1 or more; the last step has the weight 1 / window.

    Raises:
        ValueError: `window` is below 1.
    """

    window: int = 5

    def __post_init__(self) -> None:
        if self.window < 1:
            raise ValueError(f"`window` must be 1 or more, got {self.window}.")

    def of(self, losses_K: Float[Tensor, " K"], average: Tensor) -> tuple[Tensor, Tensor]:
        mean = losses_K.mean()
        new = torch.where(average.isnan(), mean, average + (mean - average) / self.window)
        return new, new


@dataclass(frozen=True)
class PolicyGradient(Estimator):
    """Estimate the gradient from the losses of several draws, by forward passes alone.

    Args:
        samples: Draws per step, 2 to 16; each costs a forward pass on the same batch.
        baseline: What their losses are compared with: `LeaveOneOut` or `MovingAverage`.

    Raises:
        ValueError: `samples` is out of its range.
    """

    samples: int = 2
    baseline: Baseline = field(default_factory=LeaveOneOut)
    back_propagates: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not 2 <= self.samples <= 16:
            raise ValueError(f"`samples` must be 2 to 16, got {self.samples}.")

    def estimate(
        self,
        draw: Callable[[int], Draw],
        evaluate: Callable[[Tensor], TokenLosses],
        average: Tensor,
    ) -> Estimate:
        draws = [draw(number) for number in range(self.samples)]
        with torch.no_grad():
            found = [evaluate(one.gates_N) for one in draws]
            losses_K = torch.stack([losses.total.float() for losses in found]).cpu()
            baseline_K, average = self.baseline.of(losses_K, average)
            advantage_K = losses_K - baseline_K
        log_p_K = torch.stack([one.log_probability() for one in draws])
        means = [
            torch.stack([getattr(losses, name) for losses in found]).mean()
            for name in ("total", "cross_entropy", "distillation")
        ]
        surrogate = (advantage_K.to(log_p_K) * log_p_K).mean()
        return Estimate(surrogate, TokenLosses(*means), draws[0].gates_N, average)
