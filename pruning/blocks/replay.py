"""Run a block up to one of its layers; the output of its attention may be given.

Blocks are called as in their model, and layers are found by the paths of the family's row, so that
the same functions work for sequential and parallel blocks and for those with norms on both sides.

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
    """Raised to leave a block early, with the tensor that was looked for."""

    def __init__(self, tensor: Tensor) -> None:
        super().__init__()
        self.tensor = tensor


@contextmanager
def attention_given(block: nn.Module, output: Float[Tensor, "B T A"] | None) -> Iterator[None]:
    """Replace the attention of a block by a given output; None computes it."""
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
    """The input of a layer of a block, without running this and later layers.

    Args:
        block: The block.
        path: The layer, relative to the block.
        call: Arguments of the block.
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
    """The output of a layer of a block; later layers do not run. Arguments as for `input_of`."""

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
    """The outputs of a layer of a block and of the block. Arguments as for `input_of`."""
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
    """Restore the window axis, which OPT's MLP flattens."""
    return x.reshape(*call.hidden_BTD.shape[:2], x.shape[-1])
