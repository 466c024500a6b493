from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from secateur.pruning.costs import Parameters
from secateur.pruning.sites import Site, find_sites
from secateur.pruning.widths.budget import Budget
from secateur.pruning.widths.gate_gradient import Fisher
from secateur.pruning.widths.gradual_ranking import GradualRanking, Ranking
from secateur.pruning.widths.width_magnitude import RandomOrder, WidthMagnitude
from tests.tiny import VOCABULARY, tiny_llama

SEARCH = GradualRanking(rounds=4, batches_per_round=2, batch_size=2)
WINDOWS_WT = torch.randint(3, VOCABULARY, (16, 12), generator=torch.Generator().manual_seed(0))
BUDGETS = {
    "half": Budget(),
    "aligned": Budget(0.4, Parameters(), min_width=3, width_multiple=4),
    "uniform": Budget(0.6, uniform=True),
    "parts": Budget(0.5, parts=True),
}


def cost(model: PreTrainedModel, budget: Budget, kept: tuple[Tensor, ...]) -> float:
    table = budget.cost.table(model, budget.family(model.config))
    return float(table.fraction(torch.tensor([float(len(index_W)) for index_W in kept])))


@pytest.mark.parametrize("name", BUDGETS)
def test_what_is_closed_stays_closed_and_every_round_is_on_budget(name: str) -> None:
    model, budget = tiny_llama(), BUDGETS[name]
    sites = find_sites(model, budget.family(model.config))
    before = Ranking.start(sites)
    for number, ranking in enumerate(SEARCH.steps(model, budget, Fisher(), WINDOWS_WT), start=1):
        gone_N = before.closed_in_N > 0
        assert torch.equal(ranking.closed_in_N[gone_N], before.closed_in_N[gone_N])
        assert torch.equal(ranking.scores_N[gone_N], before.scores_N[gone_N])
        target, found = budget.keep ** (number / 4), cost(model, budget, ranking.kept(sites))
        assert target - 0.2 < found <= target
        assert ranking.rounds == number == int(ranking.closed_in_N.max())
        before = ranking
    assert number == 4
    for site, index_W in zip(sites, before.kept(sites), strict=True):
        if not site.is_part and budget.prunes(site) and len(index_W) not in (0, site.size):
            assert len(index_W) % (budget.width_multiple or 1) == 0
            assert len(index_W) >= budget.min_width


def test_one_round_is_the_selection_by_scores() -> None:
    model, budget, score = tiny_llama(), Budget(), Fisher()
    family = budget.family(model.config)
    sites, table = find_sites(model, family), budget.cost.table(model, family)
    values_N = score.values(model, family, None, WINDOWS_WT, 2)
    scores_N = score.scores(values_N, sites, table.marginal(table.full_S))
    search = GradualRanking(rounds=1, batches_per_round=8, batch_size=2)
    found = search.choose(model, budget, score, WINDOWS_WT).kept(sites)
    for index_W, expected_W in zip(found, budget.finalise(scores_N, sites, table), strict=True):
        assert torch.equal(index_W, expected_W)


def test_a_search_is_taken_up_after_any_round() -> None:
    model, budget = tiny_llama(), Budget()
    whole = list(SEARCH.steps(model, budget, Fisher(), WINDOWS_WT))
    for done in range(4):
        rest = list(SEARCH.steps(model, budget, Fisher(), WINDOWS_WT, whole[done]))
        assert len(rest) == 3 - done
        last = (rest or whole)[-1]
        assert torch.equal(last.closed_in_N, whole[-1].closed_in_N)
        assert torch.equal(last.scores_N, whole[-1].scores_N)


def test_positions_are_by_round_and_then_by_score() -> None:
    ranking = Ranking(
        rounds=2,
        closed_in_N=torch.tensor([0, 2, 1, 0, 2]),
        scores_N=torch.tensor([5.0, 1.0, 9.0, 4.0, 0.5]),
    )
    # In order: the one of round 1, the two of round 2 by score, the two open ones by score.
    expected_N = torch.tensor([0.5, -1 / 3, -1.0, 0.0, -2 / 3])
    torch.testing.assert_close(ranking.positions_N(), expected_N)
    sites = [Site(0, "mlp_in", 2), Site(0, "mlp_mid", 3)]
    assert [index_W.tolist() for index_W in ranking.kept(sites)] == [[0], [1]]
    assert [gate_I.tolist() for gate_I in ranking.gates(sites)] == [[1, 0], [0, 1, 0]]
    open_N = Ranking.start(sites).positions_N()
    torch.testing.assert_close(open_N, torch.arange(5) / 5)


@pytest.mark.parametrize("score", [WidthMagnitude(), RandomOrder()])
def test_scores_without_text_read_none(score: WidthMagnitude | RandomOrder) -> None:
    model = tiny_llama()
    budget = Budget()
    ranking = SEARCH.choose(model, budget, score)
    sites = find_sites(model, budget.family(model.config))
    kept = ranking.kept(sites)
    assert cost(model, budget, kept) <= 0.5
    fractions = [len(index_W) / site.size for site, index_W in zip(sites, kept, strict=True)]
    assert max(fractions) - min(fractions) < 0.15  # every site keeps about the same


def test_settings_and_text_that_do_not_do_are_refused() -> None:
    model = tiny_llama()
    for name in ("rounds", "batches_per_round", "batch_size"):
        with pytest.raises(ValueError, match=f"`{name}` must be 1 or more, got 0"):
            replace(SEARCH, **{name: 0})
    with pytest.raises(ValueError, match="15 calibration windows, and .* need 16; give more text"):
        SEARCH.choose(model, Budget(), Fisher(), WINDOWS_WT[:15])
    with pytest.raises(ValueError, match="`keep` 0.001 cannot be reached"):
        SEARCH.choose(model, Budget(0.001), Fisher(), WINDOWS_WT)
