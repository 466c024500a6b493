from __future__ import annotations

import pytest
import torch
from torch import Tensor

from secateur.pruning.sites import Site, find_sites, masks_of
from secateur.pruning.widths.budget import Budget
from secateur.pruning.widths.evolution import (
    Candidate,
    Evolution,
    Genome,
    Population,
    compared,
    cross,
    mutate,
)
from secateur.pruning.widths.gradual_ranking import GradualRanking
from secateur.pruning.widths.width_magnitude import RandomOrder, WidthMagnitude
from tests.tiny import VOCABULARY, tiny_llama

SITES = [Site(block, "mlp_mid", 40) for block in range(4)]
SIZES = [site.size for site in SITES]
RANK_N = torch.rand(160, generator=torch.Generator().manual_seed(1)) * 2 - 1
WINDOWS_WT = torch.arange(60)[:, None]
SMALL = Evolution(generations=3, children=9, parents=3, windows=4, text_windows=20)


def half(genome: Genome) -> Tensor:
    """Masks of the best half of all entries."""
    changed_N = genome.changed(RANK_N, SITES)
    return torch.zeros(160).index_fill(0, changed_N.topk(80).indices, 1.0)


UNCHANGED = Genome(torch.zeros(4), torch.zeros(160))


def test_a_separable_optimum_is_approached() -> None:
    """Entries have values of their own, which the ranking does not know."""
    value_N = torch.rand(160, generator=torch.Generator().manual_seed(2))
    value_N[:40] += 1  # the first site is worth far more than it gets

    def loss(mask_N: Tensor, windows_WT: Tensor) -> float:
        return -float((mask_N * value_N).sum())

    search = Evolution(generations=30, children=40)
    *_, last = search.evolve(half, loss, RANK_N, SITES, WINDOWS_WT)
    start, best = loss(half(UNCHANGED), WINDOWS_WT), -float(value_N.topk(80).values.sum())
    assert last.parents[0].mask_N[:40].sum() >= 30
    assert last.parents[0].loss < start + 0.5 * (best - start)


def test_it_resumes_at_a_generation() -> None:
    def loss(mask_N: Tensor, windows_WT: Tensor) -> float:
        return float((mask_N[:60].sum() - windows_WT.sum()).abs())

    def end(start: Population | None = None) -> Population:
        *_, last = SMALL.evolve(half, loss, RANK_N, SITES, WINDOWS_WT, start)
        return last

    whole = end()
    again = end(next(SMALL.evolve(half, loss, RANK_N, SITES, WINDOWS_WT)))
    assert [one.loss for one in whole.parents] == [one.loss for one in again.parents]
    for one, other in zip(whole.parents, again.parents, strict=True):
        assert torch.equal(one.mask_N, other.mask_N)
        assert torch.equal(one.genome.offset_S, other.genome.offset_S)


def test_all_candidates_see_the_same_windows_and_none_that_is_held_back() -> None:
    seen: list[tuple[int, ...]] = []

    def loss(mask_N: Tensor, windows_WT: Tensor) -> float:
        seen.append(tuple(windows_WT.flatten().tolist()))
        return float(mask_N[:40].sum())

    assert len(list(SMALL.evolve(half, loss, RANK_N, SITES, WINDOWS_WT))) == 3
    assert len(set(seen)) == 3
    assert max(max(windows) for windows in seen) < 60 - SMALL.held_back_windows


@pytest.mark.parametrize("wide", [False, True])
def test_swaps_exchange_as_many_as_they_remove(wide: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    mask_N = half(UNCHANGED)
    changed = [mutate(UNCHANGED, mask_N, RANK_N, SIZES, generator, wide) for _ in range(40)]
    assert any(bool(genome.swap_N.any()) for genome in changed)
    for genome in changed:
        for swap_I, mask_I, rank_I in zip(
            genome.swap_N.split(SIZES), mask_N.split(SIZES), RANK_N.split(SIZES), strict=True
        ):
            assert int((swap_I > 0).sum()) == int((swap_I < 0).sum())
            assert bool((mask_I[swap_I < 0] == 1).all())
            assert bool((mask_I[swap_I > 0] == 0).all())
            if bool((swap_I < 0).any()):
                assert rank_I[swap_I < 0].max() <= rank_I[mask_I == 1].median()
    steps = torch.stack([genome.offset_S for genome in changed])
    assert (float((steps != 0).float().mean()) > 0.2) == wide


def test_a_child_has_each_block_from_one_parent() -> None:
    sites = [Site(block, name, 3) for block in range(20) for name in ("mlp_in", "mlp_mid")]
    one, other = (Genome(torch.full((40,), v), torch.full((120,), v)) for v in (1.0, 2.0))
    born = cross(one, other, sites, torch.Generator().manual_seed(0))
    of_blocks = born.offset_S.view(20, 2)
    assert torch.equal(of_blocks[:, 0], of_blocks[:, 1])
    assert torch.equal(born.swap_N, born.offset_S.repeat_interleave(3))
    assert set(born.offset_S.tolist()) == {1.0, 2.0}


def test_equal_masks_are_compared_once_and_losses_that_are_not_finite_are_last() -> None:
    masks = [torch.tensor(bits) for bits in ([1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 1.0])]
    losses = iter([float("nan"), 2.0, 2.0])
    candidates = [Candidate(UNCHANGED, mask) for mask in masks]
    found = compared(candidates, lambda mask_N, windows_WT: next(losses), WINDOWS_WT)
    assert [one.mask_N.tolist() for one in found] == [[0.0, 1.0], [1.0, 1.0], [1.0, 0.0]]
    assert found[-1].loss == float("inf")


def test_on_a_model_it_is_on_budget_and_better_than_its_start() -> None:
    model, budget = tiny_llama(), Budget(0.5)
    generator = torch.Generator().manual_seed(0)
    windows_WT = torch.randint(3, VOCABULARY, (24, 12), generator=generator)
    start, score = GradualRanking(rounds=1), RandomOrder(1)
    search = Evolution(
        start,
        generations=6,
        children=12,
        parents=4,
        windows=12,
        text_windows=12,
        held_back_windows=12,
    )
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = search.choose(model, budget, score, windows_WT)
    again = search.choose(model, budget, score, windows_WT)
    assert torch.equal(found.closed_in_N, again.closed_in_N)
    sites, table = find_sites(model, budget.family(model.config)), budget.cost.table(model)
    kept = found.kept(sites)
    share = float(table.fraction(torch.tensor([float(len(index_W)) for index_W in kept])))
    assert 0.49 < share <= 0.5 + 1e-6
    assert all(map(torch.equal, kept, budget.finalise(found.positions_N(), sites, table)))
    first = start.choose(model, budget, score, windows_WT)
    assert not torch.equal(masks_of(kept, sites), masks_of(first.kept(sites), sites))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not model.model.layers[0].self_attn.o_proj._forward_hooks


def test_bad_settings_and_too_little_text_are_refused() -> None:
    with pytest.raises(ValueError, match="`children` must be 3 or more, got 2"):
        Evolution(children=2)
    with pytest.raises(ValueError, match="`text_windows` must be 20 or more, got 4"):
        Evolution(text_windows=4)
    with pytest.raises(ValueError, match=r"3 calibration windows, and `search` Evolution.* 288"):
        Evolution().choose(tiny_llama(), Budget(), WidthMagnitude(), torch.ones(3, 4).long())
