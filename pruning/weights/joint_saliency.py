"""Joint choice inside N:M groups: "Pruning Foundation Models for High Accuracy without Retraining",
arXiv 2410.15567 (several weights removed at once).

The loss of removing a set P of the entries of a row w, with the other weights compensating, is

    loss(P) = w_P [(H^-1)_PP]^-1 w_P^T        (up to a factor)

`ObsSaliency` adds up the losses of single entries instead, which ignores that two entries of a
group may replace each other. In a group of m columns, all sets of n entries are compared by their
joint loss, in the sweep of SparseGPT: the inverse Hessian of the columns that are still open is
F^T F there, with F the part of its Cholesky factor that belongs to the group.

Worked by hand: w = (1, 1, 1, 1), H^-1 with ones on its diagonal and 0.9 between entries 0 and 1,
2:4. Single losses are equal. Jointly, removing 0 and 1 costs 2 / 1.9 = 1.05 and any other pair 2,
so 0 and 1 are removed. With -0.9 between them they would cost 2 / 0.1 = 20.

With `SparseGPTSweep` the mask and the weights come from one sweep; with `LeastSquares` the kept
weights are refitted exactly. Costs C(m, n) small quadratic forms per group and row: 6 for 2:4, 70
for 4:8.

Legend: O = output features, C = columns of a group, S = sets, R = entries of a set.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from math import comb

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from secateur.pruning.blocks.linears import PrunableLinear
from secateur.pruning.weights.parts import Matrix
from secateur.pruning.weights.pattern import NM, Group, Pattern, PerRow
from secateur.pruning.weights.sparse_gpt import SweptScore

_LARGEST_GROUP = 8


def joint_losses(
    weight_OC: Float[Tensor, "O C"], inverse_CC: Float[Tensor, "C C"], removed: int
) -> tuple[list[tuple[int, ...]], Float[Tensor, "O S"]]:
    """All sets of `removed` columns in lexicographic order, and the loss of each in every row.

    Args:
        weight_OC: Weights of a group of columns.
        inverse_CC: Their part of the inverse Hessian, symmetric and positive definite.
        removed: Columns of a set, 1 to C.
    """
    sets = [*combinations(range(len(inverse_CC)), removed)]
    of_SR = torch.tensor(sets, device=weight_OC.device)
    joint_SRR = torch.linalg.inv(inverse_CC[of_SR[:, :, None], of_SR[:, None, :]])
    weight_OSR = weight_OC[:, of_SR]
    return sets, torch.einsum("osr,srq,osq->os", weight_OSR, joint_SRR, weight_OSR)


@dataclass(frozen=True)
class JointSaliency(SweptScore):
    """Remove, of every N:M group, the set whose removal can be compensated best.

    Args:
        damping: Share of the mean diagonal that is added to the Hessian, finite and above 0.

    Raises:
        ValueError: `damping` is not above 0, or not finite.
    """

    def group(self, linear: PrunableLinear, pattern: Pattern) -> Group:
        return PerRow()

    def refuse(self, linear: PrunableLinear, pattern: Pattern, group: Group) -> str | None:
        if not isinstance(pattern, NM) or not isinstance(group, PerRow):
            return (
                "`score` JointSaliency compares sets of the entries of N:M groups along the "
                "inputs; use `pattern` NM with `group` PerRow, or `score` ObsSaliency."
            )
        if pattern.m > _LARGEST_GROUP:
            return (
                f"`score` JointSaliency compares all sets of a group, {comb(pattern.m, pattern.n)} "
                f"for `m` {pattern.m}; use `m` up to {_LARGEST_GROUP}, or `score` ObsSaliency."
            )
        return None

    def chosen(
        self,
        weight_OC: Float[Tensor, "O C"],
        factor_CC: Float[Tensor, "C C"],
        zero_OC: Bool[Tensor, "O C"],
        matrix: Matrix,
    ) -> Bool[Tensor, "O C"]:
        removed = matrix.pattern.num_removed(len(factor_CC))
        sets, loss_OS = joint_losses(
            weight_OC.masked_fill(zero_OC, 0), factor_CC.T @ factor_CC, removed
        )
        keep_SC = torch.ones(len(sets), len(factor_CC), dtype=torch.bool, device=zero_OC.device)
        keep_SC.scatter_(1, torch.tensor(sets, device=zero_OC.device), False)
        zeros_OS = (zero_OC[:, None] & ~keep_SC).sum(-1)
        most_O1 = zero_OC.sum(1, keepdim=True).clamp(max=removed)
        return keep_SC[loss_OS.masked_fill(zeros_OS < most_O1, torch.inf).argmin(1)]
