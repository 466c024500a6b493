"""What a model calls its blocks with, recorded from a real forward pass.

Nothing about a family is written down here: masks, positions and caches are whatever the model
hands to its blocks.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from secateur.pruning.depth.units import first_input
from secateur.pruning.families import blocks_of, family_of

Call = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and keyword arguments of one call."""


@contextmanager
def recorded(model: PreTrainedModel) -> Iterator[dict[int, Call]]:
    """Index of every block to its last call; filled while the model runs.

    The recorded tensors are those of the model: they live as long as the dictionary.
    """
    calls: dict[int, Call] = {}

    def recorder(index: int) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            calls[index] = args, kwargs

        return hook

    handles = [
        block.register_forward_pre_hook(recorder(index), with_kwargs=True)
        for index, block in enumerate(blocks_of(model, family_of(model.config)))
    ]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def with_input(call: Call, hidden_BTD: Tensor) -> Call:
    """The same call with other hidden states."""
    args, kwargs = call
    if args:
        return (hidden_BTD, *args[1:]), kwargs
    return args, kwargs | {"hidden_states": hidden_BTD}


@contextmanager
def fed(block: nn.Module, hidden_BTD: Tensor) -> Iterator[None]:
    """A block that gets these hidden states whatever it is called with."""

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        assert first_input(args, kwargs).shape == hidden_BTD.shape
        return with_input((args, kwargs), hidden_BTD)

    handle = block.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
