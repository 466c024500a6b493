"""The arguments of blocks, recorded from a real forward pass.

No family is treated specially: masks, positions and caches are those that the model passes to its
blocks.
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

    The recorded tensors are not copies; they are kept as long as the dictionary.
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
    """Make a block compute on the given hidden states, whatever its input."""

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        assert first_input(args, kwargs).shape == hidden_BTD.shape
        return with_input((args, kwargs), hidden_BTD)

    handle = block.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
