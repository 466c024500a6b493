from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, tensor

from secateur.pruning.families import FAMILIES, family_of
from secateur.pruning.measure.perplexity import window_nll
from secateur.pruning.sites import Site, find_sites
from secateur.pruning.widths.budget import Budget
from secateur.pruning.widths.feature_statistics import Fluctuation, WandaWidth, _Moments
from secateur.pruning.widths.gate_gradient import (
    Fisher,
    GateGradient,
    gate_gradients,
)
from secateur.pruning.widths.gate_hooks import GateHooks
from secateur.pruning.widths.scores import ranks_within_sites, scores_per_cost
from secateur.pruning.widths.width_magnitude import RandomOrder, WidthMagnitude
from tests.tiny import VOCABULARY, tiny_llama, tiny_model


def windows(count: int = 3, tokens: int = 12) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(3, VOCABULARY, (count, tokens), generator=generator)


def test_ranks_are_those_of_the_site() -> None:
    sites = [Site(0, "mlp_in", 2), Site(0, "mlp_mid", 4)]
    ranks_N = ranks_within_sites(torch.tensor([5.0, 3.0, 9.0, 1.0, 2.0, 2.0]), sites)
    assert ranks_N.tolist() == [0.5, 0.0, 0.75, 0.0, 0.25, 0.5]


def test_value_per_cost_by_hand() -> None:
    sites = [Site(0, "mlp_in", 1), Site(0, "mlp_mid", 2)]
    scores_N = scores_per_cost(torch.tensor([8.0, 8.0, 2.0]), sites, torch.tensor([4.0, 2.0]))
    expected_N = torch.tensor([math.log(2), math.log(4), 0.0]).double()
    torch.testing.assert_close(scores_N, expected_N)
    assert bool(scores_per_cost(torch.zeros(3), sites, torch.zeros(2)).isfinite().all())


def test_gradients_become_values_by_hand() -> None:
    gradients_BN = torch.tensor([[6.0, -4.0]])
    assert GateGradient().of(gradients_BN).tolist() == [[6.0, 4.0]]
    assert Fisher().of(gradients_BN).tolist() == [[36.0, 16.0]]


@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_of_windows_are_slopes_of_their_losses(name: str) -> None:
    model = tiny_model(name).double()
    family = family_of(model.config).with_parts()
    hooks, windows_BT = GateHooks(model, family), windows()
    # Not at open gates only: the slope is that at the gates that are given.
    generator = torch.Generator().manual_seed(1)
    gates = [0.5 + torch.rand(site.size, generator=generator) for site in hooks.sites]
    gradients_BN = gate_gradients(model.requires_grad_(False), hooks, gates, windows_BT)
    start = 0
    for place, site in enumerate(hooks.sites):
        losses = []
        for step in (-1e-3, 1e-3):
            moved = [gate_I.clone() for gate_I in gates]
            moved[place][-1] += step
            with torch.no_grad(), hooks.applied(moved):
                losses.append(window_nll(model, windows_BT))
        start += site.size
        slope_B = ((losses[1] - losses[0]) / 2e-3).float()
        torch.testing.assert_close(gradients_BN[:, start - 1], slope_B, atol=2e-4, rtol=2e-2)
    hooks.remove()


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_windows_do_not_see_each_other(name: str) -> None:
    model = tiny_model(name)
    family, windows_WT = family_of(model.config), windows(5)
    for score in (GateGradient(), Fisher()):
        alone_N = torch.stack(
            [score.values(model, family, windows_WT=window_1T) for window_1T in windows_WT.split(1)]
        ).mean(0)
        for batch_size in (2, 5):
            values_N = score.values(model, family, None, windows_WT, batch_size)
            torch.testing.assert_close(values_N, alone_N, atol=1e-6, rtol=1e-3)


def test_the_model_is_as_before() -> None:
    model = tiny_llama().train()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    Fisher().values(model, family_of(model.config), windows_WT=windows())
    assert model.training
    for parameter in model.parameters():
        assert parameter.requires_grad
        assert parameter.grad is not None
        assert bool((parameter.grad == 1).all())
    assert not any(module._forward_hooks for module in model.modules())


def test_bf16_scores_like_float32() -> None:
    model = tiny_llama()
    family = family_of(model.config)
    exact_N = GateGradient().values(model, family, windows_WT=windows(8))
    rough_N = GateGradient().values(model.bfloat16(), family, windows_WT=windows(8))
    assert rough_N.dtype == torch.float32
    assert torch.corrcoef(torch.stack([exact_N, rough_N]))[0, 1] > 0.98


