"""Apply gates and gains to a live model by hooks; the model itself is not changed.

A model masked with the gates of a plan (1 for kept entries, else 0) and its gains computes the same
function as the exported, smaller model. Norms keep their statistics over the full width: an entry
is normalised first, then selected.

Legend: S = sites, I = entries of a site, F = features on one side of a projection, B = windows of
a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from secateur.pruning.families import Family, GatePoint, blocks_of, family_of
from secateur.pruning.sites import find_sites


class GateHooks:
    """The gates of a live model, and the gains on both sides of its projections.

    All gates are open (the dense model) until `applied`.

    Args:
        model: A causal language model of a known family.
        family: The row of the table with the gates, with those of additional sites or without;
            None looks it up.

    Raises:
        ValueError: The family is unknown, or a module of its row is missing.
    """

    def __init__(self, model: PreTrainedModel, family: Family | None = None) -> None:
        self.family = family = family or family_of(model.config)
        self.sites = find_sites(model, family)
        self.gates: Sequence[Tensor | None] | None = None
        self.gains: Mapping[str, Tensor] | None = None
        self._handles: list[Any] = []
        places = count()
        for index, block in enumerate(blocks_of(model, family)):
            for point in family.gates_of(block).values():
                self._multiply(block, point, self._gate(next(places)))
            for projection in family.projections_of(block):
                for point in (
                    GatePoint(projection.path, "input"),
                    GatePoint(projection.path, "output"),
                ):
                    name = f"{index}.{point.path}.{point.side}"
                    self._multiply(block, point, self._gain(name))

    @contextmanager
    def applied(
        self,
        gates: Sequence[Tensor | None] | None,
        gains: Mapping[str, Tensor] | None = None,
    ) -> Iterator[None]:
        """Apply gates and gains for the duration of a `with` block; None opens all gates.

        Args:
            gates: One vector of shape (I,) per site, in the order of the sites, or of shape (B, 1,
                I): separate gates for every window of a batch. None leaves a site open.
            gains: One vector of shape (F,) per name of `secateur.pruning.sites.gain_sizes`.
        """
        before = self.gates, self.gains
        self.gates, self.gains = gates, gains
        try:
            yield
        finally:
            self.gates, self.gains = before

    def remove(self) -> None:
        """Remove the hooks from the model."""
        for handle in self._handles:
            handle.remove()

    def _gate(self, place: int) -> Callable[[], Tensor | None]:
        return lambda: None if self.gates is None else self.gates[place]

    def _gain(self, name: str) -> Callable[[], Tensor | None]:
        return lambda: None if self.gains is None else self.gains[name]

    def _multiply(
        self, block: nn.Module, point: GatePoint, factor: Callable[[], Tensor | None]
    ) -> None:
        """Set the factor of a module of a block; None removes it."""

        def times(x: Tensor) -> Tensor | None:
            return None if (factor_I := factor()) is None else _times(x, factor_I)

        self._handles.append(hook_at(block, point, times))


def hook_at(
    block: nn.Module, point: GatePoint, function: Callable[[Tensor], Tensor | None]
) -> RemovableHandle:
    """Call a function with the features at a gate in every forward pass.

    Args:
        block: A block of a live model.
        point: The gate.
        function: Receives the features (..., I); what it returns replaces them, unless None.

    Returns:
        The handle that removes the hook.
    """

    def on_input(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        new = function(args[0] if args else kwargs["hidden_states"])
        if new is None:
            return None
        return ((new, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": new})

    def on_output(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        return function(output)

    module = block.get_submodule(point.path)
    if point.side == "input":
        return module.register_forward_pre_hook(on_input, with_kwargs=True)
    return module.register_forward_hook(on_output)


def _times(x: Tensor, factor: Tensor) -> Tensor:
    factor = factor.to(x.device, x.dtype)
    if 1 < (groups := factor.shape[-1]) < (features := x.shape[-1]):  # of groups of heads
        factor = factor.repeat_interleave(features // groups, dim=-1)
    if factor.dim() == 3 and x.dim() == 2:  # OPT's MLP flattens windows to one row of tokens
        return torch.mul(x.view(len(factor), -1, x.shape[-1]), factor).view(x.shape)
    return torch.mul(x, factor)
