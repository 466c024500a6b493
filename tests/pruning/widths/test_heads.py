"""Groups of heads in costs, budgets, gates, scores and compositions of plans."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from secateur.pruning.costs import Bytes, Cost, CostTable, Flops, Parameters
from secateur.pruning.export.rewrite import prune_checkpoint
from secateur.pruning.export.servers import VLLM
from secateur.pruning.families import family_of
from secateur.pruning.files.base_model import BaseModel
from secateur.pruning.heads import HEADS
from secateur.pruning.measure.sizes import count
from secateur.pruning.plan import Plan, full_plan
from secateur.pruning.sites import Site, features_of, find_sites
from secateur.pruning.widths.budget import Budget
from secateur.pruning.widths.feature_statistics import Fluctuation, WandaWidth
from secateur.pruning.widths.gate_gradient import Fisher, GateGradient, gate_gradients
from secateur.pruning.widths.gate_hooks import GateHooks
from secateur.pruning.widths.latency import Latency
from secateur.pruning.widths.scores import WidthScore
from secateur.pruning.widths.uniform import uniform_widths
from secateur.pruning.widths.width_magnitude import RandomOrder, WidthMagnitude
from tests.latency import flops_table
from tests.pruning.export.plans import heads_plan, random_plan, uneven_plan, uniform_plan
from tests.tiny import VOCABULARY, tiny_folder, tiny_llama

TOKENS_BT = torch.randint(3, VOCABULARY, (3, 12), generator=torch.Generator().manual_seed(0))
SIZES = {"num_hidden_layers": 2}  # 6 query heads of 4 features on 2 groups, stream of 24


def test_features_of_groups_by_hand() -> None:
    assert features_of(torch.tensor([0, 2]), 3, 6).tolist() == [0, 1, 4, 5]
    assert features_of(torch.tensor([1]), 3, 3).tolist() == [1]


def test_heads_are_cut_only_if_they_are_named() -> None:
    config = tiny_llama().config
    assert HEADS not in Budget().family(config).gates
    named = Budget(sites=[HEADS]).family(config)
    assert [*named.gates][:3] == ["attn_in", HEADS, "attn_out"]
    both = Budget(sites=["mlp_mid", HEADS], parts=True).family(config)
    assert {HEADS, "attn", "mlp"} <= both.gates.keys()
    sites = find_sites(tiny_llama(), named)
    assert {site.size for site in sites if site.name == HEADS} == {2}
    assert {site.name for site in sites if Budget(sites=[HEADS]).prunes(site)} == {HEADS}
    assert not any(Budget().prunes(site) for site in sites if site.name == HEADS)


def test_the_cost_of_a_group_by_hand() -> None:
    model = tiny_llama(**SIZES, attention_bias=True)
    family = family_of(model.config).with_heads()
    place = [site.key for site in find_sites(model, family)].index(f"1.{HEADS}")
    # 3 query heads of 4 features: 12 rows of q, 4 of k, 4 of v, 12 columns of o; stream of 24.
    weights, biases = (12 + 4 + 4 + 12) * 24, 12 + 4 + 4
    costs: dict[Cost, float] = {
        Parameters(): weights + biases,
        Flops(): 2 * weights + biases,
        Flops(whole_model=True, context_tokens=10): 2 * weights + biases + 4 * 10 * 12,
        Bytes(context_tokens=10, batch_size=3): 2 * (weights + biases) + 3 * 10 * (4 + 4) * 2,
    }
    for cost, expected in costs.items():
        table = cost.table(model, family)
        assert float(table.marginal(table.full_S)[place]) == expected, cost
        assert table.dense == cost.table(model).dense


def _budget(sites: list[str], keep: float, parts: bool = False) -> Budget:
    return Budget(keep, Parameters(), sites=sites, parts=parts)


@pytest.mark.parametrize("seed", range(5))
def test_a_budget_of_groups_is_met_and_used_up(seed: int) -> None:
    model = tiny_llama(num_key_value_heads=6)
    budget = _budget([HEADS], 0.75)
    family = budget.family(model.config)
    sites, table = find_sites(model, family), budget.cost.table(model, family)
    scores_N = torch.rand(sum(s.size for s in sites), generator=torch.Generator().manual_seed(seed))
    kept = budget.finalise(scores_N, sites, table)
    widths_S = torch.tensor([float(len(index_W)) for index_W in kept])
    one = (4 + 4 + 4 + 4) * 24  # every group costs the same
    assert 0.75 * table.dense - one < float(table(widths_S)) <= 0.75 * table.dense
    for site, width in zip(sites, widths_S.tolist(), strict=True):
        assert width == site.size if site.name != HEADS else 1 <= width <= 6


def test_multiples_and_least_widths_count_features_and_not_heads() -> None:
    model = tiny_llama()
    budget = Budget(0.5, min_width=8, width_multiple=8, sites=[HEADS, "mlp_mid"])
    family = budget.family(model.config)
    sites = find_sites(model, family)
    kept = budget.finalise(
        torch.rand(sum(s.size for s in sites)), sites, Flops().table(model, family)
    )
    for site, index_W in zip(sites, kept, strict=True):
        assert site.name != "mlp_mid" or len(index_W) in (8, 16, 24, 32, 37)
        assert site.name != HEADS or len(index_W) in (1, 2)


def test_a_budget_that_groups_cannot_meet_says_what_they_can() -> None:
    for groups, least in ((2, "0.8171"), (1, "1.0000")):  # one group always stays
        model = tiny_llama(num_key_value_heads=groups)
        budget = _budget([HEADS], 0.6)
        family = budget.family(model.config)
        sites, table = find_sites(model, family), budget.cost.table(model, family)
        widths_S = torch.tensor([1.0 if s.name == HEADS else float(s.size) for s in sites])
        assert f"{float(table.fraction(widths_S)):.4f}" == least
        with pytest.raises(
            ValueError,
            match=rf"`keep` 0\.6 cannot be reached: with these `sites`.* at least {least} of the "
            r"cost is kept\. Raise `keep` .*, or name more `sites`",
        ):
            budget.check(sites, table)


def test_with_parts_an_attention_goes_as_a_whole() -> None:
    model = tiny_llama()
    budget = _budget([HEADS], 0.6, parts=True)
    family = budget.family(model.config)
    sites, table = find_sites(model, family), budget.cost.table(model, family)
    scores_N = torch.cat(
        [
            torch.full((s.size,), -1.0 if s.key in ("1.attn", "2.mlp") else 1.0 + s.is_part)
            for s in sites
        ]
    )
    kept = dict(zip(sites, budget.finalise(scores_N, sites, table), strict=True))
    widths = {site.key: len(index_W) for site, index_W in kept.items()}
    assert (widths["1.attn"], widths[f"1.{HEADS}"]) == (0, 0)
    assert [widths[f"{block}.{HEADS}"] for block in (0, 2)] == [1, 1]
    assert float(table(torch.tensor([*widths.values()]).double())) <= 0.6 * table.dense


def test_uniform_heads_and_mlps_are_the_best_pair_within_the_budget() -> None:
    # An MLP entry costs 1 and a group 3, in each of 2 blocks; 4 groups and 6 neurons per block.
    sites = [Site(b, name, size) for b in range(2) for name, size in ((HEADS, 4), ("mlp_mid", 6))]
    table = CostTable(sites, [(3, 0, 1.0), (1, 1, 1.0), (3, 2, 1.0), (1, 3, 1.0)])
    generator, floor_S = torch.Generator().manual_seed(0), torch.ones(4, dtype=torch.long)
    for limit in (14, 20, 26, 36):

        def fits(widths_S: Tensor, limit: int = limit) -> bool:
            return float(table(widths_S)) <= limit

        scores_N = torch.rand(20, generator=generator)
        found = uniform_widths(scores_N, sites, [True] * 4, floor_S, 1, fits).tolist()
        best = [v.sort(descending=True).values for v in scores_N.split([4, 6, 4, 6])]
        fitting = [
            (heads, neurons)
            for heads, neurons in itertools.product(range(1, 5), range(1, 7))
            if 2 * (3 * heads + neurons) <= limit < 2 * (3 * heads + neurons + 1)
            or (neurons == 6 and 2 * (3 * heads + 6) <= limit)
        ]
        worst = {
            (heads, neurons): min(
                [float(best[0][heads - 1] + best[2][heads - 1])] * (heads > 1)
                + [float(best[1][neurons - 1] + best[3][neurons - 1])] * (neurons > 1)
            )
            for heads, neurons in fitting
        }
        assert found[:2] == found[2:]
        assert worst[tuple(found[:2])] == max(worst.values())


@torch.no_grad()
def test_a_gate_multiplies_the_output_of_its_heads() -> None:
    model = tiny_llama(**SIZES)
    hooks = GateHooks(model, family_of(model.config).with_heads())
    seen: list[Tensor] = []
    o_proj: Any = model.get_submodule("model.layers.1.self_attn.o_proj")
    o_proj.register_forward_hook(lambda module, args, output: seen.append(args[0]))
    gates = [torch.ones(site.size) for site in hooks.sites]
    model(TOKENS_BT)
    gates[[site.key for site in hooks.sites].index(f"1.{HEADS}")][:] = torch.tensor([0.5, 0.0])
    with hooks.applied(gates):
        model(TOKENS_BT)
    before_BTF, after_BTF = seen
    torch.testing.assert_close(after_BTF[..., :12], before_BTF[..., :12] / 2)
    assert not after_BTF[..., 12:].any()


def test_gradients_of_gates_of_groups_are_slopes_window_by_window() -> None:
    model = tiny_llama(**SIZES).double().requires_grad_(False)
    hooks = GateHooks(model, family_of(model.config).with_heads())
    gates = [torch.ones(site.size, dtype=torch.float64) for site in hooks.sites]
    found = gate_gradients(model, hooks, gates, TOKENS_BT).split([s.size for s in hooks.sites], 1)
    place = [site.key for site in hooks.sites].index(f"0.{HEADS}")
    losses = []
    for step in (1e-2, -1e-2):
        moved = [gate.clone() for gate in gates]
        moved[place][1] += step
        with torch.no_grad(), hooks.applied(moved):
            losses.append([float(model(w[None], labels=w[None]).loss) for w in TOKENS_BT])
    slope_B = (torch.tensor(losses[0]) - torch.tensor(losses[1])) / 2e-2
    torch.testing.assert_close(found[place][:, 1], slope_B, atol=1e-3, rtol=0.1)


SCORES = [Fisher(), GateGradient(), Fluctuation(), WandaWidth(), WidthMagnitude(), RandomOrder()]


@pytest.mark.parametrize("score", SCORES, ids=lambda score: type(score).__name__)
@pytest.mark.parametrize("groups", [1, 2, 6])
def test_every_score_ranks_groups(score: WidthScore, groups: int) -> None:
    model = tiny_llama(**SIZES, num_key_value_heads=groups)
    budget = Budget(0.7, sites=[HEADS, "mlp_mid"])
    family = budget.family(model.config)
    sites, table = find_sites(model, family), budget.cost.table(model, family)
    values_N = score.values(model, family, windows_WT=TOKENS_BT)
    assert len(values_N) == sum(site.size for site in sites)
    scores_N = score.scores(values_N, sites, table.marginal(table.full_S))
    kept = budget.finalise(scores_N, sites, table)
    widths_S = torch.tensor([float(len(index_W)) for index_W in kept])
    assert float(table.fraction(widths_S)) <= 0.7


def test_the_magnitude_of_a_group_by_hand() -> None:
    model = tiny_llama(**SIZES)
    attention: Any = model.get_submodule("model.layers.1.self_attn")
    rows = [attention.q_proj.weight[12:], attention.k_proj.weight[4:], attention.v_proj.weight[4:]]
    rows.append(attention.o_proj.weight[:, 12:])
    expected = sum(float(weight.detach().square().sum()) for weight in rows) ** 0.5
    family = family_of(model.config).with_heads()
    sites = find_sites(model, family)
    values = WidthMagnitude().values(model, family).split([site.size for site in sites])
    place = [site.key for site in sites].index(f"1.{HEADS}")
    assert float(values[place][1]) == pytest.approx(expected)


def test_a_table_of_times_has_those_of_fewer_heads_or_refuses_them(tmp_path: Path) -> None:
    model = tiny_llama(num_key_value_heads=6)
    family = family_of(model.config).with_heads()
    path = tmp_path / "table.json"
    flops_table(model.config).save(path)  # as measured before heads were
    before = Latency(str(path), prompts=1.0, new_tokens=0.0)
    assert before.table(model).dense == pytest.approx(Flops().table(model).dense)
    with pytest.raises(ValueError, match="no times for fewer heads, and `sites` names 'attn_h.*"):
        before.table(model, family)
    flops_table(model.config, attn_heads=float).save(path)
    cost = Latency(str(path), prompts=1.0, new_tokens=0.0)
    table, expected = cost.table(model, family), Flops().table(model, family)
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        draw_S = torch.rand(len(table.full_S), generator=generator).double()
        widths_S = 1 + (table.full_S - 1) * draw_S
        torch.testing.assert_close(table(widths_S), expected(widths_S))
        torch.testing.assert_close(table.marginal(widths_S), expected.marginal(widths_S))
    assert cost.table(model).dense == pytest.approx(expected.dense)


def test_times_of_models_with_fewer_heads_are_predicted(tmp_path: Path) -> None:
    stock = tiny_folder(tmp_path / "stock", num_key_value_heads=6)
    dense = BaseModel(stock).load()
    table = flops_table(dense.config, attn_heads=float)
    for name, groups in (("several", [6, 1, 4]), ("uniform", [4, 4, 4])):
        prune_checkpoint(stock, heads_plan(stock, groups), tmp_path / name)
        small = BaseModel(tmp_path / name).load()
        table.check_model(small.config, "The table")
        assert table.seconds(small, "prefill") == pytest.approx(count(small).block_flops_per_token)
        with pytest.raises(
            ValueError, match=r"The table (has no times for fewer|was measured for)"
        ):
            flops_table(dense.config).check_model(small.config, "The table")


# Plans in turn. The base has 6 groups; a narrow model that a plan leaves has fewer, block by block.


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def _second(folder: Path, kind: str) -> Plan:
    if kind == "parts":
        return uneven_plan(folder, seed=3, removed=[(1, "attn"), (2, "mlp")])
    if kind == "a block":
        return uneven_plan(folder, seed=3, removed=[(1, "attn"), (1, "mlp")], also=[HEADS])
    return uneven_plan(folder, seed=3, also=[HEADS] if kind == "heads" else ())


@pytest.mark.parametrize("kind", ["heads", "others", "parts", "a block"])
@pytest.mark.parametrize("first", ["uneven", "uniform", "others"])
def test_two_plans_are_one(first: str, kind: str, tmp_path: Path) -> None:
    stock = tiny_folder(tmp_path / "stock", num_hidden_layers=4, num_key_value_heads=6)
    plan = {
        "uneven": lambda: uneven_plan(stock, also=[HEADS], removed=[(3, "mlp")]),
        "uniform": lambda: random_plan(stock, Budget(0.7, uniform=True, sites=[HEADS])),
        "others": lambda: uniform_plan(stock),
    }[first]()
    prune_checkpoint(stock, plan, tmp_path / "narrow")
    second = _second(tmp_path / "narrow", kind)
    prune_checkpoint(tmp_path / "narrow", second, tmp_path / "twice")
    both = plan.then(second)
    prune_checkpoint(stock, both, tmp_path / "once")
    expected, found = tensors_of(tmp_path / "twice"), tensors_of(tmp_path / "once")
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], atol=0, rtol=1e-6, msg=name)
    logits = [BaseModel(tmp_path / name).load()(TOKENS_BT).logits for name in ("once", "twice")]
    torch.testing.assert_close(*logits, atol=1e-5, rtol=0)


def test_a_base_with_fewer_heads_keeps_them_unless_they_are_named(tmp_path: Path) -> None:
    stock = tiny_folder(tmp_path / "stock", num_hidden_layers=4, num_key_value_heads=6)
    first = uneven_plan(stock, also=[HEADS])
    prune_checkpoint(stock, first, tmp_path / "narrow")
    base = BaseModel(tmp_path / "narrow")
    sites = find_sites(base.skeleton(), base.family)
    heads = {site.block: site.size for site in sites if site.name == HEADS}
    assert heads == {block: len(first.index(block, HEADS)) for block in range(4)}
    assert not any(Budget().prunes(site) for site in sites if site.name == HEADS)
    kept = random_plan(tmp_path / "narrow", Budget(0.7, Parameters()))
    prune_checkpoint(tmp_path / "narrow", kept, tmp_path / "again")
    left = BaseModel(tmp_path / "again").config.block_widths
    assert {block: widths[HEADS] for block, widths in enumerate(left)} == heads
    assert full_plan(base.skeleton(), "x").widths == [site.size for site in sites]


def test_servers_with_one_number_of_heads_refuse_models_with_several(tmp_path: Path) -> None:
    stock = tiny_folder(tmp_path / "stock", num_key_value_heads=6)
    several, one = (
        uneven_plan(stock, also=[HEADS]),
        random_plan(stock, Budget(0.7, uniform=True, sites=[HEADS])),
    )
    prune_checkpoint(stock, several, tmp_path / "several")
    prune_checkpoint(stock, one, tmp_path / "one")
    arguments: Any = ("float32", 8000, tmp_path)
    assert VLLM().command(tmp_path / "one", *arguments)
    with pytest.raises(ValueError, match="one number of heads for all blocks from config.json"):
        VLLM().command(tmp_path / "several", *arguments)
