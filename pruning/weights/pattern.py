"""Patterns of zeros: how many entries of a matrix are removed, and which are compared.

A pattern splits a matrix into groups of equal size and removes the same number of entries, those of
the lowest score, from every group. Entries of equal score are removed in the order of their
positions, so that equal scores give equal masks on every machine.

Legend: O = output features, I = input features, G = groups, E = entries of a group, R = entries
removed of a group.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Shaped
from torch import Tensor


class Group(ABC):
    """Which entries of a matrix are compared with each other."""

    @abstractmethod
    def split(self, x_OI: Shaped[Tensor, "O I"]) -> Shaped[Tensor, "G E"]:
        """The entries of a matrix, one row per group."""

    @abstractmethod
    def join(self, x_GE: Shaped[Tensor, "G E"], shape: torch.Size) -> Shaped[Tensor, "O I"]:
        """The inverse of `split`, for a matrix of this shape."""


@dataclass(frozen=True)
class PerRow(Group):
    """Compare the inputs of one output feature."""

    def split(self, x_OI: Shaped[Tensor, "O I"]) -> Shaped[Tensor, "G E"]:
        return x_OI

    def join(self, x_GE: Shaped[Tensor, "G E"], shape: torch.Size) -> Shaped[Tensor, "O I"]:
        return x_GE


@dataclass(frozen=True)
class PerColumn(Group):
    """Compare the output features of one input feature."""

    def split(self, x_OI: Shaped[Tensor, "O I"]) -> Shaped[Tensor, "G E"]:
        return x_OI.T

    def join(self, x_GE: Shaped[Tensor, "G E"], shape: torch.Size) -> Shaped[Tensor, "O I"]:
        return x_GE.T


@dataclass(frozen=True)
class PerMatrix(Group):
    """Compare all entries of a matrix."""

    def split(self, x_OI: Shaped[Tensor, "O I"]) -> Shaped[Tensor, "G E"]:
        return x_OI.reshape(1, -1)

    def join(self, x_GE: Shaped[Tensor, "G E"], shape: torch.Size) -> Shaped[Tensor, "O I"]:
        return x_GE.reshape(shape)


class Pattern(ABC):
    """How many entries of every group are removed.

    Attributes:
        group: Which entries are compared; None uses the group of the score, as in its paper.
        sparsity: Fraction removed, in [0, 1).
    """

    group: Group | None
    sparsity: float

    @abstractmethod
    def split(self, x_OI: Shaped[Tensor, "O I"], group: Group) -> Shaped[Tensor, "G E"]:
        """The entries of a matrix, one row per group that is compared."""

    @abstractmethod
    def join(
        self, x_GE: Shaped[Tensor, "G E"], shape: torch.Size, group: Group
    ) -> Shaped[Tensor, "O I"]:
        """The inverse of `split`, for a matrix of this shape."""

    @abstractmethod
    def num_removed(self, entries: int) -> int:
        """Number of entries to remove from a group of a given size."""

    @abstractmethod
    def column_step(self, group: Group, columns: int) -> int:
        """Number of columns to decide at once in a sweep from left to right.

        Args:
            group: Which entries compete.
            columns: Columns of one block of the sweep.
        """

    @abstractmethod
    def sweep_columns(self, columns: int) -> int:
        """The largest number of columns, at most `columns`, that divides no group."""

    @abstractmethod
    def with_sparsity(self, sparsity: float) -> Pattern:
        """The same pattern at another sparsity in [0, 1).

        Raises:
            ValueError: The pattern has only one sparsity.
        """

    @abstractmethod
    def refuse(self, shape: tuple[int, int], group: Group) -> str | None:
        """Why a matrix of shape (O, I) cannot have the pattern, and the cure; None if it can."""

    def mask(self, score_OI: Shaped[Tensor, "O I"], group: Group) -> Bool[Tensor, "O I"]:
        """Compute the mask: True for the highest scores of every group.

        Args:
            score_OI: Scores; higher means keep.
            group: Which entries are compared.
        """
        score_GE = self.split(score_OI, group)
        keep_GE = keep_highest(score_GE, self.num_removed(score_GE.shape[1]))
        return self.join(keep_GE, score_OI.shape, group)


def keep_highest(score_GE: Shaped[Tensor, "G E"], num_removed: int) -> Bool[Tensor, "G E"]:
    """Mask, False for the `num_removed` lowest scores of every row, the first of equal ones."""
    if num_removed == 0:
        return torch.ones_like(score_GE, dtype=torch.bool)
    score_GE = score_GE.contiguous()  # columns are not contiguous in memory
    lowest_GR = score_GE.topk(num_removed, dim=1, largest=False, sorted=False).values
    limit_G1 = lowest_GR.amax(1, keepdim=True)
    below_GE, equal_GE = score_GE < limit_G1, score_GE == limit_G1
    room_G1 = num_removed - below_GE.sum(1, keepdim=True)
    first_GE = equal_GE.cumsum(1, dtype=torch.int32) <= room_G1
    return ~(below_GE | equal_GE & first_GE)


@dataclass(frozen=True)
class Unstructured(Pattern):
    """Zeros anywhere, the same number in every group.

    floor(E x sparsity) of the E entries of a group are removed: 0.7 of 256 are 179.

    Args:
        sparsity: Fraction removed, in [0, 1).
        group: Which entries are compared; None uses the group of the score, as in its paper.

    Raises:
        ValueError: `sparsity` is not in [0, 1).
    """

    sparsity: float
    group: Group | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.sparsity < 1:
            raise ValueError(f"`sparsity` must be in [0, 1), got {self.sparsity}.")

    def split(self, x_OI: Shaped[Tensor, "O I"], group: Group) -> Shaped[Tensor, "G E"]:
        return group.split(x_OI)

    def join(
        self, x_GE: Shaped[Tensor, "G E"], shape: torch.Size, group: Group
    ) -> Shaped[Tensor, "O I"]:
        return group.join(x_GE, shape)

    def num_removed(self, entries: int) -> int:
        return int(entries * self.sparsity + 1e-6)  # 0.29 of 100 are 29, despite rounding

    def column_step(self, group: Group, columns: int) -> int:
        return columns

    def sweep_columns(self, columns: int) -> int:
        return columns

    def with_sparsity(self, sparsity: float) -> Unstructured:
        return replace(self, sparsity=sparsity)

    def refuse(self, shape: tuple[int, int], group: Group) -> str | None:
        return None


@dataclass(frozen=True)
class NM(Pattern):
    """Remove `n` of every `m` consecutive entries: 2:4 is `NM(2, 4)`, 4:8 is `NM(4, 8)`.

    Kernels for 2:4 need the groups along the inputs (`PerRow`).

    Args:
        n: Entries removed of every group, 1 or more and less than `m`.
        m: Consecutive entries of a group, 2 or more; divides the axis that it runs along.
        group: Whether groups run along the inputs (`PerRow`) or along the outputs (`PerColumn`);
            None uses the group of the score, as in its paper.

    Raises:
        ValueError: `n` or `m` is out of its range, or `group` is `PerMatrix`.
    """

    n: int
    m: int
    group: Group | None = None

    def __post_init__(self) -> None:
        if not 0 < self.n < self.m:
            raise ValueError(
                f"`n` must be 1 or more and less than `m`: got n {self.n} and m {self.m}; n of m "
                "consecutive entries are removed."
            )
        if isinstance(self.group, PerMatrix):
            raise ValueError(
                "`group` PerMatrix cannot be used with NM: its groups are consecutive entries of a "
                "row or a column. Use PerRow or PerColumn."
            )

    @property
    def sparsity(self) -> float:  # type: ignore[override]
        """Fraction removed."""
        return self.n / self.m

    def split(self, x_OI: Shaped[Tensor, "O I"], group: Group) -> Shaped[Tensor, "G E"]:
        return group.split(x_OI).reshape(-1, self.m)

    def join(
        self, x_GE: Shaped[Tensor, "G E"], shape: torch.Size, group: Group
    ) -> Shaped[Tensor, "O I"]:
        rows = shape[1] if isinstance(group, PerColumn) else shape[0]
        return group.join(x_GE.reshape(rows, -1), shape)

    def num_removed(self, entries: int) -> int:
        return self.n

    def column_step(self, group: Group, columns: int) -> int:
        return self.m if isinstance(group, PerRow) else columns

    def sweep_columns(self, columns: int) -> int:
        return max(columns // self.m, 1) * self.m

    def with_sparsity(self, sparsity: float) -> NM:
        if abs(sparsity - self.sparsity) > 1e-9:
            raise ValueError(
                f"`pattern` NM({self.n}, {self.m}) removes {self.sparsity:.4f} everywhere and "
                f"cannot remove {sparsity:.4f}; use Unstructured for a sparsity that varies."
            )
        return self

    def refuse(self, shape: tuple[int, int], group: Group) -> str | None:
        axis = 0 if isinstance(group, PerColumn) else 1
        if shape[axis] % self.m == 0:
            return None
        fits = [m for m in range(2, 65) if shape[axis] % m == 0]
        cure = f"choose `m` among {', '.join(map(str, fits[:6]))}" if fits else "use Unstructured"
        return (
            f"`m` {self.m} does not divide its {('output', 'input')[axis]} features, "
            f"{shape[axis]}; {cure}, or leave the matrix out by `matrices`."
        )
