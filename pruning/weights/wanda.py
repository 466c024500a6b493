"""Wanda: "A Simple and Effective Pruning Approach for Large Language Models", arXiv 2306.11695.

Score |W_ij| a_j with a_j the norm of input feature j (eq. 1), compared per output row.

    >>> weight_OI = torch.tensor([[4.0, -3.0, 2.0, 1.0]])
    >>> wanda_score(weight_OI, torch.tensor([0.1, 1.0, 1.0, 5.0]))
    tensor([[0.4000, 3.0000, 2.0000, 5.0000]])

so that pruning half of the row keeps -3 and 1, not 4 and -3.

Expected: LLaMA-2 7B at 50 % has perplexity 6.42 on WikiText-2 with 4096 tokens of context (dense
5.12; published), two forward passes of the calibration windows.

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


def wanda_score(
    weight_OI: Float[Tensor, "O I"], norms_I: Float[Tensor, " I"]
) -> Float[Tensor, "O I"]:
    """|W_ij| a_j.

    Args:
        weight_OI: Weights.
        norms_I: Norm of every input feature, up to a common factor.
    """
    return weight_OI.abs() * norms_I


@dataclass(frozen=True)
class Wanda(Score):
    """Keep large weights of large inputs, compared within an output row."""

    needs: ClassVar[frozenset[type[Statistic]]] = frozenset({SquareSums})

    def group(self, linear: PrunableLinear, pattern: Pattern) -> Group:
        return PerRow()

    def refuse(self, linear: PrunableLinear, pattern: Pattern, group: Group) -> str | None:
        if isinstance(group, PerColumn):
            return (
                "`score` Wanda with `group` PerColumn compares weights that read the same input, "
                "whose norm is equal for all of them; use Magnitude, or PerRow."
            )
        return None

    def mask(self, matrix: Matrix) -> Bool[Tensor, "O I"]:
        score_OI = wanda_score(matrix.weight_OI, matrix.inputs.norms_I())
        return matrix.pattern.mask(score_OI, matrix.group)
