"""The axes of weight pruning: base classes of allocation, score, refinement and compensation.

Each part is one small class. `secateur.pruning.weights.recipe` combines them, and the loop of
pruning/weights/loop.py calls them in this order: the allocation once, before all blocks; then per
block the score (which makes masks), the refinement (which changes masks) and the compensation
(which changes the kept weights).

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
from secateur.pruning.blocks.refit import Batch, BlockPair
from secateur.pruning.blocks.statistics import Inputs, Statistic
from secateur.pruning.weights.pattern import Group, Pattern


@dataclass
class Matrix:
    """One weight matrix while its block is pruned.

    Args:
        linear: Its layer.
        weight_OI: Its original weights, float32.
        inputs: Statistics of its inputs.
        middle: Statistics of the gated product of which its output is a factor, if it is one.
        pattern: How many of its entries are removed.
        group: Which of its entries are compared.
        note: Called with a sentence for the report.
        mask_OI: True for kept weights; set by the score, changed by the refinement.
        alike: Distinct input statistics of the block's matrices of the same width, its own
            included; or nothing.
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
    """A block while it is pruned; the weights of the module are dense until the end.

    Args:
        block: The module.
        matrices: Its matrices to prune.
        calls: Its arguments, one entry per batch of calibration windows.
    """

    block: nn.Module
    matrices: Sequence[Matrix]
    calls: Callable[[], Iterator[BlockCall]]


@dataclass(frozen=True)
class PrunedBlock:
    """The result of pruning one block.

    Args:
        masks: Layer, relative to the block, to mask (O, I), True for kept weights; on the CPU.
        notes: Sentences about deviations from the recipe.
    """

    masks: dict[str, Tensor]
    notes: list[str]


class Allocation(ABC):
    """How the sparsity is spread over the blocks."""

    @abstractmethod
    def refuse(self, pattern: Pattern) -> str | None:
        """Why it does not support a pattern, and the cure; None if it does."""

    @abstractmethod
    def sparsities(
        self, blocks: Callable[[], Iterator[Mapping[str, Tensor]]], sparsity: float
    ) -> list[float] | None:
        """Sparsity of every block, in [0, 1); None if all have that of the pattern.

        Args:
            blocks: Iterates over the blocks, in order: name, such as `3.mlp.up_proj`, to weight
                (O, I) of the matrices that are pruned.
            sparsity: Sparsity of all these matrices together.

        Raises:
            ValueError: A matrix cannot be evaluated; names it.
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
    """Which entries of a matrix are kept.

    Attributes:
        needs: Statistics to collect of the inputs.
    """

    needs: ClassVar[frozenset[type[Statistic]]]

    @abstractmethod
    def group(self, linear: PrunableLinear, pattern: Pattern) -> Group:
        """Which entries are compared in this layer if the pattern does not define it."""

    @abstractmethod
    def refuse(self, linear: PrunableLinear, pattern: Pattern, group: Group) -> str | None:
        """Why a layer cannot be scored in this way, and the cure; None if it can."""

    @abstractmethod
    def mask(self, matrix: Matrix) -> Bool[Tensor, "O I"]:
        """The mask by the pattern of the matrix: True for kept weights."""


class Refinement(ABC):
    """Change masks without training; every group keeps its number of entries.

    Attributes:
        needs: Statistics to collect of the inputs.
    """

    needs: ClassVar[frozenset[type[Statistic]]]

    @abstractmethod
    def refuse(self, linear: PrunableLinear, pattern: Pattern, group: Group) -> str | None:
        """Why a layer cannot be refined, and the cure; None if it can."""

    @abstractmethod
    def refine(self, task: BlockTask) -> list[Bool[Tensor, "O I"]]:
        """Refined masks, one per matrix of the block."""


class Compensation(ABC):
    """Change the kept weights to make up for the removed ones.

    Attributes:
        needs: Statistics to collect of the inputs.
        reads_dense: Whether `finish` is called; it reads the stream of the dense model.
    """

    needs: ClassVar[frozenset[type[Statistic]]]
    reads_dense: ClassVar[bool] = False

    def finish(
        self, block: BlockPair, batches: Sequence[Batch], masks: Mapping[str, Tensor]
    ) -> list[str]:
        """Change the layers of a pruned block once more, in place; return notes.

        Args:
            block: The block, dense and pruned.
            batches: All calibration windows at its input, in the dense and the pruned model.
            masks: Layer, relative to the block, to its mask (O, I).
        """
        return []

    @abstractmethod
    def weight(self, matrix: Matrix, mask_OI: Bool[Tensor, "O I"]) -> Float[Tensor, "O I"]:
        """New weights, float32, zero where the mask is False."""
