"""Statistics of the inputs of linear layers, collected while windows run through a block.

Layers that read the same tensor (queries, keys and values; gate and up) share one collection, and
only statistics that the parts of a recipe need are collected.

Legend: B = windows of a batch, T = tokens of a window, N = tokens of a batch, I = input features.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection
from typing import TypeVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

_MOST = 1e6  # a finite symmetric matrix is positive definite at less damping
_CHUNK = 256  # rows of the Gram matrix at once; entries to the left follow by symmetry


class Statistic(ABC):
    """A sum over all input tokens of a layer.

    Args:
        width: Input features of the layer.
        device: Its device.
    """

    @abstractmethod
    def __init__(self, width: int, device: torch.device) -> None: ...

    @abstractmethod
    def update(self, x_BTI: Float[Tensor, "B T I"]) -> None:
        """Add a batch, float32."""

    @abstractmethod
    def is_finite(self) -> bool:
        """Whether all that was taken in is finite."""


class Sums(Statistic):
    """Sum of every input feature, float32, window after window."""

    def __init__(self, width: int, device: torch.device) -> None:
        self.total_I = torch.zeros(width, device=device)

    def update(self, x_BTI: Float[Tensor, "B T I"]) -> None:
        for sum_I in x_BTI.sum(1):
            self.total_I += sum_I

    def is_finite(self) -> bool:
        return bool(self.total_I.isfinite().all())


class SquareSums(Statistic):
    """Sum of squares of every input feature, float32, window after window."""

    def __init__(self, width: int, device: torch.device) -> None:
        self.total_I = torch.zeros(width, device=device)

    def update(self, x_BTI: Float[Tensor, "B T I"]) -> None:
        for sum_I in x_BTI.square().sum(1):
            self.total_I += sum_I

    def is_finite(self) -> bool:
        return bool(self.total_I.isfinite().all())


class Gram(Statistic):
    """Sum of x x^T, float32, by products of rank N, computing only the upper half."""

    def __init__(self, width: int, device: torch.device) -> None:
        self._upper_II = torch.zeros(width, width, device=device)
        self.memo: dict[float, tuple[Tensor, float]] = {}
        """Factor of the finished sum and the damping used, by the requested damping."""

    def update(self, x_BTI: Float[Tensor, "B T I"]) -> None:
        x_NI = x_BTI.flatten(0, 1)
        for start in range(0, x_NI.shape[1], _CHUNK):
            rows = slice(start, start + _CHUNK)
            self._upper_II[rows, start:].addmm_(x_NI[:, rows].T, x_NI[:, start:])

    @property
    def total_II(self) -> Float[Tensor, "I I"]:
        """The whole matrix."""
        return self._upper_II.triu() + self._upper_II.triu(1).T

    @property
    def unread_I(self) -> Bool[Tensor, " I"]:
        """True for inputs that were zero at every token."""
        return self._upper_II.diagonal() == 0

    def is_finite(self) -> bool:
        return bool(self._upper_II.diagonal().isfinite().all())


_S = TypeVar("_S", bound=Statistic)


class Inputs:
    """All statistics of the inputs of one or several layers.

    Args:
        kinds: Statistics to collect.
        width: Input features.
        device: Their device.
    """

    def __init__(
        self, kinds: Collection[type[Statistic]], width: int, device: torch.device
    ) -> None:
        self.width = width
        self._by_kind = {kind: kind(width, device) for kind in kinds}
        self.num_windows = 0
        self.num_tokens = 0

    def update(self, x: Tensor, num_windows: int) -> None:
        """Add the inputs of the layers for a batch, of shape (..., I)."""
        x_BTI = x.detach().reshape(num_windows, -1, x.shape[-1]).float()
        for statistic in self._by_kind.values():
            statistic.update(x_BTI)
        self.num_windows += num_windows
        self.num_tokens += x_BTI.shape[0] * x_BTI.shape[1]

    def __getitem__(self, kind: type[_S]) -> _S:
        statistic = self._by_kind[kind]
        assert isinstance(statistic, kind)
        return statistic

    def is_finite(self) -> bool:
        """Whether all that was taken in is finite."""
        return all(statistic.is_finite() for statistic in self._by_kind.values())

    def norms_I(self) -> Float[Tensor, " I"]:
        """Norm of every input feature, float32: sqrt(mean over windows of the sum of squares)."""
        return (self[SquareSums].total_I / self.num_windows).sqrt()

    def hessian_II(self) -> Float[Tensor, "I I"]:
        """Hessian of the squared error of an output: 2 sum(x x^T) / windows, float32."""
        return self[Gram].total_II * (2 / self.num_windows)


def next_damping(damping: float) -> float:
    """The damping to try after Cholesky has failed: ten times as much."""
    assert damping < _MOST, "a finite symmetric matrix is positive definite at some damping"
    return damping * 10
