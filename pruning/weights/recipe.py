"""A recipe: one choice per axis, checked against a model before any work.

Legend: N = windows, T = tokens of a window.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields

from jaxtyping import Int
from torch import Tensor

from secateur.pruning.blocks.linears import PrunableLinear
from secateur.pruning.blocks.statistics import Statistic
from secateur.pruning.weights.layers import AllLinears, LayerSelection
from secateur.pruning.weights.parts import Allocation, Compensation, Refinement, Score, Uniform
from secateur.pruning.weights.pattern import Group, Pattern
from secateur.pruning.weights.wanda import Wanda


@dataclass(frozen=True)
class WeightRecipe:
    """The choices of weight pruning, one per axis.

    Args:
        pattern: How many entries of every group are removed: `Unstructured` or `NM`.
        score: Which weights are kept: `Magnitude`, `Wanda`, `DaSS` or `ObsSaliency`.
        allocation: How the sparsity is spread over the blocks: `Uniform` or `AlphaPruning`.
        refinement: Changes the masks: `DSnoT` or `Barber`; None leaves them unchanged.
        compensation: Changes the kept weights: `SparseGPTSweep`, `LeastSquares` or
            `ResidualLeastSquares`; None leaves them unchanged.
        matrices: Which matrices are pruned: `AllLinears`, `MlpOnly` or `AttentionOnly`.
    """

    pattern: Pattern
    score: Score = field(default_factory=Wanda)
    allocation: Allocation = field(default_factory=Uniform)
    refinement: Refinement | None = None
    compensation: Compensation | None = None
    matrices: LayerSelection = field(default_factory=AllLinears)

    @property
    def needs(self) -> frozenset[type[Statistic]]:
        """Statistics to collect of the inputs of every pruned matrix."""
        parts = (self.score, self.refinement, self.compensation)
        return frozenset().union(*(part.needs for part in parts if part is not None))

    @property
    def data_free(self) -> bool:
        """Whether no part reads calibration windows."""
        return not self.needs and self.refinement is None

    @property
    def reads_dense(self) -> bool:
        """Whether the compensation reads the stream of the dense model."""
        return self.compensation is not None and self.compensation.reads_dense

    def group(self, linear: PrunableLinear) -> Group:
        """Which entries of a layer are compared."""
        return self.pattern.group or self.score.group(linear, self.pattern)

    def pruned(self, linears: Sequence[PrunableLinear]) -> list[PrunableLinear]:
        """The layers that are pruned."""
        return [linear for linear in linears if self.matrices.takes(linear)]

    def check(self, blocks: Sequence[Sequence[PrunableLinear]]) -> None:
        """Refuse a recipe that cannot be applied, before any work.

        Args:
            blocks: The layers of every block, from `linears_of`.

        Raises:
            ValueError: Parts are incompatible with each other or the model; names the matrix.
        """
        if reason := self.allocation.refuse(self.pattern):
            raise ValueError(reason)
        chosen = [linear for block in blocks for linear in self.pruned(block)]
        if not chosen:
            raise ValueError(f"`matrices` {type(self.matrices).__name__} selects no matrix.")
        for linear in chosen:
            group = self.group(linear)
            judges = [part for part in (self.score, self.refinement) if part is not None]
            reasons = [self.pattern.refuse(linear.shape, group)]
            reasons += [part.refuse(linear, self.pattern, group) for part in judges]
            if reason := next(filter(None, reasons), None):
                raise ValueError(f"{linear.name} cannot be pruned like this: {reason}")

    def check_windows(self, windows_NT: Int[Tensor, "N T"] | None) -> None:
        """Refuse missing calibration windows if a part reads them.

        Raises:
            ValueError: There are none, and a part needs them.
        """
        if windows_NT is None and not self.data_free:
            raise ValueError(
                "`windows_NT` is needed: parts of this recipe read calibration windows."
            )

    def settings(self) -> dict[str, str]:
        """Every part with its settings, to compare recipes and for reports."""
        return {each.name: repr(getattr(self, each.name)) for each in fields(self)}
