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

`ResidualLeastSquares` then refits all layers of the block as `pruning/blocks/refit.py` does for
narrow models, under their masks: layers that write to the residual stream make up for what earlier
blocks lost.

Legend: O = output features, I = input features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from secateur.pruning.blocks.refit import Batch, BlockPair, refit_block
from secateur.pruning.blocks.ridge import under_mask
from secateur.pruning.blocks.statistics import next_damping
from secateur.pruning.weights.hessian import Damped, damped, note_repair
from secateur.pruning.weights.parts import Compensation, Matrix


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
                weight_OI = under_mask(matrix.weight_OI, mask_OI, damped(hessian_II, damping))
            except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
                damping = next_damping(damping)
            else:
                note_repair(matrix, self.damping, damping)
                return weight_OI


@dataclass(frozen=True)
class ResidualLeastSquares(LeastSquares):
    """Refit as `LeastSquares` does, then all layers of the block to make up for earlier blocks.

    Layers that read the residual stream are fitted to the outputs of the dense ones on the dense
    stream, layers that write to it to the difference of the two streams. Needs the dense stream: a
    copy of one block and of the calibration states.

    Args:
        damping: Fraction of the mean diagonal that is added to the diagonal, finite and above 0.

    Raises:
        ValueError: `damping` is not above 0, or not finite.
    """

    reads_dense: ClassVar[bool] = True

    def finish(
        self, block: BlockPair, batches: Sequence[Batch], masks: Mapping[str, Tensor]
    ) -> list[str]:
        layers = refit_block(block, batches, self.damping, masks)
        return [
            f"{layer.name}: the residual refit needed damping {layer.damping:.2g}."
            for layer in layers
            if layer.damping > self.damping
        ]
