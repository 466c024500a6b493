from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, LlamaConfig

from secateur.pruning.costs import Cost, CostTable, Flops, Parameters
from secateur.pruning.export.native_shape import read_shape
from secateur.pruning.export.rewrite import prune_checkpoint
from secateur.pruning.families import FAMILIES, skeleton
from secateur.pruning.files.fingerprint import fingerprint
from secateur.pruning.plan import plan_from_indices
from secateur.pruning.sites import Site, find_sites
from secateur.pruning.widths.budget import Budget, log_ratio_penalty
from tests.tiny import tiny_folder, tiny_llama, tiny_llama_config

BIASED = {"attention_bias": True, "mlp_bias": True}


def _two_sites(sizes: tuple[int, int] = (3, 5)) -> tuple[list[Site], CostTable]:
    """One matrix between two sites and one from the second to 4 fixed columns."""
    sites = [Site(0, "a", sizes[0]), Site(0, "b", sizes[1])]
    return sites, CostTable(sites, [(1, 0, 1), (2, 1, 4.0)], constant=7)


def _additive(sizes: tuple[int, ...]) -> tuple[list[Site], CostTable]:
    """Every entry costs 1."""
    sites = [Site(0, str(i), size) for i, size in enumerate(sizes)]
    return sites, CostTable(sites, [(1, i, 1.0) for i in range(len(sizes))])


def test_cost_by_hand() -> None:
    _, table = _two_sites()
    assert table.dense == 3 * 5 + 2 * 5 * 4 + 7
    assert float(table(torch.tensor([2.0, 3.0]))) == 2 * 3 + 2 * 3 * 4 + 7
    assert float(table.fraction(torch.tensor([2.0, 3.0]))) == pytest.approx(37 / 62)
    # One more of a: 3. One more of b: 2 + 2 * 4.
    assert table.marginal(torch.tensor([2.0, 3.0])).tolist() == [3.0, 10.0]


def test_the_cost_is_differentiable_and_its_gradient_is_the_marginal_cost() -> None:
    model = tiny_llama(**BIASED)
    table = Flops(whole_model=True).table(model)
    widths = torch.rand(len(table.full_S), generator=torch.Generator().manual_seed(0)) * 20
    widths.requires_grad_()
    (gradient,) = torch.autograd.grad(table(widths), widths)
    torch.testing.assert_close(gradient.double(), table.marginal(widths.detach()))


def _llama_terms(config: LlamaConfig, widths: list[int]) -> tuple[int, int, int]:
    """Weights, biases and norm entries of all blocks at the given widths, in plain arithmetic."""
    head = config.head_dim
    d_q, d_kv = config.num_attention_heads * head, config.num_key_value_heads * head
    weights = biases = norms = 0
    for block in range(config.num_hidden_layers):
        s1, s2, s3, s4, s5 = widths[5 * block : 5 * block + 5]
        weights += s1 * (d_q + 2 * d_kv) + s2 * d_q + 2 * s3 * s4 + s4 * s5
        biases += d_q + 2 * d_kv + s2 if config.attention_bias else 0
        biases += 2 * s4 + s5 if config.mlp_bias else 0
        norms += s1 + s3
    return weights, biases, norms


@pytest.mark.parametrize(
    "overrides",
    [{}, BIASED, {"num_key_value_heads": 6}, {"head_dim": 10}, {"tie_word_embeddings": True}],
)
def test_costs_equal_the_formulas_at_any_width(overrides: dict[str, object]) -> None:
    config = tiny_llama_config(**overrides)
    model = skeleton(config)
    sites = find_sites(model, FAMILIES["llama"])
    generator = random.Random(0)
    outside = config.vocab_size * config.hidden_size * (1 if config.tie_word_embeddings else 2)
    outside += config.hidden_size  # the final norm
    attention = 4 * 100 * config.num_attention_heads * config.head_dim * config.num_hidden_layers
    output_head = 2 * config.vocab_size * config.hidden_size
    for widths in (
        [site.size for site in sites],
        [1] * len(sites),
        *([generator.randint(1, site.size) for site in sites] for _ in range(5)),
    ):
        weights, biases, norms = _llama_terms(config, widths)
        expected: dict[Cost, int] = {
            Parameters(): weights + biases,
            Parameters(whole_model=True): weights + biases + norms + outside,
            Flops(): 2 * weights + biases,
            Flops(whole_model=True, context_tokens=100): (
                2 * weights + biases + attention + output_head
            ),
        }
        for cost, value in expected.items():
            assert float(cost.table(model)(torch.tensor(widths).double())) == value, cost


