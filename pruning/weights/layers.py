"""Selections of matrices to prune. Embeddings, norms and the output head are never pruned."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from secateur.pruning.blocks.linears import PrunableLinear


class LayerSelection(ABC):
    """A selection of linear layers of the blocks to prune."""

    @abstractmethod
    def takes(self, linear: PrunableLinear) -> bool:
        """Test whether a layer is pruned."""


@dataclass(frozen=True)
class AllLinears(LayerSelection):
    """Every linear layer of every block."""

    def takes(self, linear: PrunableLinear) -> bool:
        return True


@dataclass(frozen=True)
class MlpOnly(LayerSelection):
    """The layers of the MLPs; attention is not pruned, as in DaSS."""

    def takes(self, linear: PrunableLinear) -> bool:
        return linear.in_mlp


@dataclass(frozen=True)
class AttentionOnly(LayerSelection):
    """The layers of attention; MLPs are not pruned."""

    def takes(self, linear: PrunableLinear) -> bool:
        return not linear.in_mlp