def test_closed_gates_change_the_gradients_of_others() -> None:
    model = tiny_llama()
    family = family_of(model.config)
    gates = [torch.ones(site.size) for site in find_sites(model, family)]
    open_N = Fisher().values(model, family, gates, windows())
    torch.testing.assert_close(open_N, Fisher().values(model, family, None, windows()))
    gates[0][::2] = 0
    assert not torch.allclose(Fisher().values(model, family, gates, windows()), open_N, rtol=0.01)


def test_gradients_need_text_and_finite_weights() -> None:
    model = tiny_llama()
    family = family_of(model.config)
    with pytest.raises(ValueError, match="Fisher needs calibration windows"):
        Fisher().values(model, family)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = math.nan
    with pytest.raises(ValueError, match="GateGradient found values that are not finite"):
        GateGradient().values(model, family, windows_WT=windows())


def test_magnitude_is_the_norm_of_rows_and_columns() -> None:
    model = tiny_llama()
    family = family_of(model.config)
    sites = find_sites(model, family)
    values = WidthMagnitude().values(model, family).split([site.size for site in sites])
    mlp = model.model.layers[1].mlp
    rows = torch.cat([mlp.gate_proj.weight[3], mlp.up_proj.weight[3], mlp.down_proj.weight[:, 3]])
    place = next(i for i, site in enumerate(sites) if (site.block, site.name) == (1, "mlp_mid"))
    torch.testing.assert_close(values[place][3], rows.norm().detach())


def test_a_random_order_is_that_of_its_seed() -> None:
    model = tiny_llama()
    family = family_of(model.config)
    first_N, again_N, other_N = (RandomOrder(s).values(model, family) for s in (0, 0, 1))
    assert torch.equal(first_N, again_N)
    assert not torch.equal(first_N, other_N)


def test_ranks_cannot_judge_parts() -> None:
    model, budget = tiny_llama(), Budget(parts=True)
    family = budget.family(model.config)
    sites, table = find_sites(model, family), budget.cost.table(model, family)
    marginal_S = table.marginal(table.full_S)
    values_N = WidthMagnitude().values(model, family)
    with pytest.raises(ValueError, match="`parts` of the budget to false"):
        WidthMagnitude().scores(values_N, sites, marginal_S)


def test_features_become_values_by_hand() -> None:
    feature = _Moments()
    feature.add(torch.tensor([[[3.0, 1.0], [4.0, 1.0]]]))
    readers = [torch.tensor([[1.0, 2.0], [-3.0, 2.0]])]
    torch.testing.assert_close(WandaWidth().of(feature, readers), tensor([10.0, 8**0.5]).double())
    torch.testing.assert_close(Fluctuation().of(feature, readers), tensor([5.0, 0.0]).double())
    torch.testing.assert_close(WandaWidth().of(feature, []), tensor([5.0, 2**0.5]).double())


@pytest.mark.parametrize("name", FAMILIES)
def test_features_are_those_that_a_gate_multiplies(name: str) -> None:
    """The last gate of a model has nothing behind it, so closing it changes no value before it."""
    model = tiny_model(name).double()
    family = family_of(model.config)
    sites = find_sites(model, family)
    values_N = WandaWidth().values(model, family, None, windows())
    assert len(values_N) == sum(site.size for site in sites)
    assert bool((values_N > 0).any())
    # All windows at once or one by one is the same text.
    torch.testing.assert_close(WandaWidth().values(model, family, None, windows(), 1), values_N)
    closed = [torch.ones(site.size) for site in sites]
    closed[-1] = torch.zeros(sites[-1].size)
    behind_N = WandaWidth().values(model, family, closed, windows())
    before = sum(site.size for site in sites[:-1])
    torch.testing.assert_close(behind_N[:before], values_N[:before])


def test_widths_by_fluctuation_differ_and_parts_are_refused() -> None:
    sites = [Site(0, "mlp_in", 4), Site(0, "mlp_mid", 4)]
    values_N = torch.tensor([1.0, 1, 1, 9, 100, 200, 300, 400])
    scores_N = Fluctuation().scores(values_N, sites, torch.ones(2))
    assert scores_N.argmax() == 3
    for own_I in scores_N.split(4):
        assert float(own_I.mean()) == pytest.approx(0, abs=1e-6)
        assert float(own_I.std()) == pytest.approx(1)
    with pytest.raises(ValueError, match="has one gate"):
        Fluctuation().scores(torch.ones(1), [Site(0, "mlp", 1)], torch.ones(1))