@pytest.mark.parametrize("tied", [False, True])
def test_the_dense_cost_of_the_whole_model_counts_every_parameter_once(tied: bool) -> None:
    model = tiny_llama(tie_word_embeddings=tied, **BIASED)
    assert Parameters(whole_model=True).table(model).dense == sum(
        parameter.numel() for parameter in model.parameters()
    )


def _real(width: int, mlp: int, blocks: int, heads: int, kv_heads: int, words: int) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=width,
        intermediate_size=mlp,
        num_hidden_layers=blocks,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=words,
        tie_word_embeddings=False,
    )


@pytest.mark.parametrize(
    ("config", "total", "fractions"),
    [
        (_real(4096, 11008, 32, 32, 32, 32000), 6_738_415_616, (0.7919, 0.6879, 0.5838, 0.4798)),
        (_real(5120, 13824, 40, 40, 40, 32000), 13_015_864_320, (0.7948, 0.6923, 0.5897, 0.4871)),
        (_real(4096, 14336, 32, 32, 8, 128256), 8_030_261_248, (0.7699, 0.6548, 0.5398, 0.4247)),
    ],
    ids=["LLaMA-2-7B", "LLaMA-2-13B", "LLaMA-3-8B"],
)
def test_published_models_and_their_block_fractions(
    config: LlamaConfig, total: int, fractions: tuple[float, ...]
) -> None:
    # What stays of the blocks (projections and norms) when 20, 30, 40, 50 % of all parameters go.
    table = Parameters(whole_model=True).table(skeleton(config))
    assert table.dense == total
    blocks = table.dense - table.constant
    for removed, fraction in zip((0.2, 0.3, 0.4, 0.5), fractions, strict=True):
        assert 1 - removed * total / blocks == pytest.approx(fraction, abs=5e-5)


def test_the_penalty_by_hand() -> None:
    def penalty(fraction: float) -> float:
        return float(log_ratio_penalty(torch.tensor(fraction), target=0.5, strength=6.0))

    assert penalty(0.625) == pytest.approx(6 * math.log(1.25))
    assert penalty(0.4) == pytest.approx(6 * math.log(1.25))
    assert penalty(0.5) == 0


@pytest.mark.parametrize(("fraction", "sign"), [(0.9, 1), (0.2, -1)])
def test_the_penalty_pulls_from_both_sides(fraction: float, sign: int) -> None:
    value = torch.tensor(fraction, requires_grad=True)
    log_ratio_penalty(value, target=0.5, strength=6.0).backward()
    assert value.grad is not None
    assert float(value.grad) == pytest.approx(sign * 6 / fraction)


def _kept(budget: Budget, scores: list[float], *sizes: int) -> list[list[int]]:
    sites, table = _additive(sizes)
    return [index.tolist() for index in budget.finalise(torch.tensor(scores), sites, table)]


def test_finalise_by_hand() -> None:
    # 8 entries, 4 may stay: the best of each site as its minimum (0.2, 0.9), then 0.8 and 0.7.
    scores = [0.1, 0.2, 0.0, 0.9, 0.7, 0.3, 0.8, 0.6]
    assert _kept(Budget(keep=0.5), scores, 3, 5) == [[1], [0, 1, 3]]
    # In pairs: minimum {0.2, 0.1} and {0.9, 0.8}, which is all that 4 entries pay for.
    assert _kept(Budget(keep=0.5, width_multiple=2), scores, 3, 5) == [[0, 1], [0, 3]]
    # 5 entries: the single last chunk of the first site (0.0) fits where a pair does not.
    assert _kept(Budget(keep=5 / 8, width_multiple=2), scores, 3, 5) == [[0, 1, 2], [0, 3]]
    # At least 2 of each: {0.2, 0.1}, {0.9, 0.8}, then 0.7.
    assert _kept(Budget(keep=5 / 8, min_width=2), scores, 3, 5) == [[0, 1], [0, 1, 3]]


