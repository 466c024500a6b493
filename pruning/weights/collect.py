"""Collect the statistics of the inputs of linear layers while a block runs."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from secateur.pruning.blocks.linears import BlockCall
from secateur.pruning.blocks.statistics import Inputs, Statistic


@torch.no_grad()
def collect(
    block: nn.Module,
    number: int,
    paths: Sequence[str],
    kinds: Collection[type[Statistic]],
    calls: Iterable[BlockCall],
) -> dict[str, Inputs]:
    """Statistics of the inputs of layers, by path; layers that read one tensor share them.

    Args:
        block: The block.
        number: Its number, for messages.
        paths: Layers, relative to the block.
        kinds: Statistics to collect.
        calls: Arguments of the block, batch by batch.

    Raises:
        ValueError: A layer was not called, or read numbers that are not finite.
    """
    if not kinds:
        return {path: Inputs((), 0, torch.device("cpu")) for path in paths}
    found: dict[str, Inputs] = {}
    seen: list[tuple[Tensor, Inputs]] = []

    def on_input(path: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            x = args[0]
            known = next((inputs for tensor, inputs in seen if tensor is x), None)
            if known is not None:
                found[path] = known
                return
            if path not in found:
                found[path] = Inputs(kinds, x.shape[-1], x.device)
            found[path].update(x, num_windows)
            seen.append((x, found[path]))

        return hook

    handles = [
        block.get_submodule(path).register_forward_pre_hook(on_input(path)) for path in paths
    ]
    try:
        for call in calls:
            num_windows = len(call.hidden_BTD)
            call.run(block)
            seen.clear()
    finally:
        for handle in handles:
            handle.remove()
    for path in paths:
        if path not in found:
            raise ValueError(f"{number}.{path} was not called while the calibration windows ran.")
        if not found[path].is_finite():
            raise ValueError(
                f"{number}.{path} reads numbers that are not finite; load the model in float32 or "
                "bfloat16, or check the weights before it."
            )
    return found
