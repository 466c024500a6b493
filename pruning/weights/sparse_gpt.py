"""SparseGPT: "Massive Language Models Can Be Accurately Pruned in One-Shot", arXiv 2301.00774.

Columns are decided from left to right. The columns to the right of a removed weight compensate for
it in closed form: with H = 2 sum(x x^T) / windows, damped by a fraction of its mean diagonal, and U
the upper Cholesky factor of H^-1 (U^T U = H^-1),

    err_j  = (w_j - w'_j) / U_jj            error of column j
    w_k   -= err_j U_jk      for k > j      compensated to the right (eq. 3, algorithm 1)
    score  = w_j^2 / U_jj^2                 of the weights updated so far (eq. 2)

An input that is always zero gets a diagonal of 1, and its weights count as zero: they are removed
first.

Parts share this sweep: `ObsSaliency` (and `JointSaliency`) choose masks by it, and `SparseGPTSweep`
computes weights for any mask. `ObsSaliency` and `SparseGPTSweep` are SparseGPT, in one sweep.

Worked by hand: rows w = (1, 2), H = [[2, 1], [1, 2]] undamped. H^-1 = [[2, -1], [-1, 2]] / 3, so
U = [[sqrt(2/3), -sqrt(1/6)], [0, sqrt(1/2)]]. Removing w_0 costs err = 1 / sqrt(2/3), and w_1
becomes 2 + sqrt(3/2) sqrt(1/6) = 2.5: exactly the least-squares refit, 2 + H_10 / H_11.

Differs from the released code: exactly floor(128 r sparsity) weights of an unstructured group of r
rows x 128 columns are removed, not one more; an initially zero weight is removed first, even if the
sweep has changed it; layers that read the same tensor share H and U.

Expected: LLaMA-2 7B at 50 % has perplexity 6.51 (dense 5.12; published). Costs the product x x^T of
all tokens, about I/4 of a forward pass through the layer per output feature, and I^3 per layer.

Legend: O = output features, I = input features, C = columns of a block.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from secateur.pruning.blocks.linears import PrunableLinear
from secateur.pruning.blocks.statistics import Gram
from secateur.pruning.weights.hessian import Damped, factor_of
from secateur.pruning.weights.parts import Compensation, Matrix, Score
from secateur.pruning.weights.pattern import NM, Group, Pattern, PerMatrix, PerRow

_COLUMNS = 128  # columns of a block, as in the paper


Choose = Callable[[Tensor, Tensor, slice], Tensor]
"""A function from weights (O, C), factor of these columns (C, C) and columns to a mask (O, C)."""


def sweep(
    weight_OI: Float[Tensor, "O I"],
    factor_II: Float[Tensor, "I I"],
    choose: Choose,
    step: int = _COLUMNS,
    columns: int = _COLUMNS,
) -> tuple[Float[Tensor, "O I"], Bool[Tensor, "O I"]]:
    """Decide columns from left to right, and compensate to the right.

    Args:
        weight_OI: Weights.
        factor_II: Upper Cholesky factor of the inverse Hessian.
        choose: Decides `step` columns by their weights updated so far.
        step: Columns to decide at once, 1 to `columns`, a divisor of it.
        columns: Columns of a block; later blocks are compensated for it in one product.

    Returns:
        New weights, zero where the mask is False, and the mask.
    """
    # A column of the weights is contiguous in memory.
    w_IO = weight_OI.T.clone(memory_format=torch.contiguous_format)
    mask_IO = torch.ones(w_IO.shape, dtype=torch.bool, device=w_IO.device)
    diagonal_I = factor_II.diagonal()
    for start in range(0, len(w_IO), columns):
        end = min(start + columns, len(w_IO))
        err_CO = torch.zeros_like(w_IO[start:end])
        for j in range(start, end):
            if (j - start) % step == 0:
                own = slice(j, min(j + step, end))
                mask_IO[own] = choose(w_IO[own].T, factor_II[own, own], own).T
            err_CO[j - start] = w_IO[j].masked_fill(mask_IO[j], 0) / diagonal_I[j]
            w_IO[j].masked_fill_(~mask_IO[j], 0)
            w_IO[j + 1 : end].addr_(factor_II[j, j + 1 : end], err_CO[j - start], alpha=-1)
        w_IO[end:].addmm_(factor_II[start:end, end:].T, err_CO, alpha=-1)
    return w_IO.T.contiguous(), mask_IO.T.contiguous()


@dataclass(frozen=True)
class SweptScore(Damped, Score):
    """Keep weights whose removal could not be compensated, chosen column by column in a sweep."""

    @abstractmethod
    def chosen(
        self,
        weight_OC: Float[Tensor, "O C"],
        factor_CC: Float[Tensor, "C C"],
        zero_OC: Bool[Tensor, "O C"],
        matrix: Matrix,
    ) -> Bool[Tensor, "O C"]:
        """The mask of some columns.

        Args:
            weight_OC: Their weights, updated by the sweep so far.
            factor_CC: Their part of the factor of the inverse Hessian.
            zero_OC: Weights that were zero before the sweep; they are removed first.
            matrix: The matrix that they are part of.
        """

    def mask(self, matrix: Matrix) -> Bool[Tensor, "O I"]:
        start_OI = _read_weight(matrix)
        zero_OI = start_OI == 0

        def choose(weight_OC: Tensor, factor_CC: Tensor, columns: slice) -> Tensor:
            return self.chosen(weight_OC, factor_CC, zero_OI[:, columns], matrix)

        columns = matrix.pattern.sweep_columns(_COLUMNS)
        weight_OI, mask_OI = sweep(
            start_OI,
            factor_of(matrix, self.damping),
            choose,
            matrix.pattern.column_step(matrix.group, columns),
            columns,
        )
        matrix.swept = (self.damping, mask_OI, weight_OI)
        return mask_OI


@dataclass(frozen=True)
class ObsSaliency(SweptScore):
    """Keep weights whose removal could not be compensated, each judged by itself.

    Compared over all rows x 128 columns; within an N:M group along the inputs.

    Args:
        damping: Share of the mean diagonal that is added to the Hessian, finite and above 0.

    Raises:
        ValueError: `damping` is not above 0, or not finite.
    """

    def group(self, linear: PrunableLinear, pattern: Pattern) -> Group:
        return PerRow() if isinstance(pattern, NM) else PerMatrix()

    def refuse(self, linear: PrunableLinear, pattern: Pattern, group: Group) -> str | None:
        return None

    def chosen(
        self,
        weight_OC: Float[Tensor, "O C"],
        factor_CC: Float[Tensor, "C C"],
        zero_OC: Bool[Tensor, "O C"],
        matrix: Matrix,
    ) -> Bool[Tensor, "O C"]:
        score_OC = (weight_OC / factor_CC.diagonal()).square().masked_fill(zero_OC, -1)
        return matrix.pattern.mask(score_OC, matrix.group)


@dataclass(frozen=True)
class SparseGPTSweep(Damped, Compensation):
    """Compensate the error of every column in the columns to its right, in closed form.

    Args:
        damping: Share of the mean diagonal that is added to the Hessian, finite and above 0.

    Raises:
        ValueError: `damping` is not above 0, or not finite.
    """

    def weight(self, matrix: Matrix, mask_OI: Bool[Tensor, "O I"]) -> Float[Tensor, "O I"]:
        if matrix.swept is not None:
            damping, swept_OI, weight_OI = matrix.swept
            if damping == self.damping and torch.equal(swept_OI, mask_OI):
                return weight_OI  # weights of the sweep that chose the mask
        factor_II = factor_of(matrix, self.damping)
        weight_OI, _ = sweep(_read_weight(matrix), factor_II, lambda w, d, own: mask_OI[:, own])
        return weight_OI


def _read_weight(matrix: Matrix) -> Float[Tensor, "O I"]:
    """The weights, with zeros for inputs that are always zero."""
    return matrix.weight_OI.masked_fill(matrix.inputs[Gram].unread_I, 0)
