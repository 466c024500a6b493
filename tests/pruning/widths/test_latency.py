from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from secateur.pruning.costs import CostModel, Flops
from secateur.pruning.families import FAMILIES, family_of, skeleton
from secateur.pruning.measure.latency_table import LatencyTable
from secateur.pruning.sites import Site, find_sites
from secateur.pruning.widths.budget import Budget
from secateur.pruning.widths.latency import Latency
from tests.latency import flops_table, noisy_table, random_scores, stepped_table
from tests.runs import NOISE, call, learn_masks, make_inputs
from tests.tiny import tiny_llama_config, tiny_model

pytestmark = NOISE
CONFIG = tiny_llama_config()


@pytest.fixture
def saved(tmp_path: Path) -> Callable[..., Latency]:
    """The cost of a table, by its file."""

    def cost(table: LatencyTable, **settings: Any) -> Latency:
        table.save(tmp_path / "table.json")
        return Latency(str(tmp_path / "table.json"), **settings)

    return cost


def costs(cost: Latency, parts: bool = False) -> tuple[list[Site], CostModel]:
    model = skeleton(CONFIG)
    family = family_of(CONFIG).with_parts() if parts else family_of(CONFIG)
    return find_sites(model, family), cost.table(model, family)


@pytest.mark.parametrize("parts", [False, True])
def test_a_table_of_products_is_the_cost_of_flops(
    saved: Callable[..., Latency], parts: bool
) -> None:
    cost = saved(flops_table(CONFIG), prompts=1.0, new_tokens=0.0)
    sites, table = costs(cost, parts)
    family = family_of(CONFIG).with_parts() if parts else family_of(CONFIG)
    expected = Flops().table(skeleton(CONFIG), family)
    assert table.dense == pytest.approx(expected.dense)
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        widths_S = 1 + (table.full_S - 1) * torch.rand(len(sites), generator=generator).double()
        torch.testing.assert_close(table(widths_S), expected(widths_S))
        torch.testing.assert_close(table.marginal(widths_S), expected.marginal(widths_S))
        soft_S = widths_S.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(table(soft_S), soft_S)
        torch.testing.assert_close(gradient, expected.marginal(widths_S))
    scores_N = random_scores(sum(site.size for site in sites))
    for keep in (0.3, 0.5, 0.8):
        budget = Budget(keep, parts=parts)
        found = budget.finalise(scores_N, sites, table)
        assert all(map(torch.equal, found, budget.finalise(scores_N, sites, expected)))


