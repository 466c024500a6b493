"""DaSS: "Dependency-Aware Semi-Structured Sparsity of GLU Variants", arXiv 2405.01943.

In a gated MLP h = act(gate(x)) * up(x), down(h), with n_i the norm of h_i:

    gate, up   |W_ij| n_i^alpha, compared within a column: over the output rows i of one input
               feature j (eq. 6). The norm of input j would be equal for all entries compared.
    down       |W_ij| n_j, compared within a row: Wanda.

Norms are taken before any matrix of the block is pruned. Attention is not part of the method: it is
not pruned with `matrices=MlpOnly()`, as in the paper, and is scored by Wanda with `AllLinears()`.

    >>> weight_OI = torch.tensor([[3.0, 1.0], [2.0, 2.0]])
    >>> dass_score(weight_OI, torch.tensor([1.0, 4.0]), alpha=0.5)
    tensor([[3., 1.],
            [4., 4.]])

so that pruning half of every column keeps row 1 in both, while magnitude would keep 3 in the first.

2:4 kernels need groups along the inputs: in a DaSS model only `down` has them.

Expected: MLP only at 50 %, calibrated as in docs/weights.md, the 7 M LLaMA there has perplexity
113.94 on C4 (dense 109.27); two forward passes of the calibration windows.

Legend: O = output features, I = input features.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Bool, Float
from torch import Tensor

from secateur.pruning.blocks.linears import PrunableLinear
from secateur.pruning.blocks.statistics import SquareSums, Statistic
from secateur.pruning.weights.parts import Matrix, Score
from secateur.pruning.weights.pattern import Group, Pattern, PerColumn, PerRow
from secateur.pruning.weights.wanda import wanda_score


def dass_score(
    weight_OI: Float[Tensor, "O I"], middle_O: Float[Tensor, " O"], alpha: float
) -> Float[Tensor, "O I"]:
    """|W_ij| n_i^alpha.

    Args:
        weight_OI: Weights of gate or up.
        middle_O: Norm of every entry of the gated product, up to a common factor.
        alpha: Exponent of the norms, 0 or more; 0 is magnitude.
    """
    return weight_OI.abs() * middle_O.pow(alpha)[:, None]


@dataclass(frozen=True)
class DaSS(Score):
    """Score weights of gate and up by the norm of their entry of the gated product.

    All other matrices are scored by Wanda. Needs a gated MLP.

    Args:
        alpha: Exponent of the norms of the gated product, finite and above 0; 0.5 in the paper.

    Raises:
        ValueError: `alpha` is not above 0, or not finite.
    """

    alpha: float = 0.5
    needs: ClassVar[frozenset[type[Statistic]]] = frozenset({SquareSums})

    def __post_init__(self) -> None:
        if not 0 < self.alpha < float("inf"):
            raise ValueError(
                f"`alpha` must be finite and above 0, got {self.alpha}; 0 would be magnitude: use "
                "Magnitude."
            )

    def group(self, linear: PrunableLinear, pattern: Pattern) -> Group:
        return PerRow() if linear.middle is None else PerColumn()

    def refuse(self, linear: PrunableLinear, pattern: Pattern, group: Group) -> str | None:
        if linear.plain_mlp:
            return (
                "`score` DaSS needs a gated MLP, act(gate(x)) * up(x), and this model has a plain "
                "one; use Wanda."
            )
        if linear.middle is not None and isinstance(group, PerRow):
            return (
                "`score` DaSS with `group` PerRow compares weights of one row, which share one "
                "factor: this is magnitude. Use Magnitude, or leave `group` out."
            )
        if linear.middle is None and isinstance(group, PerColumn):
            return (
                "`score` DaSS scores it by Wanda, which cannot compare within columns: the norm of "
                "the input is equal for all of them. Leave `group` out."
            )
        return None

    def mask(self, matrix: Matrix) -> Bool[Tensor, "O I"]:
        if matrix.middle is not None:
            score_OI = dass_score(matrix.weight_OI, matrix.middle.norms_I(), self.alpha)
        else:
            score_OI = wanda_score(matrix.weight_OI, matrix.inputs.norms_I())
        return matrix.pattern.mask(score_OI, matrix.group)
