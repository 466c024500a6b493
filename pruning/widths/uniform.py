"""Widths that are the same in all blocks, as stock models have them.

Legend: S = sites, N = all gates, B = blocks, I = entries of a site.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from itertools import product

import torch
from jaxtyping import Float, Int
from torch import Tensor

from secateur.pruning.heads import HEADS
from secateur.pruning.sites import Site

UNIFORM = (HEADS, "mlp_mid")
"""Sites that stock models can narrow, in all blocks alike."""


def uniform_widths(
    scores_N: Float[Tensor, " N"],
    sites: Sequence[Site],
    pruned: Sequence[bool],
    floor_S: Int[Tensor, " S"],
    multiple: int,
    fits: Callable[[Tensor], bool],
) -> Int[Tensor, " S"]:
    """The widest sites within a budget, of one width each in all blocks.

    If heads and MLPs are pruned, every number of heads goes with the widest MLP that then fits. Of
    these pairs that one is chosen whose worst kept entry scores best; the score of the last of k
    heads is the mean over blocks of their k-th best one, and so for neurons. Ties go to more heads.

    Args:
        scores_N: Higher means keep.
        sites: The sites, in order.
        pruned: Whether a site may lose entries; those of one name have the same size.
        floor_S: Fewest entries of every site.
        multiple: MLP widths are multiples of this, or full.
        fits: Tells whether the widths (S,) are within the budget.
    """
    scores = scores_N.double().split([site.size for site in sites])
    places: dict[str, list[int]] = {}
    choices: dict[str, list[int]] = {}
    for name in UNIFORM:
        if own := [p for p, site in enumerate(sites) if pruned[p] and site.name == name]:
            site, floor = sites[own[0]], int(floor_S[own[0]])
            step = multiple if site.is_of_features else 1
            # A site whose size is not a multiple may stay uncut.
            choices[name] = sorted({*range(floor, site.size + 1, step), site.size})
            places[name] = own

    def widths_of(widths: Sequence[int]) -> Tensor:
        widths_S = floor_S.clone()
        for name, width in zip(choices, widths, strict=True):
            widths_S[places[name]] = width
        return widths_S

    *outer, last = choices
    found: list[tuple[int, ...]] = []
    for others in product(*(reversed(choices[name]) for name in outer)):
        # The cost grows with the width.
        count = bisect_left(
            choices[last], True, key=lambda width: not fits(widths_of((*others, width)))
        )
        if count:
            found.append((*others, choices[last][count - 1]))
    if len(found) == 1:
        return widths_of(found[0])
    best = [_best_first(scores, places[name]) for name in choices]

    def worst(widths: Sequence[int]) -> float:
        least = [int(floor_S[places[name][0]]) for name in choices]
        kept = zip(best, widths, least, strict=True)
        return min((float(of_I[w - 1]) for of_I, w, low in kept if w > low), default=math.inf)

    return widths_of(max(found, key=worst))


def _best_first(scores: Sequence[Tensor], places: Sequence[int]) -> Float[Tensor, " I"]:
    """Mean over blocks of the best score, of the second best one, and so on."""
    return torch.stack([scores[p].sort(descending=True).values for p in places]).mean(0)