def test_ties_go_to_the_earlier_entry() -> None:
    assert _kept(Budget(keep=0.5), [0.5] * 8, 3, 5) == [[0, 1, 2], [0]]


def test_keeping_everything() -> None:
    model = tiny_llama()
    sites = find_sites(model, FAMILIES["llama"])
    scores = torch.rand(sum(s.size for s in sites), generator=torch.Generator().manual_seed(0))
    kept = Budget(keep=1.0, width_multiple=8).finalise(scores, sites, Flops().table(model))
    assert [len(index) for index in kept] == [site.size for site in sites]


def test_scores_that_tie_up_to_rounding_keep_their_multiples() -> None:
    # The mean of ten times 0.1 is not 0.1 in float64; the odd chunk of three must not go first.
    scores = torch.full((103 + 53,), 0.1, dtype=torch.float64)
    sites, table = _additive((103, 53))
    kept = Budget(keep=0.5, width_multiple=10).finalise(scores, sites, table)
    assert [len(index) for index in kept] == [60, 10]


def _draw(seed: int) -> tuple[Budget, Tensor, list[Site], CostTable]:
    """A random problem: shapes, scores (rounded, so that ties happen), shape rules, target."""
    draw = random.Random(seed)
    heads = draw.choice([1, 2, 4])
    model = skeleton(
        tiny_llama_config(
            hidden_size=heads * 4 * draw.randint(2, 5),
            intermediate_size=draw.randint(9, 60),
            num_hidden_layers=draw.randint(1, 3),
            num_attention_heads=heads * 2,
            num_key_value_heads=heads,
            head_dim=4,
            attention_bias=draw.random() < 0.5,
            mlp_bias=draw.random() < 0.5,
            tie_word_embeddings=draw.random() < 0.5,
        )
    )
    cost = draw.choice(
        [Flops(), Flops(True, context_tokens=64), Parameters(), Parameters(whole_model=True)]
    )
    table = cost.table(model)
    sites = find_sites(model, FAMILIES["llama"])
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(sum(site.size for site in sites), generator=generator)
    if draw.random() < 0.5:
        scores = scores.round(decimals=1)
    multiple, minimum = draw.choice([1, 1, 2, 3, 8]), draw.choice([1, 2, 5])
    step = -(-minimum // multiple) * multiple
    floor = torch.tensor([min(site.size, step) for site in sites])
    lowest = float(table.fraction(floor.double()))
    keep = lowest + (1 - lowest) * draw.random()
    return Budget(keep, cost, minimum, multiple), scores, sites, table


SEEDS = pytest.mark.parametrize("seed", range(40))


@SEEDS
def test_the_budget_is_met_and_nothing_more_would_fit(seed: int) -> None:
    budget, scores, sites, table = _draw(seed)
    kept = budget.finalise(scores, sites, table)
    widths = [len(index) for index in kept]
    limit, multiple = budget.keep * table.dense * (1 + 1e-9), budget.width_multiple or 1
    assert float(table(torch.tensor(widths).double())) <= limit
    for place, (site, width) in enumerate(zip(sites, widths, strict=True)):
        assert width >= min(budget.min_width, site.size)
        assert width % multiple == 0 or width == site.size
        if width < site.size:
            wider = list(widths)
            wider[place] = min(site.size, width + multiple)
            assert float(table(torch.tensor(wider).double())) > limit, site


@SEEDS
def test_finalise_equals_buying_one_entry_after_the_other(seed: int) -> None:
    budget, scores, sites, table = _draw(seed)
    budget = Budget(budget.keep, budget.cost)
    entries = [(place, entry) for place, site in enumerate(sites) for entry in range(site.size)]
    kept: list[list[int]] = [[] for _ in sites]
    values = dict(zip(entries, scores.tolist(), strict=True))
    best_first = sorted(entries, key=lambda entry: -values[entry])
    for place in range(len(sites)):  # at least one of each site, whatever it costs
        first = next(entry for entry in best_first if entry[0] == place)
        best_first.remove(first)
        kept[place].append(first[1])
    closed: set[int] = set()
    for place, entry in best_first:
        wider = [len(index) + (site == place) for site, index in enumerate(kept)]
        if place in closed or float(table(torch.tensor(wider))) > budget.keep * table.dense:
            closed.add(place)
        else:
            kept[place].append(entry)
    assert [index.tolist() for index in budget.finalise(scores, sites, table)] == [
        sorted(index) for index in kept
    ]


@SEEDS
def test_every_site_keeps_its_best_entries_in_order(seed: int) -> None:
    budget, scores, sites, table = _draw(seed)
    kept = budget.finalise(scores, sites, table)
    of_site = scores.split([site.size for site in sites])
    for vector, index in zip(of_site, kept, strict=True):
        assert torch.equal(index, index.unique())
        gone = torch.ones(len(vector), dtype=torch.bool).index_fill(0, index, False)
        if bool(gone.any()):
            assert vector[index].min() >= vector[gone].max()


@SEEDS
def test_a_kept_entry_stays_when_its_score_rises(seed: int) -> None:
    budget, scores, sites, table = _draw(seed)
    budget = Budget(budget.keep, budget.cost)  # chunks of several entries rise and fall together
    before = budget.finalise(scores, sites, table)
    draw = random.Random(seed)
    place = draw.randrange(len(sites))
    entry = draw.choice(before[place].tolist())
    offset = sum(site.size for site in sites[:place])
    scores[offset + entry] += draw.random() * 2
    assert entry in budget.finalise(scores, sites, table)[place].tolist()


@SEEDS
def test_only_the_order_of_the_scores_matters_and_a_repeat_is_equal(seed: int) -> None:
    budget, scores, sites, table = _draw(seed)
    budget = Budget(budget.keep, budget.cost, budget.min_width)
    first = budget.finalise(scores, sites, table)
    for same in (scores, scores.double().sigmoid()):
        again = budget.finalise(same, sites, table)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_finalise_works_where_gradients_are_off() -> None:
    budget, scores, sites, table = _draw(0)
    expected = budget.finalise(scores, sites, table)
    for off in (torch.no_grad, torch.inference_mode):
        with off():
            kept = budget.finalise(scores, sites, table)
        assert all(torch.equal(a, b) for a, b in zip(expected, kept, strict=True))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Budget(keep=0.0), r"`keep` must be in \(0, 1\], got 0\.0"),
        (lambda: Budget(keep=1.5), r"`keep` must be in \(0, 1\], got 1\.5"),
        (lambda: Budget(keep=math.nan), r"`keep` must be in \(0, 1\], got nan"),
        (lambda: Budget(min_width=0), "`min_width` must be 1 or more, got 0"),
        (lambda: Budget(width_multiple=0), "`width_multiple` must be 1 or more, got 0"),
        (lambda: Budget(selection=-1), "`selection` must be 0 or more, got -1"),
    ],
)
def test_settings_out_of_range(make: Callable[[], Budget], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        (Budget(min_width=4), "`min_width` 4 is larger than site 0.0, which has 3 entries"),
        (Budget(width_multiple=8), "`width_multiple` 8 is larger than site 0.0"),
        (
            Budget(keep=0.4, min_width=2),
            r"`keep` 0\.4 cannot be reached: with `min_width` 2 and `width_multiple` 1 at least "
            r"0\.5000 of the cost is kept",
        ),
    ],
)
def test_targets_that_cannot_be_met(budget: Budget, message: str) -> None:
    sites, table = _additive((3, 5))
    with pytest.raises(ValueError, match=message):
        budget.check(sites, table)
    with pytest.raises(ValueError, match=message):
        budget.finalise(torch.zeros(8), sites, table)


