"""LLM-Barber: "Block-Aware Rebuilder for Sparsity Mask in One-Shot", arXiv 2408.10631.

A mask is rebuilt with the gradients of the whole block: with the loss of a batch the mean squared
error between the outputs of the sparse and of the dense block on the same input,

    score = |W_dense| sqrt(mean over batches of grad^2)

and if a removed entry scores higher than a kept one of its group, the two are exchanged: the pairs
with the largest difference first, up to a fraction of the entries of a matrix.

Worked by hand: scores (5, 1, 2, 4) of one group, kept are 1 and 2: the largest removed, 5, is
exchanged with the smallest kept, 1, then 4 with 2. With a limit of one pair, only the first
exchange is made.

Differs from the paper: the number of pairs is set, not a threshold of the scores, which at small
widths no pair exceeds.

Costs a dense forward, a sparse forward and a backward pass of the calibration windows.

Legend: O = output features, I = input features, G = groups, E = entries of a group, P = pairs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from secateur.pruning.blocks.linears import PrunableLinear, weight_of
from secateur.pruning.blocks.statistics import Statistic
from secateur.pruning.weights.parts import BlockTask, Matrix, Refinement
from secateur.pruning.weights.pattern import Group, Pattern


def exchange(
    keep_GE: Bool[Tensor, "G E"], score_GE: Float[Tensor, "G E"], num_pairs: int
) -> Bool[Tensor, "G E"]:
    """Exchange removed and kept entries within their groups if the removed one scores higher.

    Args:
        keep_GE: True for kept entries.
        score_GE: Higher is better, finite.
        num_pairs: Pairs to exchange at most, those with the largest difference.
    """
    most = min(int((~keep_GE).sum(1).max()), int(keep_GE.sum(1).max()), num_pairs)
    if most == 0:
        return keep_GE
    infinity = float("inf")
    up_GP, grown_GP = score_GE.masked_fill(keep_GE, -infinity).topk(most, dim=1)
    down_GP, removed_GP = score_GE.masked_fill(~keep_GE, infinity).topk(most, 1, largest=False)
    gain_GP = up_GP - down_GP  # decreases along the pairs of a group
    gain_P, place_P = gain_GP.flatten().topk(min(num_pairs, gain_GP.numel()))
    place_P = place_P[gain_P > 0]
    group_P = place_P // most
    result_GE = keep_GE.clone()
    result_GE[group_P, grown_GP.flatten()[place_P]] = True
    result_GE[group_P, removed_GP.flatten()[place_P]] = False
    return result_GE


@dataclass(frozen=True)
class Barber(Refinement):
    """Rebuild the masks of a block by the gradients of its output's error.

    Args:
        share: Pairs to exchange at most, as a fraction of the entries of a matrix, in (0, 0.5].

    Raises:
        ValueError: `share` is out of its range.
    """

    share: float = 0.01
    needs: ClassVar[frozenset[type[Statistic]]] = frozenset()

    def __post_init__(self) -> None:
        if not 0 < self.share <= 0.5:
            raise ValueError(f"`share` must be in (0, 0.5], got {self.share}.")

    def refuse(self, linear: PrunableLinear, pattern: Pattern, group: Group) -> str | None:
        return None

    def refine(self, task: BlockTask) -> list[Bool[Tensor, "O I"]]:
        squares = [torch.zeros_like(matrix.weight_OI) for matrix in task.matrices]
        for call in task.calls():
            with torch.no_grad():
                dense_BTD = call.run(task.block)
            with torch.enable_grad():
                sparse = [_masked(task, matrix).requires_grad_() for matrix in task.matrices]
                names = [f"{matrix.linear.path}.weight" for matrix in task.matrices]
                output_BTD = call.run(task.block, dict(zip(names, sparse, strict=True)))
                loss = torch.nn.functional.mse_loss(output_BTD.float(), dense_BTD.float())
                gradients = torch.autograd.grad(loss, sparse)
            for square_OI, gradient_OI in zip(squares, gradients, strict=True):
                # The scale of the loss is free; this one keeps squares within the range of floats.
                square_OI += (gradient_OI.float() * dense_BTD.numel() ** 0.5).square()
        return [
            self._rebuilt(matrix, square_OI)
            for matrix, square_OI in zip(task.matrices, squares, strict=True)
        ]

    def _rebuilt(self, matrix: Matrix, square_OI: Tensor) -> Tensor:
        pattern, group = matrix.pattern, matrix.group
        keep_GE = exchange(
            pattern.split(matrix.mask_OI, group),
            pattern.split(matrix.weight_OI.abs() * square_OI.sqrt(), group),
            int(self.share * matrix.mask_OI.numel()),
        )
        return pattern.join(keep_GE, matrix.mask_OI.shape, group)


def _masked(task: BlockTask, matrix: Matrix) -> Tensor:
    return (weight_of(task.block, matrix.linear.path) * matrix.mask_OI).detach()
