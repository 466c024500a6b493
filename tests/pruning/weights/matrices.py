"""Single matrices to try the parts on."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from secateur.pruning.blocks.linears import PrunableLinear
from secateur.pruning.blocks.statistics import Gram, Inputs, SquareSums, Statistic, Sums
from secateur.pruning.weights.parts import Matrix
from secateur.pruning.weights.pattern import Group, Pattern, PerRow

LINEAR = PrunableLinear(
    block=0, path="mlp.up_proj", shape=(6, 8), in_mlp=True, middle=None, plain_mlp=False
)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def inputs_of(
    x_BTI: Tensor, kinds: Collection[type[Statistic]] = (Gram, SquareSums, Sums)
) -> Inputs:
    inputs = Inputs(kinds, x_BTI.shape[-1], torch.device("cpu"))
    inputs.update(x_BTI, len(x_BTI))
    return inputs


def matrix_of(
    weight_OI: Tensor, x_BTI: Tensor, pattern: Pattern, group: Group | None = None, **fields: Any
) -> Matrix:
    return Matrix(
        linear=replace(LINEAR, shape=(weight_OI.shape[0], weight_OI.shape[1])),
        weight_OI=weight_OI,
        inputs=inputs_of(x_BTI),
        pattern=pattern,
        group=group or PerRow(),
        **{"middle": None, "note": lambda text: None} | fields,
    )


def output_error(weight_OI: Tensor, other_OI: Tensor, x_BTI: Tensor) -> float:
    """Squared error of the outputs."""
    return float(((x_BTI @ (weight_OI - other_OI).T) ** 2).sum())