def _readers(*sizes: int) -> tuple[list[Site], CostTable]:
    """Sites of a residual stream of 8 entries, each read by a layer of so many outputs."""
    sites = [Site(block, "mlp_in", 8) for block in range(len(sizes))]
    products = [(1, place, float(size)) for place, size in enumerate(sizes)]
    return sites, CostTable(sites, products)


def test_a_selection_that_does_not_pay_is_not_made() -> None:
    # Entries cost 1 at site 0 and 4 at site 1, 40 in all; 30 may stay. By score, two of site 0 and
    # two of site 1 go, which saves 2 + 8; a product of the stream with one feature costs 8, so
    # that site 0 stays whole, and site 1 loses 3.
    sites, table = _readers(1, 4)
    scores = torch.tensor([0.0, 1, 9, 9, 9, 9, 9, 9, 0, 1, 2, 9, 9, 9, 9, 9])
    budget = Budget(30 / 40, Parameters(), width_multiple=1, selection=0)
    assert [len(index) for index in budget.finalise(scores, sites, table)] == [6, 6]
    kept = replace(budget, selection=1).finalise(scores, sites, table)
    assert [index.tolist() for index in kept] == [[*range(8)], [3, 4, 5, 6, 7]]


def test_a_selection_that_the_budget_asks_for_is_made_in_any_case() -> None:
    sites, table = _readers(1, 4)
    budget = Budget(0.5, Parameters(), width_multiple=1, selection=100)
    widths = [len(index) for index in budget.finalise(torch.zeros(16), sites, table)]
    assert float(table(torch.tensor(widths))) <= 20


