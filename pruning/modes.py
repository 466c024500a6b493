"""Set the mode of a live model for the duration of a `with` block."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def evaluation(model: nn.Module) -> Iterator[None]:
    """Set evaluation mode, without dropout; restore the mode afterwards."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Disable and remove the gradients of all parameters; restore them afterwards."""
    before = [(tensor, tensor.requires_grad, tensor.grad) for tensor in model.parameters()]
    try:
        for tensor, _, _ in before:
            tensor.requires_grad_(False)
            tensor.grad = None
        yield
    finally:
        for tensor, wanted, gradient in before:
            tensor.requires_grad_(wanted)
            tensor.grad = gradient
