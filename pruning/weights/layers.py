"""Which matrices of a block are pruned. Embeddings, norms and the output head never are."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from secateur.pruning.blocks.linears import PrunableLinear


class LayerSelection(ABC):
    """Which linear layers of the blocks are pruned."""

    @abstractmethod
    def takes(self, linear: PrunableLinear) -> bool:
        """Whether a layer is pruned."""


@dataclass(frozen=True)
class AllLinears(LayerSelection):
    """Every linear layer of every block."""

    def takes(self, linear: PrunableLinear) -> bool:
        return True


@dataclass(frozen=True)
class MlpOnly(LayerSelection):
    """The layers of the MLPs; attention stays dense, as in DaSS."""

    def takes(self, linear: PrunableLinear) -> bool:
        return linear.in_mlp


@dataclass(frozen=True)
class AttentionOnly(LayerSelection):
    """The layers of attention; MLPs stay dense."""

    def takes(self, linear: PrunableLinear) -> bool:
        return not linear.in_mlp
