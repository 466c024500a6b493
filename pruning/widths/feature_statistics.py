"""Score entries by the features on calibration text and the weights that read them.

`WandaWidth` is the structured form of Wanda's metric, "A Simple and Effective Pruning Approach for
Large Language Models" (arXiv 2306.11695), as "Bypass Back-propagation" (arXiv 2406.10576) starts
from: the norm of the feature over all tokens, times the mean absolute weight of the projections
that read it. `Fluctuation` is that of "Fluctuation-based Adaptive Structured Pruning" (arXiv
2312.11983, eq. 5): the variance of the feature times the squared norm of these weights, since a
feature that hardly varies can be replaced by a bias. An entry that projections only write counts by
its feature alone; a group of heads by the sum over its features.

Only forward passes are needed. Memory: two floats per gate, in float64.

Worked by hand: a feature (3, 4) over two tokens, read with weights (1, -3): norm 5 times mean
absolute weight 2 is 10 by `WandaWidth`; variance 0.5 times 1 + 9 is 5 by `Fluctuation`.

Legend: N = all gates, S = sites, F = features at the gates of a site, I = its entries, W =
calibration windows, T = tokens of a window, O = output features.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from secateur.pruning.families import Family, blocks_of
from secateur.pruning.modes import evaluation
from secateur.pruning.sites import Site, find_sites
from secateur.pruning.widths.gate_hooks import GateHooks, hook_at
from secateur.pruning.widths.scores import WidthScore, refuse_parts


@dataclass
class _Moments:
    """Sums over tokens of a feature and of its square, shape (F,), float64."""

    tokens: int = 0
    sum_F: Tensor | float = 0.0
    squares_F: Tensor | float = 0.0

    def add(self, x: Tensor) -> None:
        x_NF = x.detach().flatten(0, -2).double()
        self.tokens += len(x_NF)
        self.sum_F, self.squares_F = self.sum_F + x_NF.sum(0), self.squares_F + x_NF.square().sum(0)

    def variance_F(self) -> Tensor:
        mean_F = torch.as_tensor(self.sum_F) / self.tokens
        around_F = torch.as_tensor(self.squares_F) - self.tokens * mean_F.square()
        return around_F.clamp_min(0) / max(1, self.tokens - 1)


@contextmanager
def _watched(model: PreTrainedModel, family: Family) -> Iterator[list[_Moments]]:
    """Moments of the features at every gate, for the duration of a `with` block."""
    handles, found = [], []
    for block in blocks_of(model, family):
        for point in family.gates_of(block).values():
            found.append(_Moments())
            handles.append(hook_at(block, point, found[-1].add))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True)
class _FeatureScore(WidthScore):
    """A score of the features at a gate and of the weights that read them."""

    reads_text: ClassVar[bool] = True

    @abstractmethod
    def of(self, feature: _Moments, readers: Sequence[Tensor]) -> Float[Tensor, " F"]:
        """The values of the features of a site.

        Args:
            feature: Their moments.
            readers: Weights (O, F) of the projections that read it; none if it is only written.
        """

    def values(
        self,
        model: PreTrainedModel,
        family: Family,
        gates: Sequence[Tensor] | None = None,
        windows_WT: Int[Tensor, "W T"] | None = None,
        batch_size: int = 8,
    ) -> Float[Tensor, " N"]:
        text_WT = self.text(windows_WT)
        hooks = GateHooks(model, family)
        try:
            applied = hooks.applied(gates)
            with evaluation(model), torch.no_grad(), applied, _watched(model, family) as moments:
                for windows_BT in text_WT.split(batch_size):
                    model.get_decoder()(input_ids=windows_BT.to(model.device), use_cache=False)
        finally:
            hooks.remove()
        blocks = blocks_of(model, family)
        values = []
        for site, feature in zip(find_sites(model, family), moments, strict=True):
            block: Any = blocks[site.block]
            paths = [p.path for p in family.projections_of(block) if p.input == site.name]
            readers = [block.get_submodule(path).weight.detach() for path in paths]
            value_F = self.of(feature, readers)
            values.append(value_F.view(site.size, -1).sum(1).float().cpu())
        return self.finite(torch.cat(values))


@dataclass(frozen=True)
class WandaWidth(_FeatureScore):
    """Norm of the feature times the mean absolute weight that reads it.

    Entries are ranked within their site, so that every site keeps about the same fraction.
    """

    def of(self, feature: _Moments, readers: Sequence[Tensor]) -> Float[Tensor, " F"]:
        norm_F = torch.as_tensor(feature.squares_F).sqrt()
        if not readers:
            return norm_F
        return norm_F * torch.stack([weight.double().abs().mean(0) for weight in readers]).mean(0)


@dataclass(frozen=True)
class Fluctuation(_FeatureScore):
    """Variance of the feature times the squared norm of the weights that read it.

    Values are standardised within their site and then compared between all sites, so that widths
    differ.
    """

    def of(self, feature: _Moments, readers: Sequence[Tensor]) -> Float[Tensor, " F"]:
        variance_F = feature.variance_F()
        if not readers:
            return variance_F
        return variance_F * torch.stack([w.double().square().sum(0) for w in readers]).sum(0)

    def scores(
        self,
        values_N: Float[Tensor, " N"],
        sites: Sequence[Site],
        marginal_S: Float[Tensor, " S"],
    ) -> Float[Tensor, " N"]:
        refuse_parts(sites)
        values = values_N.double().split([site.size for site in sites])
        return torch.cat([_standardised(value_I) for value_I in values])


def _standardised(value_I: Float[Tensor, " I"]) -> Float[Tensor, " I"]:
    """Distance from the mean in standard deviations; 0 of a single entry, which always stays."""
    if len(value_I) == 1:
        return torch.zeros_like(value_I)
    return (value_I - value_I.mean()) / value_I.std().clamp_min(1e-30)