@pytest.mark.parametrize(
    ("stream", "multiple", "selection"), [(511, 1, 0), (512, 32, 512), (1024, 64, 512)]
)
def test_shapes_suit_the_model(stream: int, multiple: int, selection: int) -> None:
    sites = [Site(0, "attn_in", stream), Site(0, "mlp_mid", 4096)]
    suited = Budget().suited(sites)
    assert (suited.width_multiple, suited.selection) == (multiple, selection)
    typed = Budget(width_multiple=3, selection=5)
    assert typed.suited(sites) == typed


def _mlps(*sizes: int) -> tuple[list[Site], CostTable]:
    """Blocks with a site of 2 entries and an MLP; every entry costs 1."""
    sites = [s for b, size in enumerate(sizes) for s in (Site(b, "x", 2), Site(b, "mlp_mid", size))]
    return sites, CostTable(sites, [(1, i, 1.0) for i in range(len(sites))])


def test_uniform_by_hand() -> None:
    # 2 blocks of 2 + 4 entries, 9 of 12 may stay: 4 outside the MLPs, so 2 neurons per block, the
    # best of each; what is left over does not buy a neuron in both blocks.
    sites, table = _mlps(4, 4)
    scores = torch.tensor([0, 0, 0.1, 0.4, 0.3, 0.2, 0, 0, 0.9, 0.5, 0.6, 0.8])
    kept = Budget(keep=9 / 12, uniform=True).finalise(scores, sites, table)
    assert [index.tolist() for index in kept] == [[0, 1], [1, 2], [0, 1], [0, 3]]


