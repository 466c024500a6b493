"""Score gates by the gradient of the training loss at them, while the model trains.

Source: the first-order importance of "LoRAPrune" (arXiv 2305.18403, section 3.2), exactly instead
of by its estimate from low-rank updates. With a gate g_i = 1 on entry i of a site,

    dL/dg_i = sum_t x_ti dL/dx_ti,     value_i = mean over windows of |dL/dg_i|.

Back-propagation to the updates computes both factors anyway. `GateGradient` is the same value on
calibration windows. Memory: the features at the gates of one batch, and two floats per gate and
window; time: that of one multiplication per gated feature.

Legend: N = all gates, S = sites, I = entries of a site, B = windows of a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from secateur.pruning.families import Family
from secateur.pruning.sites import Site
from secateur.pruning.widths.scores import scores_per_cost
from secateur.pruning.widths.training_score import TrainingScore, Watch


@dataclass(frozen=True)
class GateTaylor(TrainingScore):
    """Mean |gradient of the training loss at the gate| over windows, per cost of the entry.

    Args:
        average: Weight of the earlier steps in the moving average, in [0, 1).
    """

    def watch(
        self, model: PreTrainedModel, family: Family, prunes: Callable[[Site], bool]
    ) -> Watch:
        return _GateWatch(model, family, prunes)

    def scores(
        self,
        values_N: Float[Tensor, " N"],
        sites: Sequence[Site],
        marginal_S: Float[Tensor, " S"],
    ) -> Float[Tensor, " N"]:
        return scores_per_cost(values_N, sites, marginal_S)


class _GateWatch(Watch):
    """Gates with a gradient of their own for every window of a batch."""

    def __init__(
        self, model: PreTrainedModel, family: Family, prunes: Callable[[Site], bool]
    ) -> None:
        super().__init__(model, family, prunes)
        sites = self.hooks.sites
        self._totals = [torch.zeros(site.size, device=self.device) for site in sites]
        self._masks: Sequence[Tensor | None] = []
        self._leaves: list[Tensor | None] = []
        self.close([torch.ones(site.size) for site in sites])

    def before_batch(self, windows: int) -> None:
        self._masks = self.hooks.gates or []
        self._leaves = [
            None if mask_I is None else mask_I.expand(windows, 1, -1).clone().requires_grad_()
            for mask_I in self._masks
        ]
        self.hooks.gates = self._leaves

    def after_backward(self) -> None:
        for total_I, leaf_B1I in zip(self._totals, self._leaves, strict=True):
            if leaf_B1I is not None and leaf_B1I.grad is not None:
                total_I += leaf_B1I.grad.abs().sum((0, 1))
        self.hooks.gates, self._leaves = self._masks, []

    def values(self) -> Float[Tensor, " N"]:
        values_N = torch.cat(self._totals).cpu()
        for total_I in self._totals:
            total_I.zero_()
        return values_N
