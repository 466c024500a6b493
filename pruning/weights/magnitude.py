"""Magnitude pruning: |W|, without data.

Expected on the 7 M LLaMA of docs/weights.md at 50 %: perplexity 117.30 on C4 (dense 109.27), in
less than a second.

Legend: O = output features, I = input features.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Bool
from torch import Tensor

from secateur.pruning.blocks.linears import PrunableLinear
from secateur.pruning.blocks.statistics import Statistic
from secateur.pruning.weights.parts import Matrix, Score
from secateur.pruning.weights.pattern import NM, Group, Pattern, PerMatrix, PerRow


@dataclass(frozen=True)
class Magnitude(Score):
    """Keep the largest weights, compared within a matrix; within an N:M group along the inputs."""

    needs: ClassVar[frozenset[type[Statistic]]] = frozenset()

    def group(self, linear: PrunableLinear, pattern: Pattern) -> Group:
        return PerRow() if isinstance(pattern, NM) else PerMatrix()

    def refuse(self, linear: PrunableLinear, pattern: Pattern, group: Group) -> str | None:
        return None

    def mask(self, matrix: Matrix) -> Bool[Tensor, "O I"]:
        return matrix.pattern.mask(matrix.weight_OI.abs(), matrix.group)
