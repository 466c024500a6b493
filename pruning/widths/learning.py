"""Settings of gate learning: how gates meet the budget, the loss, and the initial gates.

Sources: the log-ratio penalty is DISP-LLM's (arXiv 2410.11988, eq. 8). Samples that always meet the
budget follow "GRASPrune" (arXiv 2604.19398); their gradient is that of ReinMax (arXiv 2304.08612).

Legend: N = all gates, S = sites, I = entries of a site.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from secateur.pruning.losses import LossWeights
from secateur.pruning.widths.budget import log_ratio_penalty
from secateur.pruning.widths.exchange import Exchange
from secateur.pruning.widths.gate_gradient import Fisher
from secateur.pruning.widths.gates import GateSampler, Stream
from secateur.pruning.widths.gradual_ranking import WidthSearch
from secateur.pruning.widths.policy_gradient import Draw, Estimator, Pathwise
from secateur.pruning.widths.scores import WidthScore
from secateur.pruning.widths.sizes import Sizes

OnBudget = Callable[[Tensor], Tensor]
"""From scores (N,) to masks (N,) of the best ones within a budget: 1 for kept, else 0."""


class Pressure(ABC):
    """How gates meet the budget while they are learned."""

    @abstractmethod
    def draw(
        self,
        sampler: GateSampler,
        logits_N: Float[Tensor, " N"],
        stream: Stream,
        on_budget: OnBudget,
    ) -> Draw:
        """Draw the gates of a step, in [0, 1], differentiable in the logits.

        Args:
            sampler: Noise and relaxation.
            logits_N: Logits, without the offset of the sampler.
            stream: Step, rank and number of the draw.
            on_budget: Returns the masks of the best scores within the budget of this step.
        """

    @abstractmethod
    def keep_probability(
        self,
        sampler: GateSampler,
        logits_N: Float[Tensor, " N"],
        on_budget: OnBudget,
    ) -> Float[Tensor, " N"]:
        """Return P(keep) of every gate, or an approximation; arguments as for `draw`."""

    def penalty(self, fraction: Tensor, keep: float) -> Tensor:
        """Return the term to add to the loss: a scalar, 0 unless overridden.

        Args:
            fraction: Fraction of the cost that the gates of the step keep.
            keep: Fraction that the budget of the step allows.
        """
        return torch.zeros_like(fraction)


@dataclass(frozen=True)
class Penalty(Pressure):
    """Draw every gate independently, and add the log-ratio of cost and budget to the loss.

    Args:
        strength: Factor of the log-ratio (the paper's lambda), above 0; 6 in the paper.

    Raises:
        ValueError: `strength` is not above 0.
    """

    strength: float = 6.0

    def __post_init__(self) -> None:
        if not self.strength > 0:
            raise ValueError(f"`strength` must be above 0, got {self.strength}.")

    def draw(
        self,
        sampler: GateSampler,
        logits_N: Float[Tensor, " N"],
        stream: Stream,
        on_budget: OnBudget,
    ) -> Draw:
        gates_N = sampler(logits_N, stream)

        def log_probability() -> Tensor:
            kept_N, keep_N = gates_N.detach().round(), sampler.keep_probability(logits_N)
            return -F.binary_cross_entropy(keep_N, kept_N, reduction="sum")

        return Draw(gates_N, log_probability)

    def keep_probability(
        self,
        sampler: GateSampler,
        logits_N: Float[Tensor, " N"],
        on_budget: OnBudget,
    ) -> Float[Tensor, " N"]:
        return sampler.keep_probability(logits_N)

    def penalty(self, fraction: Tensor, keep: float) -> Tensor:
        return log_ratio_penalty(fraction, keep, self.strength)


@dataclass(frozen=True)
class ExactBudget(Pressure):
    """Rank the noisy logits and keep as many as fit the budget: every sample is on budget.

    Forward, gates are exactly 0 or 1. Backward, with p = sigmoid((logit - threshold) / temperature)
    and the threshold between kept and removed gates, a kept gate has the slope (1 - p) / 2 and a
    removed one p / 2: half the probability of the other state. At temperature 1 both states weigh
    p (1 - p) / 2 in the mean, so that the gradient is exact for losses that are quadratic in a
    gate, as that of `ReinMax`. The slope of a soft gate weighs the likelier state more; the loss
    at a kept gate tells too little of what its removal costs, logits gather at the threshold, and
    from a hundred steps on masks became worse than the ranking that they had started from.

    Args:
        temperature: Temperature of the gradient, above 0. Higher ones also move gates far from the
            threshold; for logits between -16 and 16 (`Importance`), 4 was better than 1.

    Raises:
        ValueError: `temperature` is not above 0.
    """

    temperature: float = 4.0

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(f"`temperature` must be above 0, got {self.temperature}.")

    def draw(
        self,
        sampler: GateSampler,
        logits_N: Float[Tensor, " N"],
        stream: Stream,
        on_budget: OnBudget,
    ) -> Draw:
        noisy_N = logits_N + sampler.noise_of(logits_N, stream)
        hard_N, threshold = _split_at_budget(noisy_N.detach(), on_budget)
        p_N = ((logits_N.detach() - threshold) / self.temperature).sigmoid()
        slope_N = torch.where(hard_N > 0, 1 - p_N, p_N) / 2
        return Draw(
            hard_N + slope_N * (logits_N - logits_N.detach()),
            # That of the noisy logits, of which the masks are a function.
            lambda: sampler.noise.log_density(noisy_N.detach() - logits_N).sum(),
        )

    def keep_probability(
        self,
        sampler: GateSampler,
        logits_N: Float[Tensor, " N"],
        on_budget: OnBudget,
    ) -> Float[Tensor, " N"]:
        _, threshold = _split_at_budget(logits_N, on_budget)
        return sampler.noise.keep_probability(logits_N - threshold)


@dataclass(frozen=True)
class Importance:
    """Start from a ranking of the gates instead of equal gates.

    Args:
        score: Score to rank gates by.
        search: Search that ranks them.
        scale: Logits start between -scale and scale, above 0; noise has a standard deviation of
            1.8, and so exchanges the gates in a part of the ranking that shrinks with the scale.
            It suits `ExactBudget`; gates that `Penalty` has to move start from null instead.
        seed: Seed of the draw of windows, 0 or more.

    Raises:
        ValueError: A setting is outside its range.
    """

    score: WidthScore = field(default_factory=Fisher)
    search: WidthSearch = field(default_factory=Exchange)
    scale: float = 16.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.scale > 0:
            raise ValueError(f"`scale` must be above 0, got {self.scale}.")
        if self.seed < 0:
            raise ValueError(f"`seed` must be 0 or more, got {self.seed}.")

    @property
    def back_propagates(self) -> bool:
        """Whether the ranking needs the memory of a backward pass through the model."""
        return self.score.back_propagates or self.search.back_propagates


@dataclass(frozen=True)
class GateLearning:
    """How gates are learned while the weights are frozen.

    Args:
        pressure: How gates meet the budget: `ExactBudget` or `Penalty`.
        loss: Loss that trains the gates.
        start: Initial ranking; None starts with all gates open.
        gradient: `Pathwise` back-propagates through the model; `PolicyGradient` only runs it
            forward, so that no activations are stored.
        sizes: Several budgets, one drawn for every step; None means that of the model alone.

    Raises:
        ValueError: `sizes` are set beside a `pressure` that gates follow slowly.
    """

    pressure: Pressure = field(default_factory=ExactBudget)
    loss: LossWeights = field(default_factory=LossWeights)
    start: Importance | None = field(default_factory=Importance)
    gradient: Estimator = field(default_factory=Pathwise)
    sizes: Sizes | None = None

    def __post_init__(self) -> None:
        if self.sizes is not None and not isinstance(self.pressure, ExactBudget):
            raise ValueError(
                f"`sizes` need `pressure` ExactBudget, got {type(self.pressure).__name__}: gates "
                "that a penalty moves do not meet another budget at every step."
            )


def _split_at_budget(scores_N: Tensor, on_budget: OnBudget) -> tuple[Tensor, Tensor]:
    """Masks on budget, and the score threshold between kept and removed."""
    hard_N = on_budget(scores_N).to(scores_N)
    place = min(int(hard_N.sum()), len(hard_N) - 1)
    return hard_N, scores_N.sort(descending=True).values[place]
