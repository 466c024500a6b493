"""Multiply gates into a live model, by hooks: the model itself is not changed.

Masking with the gates of a plan, 0 for what goes and 1 or its gain for what stays, gives the
function that the exported, smaller model computes. The
norms keep their statistics over the full width: an entry is normalised first, then selected.

Legend: S = sites, I = entries of a site.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pruning.families import Family, blocks_of, family_of
from pruning.sites import find_sites


class GateHooks:
    """The gates of a live model.

    They are open (the dense model) until `gates` is set, and open again when it is None.

    Args:
        model: A causal language model of a known family.
        family: The row of the table whose gates these are, `with_parts` or without; None looks it
            up.

    Raises:
        ValueError: The family is unknown, or a module of its row is missing.
    """

    def __init__(self, model: PreTrainedModel, family: Family | None = None) -> None:
        family = family or family_of(model.config)
        self.sites = find_sites(model, family)
        self.gates: Sequence[Tensor] | None = None
        self._handles = []
        for block_index, block in enumerate(blocks_of(model, family)):
            for offset, point in enumerate(family.gates.values()):
                module = block.get_submodule(point.path)
                place = block_index * len(family.gates) + offset
                self._handles.append(
                    module.register_forward_pre_hook(self._on_input(place), with_kwargs=True)
                    if point.side == "input"
                    else module.register_forward_hook(self._on_output(place))
                )

    @contextmanager
    def applied(self, gates: Sequence[Tensor] | None) -> Iterator[None]:
        """Gates for the duration of a `with` block; None opens them all.

        Args:
            gates: One vector of shape (I,) per site, in the order of the sites.
        """
        before, self.gates = self.gates, gates
        try:
            yield
        finally:
            self.gates = before

    def remove(self) -> None:
        """Take the hooks off the model."""
        for handle in self._handles:
            handle.remove()

    def _on_input(self, place: int) -> Any:
        def hook(
            module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
        ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
            if self.gates is None:
                return None
            if args:
                return (_gate(args[0], self.gates[place]), *args[1:]), kwargs
            return args, kwargs | {
                "hidden_states": _gate(kwargs["hidden_states"], self.gates[place])
            }

        return hook

    def _on_output(self, place: int) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            return output if self.gates is None else _gate(output, self.gates[place])

        return hook


def _gate(x: Tensor, gate_I: Tensor) -> Tensor:
    return torch.mul(x, gate_I.to(x.dtype))
