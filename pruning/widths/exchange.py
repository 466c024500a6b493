"""Improve a ranking of gates by exchanges: open closed gates, and close open ones in return.

For masks m on budget, the loss with gate i closed minus that with it open is, to second order,

    v_i = -g_i + h_i / 2 for an open gate,    v_i = -g_i - h_i / 2 for a closed one,

with g_i = dL/dm_i, the mean over windows, and the curvature h_i, estimated by the Fisher
information of tokens. The gradient g_wi of window w is the mean of those of its T tokens; if tokens
are independent, its square is h_i / T in the mean, so h_i = T mean(g_wi^2). Both forms estimate the
same number, so they are averaged over rounds, whatever state a gate was in:

    v = (1 - weight) v_before + weight v_now.

In every round the entries with the highest v per cost within the budget are kept. Values of single
gates do not add up: of two entries that can replace each other, both look dispensable while both
are there. So a round may change the state of a few gates only. That limit falls linearly from
round to round; it is kept by a bonus for all open gates, the smallest that suffices.

`GradualRanking` closes gates for good and measures curvature alone. Here a closed gate can open
again, and its gradient tells whether it should.

Worked by hand: a window of T = 2 tokens has gradients (-0.4, -0.2) at an open and a closed gate.
h = 2 (0.16, 0.04) = (0.32, 0.08), and v = (0.4 + 0.16, 0.2 - 0.04) = (0.56, 0.16).

Expected on a LLaMA of 7 M parameters at half of the block FLOPs: mean excess of three texts 0.22
nats after 24 rounds of 32 windows of 256 tokens, from a ranking by `Fisher` with 0.36.

Sources: the expansion is that of "Optimal Brain Surgeon" (Hassibi and Stork, 1993) with a diagonal
Hessian; opening entries again by their gradient is that of "Rigging the Lottery" (arXiv
1911.11134).

Legend: N = all gates, S = sites, I = entries of a site, W = calibration windows, R = windows of a
round, T = tokens of a window.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from secateur.pruning.costs import CostModel
from secateur.pruning.families import Family
from secateur.pruning.progress import tracked
from secateur.pruning.sites import Site, find_sites, masks_of, split
from secateur.pruning.widths.budget import Budget
from secateur.pruning.widths.gate_gradient import gradients_of_windows
from secateur.pruning.widths.gradual_ranking import Improvement, Ranking
from secateur.pruning.widths.scores import WidthScore, costs_of_gates, finite

_HALVINGS = 16  # of the interval that holds the bonus of open gates


def values_of_gates(
    mean_N: Float[Tensor, " N"],
    square_N: Float[Tensor, " N"],
    mask_N: Float[Tensor, " N"],
    tokens: int,
) -> Float[Tensor, " N"]:
    """Change of the loss when a gate closes, to second order: nats per token.

    Args:
        mean_N: Gradient of the loss of a window at every gate, mean over windows.
        square_N: Its square, mean over windows.
        mask_N: The present gates, 1 for open and 0 for closed.
        tokens: Tokens of a window.
    """
    half_N = tokens * square_N / 2
    return torch.where(mask_N > 0, half_N, -half_N) - mean_N


def exchanged(
    values_N: Float[Tensor, " N"],
    mask_N: Float[Tensor, " N"],
    most: int,
    budget: Budget,
    sites: Sequence[Site],
    table: CostModel,
) -> Float[Tensor, " N"]:
    """Masks on budget with the highest values per cost, of those that differ in few gates.

    Args:
        values_N: Values of all gates.
        mask_N: The present masks, on budget.
        most: Number of gates that may change their state, 0 or more.
        budget: The budget.
        sites: The sites, in order.
        table: Cost of the same sites.

    Raises:
        ValueError: A value is not finite.
    """
    cost_N = _costs(mask_N, sites, table)

    def best(bonus: float) -> Tensor:
        scores_N = (values_N + bonus * mask_N) / cost_N
        return masks_of(budget.finalise(scores_N, sites, table), sites)

    def changes(found_N: Tensor) -> int:
        return int((found_N != mask_N).sum())

    if changes(found_N := best(0.0)) <= most:
        return found_N
    low, high, found_N = 0.0, 2 * float(values_N.abs().max()), mask_N
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        if changes(masks_N := best(middle)) <= most:
            high, found_N = middle, masks_N
        else:
            low = middle
    return found_N


def _costs(
    mask_N: Float[Tensor, " N"], sites: Sequence[Site], table: CostModel
) -> Float[Tensor, " N"]:
    """Cost of one more entry at the present widths, by gate."""
    width_S = torch.stack([mask_I.sum() for mask_I in split(mask_N, sites)])
    return costs_of_gates(sites, table.marginal(width_S))


@dataclass(frozen=True)
class Exchange(Improvement):
    """Improve a ranking by exchanges of open and closed gates.

    The windows of the ranking are read again, in turn. Costs a forward and a backward pass over
    `rounds` x `batches_per_round` batches, in addition to those of the ranking.

    Args:
        start: The search that makes the ranking.
        rounds: Number of rounds, 1 or more.
        batches_per_round: Batches of windows, of the size in `start`, that values are measured on
            in a round, 1 or more.
        weight: Weight of the values of a round in their moving average, in (0, 1].
        changes: Fraction of all gates that the first round may open or close, in (0, 1].

    Raises:
        ValueError: A setting is outside its range.
    """

    back_propagates: ClassVar[bool] = True

    rounds: int = 24
    batches_per_round: int = 4
    weight: float = 0.15
    changes: float = 0.04

    def __post_init__(self) -> None:
        for name in ("rounds", "batches_per_round"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be 1 or more, got {getattr(self, name)}.")
        for name in ("weight", "changes"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"`{name}` must be in (0, 1], got {getattr(self, name)}.")

    def windows_read(self, score: WidthScore) -> int:
        return max(self.start.windows_read(score), self.batches_per_round * self.start.batch_size)

    def improve(
        self,
        model: PreTrainedModel,
        budget: Budget,
        ranking: Ranking,
        windows_WT: Int[Tensor, "W T"],
    ) -> Ranking:
        steps = self.steps(model, budget, ranking, windows_WT)
        return list(tracked(steps, "Exchanging entries", self.rounds))[-1]

    def steps(
        self,
        model: PreTrainedModel,
        budget: Budget,
        ranking: Ranking,
        windows_WT: Int[Tensor, "W T"],
    ) -> Iterator[Ranking]:
        """Exchange round by round.

        Args:
            model: The dense model; it is not changed.
            budget: Budget that the open gates meet before and after every round.
            ranking: The ranking to improve.
            windows_WT: Token ids of calibration text, at least those of one round.

        Yields:
            The ranking after every round: closed gates by their values, then open ones.

        Raises:
            ValueError: A value is not finite.
        """
        family = budget.family(model.config)
        sites, table = find_sites(model, family), budget.cost.table(model, family)
        mask_N, value_N = masks_of(ranking.kept(sites), sites), torch.zeros(())
        for number in range(self.rounds):
            own_RT = self._text(windows_WT, number)
            now_N = self._values(model, family, sites, mask_N, own_RT)
            value_N = torch.lerp(value_N, now_N, self.weight) if number else now_N
            most = int(self.changes * len(mask_N) * (1 - number / self.rounds))
            mask_N = exchanged(value_N, mask_N, most, budget, sites, table)
            yield Ranking(1, (mask_N == 0).long(), value_N / _costs(mask_N, sites, table))

    def _text(self, windows_WT: Int[Tensor, "W T"], number: int) -> Int[Tensor, "R T"]:
        """The windows of a round: the next ones, from the first again after the last."""
        count = self.batches_per_round * self.start.batch_size
        return windows_WT[torch.arange(number * count, (number + 1) * count) % len(windows_WT)]

    def _values(
        self,
        model: PreTrainedModel,
        family: Family,
        sites: Sequence[Site],
        mask_N: Float[Tensor, " N"],
        windows_RT: Int[Tensor, "R T"],
    ) -> Float[Tensor, " N"]:
        """Values of the present gates on the windows of a round."""
        gates, size = split(mask_N, sites), self.start.batch_size
        mean_N = square_N = torch.zeros(())
        for own_BN in gradients_of_windows(model, family, gates, windows_RT, size):
            mean_N = mean_N + own_BN.double().sum(0) / len(windows_RT)
            square_N = square_N + own_BN.double().square().sum(0) / len(windows_RT)
        values_N = values_of_gates(mean_N, square_N, mask_N, windows_RT.shape[1])
        return finite(values_N, type(self).__name__)
