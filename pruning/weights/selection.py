"""Which matrices of a block are pruned. Embeddings, norms and the output head never are."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from pruning.weights.parts import Linear


class Selection(ABC):
    """Which linear layers of the blocks are pruned."""

    @abstractmethod
    def takes(self, linear: Linear) -> bool:
        """Whether a layer is pruned."""


@dataclass(frozen=True)
class AllLinears(Selection):
    """Every linear layer of every block."""

    def takes(self, linear: Linear) -> bool:
        return True


@dataclass(frozen=True)
class MlpOnly(Selection):
    """The layers of the MLPs; attention stays dense, as in DaSS."""

    def takes(self, linear: Linear) -> bool:
        return linear.in_mlp


@dataclass(frozen=True)
class AttentionOnly(Selection):
    """The layers of attention; MLPs stay dense."""

    def takes(self, linear: Linear) -> bool:
        return not linear.in_mlp
