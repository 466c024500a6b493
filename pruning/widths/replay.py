"""Run a block up to one of its layers, with its attention computed or given.

Blocks are called as their model calls them, and layers are found by the paths of the family's row,
so that one way serves sequential and parallel blocks and those with norms on both sides.

Legend: B = windows of a batch, T = tokens of a window, D = width of the residual stream, I, O, A =
inputs and outputs of a layer, outputs of attention.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from secateur.pruning.blocks.linears import BlockCall


class _Reached(Exception):
    """Carries what was looked for out of a block whose rest need not run."""

    def __init__(self, tensor: Tensor) -> None:
        super().__init__()
        self.tensor = tensor


@contextmanager
def attention_given(block: nn.Module, output: Float[Tensor, "B T A"] | None) -> Iterator[None]:
    """Let the attention of a block give this output without computing it; None computes it."""
    if output is None:
        yield
        return
    attention: Any = block.self_attn
    attention.forward = lambda *args, **kwargs: (output, None)
    try:
        yield
    finally:
        del attention.forward


def input_of(
    block: nn.Module, path: str, call: BlockCall, attention: Float[Tensor, "B T A"] | None = None
) -> Float[Tensor, "B T I"]:
    """What a layer of a block reads; neither it nor what follows it runs.

    Args:
        block: The block.
        path: The layer, relative to the block.
        call: What the block is called with.
        attention: Output of the attention, if it is known.
    """

    def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
        raise _Reached(args[0])

    return _run_to(
        block.get_submodule(path).register_forward_pre_hook(hook), block, call, attention
    )


def output_of(
    block: nn.Module, path: str, call: BlockCall, attention: Float[Tensor, "B T A"] | None = None
) -> Float[Tensor, "B T O"]:
    """What a layer of a block gives out; what follows it does not run. Arguments as above."""

    def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        raise _Reached(output)

    return _run_to(block.get_submodule(path).register_forward_hook(hook), block, call, attention)


def _run_to(handle: Any, block: nn.Module, call: BlockCall, attention: Tensor | None) -> Tensor:
    try:
        with attention_given(block, attention):
            call.run(block)
    except _Reached as reached:
        return _by_window(reached.tensor, call)
    finally:
        handle.remove()
    raise AssertionError("every layer of the family's row is called")


def outputs_of(
    block: nn.Module, path: str, call: BlockCall, attention: Float[Tensor, "B T A"] | None = None
) -> tuple[Float[Tensor, "B T O"], Float[Tensor, "B T D"]]:
    """What a layer of a block and the block itself give out. Arguments as above."""
    found: list[Tensor] = []

    def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        found.append(output)

    handle = block.get_submodule(path).register_forward_hook(hook)
    try:
        with attention_given(block, attention):
            output_BTD = call.run(block)
    finally:
        handle.remove()
    return _by_window(found[0], call), output_BTD


def _by_window(x: Tensor, call: BlockCall) -> Tensor:
    """Tokens by window, which OPT's MLP reads as one row."""
    return x.reshape(*call.hidden_BTD.shape[:2], x.shape[-1])
