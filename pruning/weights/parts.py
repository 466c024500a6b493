"""The axes of weight pruning: what an allocation, a score, a refinement and a compensation are.

Each part is one small class. They meet in `secateur.pruning.weights.recipe`, and the loop of
pruning/weights/loop.py calls them, block by block, in this order: the allocation once, before all
blocks; then per block the score (which makes masks), the refinement (which changes masks) and the
compensation (which changes the weights that stay).

Legend: O = output features, I = input features.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from secateur.pruning.blocks.linears import BlockCall, PrunableLinear
from secateur.pruning.blocks.statistics import Inputs, Statistic
from secateur.pruning.weights.pattern import Group, Pattern


@dataclass
class Matrix:
    """One weight matrix while its block is pruned.

    Args:
        linear: Which one it is.
        weight_OI: Its weights as they were, float32.
        inputs: What is known of what it reads.
        middle: What is known of the gated product of which its output is a factor, if it is one.
        pattern: How much of it goes.
        group: Which of its entries compete.
        note: Takes a sentence for the report.
        mask_OI: True for what stays; set by the score, changed by the refinement.
        alike: What is known of the inputs of the block's matrices that are as wide, its own among
            it, each once; or nothing.
        swept: Damping, mask and weights of the sweep that chose the mask, if one did.
    """

    linear: PrunableLinear
    weight_OI: Tensor
    inputs: Inputs
    middle: Inputs | None
    pattern: Pattern
    group: Group
    note: Callable[[str], None]
    mask_OI: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.bool))
    alike: Sequence[Inputs] = ()
    swept: tuple[float, Tensor, Tensor] | None = None


@dataclass
class BlockTask:
    """A block while it is pruned; its own weights are dense until the end.

    Args:
        block: The module.
        matrices: Its matrices that are pruned.
        calls: What it is called with, one entry per batch of calibration windows.
    """

    block: nn.Module
    matrices: Sequence[Matrix]
    calls: Callable[[], Iterator[BlockCall]]


@dataclass(frozen=True)
class PrunedBlock:
    """A block that is finished.

    Args:
        masks: Layer, relative to the block, to mask (O, I), True for what stays; on the CPU.
        notes: Sentences about what went otherwise than asked.
    """

    masks: dict[str, Tensor]
    notes: list[str]


class Allocation(ABC):
    """How the sparsity of the whole is spread over the blocks."""

    @abstractmethod
    def refuse(self, pattern: Pattern) -> str | None:
        """Why it does not go with a pattern, and the cure; None if it does."""

    @abstractmethod
    def sparsities(
        self, blocks: Callable[[], Iterator[Mapping[str, Tensor]]], sparsity: float
    ) -> list[float] | None:
        """Sparsity of every block, in [0, 1); None where all have that of the pattern.

        Args:
            blocks: Goes through the blocks, in order: name, such as `3.mlp.up_proj`, to weight
                (O, I) of the matrices that are pruned.
            sparsity: Of all these matrices together.

        Raises:
            ValueError: A matrix cannot be judged; names it.
        """


@dataclass(frozen=True)
class Uniform(Allocation):
    """Every block has the sparsity of the pattern."""

    def refuse(self, pattern: Pattern) -> str | None:
        return None

    def sparsities(
        self, blocks: Callable[[], Iterator[Mapping[str, Tensor]]], sparsity: float
    ) -> list[float] | None:
        return None


class Score(ABC):
    """Which entries of a matrix stay.

    Attributes:
        needs: Statistics to collect of the inputs.
    """

    needs: ClassVar[frozenset[type[Statistic]]]

    @abstractmethod
    def group(self, linear: PrunableLinear, pattern: Pattern) -> Group:
        """Which entries compete in this layer where the pattern does not say."""

    @abstractmethod
    def refuse(self, linear: PrunableLinear, pattern: Pattern, group: Group) -> str | None:
        """Why a layer cannot be scored like that, and the cure; None if it can."""

    @abstractmethod
    def mask(self, matrix: Matrix) -> Bool[Tensor, "O I"]:
        """True for what stays, by the pattern of the matrix."""


class Refinement(ABC):
    """Changes masks without training; every group keeps its number of entries.

    Attributes:
        needs: Statistics to collect of the inputs.
    """

    needs: ClassVar[frozenset[type[Statistic]]]

    @abstractmethod
    def refuse(self, linear: PrunableLinear, pattern: Pattern, group: Group) -> str | None:
        """Why a layer cannot be refined, and the cure; None if it can."""

    @abstractmethod
    def refine(self, task: BlockTask) -> list[Bool[Tensor, "O I"]]:
        """Better masks, one per matrix of the block."""


class Compensation(ABC):
    """Changes the weights that stay so that they make up for those that go.

    Attributes:
        needs: Statistics to collect of the inputs.
    """

    needs: ClassVar[frozenset[type[Statistic]]]

    @abstractmethod
    def weight(self, matrix: Matrix, mask_OI: Bool[Tensor, "O I"]) -> Float[Tensor, "O I"]:
        """New weights, float32, zero where the mask is False."""
