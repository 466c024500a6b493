"""Make optimisers of the setting `optimizer`: their groups, and how they are told."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn


def made_optimizer(
    make: Callable[[Any], torch.optim.Optimizer], trained: Any
) -> torch.optim.Optimizer:
    """Make an optimiser.

    Args:
        make: The setting `optimizer`.
        trained: Parameters, or groups of them.

    Raises:
        ValueError: It does not take its settings; the reason is that of its library.
    """
    try:
        return make(trained)
    except (TypeError, ValueError) as error:
        raise ValueError(f"`optimizer` does not take its settings: {error}.") from error


def decay_groups(trained: Sequence[nn.Parameter]) -> list[dict[str, Any]]:
    """The groups of an optimiser: matrices, and vectors (biases, norms) without weight decay.

    Args:
        trained: The parameters, each once: tied embeddings are one.
    """

    def is_vector(parameter: nn.Parameter) -> bool:
        shape = getattr(parameter, "ds_shape", parameter.shape)  # DeepSpeed: full shape
        return len(shape) < 2

    vectors = [parameter for parameter in trained if is_vector(parameter)]
    matrices = [parameter for parameter in trained if not is_vector(parameter)]
    groups: list[dict[str, Any]] = [{"params": matrices}]
    groups.append({"params": vectors, "weight_decay": 0.0})
    return [group for group in groups if group["params"]]


def describe_optimizer(optimizer: torch.optim.Optimizer) -> str:
    """Class and settings of an optimiser; resuming restores these, whatever the configuration."""
    return f"{type(optimizer).__name__} {optimizer.defaults}"
