"""Measure a model on this machine: a few passes, and what one-shot pruning does to it.

Nothing is trained and nothing is written. The model is left as it is.

Legend: N = windows, T = tokens of a window.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel

from secateur.pruning.depth import BlockFraction, BlockInfluence, OneShot, bypassed
from secateur.pruning.export.cut import cut
from secateur.pruning.families import family_of
from secateur.pruning.measure.perplexity import perplexity
from secateur.pruning.plan import plan_from_indices
from secateur.pruning.progress import part, tracked
from secateur.pruning.sites import find_sites
from secateur.pruning.widths.budget import Budget
from secateur.pruning.widths.gate_gradient import Fisher
from secateur.pruning.widths.gradual_ranking import GradualRanking

_ROUNDS = 8  # of the ranking of widths, one window each
_PASSES = 3  # of which the median counts, after one that does not

Clock = Callable[[], float]


@dataclass(frozen=True)
class Times:
    """How long passes take here.

    Args:
        forward: Forward pass, seconds per token.
        half_forward: The same with every second block bypassed.
        backward: Forward and backward pass through gates on all widths, seconds per token.
    """

    forward: float
    half_forward: float
    backward: float


@dataclass(frozen=True)
class Losses:
    """What one-shot pruning costs, nothing trained: excess over the dense model, nats per token.

    Args:
        dense_perplexity: Perplexity of the dense model on the same windows.
        removed: Blocks that were removed; none where those between the first and the last one are
            not enough.
        blocks: Excess without them.
        widths: Excess of the model cut to the budget by Fisher information, without a refit.
        uniform: The same where all MLPs are narrowed alike and nothing else; None where that
            cannot meet the budget.
    """

    dense_perplexity: float
    removed: tuple[int, ...]
    blocks: float
    widths: float
    uniform: float | None


def measure_times(
    model: PreTrainedModel, windows_NT: Int[Tensor, "N T"], clock: Clock = time.perf_counter
) -> Times:
    """Time passes of two windows.

    Args:
        model: A causal language model of a known family.
        windows_NT: Token ids, 2 windows or more.
        clock: Tells the time, in seconds.
    """
    batch_BT = windows_NT[:2]

    def run(work: Callable[[], Any], name: str) -> float:
        seconds = []
        for _ in tracked(range(_PASSES + 1), f"Timing {name}"):
            begun = clock()
            work()
            seconds.append(clock() - begun)
        return median(seconds[1:]) / batch_BT.numel()

    family = family_of(model.config)
    forward = run(lambda: perplexity(model, batch_BT), "a forward pass")
    with bypassed(model, range(1, model.config.num_hidden_layers, 2)):
        half = run(lambda: perplexity(model, batch_BT), "half of the blocks")
    backward = run(
        lambda: Fisher().values(model, family, windows_WT=batch_BT), "a forward and backward pass"
    )
    return Times(forward, half, backward)


def measure_losses(model: PreTrainedModel, windows_NT: Int[Tensor, "N T"], keep: float) -> Losses:
    """Prune once by blocks and once by widths, and measure what is left.

    Args:
        model: A causal language model of a known family.
        windows_NT: Token ids; the first half chooses, the second half measures.
        keep: Fraction of the FLOPs of the blocks that stays, in (0, 1).

    Raises:
        ValueError: There are less than 16 windows.
    """
    if len(windows_NT) < 2 * _ROUNDS:
        raise ValueError(
            f"The text has {len(windows_NT)} windows and {2 * _ROUNDS} are needed; give more text "
            "(`--text`) or shorter windows (`--window-tokens`)."
        )
    choosing_NT, measuring_NT = windows_NT.chunk(2)
    dense = perplexity(model, measuring_NT)
    search = OneShot(BlockInfluence(), protect_first=1, protect_last=1)
    removed: list[int] = []
    if keep >= 2 / model.config.num_hidden_layers:
        removed = search(model, choosing_NT, BlockFraction(1 - keep)).blocks
    with bypassed(model, removed):
        blocks = perplexity(model, measuring_NT)
    with part("all widths"):
        widths = _narrowed(model, Budget(keep=keep), choosing_NT, measuring_NT)
    alike, uniform = Budget(keep=keep, uniform=True), None
    if _reachable(model, alike):
        with part("all MLPs alike"):
            uniform = _narrowed(model, alike, choosing_NT, measuring_NT) - dense.mean_nll
    return Losses(
        dense.value,
        tuple(removed),
        blocks.mean_nll - dense.mean_nll,
        widths - dense.mean_nll,
        uniform,
    )


def _reachable(model: PreTrainedModel, budget: Budget) -> bool:
    family = budget.family(model.config)
    try:
        budget.check(find_sites(model, family), budget.cost.table(model, family))
    except ValueError:
        return False
    return True


def _narrowed(
    model: PreTrainedModel,
    budget: Budget,
    choosing_NT: Int[Tensor, "N T"],
    measuring_NT: Int[Tensor, "N T"],
) -> float:
    """Mean negative log-likelihood of the model cut to a budget by Fisher information, nats."""
    family = budget.family(model.config)
    ranking = GradualRanking(_ROUNDS, batches_per_round=1, batch_size=1)
    kept = ranking.choose(model, budget, Fisher(), choosing_NT).kept(find_sites(model, family))
    narrow = cut(model, plan_from_indices(model, "", kept, {}, family=family))
    return perplexity(narrow, measuring_NT).mean_nll
