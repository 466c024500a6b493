"""DSnoT: "Dynamic Sparse No Training", arXiv 2310.08915.

A row's removed weights shift the mean of its output by e_i = sum over removed j of W_ij s_j, with
s_j the mean over windows of the sum of input j. Up to `cycles` times, one weight of every row with
|e_i| > threshold is grown and one is removed:

    grow     the removed j with the largest sign(e_i) W_ij s_j / var_j            (eq. 4)
    remove   the kept k with W_ik s_k of the other sign than e_i that has the smallest Wanda score
             |W_ik| a_k, within the N:M group of j if there are any              (eq. 5)

A row stops as soon as a pair would not make |e_i| smaller; a weight is grown only if its group has
a weight to remove.

Worked by hand: W = (1, 2, -1, 3), s = a = 1, removed are 0 and 1: e = 3. Growing 1 leaves e = 1;
of the kept weights only 2 has the other sign; removing it leaves e = 0: the new mask keeps 1 and 3.

Differs from the paper: rows stop as above; the released code continues even if |e_i| does not
decrease.

It corrects only the mean of the output, and removes weights with larger scores for it: the error
that varies between tokens grows. On the 7 M LLaMA of docs/weights.md it harms, so
check it on held-back text.

Legend: O = output features, R = unfinished rows, I = input features.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from secateur.pruning.blocks.linears import PrunableLinear
from secateur.pruning.blocks.statistics import SquareSums, Statistic, Sums
from secateur.pruning.weights.parts import BlockTask, Refinement
from secateur.pruning.weights.pattern import NM, Group, Pattern, PerColumn
from secateur.pruning.weights.wanda import wanda_score


def regrow(
    mask_OI: Bool[Tensor, "O I"],
    shift_OI: Float[Tensor, "O I"],
    variance_I: Float[Tensor, " I"],
    score_OI: Float[Tensor, "O I"],
    cycles: int,
    threshold: float,
    group_size: int,
) -> Bool[Tensor, "O I"]:
    """Exchange entries of a mask to reduce the shift of the outputs; group sizes are unchanged.

    Args:
        mask_OI: True for kept weights.
        shift_OI: Contribution of every weight to the mean output of its row, W_ij s_j.
        variance_I: Variance of every input feature.
        score_OI: Wanda scores.
        cycles: Pairs to exchange in a row at most.
        threshold: A row with a smaller |e| is finished.
        group_size: Consecutive inputs within which a pair is exchanged; divides I.
    """
    mask_OI = mask_OI.clone()
    error_O = (shift_OI * ~mask_OI).sum(1)
    rows_R = torch.arange(len(mask_OI), device=mask_OI.device)
    place_I = torch.arange(mask_OI.shape[1], device=mask_OI.device) // group_size
    for _ in range(cycles):
        rows_R = rows_R[error_O[rows_R].abs() > threshold]
        if len(rows_R) == 0:
            break
        keep_RI, error_R = mask_OI[rows_R], error_O[rows_R]
        along_RI = shift_OI[rows_R] * error_R.sign()[:, None]
        removable_RI = keep_RI & (along_RI < 0)
        partner_RI = removable_RI.unflatten(1, (-1, group_size)).any(2)[:, place_I]
        growable_RI = ~keep_RI & partner_RI
        gain_R, grown_R = (along_RI / variance_I).masked_fill(~growable_RI, float("-inf")).max(1)
        removable_RI &= place_I == place_I[grown_R][:, None]
        cost_R, removed_R = score_OI[rows_R].masked_fill(~removable_RI, float("inf")).min(1)
        pick_R = torch.arange(len(rows_R), device=rows_R.device)
        after_R = error_R.abs() - along_RI[pick_R, grown_R] + along_RI[pick_R, removed_R]
        better_R = (gain_R > 0) & cost_R.isfinite() & (after_R.abs() < error_R.abs())
        rows_R, grown_R, removed_R = rows_R[better_R], grown_R[better_R], removed_R[better_R]
        mask_OI[rows_R, grown_R] = True
        mask_OI[rows_R, removed_R] = False
        error_O[rows_R] = (after_R * error_R.sign())[better_R]
    return mask_OI


@dataclass(frozen=True)
class DSnoT(Refinement):
    """Exchange removed and kept weights to restore the mean output of every row.

    Args:
        cycles: Pairs to exchange in a row at most, 1 or more.
        threshold: Largest shift of a finished row, summed over the tokens of a window; 0 or more.

    Raises:
        ValueError: A setting is out of its range.
    """

    cycles: int = 50
    threshold: float = 0.1
    needs: ClassVar[frozenset[type[Statistic]]] = frozenset({Sums, SquareSums})

    def __post_init__(self) -> None:
        if self.cycles < 1:
            raise ValueError(f"`cycles` must be 1 or more, got {self.cycles}.")
        if not self.threshold >= 0:
            raise ValueError(f"`threshold` must be 0 or more, got {self.threshold}.")

    def refuse(self, linear: PrunableLinear, pattern: Pattern, group: Group) -> str | None:
        if isinstance(group, PerColumn):
            return (
                "`refinement` DSnoT exchanges weights of one row, and here columns have a fixed "
                "number of kept weights, which this would change; use Barber, or a score that "
                "compares within rows."
            )
        return None

    def refine(self, task: BlockTask) -> list[Bool[Tensor, "O I"]]:
        masks = []
        for matrix in task.matrices:
            inputs = matrix.inputs
            mean_I = inputs[Sums].total_I / inputs.num_tokens
            variance_I = inputs[SquareSums].total_I / inputs.num_tokens - mean_I.square()
            sums_I = inputs[Sums].total_I / inputs.num_windows
            whole = matrix.weight_OI.shape[1]
            masks.append(
                regrow(
                    matrix.mask_OI,
                    matrix.weight_OI * sums_I,
                    variance_I.clamp(min=torch.finfo(torch.float32).tiny),
                    wanda_score(matrix.weight_OI, inputs.norms_I()),
                    self.cycles,
                    self.threshold,
                    matrix.pattern.m if isinstance(matrix.pattern, NM) else whole,
                )
            )
        return masks
