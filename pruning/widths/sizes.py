"""Several budgets in one run: each step that learns masks has one of them, and all cut one ranking.

A size drawn for every step follows "Universally Slimmable Networks" (arXiv 1903.05134), models
nested in each other "MatFormer" (arXiv 2310.07707). There the sizes share trained weights; here
they share the logits of the gates, the weights are frozen, and each size is refitted for itself.

Legend: N = all gates of a model, S = sites.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor

from secateur.pruning.costs import CostModel
from secateur.pruning.plan import Plan
from secateur.pruning.sites import Site
from secateur.pruning.widths.budget import Budget


@dataclass(frozen=True)
class Sizes:
    """Budgets that share one ranking of the gates: a step that learns masks has one of them.

    Of as many consecutive steps as there are budgets, each budget has one, in an order that is
    drawn.

    Args:
        keep: Fractions of the dense cost to keep, in (0, 1), two or more, the largest first.
        seed: Seed of the draw, 0 or more.

    Raises:
        ValueError: A setting is outside its range.
    """

    keep: Sequence[float]
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "keep", tuple(self.keep))
        told = " ".join(map(str, self.keep))
        if len(self.keep) < 2:
            raise ValueError(f"`keep` must have two fractions or more, got {told or 'none'}.")
        if strange := [keep for keep in self.keep if not 0 < keep < 1]:
            raise ValueError(f"`keep` must have fractions in (0, 1), got {strange[0]}.")
        if any(larger <= smaller for larger, smaller in pairwise(self.keep)):
            raise ValueError(
                f"`keep` must have different fractions, the largest first, got {told}; "
                f"{' '.join(map(str, sorted({*self.keep}, reverse=True)))} would do."
            )
        if self.seed < 0:
            raise ValueError(f"`seed` must be 0 or more, got {self.seed}.")

    def of_step(self, step: int) -> float:
        """The kept fraction of an optimiser step: a function of step and seed alone.

        Args:
            step: The step, 0 or more.
        """
        turn, place = divmod(step, len(self.keep))
        # Seeds are far apart, so that a turn of one is none of another.
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + turn)
        return self.keep[int(torch.randperm(len(self.keep), generator=generator)[place])]


def nested_cuts(
    keeps: Sequence[float],
    budget: Budget,
    scores_N: Float[Tensor, " N"],
    sites: Sequence[Site],
    table: CostModel,
) -> dict[float, tuple[Tensor, ...]]:
    """Cut one ranking at several budgets, so that what a budget keeps, a larger one keeps, too.

    No site is wider than under the budget before. Alone, every cut would fill its budget with the
    chunks that still fit, and decide anew which sites of the stream are worth a cut: both may keep
    what a larger budget has removed.

    Args:
        keeps: Fractions of the dense cost, the largest first, one or more.
        budget: Its other settings.
        scores_N: Higher means keep.
        sites: The sites, in order.
        table: Cost of the same sites.

    Returns:
        Fraction to the sorted indices (int64) of the kept entries, one vector per site.

    Raises:
        ValueError: As for `Budget.finalise`.
    """
    cuts: dict[float, tuple[Tensor, ...]] = {}
    most_S: Tensor | None = None
    for keep in keeps:
        cuts[keep] = replace(budget, keep=keep).finalise(scores_N, sites, table, most_S)
        most_S = torch.tensor([len(index_W) for index_W in cuts[keep]])
    return cuts


def check_nested(plans: Mapping[str, Plan]) -> None:
    """Check that every plan keeps only what the plan before it keeps.

    Args:
        plans: Name to plan of one base model, the largest first.

    Raises:
        ValueError: A plan keeps an entry that the one before has removed.
    """
    for (larger, outer), (smaller, inner) in pairwise(plans.items()):
        for site, of_outer, of_inner in zip(outer.sites, outer.kept, inner.kept, strict=True):
            if not bool(torch.isin(of_inner, of_outer).all()):
                raise ValueError(
                    f"The plan of {smaller} keeps entries of {site.key} that the plan of {larger} "
                    "has removed: they are not cut from one ranking. Remove both folders and run "
                    "again."
                )
