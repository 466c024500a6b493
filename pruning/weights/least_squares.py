"""APT's compensation: "Pruning Foundation Models for High Accuracy without Retraining", 2410.15567.

For a row w that keeps the set K and loses P, with H the damped Hessian of its inputs, the weights
that best reproduce the outputs of the dense row are (theorem 3.1)

    dw = -w_P [(H^-1)_PP]^-1 (H^-1)_P:        equivalently      w'_K = (H_KK)^-1 (H w)_K,

the least-squares refit. The second form is solved here: it needs no inverse, and at high sparsity
the kept set is the smaller one.

Worked by hand: w = (1, 2), H = [[2, 1], [1, 2]], the first entry is removed: w'_1 = (1 x 1 + 2 x 2)
/ 2 = 2.5. By the first form: dw_1 = -1 x (2/3)^-1 x (-1/3) = 0.5, the same.

Differs from the paper: the score chooses the mask.

Expected: never worse than the mask alone on the calibration text, layer by layer, and never worse
than a sweep with the same mask. Costs one Cholesky factorisation of K x K per output row.

Legend: O = output features, R = rows of a chunk, I = input features, K = kept inputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from secateur.pruning.blocks.statistics import next_damping
from secateur.pruning.weights.hessian import Damped, damped, note_repair
from secateur.pruning.weights.parts import Compensation, Matrix

_CHUNK_ENTRIES = 2**24  # entries of the batched K x K matrices: 64 MiB


def refit(
    weight_OI: Float[Tensor, "O I"], mask_OI: Bool[Tensor, "O I"], hessian_II: Float[Tensor, "I I"]
) -> Float[Tensor, "O I"]:
    """The weights under a mask whose outputs are closest to those of the dense weights.

    Args:
        weight_OI: Weights.
        mask_OI: True for kept weights; rows may keep different numbers.
        hessian_II: Positive definite.

    Raises:
        torch.linalg.LinAlgError: The Hessian is not positive definite.
    """
    most = int(mask_OI.sum(1).max())
    target_OI = weight_OI @ hessian_II
    result_OI = torch.zeros_like(weight_OI)
    if most == 0:
        return result_OI
    # Kept positions first, in order; rows that keep fewer than `most` are padded with other
    # positions, whose equations are replaced by x = 0.
    place_OK = mask_OI.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :most]
    real_OK = mask_OI.gather(1, place_OK)
    rows = max(1, _CHUNK_ENTRIES // most**2)
    for own in torch.arange(len(weight_OI), device=weight_OI.device).split(rows):
        place_RK, real_RK = place_OK[own], real_OK[own]
        matrix_RKK = hessian_II[place_RK[:, :, None], place_RK[:, None, :]]
        matrix_RKK *= real_RK[:, :, None] & real_RK[:, None, :]
        matrix_RKK.diagonal(dim1=1, dim2=2).add_(~real_RK)
        target_RK = target_OI[own].gather(1, place_RK) * real_RK
        solved_RK = torch.cholesky_solve(target_RK[:, :, None], torch.linalg.cholesky(matrix_RKK))
        result_OI[own] = torch.zeros_like(result_OI[own]).scatter(1, place_RK, solved_RK[:, :, 0])
    return result_OI


@dataclass(frozen=True)
class LeastSquares(Damped, Compensation):
    """Refit the kept weights of a row to the outputs of the dense row, exactly.

    Args:
        damping: Fraction of the mean diagonal that is added to the diagonal, finite and above 0.

    Raises:
        ValueError: `damping` is not above 0, or not finite.
    """

    def weight(self, matrix: Matrix, mask_OI: Bool[Tensor, "O I"]) -> Float[Tensor, "O I"]:
        hessian_II, damping = matrix.inputs.hessian_II(), self.damping
        while True:
            try:
                weight_OI = refit(matrix.weight_OI, mask_OI, damped(hessian_II, damping))
            except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
                damping = next_damping(damping)
            else:
                note_repair(matrix, self.damping, damping)
                return weight_OI
