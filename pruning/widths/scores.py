"""The axis "score" of width pruning: the importance of every gate of a model.

Legend: N = all gates, S = sites, I = entries of a site, W = calibration windows, T = tokens.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from secateur.pruning.families import Family
from secateur.pruning.sites import Site


class GateScore:
    """Values of gates, compared between sites, for `Budget.finalise`.

    They are compared by `ranks_within_sites`, or, where values are changes of the loss, by
    `scores_per_cost`.
    """

    def scores(
        self,
        values_N: Float[Tensor, " N"],
        sites: Sequence[Site],
        marginal_S: Float[Tensor, " S"],
    ) -> Float[Tensor, " N"]:
        """Make values comparable between sites: by their ranks, unless overridden.

        Args:
            values_N: One value per gate.
            sites: The sites, in order.
            marginal_S: Cost of one more entry of every site, see `CostModel.marginal`.

        Raises:
            ValueError: The score cannot compare these sites.
        """
        return ranks_within_sites(values_N, sites)


class WidthScore(GateScore, ABC):
    """One number per gate, in the order of `find_sites`; higher means keep.

    A score works in two steps. `values` measures every entry; values may be averaged over batches,
    training steps and ranks. `scores` makes them comparable between sites.

    An entry of a site is a feature that several projections of a block read or write, see
    `pruning/families.py`; a group of heads is one entry with several features; an entire part
    (`Budget(parts=True)`) is a site with one entry.

    Attributes:
        reads_text: Whether `values` needs calibration windows.
        back_propagates: Whether `values` needs the memory of a backward pass through the model.
    """

    reads_text: ClassVar[bool]
    back_propagates: ClassVar[bool] = False

    @abstractmethod
    def values(
        self,
        model: PreTrainedModel,
        family: Family,
        gates: Sequence[Tensor] | None = None,
        windows_WT: Int[Tensor, "W T"] | None = None,
        batch_size: int = 8,
    ) -> Float[Tensor, " N"]:
        """Measure every entry, float32 on the CPU.

        Args:
            model: The dense model; it is not changed.
            family: The row of its family, with additional sites or without.
            gates: The present gates, one vector of shape (I,) per site; None opens all. Values of
                closed entries are measured too, and not used.
            windows_WT: Token ids of calibration text; None for scores that read no text.
            batch_size: Windows per forward pass, 1 or more.

        Raises:
            ValueError: The score reads text and there is none, or a value is not finite.
        """

    def text(self, windows_WT: Int[Tensor, "W T"] | None) -> Int[Tensor, "W T"]:
        """Return the calibration windows of a score that reads text.

        Raises:
            ValueError: There are none.
        """
        if windows_WT is None or len(windows_WT) == 0:
            name = type(self).__name__
            raise ValueError(f"{name} needs calibration windows; give 1 or more, usually 32.")
        return windows_WT

    def finite(self, values_N: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
        """Return values that are finite; see `finite`."""
        return finite(values_N, type(self).__name__)


def finite(values_N: Float[Tensor, " N"], method: str) -> Float[Tensor, " N"]:
    """Return values that are finite.

    Args:
        values_N: One value per gate.
        method: Name of the score or search that found them, for the error.

    Raises:
        ValueError: One is not.
    """
    if not bool(values_N.isfinite().all()):
        raise ValueError(
            f"{method} found values that are not finite; load the model in float32 or bfloat16, or "
            "look at its weights."
        )
    return values_N


def costs_of_gates(sites: Sequence[Site], marginal_S: Float[Tensor, " S"]) -> Float[Tensor, " N"]:
    """Cost of one more entry of the site of every gate, float64 and above 0.

    Args:
        sites: The sites, in order.
        marginal_S: Cost of one more entry of every site, see `CostModel.marginal`.
    """
    size_S = torch.tensor([site.size for site in sites])
    tiny = torch.finfo(torch.float32).tiny
    return marginal_S.double().clamp_min(tiny).repeat_interleave(size_S)


def scores_per_cost(
    values_N: Float[Tensor, " N"], sites: Sequence[Site], marginal_S: Float[Tensor, " S"]
) -> Float[Tensor, " N"]:
    """ln(value) - ln(marginal cost) of every gate, float64.

    Args:
        values_N: Value of every entry, 0 or more.
        sites: The sites, in order.
        marginal_S: Cost of one more entry of every site.
    """
    tiny = torch.finfo(torch.float32).tiny
    return values_N.double().clamp_min(tiny).log() - costs_of_gates(sites, marginal_S).log()


def refuse_parts(sites: Sequence[Site]) -> None:
    """Refuse sites with one gate, for scores that compare the entries of a site.

    Raises:
        ValueError: A site is an entire part.
    """
    if part := next((site for site in sites if site.is_part), None):
        raise ValueError(
            f"Site {part.key} has one gate, and this score ranks entries within their site. Set "
            "`parts` of the budget to false, or choose a score such as Fisher."
        )


def ranks_within_sites(values_N: Float[Tensor, " N"], sites: Sequence[Site]) -> Float[Tensor, " N"]:
    """Rank of every value among those of its site, scaled to [0, 1).

    Every site then keeps about the same fraction of its entries.

    Args:
        values_N: One value per gate.
        sites: The sites, in order.

    Raises:
        ValueError: A site is an entire part, with a single gate that cannot be ranked.
    """
    refuse_parts(sites)
    values = values_N.split([site.size for site in sites])
    return torch.cat(
        [value_I.argsort(stable=True).argsort(stable=True) / len(value_I) for value_I in values]
    )
