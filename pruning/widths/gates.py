"""From logits to gates in [0, 1]: noise, relaxation, and the probability to keep an entry.

Sources: binary Concrete gates, "The Concrete Distribution" (arXiv 1611.00712, appendix B);
DISP-LLM (arXiv 2410.11988, eq. 5); ReinMax, "Bridging Discrete and Backpropagation"
(arXiv 2304.08612, algorithm 2, worked out for two categories below).

Differs from the paper: DISP-LLM adds one Gumbel sample to the logit, which keeps a gate of logit 0
with probability 0.632. `Logistic` adds the difference of two, so that P(keep) = sigmoid(logit);
`ReferenceGumbel` is there for comparison runs.

Legend: N = all gates of a model.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

_TINY = 1e-7  # keeps log(u) and log(1 - u) finite for u drawn from [0, 1)


class Noise(ABC):
    """A random variable that is added to a logit; the entry is kept if the sum is positive."""

    @abstractmethod
    def from_uniform(self, uniform_N: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
        """Samples: the inverse distribution function at uniform numbers in [0, 1)."""

    @abstractmethod
    def keep_probability(self, logits_N: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
        """P(logit + noise > 0)."""

    @abstractmethod
    def log_density(self, noise_N: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
        """Logarithm of the density of the noise."""


class Logistic(Noise):
    """Logistic noise, the difference of two Gumbel variables: P(keep) = sigmoid(logit)."""

    def from_uniform(self, uniform_N: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
        u_N = uniform_N.clamp(_TINY, 1 - _TINY)
        return u_N.log() - (1 - u_N).log()

    def keep_probability(self, logits_N: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
        return logits_N.sigmoid()

    def log_density(self, noise_N: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
        return F.logsigmoid(noise_N) + F.logsigmoid(-noise_N)


class ReferenceGumbel(Noise):
    """One Gumbel variable, as in the released DISP-LLM code: P(keep) = 1 - exp(-exp(logit))."""

    def from_uniform(self, uniform_N: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
        return -(-uniform_N.clamp(_TINY, 1 - _TINY).log()).log()

    def keep_probability(self, logits_N: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
        return -torch.expm1(-logits_N.exp())

    def log_density(self, noise_N: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
        return -noise_N - (-noise_N).exp()


class Relaxation(ABC):
    """A function from a noisy logit to a gate with a gradient."""

    @abstractmethod
    def __call__(
        self, logits_N: Float[Tensor, " N"], noise_N: Float[Tensor, " N"], temperature: float
    ) -> Float[Tensor, " N"]:
        """Gates in [0, 1].

        Args:
            logits_N: Logits, offset included.
            noise_N: Noise of the same draw.
            temperature: Temperature of the relaxation, above 0; lower gives harder gates.
        """


class Soft(Relaxation):
    """sigmoid((logit + noise) / temperature): gates between 0 and 1, exact gradient."""

    def __call__(
        self, logits_N: Float[Tensor, " N"], noise_N: Float[Tensor, " N"], temperature: float
    ) -> Float[Tensor, " N"]:
        return ((logits_N + noise_N) / temperature).sigmoid()


class StraightThrough(Relaxation):
    """Gates of exactly 0 or 1 forward, the gradient of `Soft` backward."""

    def __call__(
        self, logits_N: Float[Tensor, " N"], noise_N: Float[Tensor, " N"], temperature: float
    ) -> Float[Tensor, " N"]:
        soft_N = ((logits_N + noise_N) / temperature).sigmoid()
        return soft_N.round().detach() + (soft_N - soft_N.detach())


class ReinMax(Relaxation):
    """Gates of exactly 0 or 1 forward, a second-order accurate gradient backward.

    With p = P(keep), D the sample, and p_t = sigmoid(logit / temperature), the general estimator,
    pi_1 = (pi_t + D) / 2 and gradient 2 grad(pi_1) - grad(pi) / 2, is for a binary gate the factor

        2 m (1 - m) - p (1 - p) / 2,   m = (p_t + D) / 2.

    At temperature 1 its mean over D is 3 p (1 - p) / 2 - p (1 - p) / 2 = p (1 - p), the exact
    derivative of the mean gate: p = 0.5 gives 2 * 0.25 * 0.75 - 0.125 = 0.25 for either sample.

    Use it with `Logistic` noise, since the derivation assumes P(keep) = sigmoid(logit), and with a
    temperature of 1 or more: below 1 the gradient of decided gates shrinks and changes its sign.
    """

    def __call__(
        self, logits_N: Float[Tensor, " N"], noise_N: Float[Tensor, " N"], temperature: float
    ) -> Float[Tensor, " N"]:
        with torch.no_grad():
            hard_N = (logits_N + noise_N > 0).to(logits_N.dtype)
            p_N, mean_N = logits_N.sigmoid(), ((logits_N / temperature).sigmoid() + hard_N) / 2
            slope_N = 2 * mean_N * (1 - mean_N) - p_N * (1 - p_N) / 2
        return hard_N + slope_N * (logits_N - logits_N.detach())


@dataclass(frozen=True)
class Stream:
    """The place of a draw in a run; every place has noise of its own.

    Args:
        step: Optimiser step, 0 or more.
        rank: Rank of this process, 0 or more; ignored unless the sampler draws `per_rank`.
        sample: Number of the draw within its step, 0 to 15.
    """

    step: int
    rank: int = 0
    sample: int = 0


class GateSampler:
    """Sampler of the gates of a step: a pure function of (logits, seed, step, rank, sample).

    It keeps no state between draws, so resuming at a step repeats its noise exactly, on any number
    of ranks.

    Args:
        noise: Distribution that is added to the logits.
        relaxation: Function from a noisy logit to a gate with a gradient.
        offset: Added to every logit; 3.0 starts training almost dense (mean gate 0.95 to 0.997,
            depending on the noise). Any finite number.
        temperature: Temperature of the relaxation, above 0.
        seed: Seed of the noise, 0 or more.
        per_rank: Draw different noise on every rank, which averages over more masks per step;
            False gives every rank the same masks.

    Raises:
        ValueError: `temperature` is not above 0, `seed` is negative, or the relaxation does not
            support the noise or the temperature.
    """

    def __init__(
        self,
        noise: Noise | None = None,
        relaxation: Relaxation | None = None,
        offset: float = 3.0,
        temperature: float = 0.4,
        seed: int = 0,
        per_rank: bool = False,
    ) -> None:
        if seed < 0:
            raise ValueError(f"`seed` must be 0 or more, got {seed}.")
        self.noise = noise or Logistic()
        self.relaxation = relaxation or StraightThrough()
        if isinstance(self.relaxation, ReinMax) and not isinstance(self.noise, Logistic):
            raise ValueError(
                f"`relaxation` ReinMax is derived for `noise` Logistic, got "
                f"{type(self.noise).__name__}; use Logistic noise or another relaxation."
            )
        self.offset = offset
        self.temperature = self.start_temperature = temperature
        self.seed, self.per_rank = seed, per_rank

    @property
    def temperature(self) -> float:
        """The present temperature of the relaxation, above 0."""
        return self._temperature

    @temperature.setter
    def temperature(self, value: float) -> None:
        if not value > 0:
            raise ValueError(f"`temperature` must be above 0, got {value}.")
        if isinstance(self.relaxation, ReinMax) and value < 1:
            raise ValueError(
                f"`temperature` {value} is too low for `relaxation` ReinMax, whose gradient "
                "changes its sign below 1; set 1 or more."
            )
        self._temperature = value

    def __call__(self, logits_N: Float[Tensor, " N"], stream: Stream) -> Float[Tensor, " N"]:
        """Gates in [0, 1] for one training step, differentiable in the logits.

        Args:
            logits_N: Output of the hypernetwork.
            stream: The place of the draw.
        """
        noise_N = self.noise_of(logits_N, stream)
        return self.relaxation(logits_N + self.offset, noise_N, self.temperature)

    def noise_of(self, logits_N: Float[Tensor, " N"], stream: Stream) -> Float[Tensor, " N"]:
        """Draw noise, in the type and on the device of the logits.

        Args:
            logits_N: Output of the hypernetwork.
            stream: The place of the draw.
        """
        uniform_N = self._uniform(len(logits_N), stream)
        return self.noise.from_uniform(uniform_N).to(logits_N)

    def keep_probability(self, logits_N: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
        """P(keep) of every gate; deterministic."""
        return self.noise.keep_probability(logits_N + self.offset)

    def _uniform(self, count: int, stream: Stream) -> Tensor:
        # The generator uses the low 32 bits of its seed, which are distinct within a run for up to
        # 8191 ranks (511 with 16 samples) and half a million steps. It is on the CPU, whose stream
        # is the same on every machine.
        place = (stream.rank if self.per_rank else 0) + stream.sample * 511
        generator = torch.Generator().manual_seed(
            (self.seed * 1_000_003 + stream.step) * 8191 + place & 0x7FFF_FFFF_FFFF_FFFF
        )
        return torch.rand(count, generator=generator)

    def recipe(self) -> dict[str, Any]:
        """The settings that affect the draws, to compare two configurations."""
        return {
            "noise": type(self.noise).__name__,
            "relaxation": type(self.relaxation).__name__,
            "offset": self.offset,
            "temperature": self.start_temperature,
            "seed": self.seed,
            "per_rank": self.per_rank,
        }
