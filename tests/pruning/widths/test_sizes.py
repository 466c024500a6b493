from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from secateur.pruning.costs import Bytes, Flops, Parameters
from secateur.pruning.families import skeleton
from secateur.pruning.plan import Plan
from secateur.pruning.sites import find_sites
from secateur.pruning.widths.budget import Budget
from secateur.pruning.widths.learning import GateLearning, Penalty
from secateur.pruning.widths.sizes import Sizes, check_nested, nested_cuts
from tests.tiny import tiny_llama_config

KEEPS = (0.9, 0.8, 0.65, 0.5, 0.31)


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        ([0.5], "must have two fractions or more, got 0.5"),
        ([], "must have two fractions or more, got none"),
        ([1.0, 0.5], r"must have fractions in \(0, 1\), got 1.0"),
        ([0.5, 0.0], r"must have fractions in \(0, 1\), got 0.0"),
        ([0.5, float("nan")], r"must have fractions in \(0, 1\), got nan"),
        (
            [0.5, 0.8],
            "must have different fractions, the largest first, got 0.5 0.8; 0.8 0.5 would",
        ),
        ([0.8, 0.5, 0.5], "must have different fractions, .* got 0.8 0.5 0.5; 0.8 0.5 would do"),
    ],
)
def test_sizes_that_make_no_sense_are_refused(keep: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=f"`keep` {message}"):
        Sizes(keep)


def test_a_negative_seed_is_refused() -> None:
    with pytest.raises(ValueError, match="`seed` must be 0 or more, got -1"):
        Sizes(KEEPS, seed=-1)


def test_gates_that_a_penalty_moves_have_one_size() -> None:
    with pytest.raises(ValueError, match="`sizes` need `pressure` ExactBudget, got Penalty"):
        GateLearning(Penalty(), sizes=Sizes(KEEPS))


def test_every_size_has_one_of_as_many_steps_in_an_order_that_is_drawn() -> None:
    sizes = Sizes(KEEPS, seed=3)
    drawn = [sizes.of_step(step) for step in range(200)]
    assert drawn == [Sizes(KEEPS, seed=3).of_step(step) for step in range(200)]
    turns = [tuple(drawn[first : first + 5]) for first in range(0, 200, 5)]
    assert all(sorted(turn) == sorted(KEEPS) for turn in turns)
    assert len(set(turns)) > 20  # of 120 orders, 40 are drawn
    assert drawn != [Sizes(KEEPS, seed=4).of_step(step) for step in range(200)]


BUDGETS: dict[str, dict[str, Any]] = {
    "free widths": {},
    "multiples": {"width_multiple": 4, "min_width": 2},
    "sites of the stream that pay": {"selection": 6},
    "multiples and sites that pay": {"width_multiple": 4, "selection": 6},
    "parts": {"parts": True},
    "parts and multiples": {"parts": True, "width_multiple": 4},
    "uniform": {"uniform": True, "keeps": (0.9, 0.8, 0.65)},
    "parameters of the whole model": {"cost": Parameters(True), "keeps": (0.9, 0.8, 0.65)},
    "bytes": {"cost": Bytes(64, 1), "width_multiple": 2, "keeps": (0.9, 0.8, 0.65)},
}


def cuts_of(seed: int, settings: dict[str, Any], nested: bool) -> tuple[Any, Any, Any]:
    """Widths by fraction, of a random ranking of a small model; its sites and costs."""
    settings = dict(settings)
    keeps = settings.pop("keeps", KEEPS)
    budget = Budget(**{"width_multiple": 1, "cost": Flops()} | settings)
    config = tiny_llama_config()
    family = budget.family(config)
    model = skeleton(config)
    sites, table = find_sites(model, family), budget.cost.table(model, family)
    generator = torch.Generator().manual_seed(seed)
    # Blocks and sites matter by different amounts, as in a trained model.
    scores_N = torch.cat(
        [
            torch.randn(site.size, generator=generator) + 2 * torch.randn(1, generator=generator)
            for site in sites
        ]
    )
    if nested:
        cuts = nested_cuts(keeps, budget, scores_N, sites, table)
    else:
        cuts = {k: replace(budget, keep=k).finalise(scores_N, sites, table) for k in keeps}
    return cuts, sites, table


def nested(cuts: dict[float, tuple[Tensor, ...]]) -> bool:
    return all(
        bool(torch.isin(inner, outer).all())
        for larger, smaller in pairwise(cuts.values())
        for outer, inner in zip(larger, smaller, strict=True)
    )


@pytest.mark.parametrize("settings", BUDGETS.values(), ids=BUDGETS)
def test_what_a_size_keeps_the_larger_ones_keep_and_each_meets_its_budget(
    settings: dict[str, Any],
) -> None:
    for seed in range(8):
        cuts, sites, table = cuts_of(seed, settings, nested=True)
        assert nested(cuts)
        for keep, kept in cuts.items():
            widths_S = torch.tensor([float(len(index_W)) for index_W in kept])
            found = float(table.fraction(widths_S))
            assert found <= keep * (1 + 1e-9)
            multiple = settings.get("width_multiple", 1)
            assert all(
                len(index_W) % multiple == 0 or len(index_W) == site.size
                for index_W, site in zip(kept, sites, strict=True)
                if not site.is_part
            )
            if settings == {}:  # nothing but single entries: the budget is filled
                assert found > keep - 0.01
        alone, _, _ = cuts_of(seed, settings, nested=False)
        largest = next(iter(cuts))
        assert all(map(torch.equal, cuts[largest], alone[largest]))


def test_cuts_that_are_made_alone_are_not_nested() -> None:
    """Otherwise there would be no need for more."""
    alone = [cuts_of(seed, BUDGETS["multiples"], nested=False)[0] for seed in range(8)]
    assert not all(map(nested, alone))


def test_plans_of_different_rankings_are_told() -> None:
    cuts, sites, _ = cuts_of(0, {}, nested=True)
    other, _, _ = cuts_of(1, {}, nested=True)
    plans = {
        str(keep): Plan("llama", "f" * 64, tuple(sites), kept, {}) for keep, kept in cuts.items()
    }
    check_nested(plans)
    plans["0.5"] = replace(plans["0.5"], kept=other[0.5])
    with pytest.raises(ValueError, match="The plan of 0.5 keeps entries of .* the plan of 0.65"):
        check_nested(plans)
