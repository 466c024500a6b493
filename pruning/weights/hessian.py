"""Hessians of the error of a layer's output: damping, factors, and repair if Cholesky fails.

The Hessian is H = 2 sum(x x^T) / windows, the same for every row of a layer and for every layer
that reads the same tensor. It is damped: a fraction of its mean diagonal is added to the diagonal.

Legend: S = Hessians of equal width, I = input features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from secateur.pruning.blocks.statistics import Gram, Inputs, Statistic, next_damping
from secateur.pruning.weights.parts import Matrix


@dataclass(frozen=True)
class Damped:
    """Base class of parts that use Hessians, damped by a fraction of their mean diagonal.

    Args:
        damping: Fraction of the mean diagonal that is added to the diagonal, finite and above 0.

    Raises:
        ValueError: `damping` is not above 0, or not finite.
    """

    damping: float = 0.01
    needs: ClassVar[frozenset[type[Statistic]]] = frozenset({Gram})

    def __post_init__(self) -> None:
        if not 0 < self.damping < float("inf"):
            raise ValueError(
                f"`damping` must be finite and above 0, got {self.damping}; 0.01 is usual."
            )


def damped(hessian_SII: Float[Tensor, "*S I I"], damping: float) -> Float[Tensor, "*S I I"]:
    """Hessians with a fraction of the mean diagonal added, and diagonal 1 for unused inputs."""
    diagonal_SI = hessian_SII.diagonal(dim1=-2, dim2=-1)
    diagonal_SI = torch.where(diagonal_SI == 0, 1.0, diagonal_SI)
    diagonal_SI = diagonal_SI + damping * diagonal_SI.mean(-1, keepdim=True)
    return hessian_SII.clone().diagonal_scatter(diagonal_SI, dim1=-2, dim2=-1)


def inverse_factors(
    hessian_SII: Float[Tensor, "S I I"], damping: float
) -> tuple[Float[Tensor, "S I I"], list[float]]:
    """Upper Cholesky factors of the inverses of damped Hessians, and the damping used for each.

    All are factorised in one batch; those that fail are repeated with ten times the damping.

    Args:
        hessian_SII: Symmetric, finite.
        damping: Initial fraction of the mean diagonal, above 0.
    """
    factor_SII, used = torch.empty_like(hessian_SII), [damping] * len(hessian_SII)
    rest = list(range(len(hessian_SII)))
    while True:
        lower_SII, failed_S = torch.linalg.cholesky_ex(damped(hessian_SII[rest], damping))
        lower_SII[failed_S > 0] = torch.eye(lower_SII.shape[-1], device=lower_SII.device)
        upper_SII, again_S = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower_SII), upper=True)
        done_S = (failed_S == 0) & (again_S == 0) & upper_SII.isfinite().all(2).all(1)
        for place, number in enumerate(rest):
            factor_SII[number], used[number] = upper_SII[place], damping
        rest = [number for number, done in zip(rest, done_S.tolist(), strict=True) if not done]
        if not rest:
            return factor_SII, used
        damping = next_damping(damping)


def factor_of(matrix: Matrix, damping: float) -> Float[Tensor, "I I"]:
    """The factor of a matrix's Hessian, computed once for matrices with the same input; notes
    repairs.

    The other Hessians of the block with the same width are factorised in the same batch.
    """
    memo = matrix.inputs[Gram].memo
    if damping not in memo:
        alike: Sequence[Inputs] = matrix.alike or [matrix.inputs]
        hessian_SII = torch.stack([inputs.hessian_II() for inputs in alike])
        factors = zip(*inverse_factors(hessian_SII, damping), strict=True)
        for inputs, (factor_II, used) in zip(alike, factors, strict=True):
            inputs[Gram].memo[damping] = factor_II, used
    factor_II, used = memo[damping]
    note_repair(matrix, damping, used)
    return factor_II


def note_repair(matrix: Matrix, damping: float, used: float) -> None:
    """Note for the report that a factorisation needed more damping than set."""
    if used > damping:
        matrix.note(f"Cholesky failed at damping {damping:g}; repaired with {used:g}.")