@SEEDS
def test_uniform_widths_are_the_widest_that_the_budget_pays_for(seed: int) -> None:
    budget, scores, sites, table = _draw(seed)
    multiple = min(budget.width_multiple or 1, 8)
    whole = table.full_S.clone()
    mlps = torch.tensor([site.name == "mlp_mid" for site in sites])
    floor = min(-(-budget.min_width // multiple) * multiple, int(whole[mlps][0]))
    lowest = float(table.fraction(whole.masked_fill(mlps, floor)))
    keep = lowest + (1 - lowest) * random.Random(seed).random()
    budget = Budget(keep, budget.cost, budget.min_width, multiple, uniform=True)
    kept = budget.finalise(scores, sites, table)
    widths = torch.tensor([float(len(index)) for index in kept])
    assert torch.equal(widths[~mlps], whole[~mlps].float())
    (width,) = set(widths[mlps].tolist())
    assert width == whole[mlps][0] or width % multiple == 0
    assert float(table(widths)) <= keep * table.dense * (1 + 1e-9)
    if width < whole[mlps][0]:  # one unit more in every block is too much
        wider = widths.masked_fill(mlps, min(width + multiple, float(whole[mlps][0])))
        assert float(table(wider)) > keep * table.dense
    for vector, index in zip(scores.split([s.size for s in sites]), kept, strict=True):
        gone = torch.ones(len(vector), dtype=torch.bool).index_fill(0, index, False)
        assert not bool(gone.any()) or vector[index].min() >= vector[gone].max()


def test_what_uniform_cannot_do() -> None:
    sites, table = _mlps(4, 4)
    with pytest.raises(
        ValueError,
        match=r"`keep` 0\.4 cannot be reached: with `uniform`, `min_width` 1 and "
        r"`width_multiple` 1 at least 0\.5000 of the cost is kept\. .*, or set `uniform` to false",
    ):
        Budget(keep=0.4, uniform=True).check(sites, table)
    sites, table = _mlps(4, 6)
    with pytest.raises(
        ValueError, match=r"same size in every block, got 0\.mlp_mid 4, 1\.mlp_mid 6"
    ):
        Budget(uniform=True).check(sites, table)
    sites, table = _additive((3, 5))
    with pytest.raises(ValueError, match="`uniform` needs a site `mlp_mid`.*got none"):
        Budget(uniform=True).check(sites, table)


def test_uniform_prunes_the_mlps_only() -> None:
    sites, _ = _mlps(4, 4)
    assert [Budget(uniform=True).prunes(site) for site in sites] == [False, True] * 2
    assert all(Budget().prunes(site) for site in sites)


def test_sites_that_are_not_named_stay_whole() -> None:
    # As above, but the neurons of both blocks compete: 5 of 8 stay, the best of all.
    sites, table = _mlps(4, 4)
    scores = torch.tensor([0, 0, 0.1, 0.4, 0.3, 0.2, 0, 0, 0.9, 0.5, 0.6, 0.8])
    kept = Budget(keep=9 / 12, sites=["mlp_mid"]).finalise(scores, sites, table)
    assert [index.tolist() for index in kept] == [[0, 1], [1], [0, 1], [0, 1, 2, 3]]
    with pytest.raises(ValueError, match=r"with these `sites`, .* or name more `sites`"):
        Budget(keep=0.3, sites=["mlp_mid"]).check(sites, table)
    with pytest.raises(ValueError, match="`sites` names 'mlp_min'; the model has .*mlp_mid"):
        Budget(sites=["mlp_min"]).check(sites, table)
    with pytest.raises(ValueError, match="`sites` must name one site or more"):
        Budget(sites=[])
    with pytest.raises(ValueError, match=r"`uniform` and `sites` \['attn_in'\] cannot both be set"):
        Budget(uniform=True, sites=["mlp_mid", "attn_in"])


def test_sites_and_parts_leave_a_model_that_servers_know(tmp_path: Path) -> None:
    base = tiny_folder(tmp_path / "base", num_hidden_layers=4)
    budget = Budget(0.6, Parameters(), width_multiple=2, parts=True, sites=["mlp_mid"])
    model = skeleton(AutoConfig.from_pretrained(base))
    family = budget.family(model.config)
    sites = find_sites(model, family)
    table = budget.cost.table(model, family)
    scores = torch.rand(sum(s.size for s in sites), generator=torch.Generator().manual_seed(0))
    kept = budget.finalise(scores, sites, table)
    cost = float(table.fraction(torch.tensor([float(len(index)) for index in kept])))
    assert 0.6 - 4 * 2 * 24 / table.dense < cost <= 0.6
    plan = plan_from_indices(model, fingerprint(base), kept, {"seed": 0}, family=family)
    prune_checkpoint(base, plan, tmp_path / "small")
    shape = read_shape(tmp_path / "small")  # refuses whatever selects entries of the stream
    assert len(set(shape.mlp_widths)) > 1
    assert not all(shape.groups)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_scores_of_a_diverged_run_are_refused(bad: float) -> None:
    with pytest.raises(ValueError, match="must be finite"):
        _kept(Budget(), [0.0] * 7 + [bad], 3, 5)


def _blocks_with_parts(*gates: float) -> tuple[list[Site], CostTable, Tensor]:
    """Per gate a block whose attention has 4 entries of cost 1 and 2 more for the part itself.

    The entries of every block score 0.9, 0.8, 0.7 and 0.6.
    """
    sites = [s for b in range(len(gates)) for s in (Site(b, "attn_in", 4), Site(b, "attn", 1))]
    products = [(1, 2 * b, 2 * b + 1) for b in range(len(gates))]
    own = [(2, 2 * b + 1) for b in range(len(gates))]
    scores = torch.tensor([s for gate in gates for s in (0.9, 0.8, 0.7, 0.6, gate)])
    return sites, CostTable(sites, [*products, *own]), scores


@pytest.mark.parametrize(
    ("keep", "gates", "widths"),
    [
        # Of 18, 9 may stay: two parts with two entries each are 8, one entry more is 9; the gate of
        # the third part comes after all entries and is out.
        (9 / 18, (1.0, 0.95, 0.1), [3, 1, 2, 1, 0, 0]),
        # All of the first two is 12, so the third comes back; three entries of each are 15.
        (15 / 18, (1.0, 0.95, 0.1), [3, 1, 3, 1, 3, 1]),
        # One attention stays, however low: the best.
        (4 / 18, (0.0, 0.2, 0.1), [0, 0, 2, 1, 0, 0]),
    ],
)
def test_parts_by_hand(keep: float, gates: tuple[float, ...], widths: list[int]) -> None:
    sites, table, scores = _blocks_with_parts(*gates)
    assert table.dense == 18
    kept = Budget(keep, parts=True).finalise(scores, sites, table)
    assert [len(index) for index in kept] == widths


def test_the_cost_of_a_closed_part_is_nothing_and_its_gradient_all_of_it() -> None:
    # Worked by hand: 3 entries and 2 for the part are 5 while it is open.
    _, table, _ = _blocks_with_parts(1.0)
    widths = torch.tensor([3.0, 0.0], requires_grad=True)
    cost = table(widths)
    assert float(cost.detach()) == 0
    assert torch.autograd.grad(cost, widths)[0].tolist() == [0, 5]
    assert table.marginal(torch.tensor([3.0, 0.0])).tolist() == [0, 5]
    assert table.marginal(torch.tensor([3.0, 1.0])).tolist() == [1, 5]


@pytest.mark.parametrize("seed", range(12))
def test_parts_meet_the_budget_exactly(seed: int) -> None:
    budget, _, _, _ = _draw(seed)
    model = skeleton(tiny_llama_config(num_hidden_layers=4))
    budget = Budget(0.2 + seed / 16, budget.cost, parts=True)
    family = budget.family(model.config)
    sites, table = find_sites(model, family), budget.cost.table(model, family)
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(sum(site.size for site in sites), generator=generator)
    try:
        kept = budget.finalise(scores, sites, table)
    except ValueError as error:  # embeddings alone cost more
        assert "cannot be reached" in str(error)  # noqa: PT017
        assert budget.cost.whole_model
        return
    widths_S = torch.tensor([float(len(index)) for index in kept])
    limit = budget.keep * table.dense
    assert float(table(widths_S)) <= limit * (1 + 1e-9)
    parts = {(s.block, s.name): int(w) for s, w in zip(sites, widths_S, strict=True) if s.is_part}
    assert sum(width for (_, name), width in parts.items() if name == "attn") >= 1
    for place, (site, width) in enumerate(zip(sites, widths_S.tolist(), strict=True)):
        assert (width > 0) == (parts[site.block, site.part] == 1)
        if 0 < width < site.size:
            wider = widths_S.clone()
            wider[place] += 1
            assert float(table(wider)) > limit


def test_uniform_and_parts_exclude_each_other() -> None:
    with pytest.raises(ValueError, match="`uniform` and `parts` cannot both be true"):
        Budget(uniform=True, parts=True)


def test_a_context_of_no_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match="`context_tokens` must be 1 or more, got 0"):
        Flops(True, context_tokens=0)
