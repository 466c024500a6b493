"""Score entries without text: by the size of their weights, or at random as a baseline.

Legend: N = all gates, S = sites, I = entries of a site, F = their features, W = calibration
windows, T = tokens, O, J = output and input features of a projection.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from secateur.pruning.families import Family, blocks_of
from secateur.pruning.sites import find_sites
from secateur.pruning.widths.scores import WidthScore


@dataclass(frozen=True)
class WidthMagnitude(WidthScore):
    """Norm of all weights of an entry: rows and columns of its site's projections.

    Entries are ranked within their site, so that every site keeps about the same fraction.
    """

    reads_text: ClassVar[bool] = False

    def values(
        self,
        model: PreTrainedModel,
        family: Family,
        gates: Sequence[Tensor] | None = None,
        windows_WT: Int[Tensor, "W T"] | None = None,
        batch_size: int = 8,
    ) -> Float[Tensor, " N"]:
        blocks = blocks_of(model, family)
        values = []
        for site in find_sites(model, family):
            squares_I = torch.zeros(site.size)
            for projection in family.projections_of(blocks[site.block]):
                weight_OJ: Tensor = blocks[site.block].get_submodule(projection.path).weight  # type: ignore[assignment]
                for axis, name in enumerate((projection.output, projection.input)):
                    if name == site.name:
                        squares_F = weight_OJ.detach().float().square().sum(1 - axis).cpu()
                        squares_I += squares_F.view(site.size, -1).sum(1)
            values.append(squares_I.sqrt())
        return torch.cat(values)


@dataclass(frozen=True)
class RandomOrder(WidthScore):
    """A random order of the entries of every site.

    Args:
        seed: Seed of the order, 0 or more.
    """

    seed: int = 0
    reads_text: ClassVar[bool] = False

    def values(
        self,
        model: PreTrainedModel,
        family: Family,
        gates: Sequence[Tensor] | None = None,
        windows_WT: Int[Tensor, "W T"] | None = None,
        batch_size: int = 8,
    ) -> Float[Tensor, " N"]:
        generator = torch.Generator().manual_seed(self.seed)
        sites = find_sites(model, family)
        return torch.cat([torch.rand(site.size, generator=generator) for site in sites])