def test_an_increase_is_the_difference_of_two_costs(saved: Callable[..., Latency]) -> None:
    sites, table = costs(saved(noisy_table(CONFIG)), parts=True)
    widths_S = torch.tensor([1 if s.is_part else max(1, s.size // 3) for s in sites])
    for place, site in enumerate(sites):
        entries = 0 if site.is_part else 4
        wider_S = widths_S.index_add(0, torch.tensor([place]), torch.tensor([entries]))
        more = float(table(wider_S) - table(widths_S))
        assert table.increase(widths_S, place, entries) == pytest.approx(more, abs=1e-9)


def test_a_removed_part_takes_no_time_and_not_the_floor(saved: Callable[..., Latency]) -> None:
    timed = noisy_table(CONFIG)
    sites, table = costs(saved(timed, prompts=1.0, new_tokens=0.0), parts=True)
    widths_S = torch.tensor([0.0 if site.is_part else 1.0 for site in sites])
    assert float(table(widths_S)) == pytest.approx(timed.phases["prefill"].rest)


def test_the_cost_never_falls_with_a_width(saved: Callable[..., Latency]) -> None:
    sites, table = costs(saved(noisy_table(CONFIG)))
    for place, site in enumerate(sites):
        widths_S = torch.tensor([max(1, s.size // 2) for s in sites])
        for width in range(1, site.size):
            widths_S[place] = width
            assert table.increase(widths_S, place, 1) >= -1e-9


def _widths(kept: tuple[Tensor, ...]) -> Tensor:
    return torch.tensor([len(index) for index in kept])


@pytest.mark.parametrize(
    "settings", [{}, {"parts": True}, {"uniform": True}, {"sites": ["mlp_mid"]}]
)
@pytest.mark.parametrize("make", [stepped_table, noisy_table])
def test_plans_are_on_budget_and_nothing_more_fits(
    make: Callable[..., LatencyTable], settings: dict[str, Any], saved: Callable[..., Latency]
) -> None:
    sites, table = costs(saved(make(CONFIG)), "parts" in settings)
    budget = Budget(0.75, **settings)
    widths_S = _widths(budget.finalise(random_scores(sum(s.size for s in sites)), sites, table))
    limit = 0.75 * table.dense
    assert float(table(widths_S)) <= limit * (1 + 1e-9)
    narrow = [n for n, s in enumerate(sites) if budget.prunes(s) and 0 < widths_S[n] < s.size]
    assert narrow
    if "uniform" in settings:
        wider_S = widths_S.index_add(0, torch.tensor(narrow), torch.ones_like(widths_S)[narrow])
        assert float(table(wider_S)) > limit
        return
    gates = {(s.block, s.name): int(widths_S[n]) for n, s in enumerate(sites) if s.is_part}
    for place in narrow:
        if gates.get((sites[place].block, sites[place].part), 1):
            assert float(table(widths_S)) + table.increase(widths_S, place, 1) > limit


def test_a_tread_of_a_step_is_filled(saved: Callable[..., Latency]) -> None:
    """What costs nothing is kept: widths end where a step does, in multiples of 8, or full."""
    sites, table = costs(saved(stepped_table(CONFIG, tread=8)))
    widths_S = _widths(
        Budget(0.6).finalise(random_scores(sum(s.size for s in sites)), sites, table)
    )
    assert all(w % 8 == 0 or w == s.size for w, s in zip(widths_S.tolist(), sites, strict=True))


def test_an_unreachable_budget_is_told_with_the_smallest(saved: Callable[..., Latency]) -> None:
    sites, table = costs(cost := saved(noisy_table(CONFIG)))
    least = float(table.fraction(torch.ones(len(sites))))
    with pytest.raises(ValueError, match=rf"at least {least:.4f} of the cost.*remove blocks first"):
        Budget(0.05, cost).check(sites, table)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_its_time(family: str, saved: Callable[..., Latency]) -> None:
    config = tiny_model(family).config
    cost = saved(noisy_table(config))
    model = skeleton(config)
    table, sites = cost.table(model), find_sites(model, family_of(config))
    timed = cost.times
    dense = timed.seconds(model, "prefill") + 128 * timed.seconds(model, "decode")
    assert table.dense == pytest.approx(dense)
    budget = Budget(0.8, cost)
    kept = budget.finalise(random_scores(sum(s.size for s in sites)), sites, table)
    assert float(table.fraction(_widths(kept))) <= 0.8 * (1 + 1e-9)


def test_the_table_of_another_machine_or_model_is_refused_unless_it_is_named(
    saved: Callable[..., Latency],
) -> None:
    foreign = noisy_table(CONFIG, machine="a far GPU")
    with pytest.raises(ValueError, match="measured on 'a far GPU, float32', and not on .*, this"):
        costs(saved(foreign))
    sites, table = costs(saved(foreign, measured_on="a far GPU, float32"))
    assert len(sites) == len(table.full_S)
    with pytest.raises(ValueError, match="not on 'my phone'"):
        costs(saved(foreign, measured_on="my phone"))
    with pytest.raises(ValueError, match="bfloat16', and not on .*float32"):
        costs(saved(noisy_table(CONFIG, dtype="bfloat16")))
    with pytest.raises(ValueError, match="another model: `hidden_size` is 36 there and 24 here"):
        costs(saved(noisy_table(tiny_llama_config(hidden_size=36))))
    with pytest.raises(ValueError, match="another model: `mlp_mid` has 40 entries there, and 37"):
        costs(saved(noisy_table(tiny_llama_config(intermediate_size=40))))


def test_settings_out_of_range_are_told(saved: Callable[..., Latency]) -> None:
    with pytest.raises(ValueError, match="`prompts` must be 0 or more, got -1"):
        saved(noisy_table(CONFIG), prompts=-1.0)
    with pytest.raises(ValueError, match="cannot both be 0"):
        saved(noisy_table(CONFIG), prompts=0.0, new_tokens=0.0)


def test_equal_tables_are_equal_costs_wherever_they_lie(
    saved: Callable[..., Latency], tmp_path: Path
) -> None:
    first = saved(noisy_table(CONFIG))
    noisy_table(CONFIG).save(tmp_path / "copy.json")
    copy = Latency(str(tmp_path / "copy.json"))
    assert (first, hash(first), repr(first)) == (copy, hash(copy), repr(copy))
    assert first != saved(noisy_table(CONFIG, seed=1))
    assert str(tmp_path) not in repr(first)


def test_a_run_meets_its_time_tells_the_prediction_and_resumes_on_its_own_table_only(
    tmp_path: Path,
) -> None:
    inputs = make_inputs(tmp_path / "inputs")
    noisy_table(CONFIG, machine="a server").save(tmp_path / "table.json")
    run = [
        *learn_masks(inputs, tmp_path / "run", max_steps=6),
        "--model.budget.cost=Latency",
        f"--model.budget.cost.table={tmp_path / 'table.json'}",
        "--model.budget.cost.measured_on=a server, float32",
        "--model.budget.keep=0.85",
    ]
    module: Any = call(run).model
    plan = module.plan()
    assert 0.8 < plan.provenance["kept"] <= 0.85 * (1 + 1e-9)
    assert "on a server, float32" in plan.provenance["counted"]
    report = (tmp_path / "run" / "report.md").read_text(encoding="utf-8")
    assert "| prefill by the table, ms |" in report
    noisy_table(CONFIG, seed=1, machine="a server").save(tmp_path / "table.json")
    with pytest.raises(ValueError, match="budget"):
        call([*run, "--ckpt_path=last"])
