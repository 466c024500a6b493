"""AlphaPruning: "Using Heavy-Tailed Self Regularization Theory for Improved Layer-wise Pruning",
arXiv 2410.10912.

A heavier tail of a weight matrix's spectrum indicates better training, so a block with heavier
tails (a smaller exponent) is pruned less. With lambda the sorted eigenvalues of W^T W, the exponent
of the tail that begins at xmin = lambda_k is the Hill estimate

    alpha = 1 + m / sum(ln(lambda_i / xmin))     over the m eigenvalues i >= k,

for the xmin of a `TailStart`: `Peak`, that of the paper, is the peak of the histogram of log
lambda. The mean over the matrices of a block is mapped linearly to [1 - spread, 1 + spread], times
the sparsity, so that the model as a whole has the given sparsity. Exponents of blocks that differ
by less than 1 say little, so `spread` is lowered in proportion (`scaled_spread`; not in the paper).

Worked by hand: two blocks of equal size with exponents 2 and 4, spread 0.2, sparsity 0.5: factors
0.8 and 1.2 have the mean 1, so the sparsities are 0.4 and 0.6.

Needs no data: one singular value decomposition per matrix. It ignores the function of a block: on a
model whose first block is critical and has a light tail, it harms (docs/weights.md), so check it on
held-back text.

Legend: O = output features, I = input features, E = eigenvalues, L = blocks.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from secateur.pruning.weights.parts import Allocation
from secateur.pruning.weights.pattern import Pattern, Unstructured

_LEAST_EIGENVALUE = 1e-5  # of the mean; smaller ones are rounding
_HIGHEST = 0.99  # no block is removed entirely
_CLEAR_SPAN = 1.0  # exponents of LLaMA models span 1.6 to 2.6


class TailStart(ABC):
    """Where the tail of a spectrum begins."""

    @abstractmethod
    def starts(self, log_E: Float[Tensor, " E"]) -> Iterable[int]:
        """Positions that it may begin at; the one closest to a power law is taken.

        Args:
            log_E: Logarithms of the eigenvalues, in ascending order.
        """


def _peak(log_E: Float[Tensor, " E"], bins: int) -> float:
    """Lower edge of the fullest of some equal bins from the lowest to the highest value."""
    low, high = log_E.min().item(), log_E.max().item()
    counts = torch.histc(log_E.cpu(), bins=bins, min=low, max=high)
    return low + int(counts.argmax()) * (high - low) / bins


@dataclass(frozen=True)
class Peak(TailStart):
    """At the peak of the histogram of the logarithms, as in the paper.

    The histogram has a bin for every 10 eigenvalues, 10 to 100 of them.
    """

    def starts(self, log_E: Float[Tensor, " E"]) -> Iterable[int]:
        peak = _peak(log_E, min(max(len(log_E) // 10, 10), 100))
        return [min(int((log_E < peak).sum()), len(log_E) - 2)]


@dataclass(frozen=True)
class Median(TailStart):
    """At the median eigenvalue."""

    def starts(self, log_E: Float[Tensor, " E"]) -> Iterable[int]:
        return [(len(log_E) - 1) // 2]


@dataclass(frozen=True)
class ClosestToPowerLaw(TailStart):
    """Up to 1.5 times the peak, where the Kolmogorov-Smirnov distance from a power law is smallest.

    As in the released code, with 100 bins. A single small eigenvalue can move it far.
    """

    def starts(self, log_E: Float[Tensor, " E"]) -> Iterable[int]:
        limit = _peak(log_E, 100) + math.log(1.5)
        return range(min(int((log_E <= limit).sum()) or 1, len(log_E) - 1))


def tail_exponent(weight_OI: Float[Tensor, "O I"], tail: TailStart | None = None) -> float | None:
    """Exponent of the power law that the largest eigenvalues of W^T W follow, above 1.

    Args:
        weight_OI: Weights.
        tail: Where the tail begins; `Peak` if not given.

    Returns:
        None if fewer than two different eigenvalues are above 1e-5 of their mean, so that there is
        no tail.
    """
    lambda_E = torch.linalg.svdvals(weight_OI.float()).double().square().flip(0)
    log_E = lambda_E[lambda_E > _LEAST_EIGENVALUE * lambda_E.mean()].log()
    if len(log_E) < 2:
        return None
    best = (float("inf"), float("nan"))
    for first in (tail or Peak()).starts(log_E):
        tail_E = log_E[first:] - log_E[first]
        mean = tail_E.mean().item()
        if mean == 0:
            break
        alpha = 1 + 1 / mean
        steps_E = torch.arange(len(tail_E), device=tail_E.device) / len(tail_E)
        distance = (1 - (tail_E * (1 - alpha)).exp() - steps_E).abs().max().item()
        best = min(best, (distance, alpha))
    return None if math.isnan(best[1]) else best[1]


def scaled_spread(alphas_L: Sequence[float], spread: float) -> float:
    """`spread`, lowered in proportion if the exponents span less than 1."""
    return spread * min(1.0, (max(alphas_L) - min(alphas_L)) / _CLEAR_SPAN)


def spread_sparsity(
    alphas_L: Sequence[float], sizes_L: Sequence[int], sparsity: float, spread: float
) -> list[float]:
    """Sparsity of every block, in [0, 0.99], with the weighted mean `sparsity`.

    If a block reaches the limit of 0.99, the others are pruned more instead: in proportion to their
    factors, or equally if these are 0.

    Args:
        alphas_L: Mean exponent of every block.
        sizes_L: Entries of every block, for the mean.
        sparsity: Sparsity of all blocks together, in [0, 0.99].
        spread: Largest distance of the factors from 1, in [0, 1].

    Raises:
        ValueError: `sparsity` is outside its range.
    """
    if not 0 <= sparsity <= _HIGHEST:
        raise ValueError(f"`sparsity` must be in [0, {_HIGHEST}], got {sparsity}.")
    low, high = min(alphas_L), max(alphas_L)
    width = high - low or 1.0
    factors = [1 - spread + 2 * spread * (alpha - low) / width for alpha in alphas_L]
    clamped: set[int] = set()
    while free := [block for block in range(len(factors)) if block not in clamped]:
        if not any(factors[block] for block in free):
            factors = [1.0] * len(factors)
        budget = sparsity * sum(sizes_L) - _HIGHEST * sum(sizes_L[block] for block in clamped)
        scale = budget / sum(factors[block] * sizes_L[block] for block in free)
        over = {block for block in free if factors[block] * scale > _HIGHEST}
        if not over:
            return [
                _HIGHEST if block in clamped else factor * scale
                for block, factor in enumerate(factors)
            ]
        clamped |= over
    return [_HIGHEST] * len(factors)


@dataclass(frozen=True)
class AlphaPruning(Allocation):
    """Prune blocks less if their weights have heavier-tailed spectra.

    Args:
        spread: Largest distance of the factors of the sparsity from 1, in [0, 1]; lower if the
            exponents span less than 1. Published at a sparsity of 0.7: 0.3 for magnitude, 0.2 for
            Wanda and SparseGPT (LLaMA 7B), 0.3 for all from 13B on.
        tail: Where the tail of a spectrum begins: `Peak`, `Median` or `ClosestToPowerLaw`.

    Raises:
        ValueError: `spread` is not in [0, 1].
    """

    spread: float = 0.2
    tail: TailStart = field(default_factory=Peak)

    def __post_init__(self) -> None:
        if not 0 <= self.spread <= 1:
            raise ValueError(f"`spread` must be in [0, 1], got {self.spread}.")

    def refuse(self, pattern: Pattern) -> str | None:
        if isinstance(pattern, Unstructured):
            if pattern.sparsity <= _HIGHEST:
                return None
            return (
                f"`allocation` AlphaPruning keeps at least 0.01 of every block, and `sparsity` is "
                f"{pattern.sparsity}; set {_HIGHEST} or less, or use Uniform."
            )
        return (
            "`allocation` AlphaPruning gives every block its own sparsity, and `pattern` "
            f"{type(pattern).__name__} has only one; use Unstructured, or Uniform."
        )

    def sparsities(
        self, blocks: Callable[[], Iterator[Mapping[str, Tensor]]], sparsity: float
    ) -> list[float] | None:
        alphas: list[float | None] = []
        sizes: list[int] = []
        for weights in blocks():
            exponents = []
            for name, weight_OI in weights.items():
                if (exponent := tail_exponent(weight_OI, self.tail)) is None:
                    raise ValueError(
                        f"`allocation` AlphaPruning finds no tail in {name}: fewer than two "
                        "different eigenvalues of W^T W are above 1e-5 of their mean. Use Uniform, "
                        "or leave the matrix out by `matrices`."
                    )
                exponents.append(exponent)
            alphas.append(sum(exponents) / len(exponents) if exponents else None)
            sizes.append(sum(weight_OI.numel() for weight_OI in weights.values()))
        lowest = min(alpha for alpha in alphas if alpha is not None)
        # A block that is not pruned does not affect the sparsity of the others.
        filled = [lowest if alpha is None else alpha for alpha in alphas]
        return spread_sparsity(filled, sizes, sparsity, scaled_spread(filled, self.spread))
