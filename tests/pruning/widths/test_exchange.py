from __future__ import annotations

import pytest
import torch

from secateur.pruning.families import family_of
from secateur.pruning.measure.perplexity import window_nll
from secateur.pruning.modes import frozen
from secateur.pruning.sites import find_sites, masks_of, split
from secateur.pruning.widths.budget import Budget
from secateur.pruning.widths.exchange import Exchange, exchanged, values_of_gates
from secateur.pruning.widths.gate_gradient import Fisher, gate_gradients
from secateur.pruning.widths.gate_hooks import GateHooks
from secateur.pruning.widths.gradual_ranking import GradualRanking, Ranking
from secateur.pruning.widths.scores import costs_of_gates
from secateur.pruning.widths.width_magnitude import RandomOrder
from tests.pruning.widths.test_gradual_ranking import BUDGETS, WINDOWS_WT, cost
from tests.tiny import tiny_llama

SEARCH = Exchange(GradualRanking(1, 1, 4), rounds=6, batches_per_round=2, changes=0.2)


def test_the_values_of_the_worked_case() -> None:
    mean_N = torch.tensor([-0.4, -0.2])
    found_N = values_of_gates(mean_N, mean_N.square(), torch.tensor([1.0, 0.0]), tokens=2)
    torch.testing.assert_close(found_N, torch.tensor([0.56, 0.16]))


@pytest.mark.parametrize("mask", [1.0, 0.0])
def test_values_are_exact_for_a_quadratic_loss_in_either_state(mask: float) -> None:
    a, h = -0.3, 0.5  # L(m) = a m + h m^2 / 2
    mean_N, square_N = torch.tensor([a + h * mask]), torch.tensor([h])
    value_N = values_of_gates(mean_N, square_N, torch.tensor([mask]), tokens=1)
    torch.testing.assert_close(value_N, torch.tensor([-a - h / 2]))


def test_values_on_windows_are_those_of_their_gradients() -> None:
    model, search = tiny_llama(), Exchange(GradualRanking(1, 1, 4), rounds=1, weight=1.0)
    hooks = GateHooks(model)
    gates = [torch.ones(site.size) for site in hooks.sites]
    with frozen(model):
        gradients_WN = gate_gradients(model, hooks, gates, WINDOWS_WT).double()
    hooks.remove()
    half_N = WINDOWS_WT.shape[1] * gradients_WN.square().mean(0) / 2
    (ranking,) = search.steps(model, Budget(1.0), Ranking.start(hooks.sites), WINDOWS_WT)
    marginal_S = (
        Budget()
        .cost.table(model)
        .marginal(torch.tensor([float(site.size) for site in hooks.sites]))
    )
    expected_N = (half_N - gradients_WN.mean(0)) / costs_of_gates(hooks.sites, marginal_S)
    torch.testing.assert_close(ranking.scores_N, expected_N, rtol=1e-3, atol=1e-12)


@pytest.mark.parametrize("name", BUDGETS)
def test_every_round_is_on_budget_and_changes_few_gates(name: str) -> None:
    model, budget = tiny_llama(), BUDGETS[name]
    sites = find_sites(model, budget.family(model.config))
    start = SEARCH.start.choose(model, budget, Fisher(), WINDOWS_WT)
    before_N = masks_of(start.kept(sites), sites)
    moved = []
    for ranking in SEARCH.steps(model, budget, start, WINDOWS_WT):
        kept = ranking.kept(sites)
        assert budget.keep - 0.2 < cost(model, budget, kept) <= budget.keep
        mask_N = masks_of(kept, sites)
        moved.append(int((mask_N != before_N).sum()))
        before_N = mask_N
    most = [0.2 * len(before_N) * (1 - number / 6) for number in range(6)]
    assert all(found <= limit for found, limit in zip(moved, most, strict=True))
    assert len(moved) == 6


def test_few_changes_are_those_that_gain_most() -> None:
    model, budget = tiny_llama(), Budget(0.5)
    sites, table = find_sites(model, family_of(model.config)), budget.cost.table(model)
    values_N = torch.rand(
        sum(site.size for site in sites), generator=torch.Generator().manual_seed(0)
    ).double()
    kept = budget.finalise(-values_N, sites, table)
    worst_N = masks_of(kept, sites)
    few_N, all_N = (exchanged(values_N, worst_N, most, budget, sites, table) for most in (20, 399))
    assert torch.equal(exchanged(values_N, worst_N, 0, budget, sites, table), worst_N)
    assert 0 < int((few_N != worst_N).sum()) <= 20
    total = [float((values_N * mask_N).sum()) for mask_N in (worst_N, few_N, all_N)]
    assert total[0] < total[1] < total[2]


def test_it_lowers_the_loss_repeats_and_leaves_the_model_alone() -> None:
    model, budget = tiny_llama(), Budget(0.5)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    start, score = SEARCH.start, RandomOrder(1)
    found = SEARCH.choose(model, budget, score, WINDOWS_WT)
    again = SEARCH.choose(model, budget, score, WINDOWS_WT)
    assert torch.equal(found.closed_in_N, again.closed_in_N)
    assert torch.equal(found.scores_N, again.scores_N)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not model.model.layers[0].self_attn.o_proj._forward_hooks
    hooks = GateHooks(model)
    sites = hooks.sites
    losses = []
    for ranking in (start.choose(model, budget, score), found):
        with torch.no_grad(), hooks.applied(split(masks_of(ranking.kept(sites), sites), sites)):
            losses.append(float(window_nll(model, WINDOWS_WT).mean()))
    assert losses[1] < losses[0]
    # Mask learning starts from the same masks.
    kept = budget.finalise(found.positions_N(), sites, budget.cost.table(model))
    assert torch.equal(masks_of(kept, sites), masks_of(found.kept(sites), sites))


def test_windows_are_read_in_turn_and_bad_settings_are_refused() -> None:
    assert SEARCH.windows_read(RandomOrder()) == 8
    with pytest.raises(ValueError, match="There are 7 calibration windows, and `search`"):
        SEARCH.choose(tiny_llama(), Budget(), RandomOrder(), WINDOWS_WT[:7])
    with pytest.raises(ValueError, match="`rounds` must be 1 or more, got 0"):
        Exchange(rounds=0)
    with pytest.raises(ValueError, match=r"`changes` must be in \(0, 1\], got 0"):
        Exchange(changes=0.0)
