"""Scores of gates that are read off the steps of a training, without calibration windows.

Source: "LoRAPrune" (arXiv 2305.18403, section 3.3). A moving average over optimiser steps,

    s <- average * s + (1 - average) * s_t,

ranks the gates; the lowest close while the model trains, and closed gates stay closed. A step whose
values are not finite on any rank is left out of the average.

Differs from the paper: a gate multiplies the feature itself, and with it everything that reads or
writes it; the budget decides how much of each block goes, none is protected; the last rise meets
the budget exactly; the model is then cut, and trains on with fresh updates.

Legend: N = all gates, S = sites, I = entries of a site, B = windows of a batch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from secateur.pruning.families import Family
from secateur.pruning.sites import Site
from secateur.pruning.widths.gate_hooks import GateHooks
from secateur.pruning.widths.scores import GateScore


class Watch(ABC):
    """What a score reads off the steps of one live model, whose closed gates stay closed.

    Args:
        model: The model, with its low-rank updates if it has any.
        family: The row of its family, `with_parts` or without.
        prunes: Whether a site may lose entries.

    Raises:
        ValueError: The model lacks what the score reads.
    """

    def __init__(
        self, model: PreTrainedModel, family: Family, prunes: Callable[[Site], bool]
    ) -> None:
        self.hooks = GateHooks(model, family)
        self.pruned = [prunes(site) for site in self.hooks.sites]
        self.device = model.device

    def close(self, gates: Sequence[Tensor]) -> None:
        """Keep gates closed from now on.

        Args:
            gates: One vector of shape (I,) per site: 1 for open entries, 0 for closed ones.
        """
        self.hooks.gates = [
            gate_I.to(self.device) if pruned else None
            for gate_I, pruned in zip(gates, self.pruned, strict=True)
        ]

    @abstractmethod
    def before_batch(self, windows: int) -> None:
        """Prepare for the forward pass of a batch.

        Args:
            windows: Number of windows of the batch, 1 or more.
        """

    @abstractmethod
    def after_backward(self) -> None:
        """Read the gradients of a batch."""

    @abstractmethod
    def values(self) -> Float[Tensor, " N"]:
        """Values of the optimiser step that is due, float32 on the CPU; the next starts anew.

        Gradients of the parameters are those of the step: accumulated, unscaled, not clipped.
        """

    def remove(self) -> None:
        """Remove all gates from the model."""
        self.hooks.remove()


@dataclass(frozen=True)
class TrainingScore(GateScore, ABC):
    """A score that training steps yield.

    Args:
        average: Weight of the earlier steps in the moving average, in [0, 1).

    Raises:
        ValueError: `average` is outside its range.
    """

    average: float = 0.9

    def __post_init__(self) -> None:
        if not 0 <= self.average < 1:
            raise ValueError(f"`average` must be in [0, 1), got {self.average}.")

    @abstractmethod
    def watch(
        self, model: PreTrainedModel, family: Family, prunes: Callable[[Site], bool]
    ) -> Watch:
        """Begin to watch a model; see `Watch`."""
