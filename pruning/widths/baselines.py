"""Scores that learn nothing, to compare learned masks with.

Each gives one score per gate for `Budget.finalise`. Scores are ranks within their site, scaled to
[0, 1), so that every site keeps about the same fraction of its entries.

Legend: N = all gates, I = entries of a site.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from secateur.pruning.families import blocks_of, family_of
from secateur.pruning.sites import find_sites


def magnitude_scores(model: PreTrainedModel) -> Float[Tensor, " N"]:
    """Norm of all weights that an entry slices away: rows and columns of its site's projections."""
    family = family_of(model.config)
    blocks = blocks_of(model, family)
    scores = []
    for site in find_sites(model, family):
        squares_I = torch.zeros(site.size)
        for projection in family.projections:
            weight_OI = blocks[site.block].get_submodule(projection.path).weight
            for axis, name in enumerate((projection.output, projection.input)):
                if name == site.name:
                    squares_I += weight_OI.detach().float().square().sum(1 - axis).cpu()  # type: ignore[operator]
        scores.append(_ranks(squares_I))
    return torch.cat(scores)


def random_scores(model: PreTrainedModel, seed: int = 0) -> Float[Tensor, " N"]:
    """A random order of every site."""
    generator = torch.Generator().manual_seed(seed)
    sites = find_sites(model, family_of(model.config))
    return torch.cat([_ranks(torch.rand(site.size, generator=generator)) for site in sites])


def _ranks(values_I: Tensor) -> Tensor:
    return values_I.argsort(stable=True).argsort(stable=True) / len(values_I)
