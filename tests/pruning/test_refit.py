from __future__ import annotations

import copy
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from secateur.pruning.blocks.linears import linears_of
from secateur.pruning.blocks.refit import (
    Batch,
    BlockPair,
    LayerRefit,
    Refit,
    outputs,
    refit,
    refit_block,
)
from secateur.pruning.blocks.ridge import Sums, damped, solve, squared_error, under_mask
from secateur.pruning.blocks.source import CalibrationStates, LiveBlocks
from secateur.pruning.export.cut import cut
from secateur.pruning.families import blocks_of, family_of
from secateur.pruning.plan import Plan, full_plan, plan_from_indices
from secateur.pruning.sites import find_sites
from secateur.pruning.widths.budget import Budget
from secateur.pruning.widths.gradual_ranking import GradualRanking
from secateur.pruning.widths.width_magnitude import RandomOrder
from tests.pruning.export.plans import uneven_plan
from tests.tiny import VARIANTS, VOCABULARY, tiny_family_folder, tiny_llama, tiny_model

ROWS = [
    *((family, next(iter(variants))) for family, variants in VARIANTS.items()),
    ("llama", "biases"),
    ("opt", "no biases"),
    ("gemma2", "biases, no caps"),
    ("phi", "norms of queries and keys"),
]
REMOVED = [(0, "attn"), (1, "mlp"), (2, "attn"), (2, "mlp")]
WINDOWS_WT = torch.randint(3, VOCABULARY, (24, 20), generator=torch.Generator().manual_seed(0))


def random_plan(model: PreTrainedModel, keep: float = 0.5) -> Plan:
    ranking = GradualRanking(rounds=1).choose(model, Budget(keep), RandomOrder())
    kept = ranking.kept(find_sites(model, family_of(model.config)))
    return plan_from_indices(model, "base", kept, {})


@torch.no_grad()
def error(model: PreTrainedModel, narrow: PreTrainedModel) -> float:
    return float((model(WINDOWS_WT).logits - narrow(WINDOWS_WT).logits).square().mean())


def test_a_case_by_hand() -> None:
    # One input, 1, 1 and 2 at three tokens; targets 2, 2 and 5.
    sums = Sums()
    x_BTI, y_BTY = torch.tensor([[[1.0], [1.0], [2.0]]]), torch.tensor([[[2.0], [2.0], [5.0]]])
    sums.update(x_BTI, y_BTY, torch.ones(1, 3, 1))
    assert sums.gram_KK.tolist() == [[6.0, 4.0], [4.0, 3.0]]
    assert sums.cross_YK.tolist() == [[14.0, 9.0]]
    gram_KK, cross_OK = sums.gram_KK[:1, :1], sums.cross_YK[:, :1]
    solved_OK, used = solve(gram_KK, cross_OK, torch.ones(1, 1), 0.5)
    assert (float(solved_OK), used) == (pytest.approx(17 / 9), 0.5)
    layer = torch.nn.Linear(1, 1, bias=False)
    for weight, left in ((1.0, 11.0), (17 / 9, 41 / 27)):
        torch.nn.init.constant_(layer.weight, weight)
        assert squared_error(layer, sums) == pytest.approx(left / 33)  # 33 = 2^2 + 2^2 + 5^2
    # Two inputs that are the same: damping shares the target out evenly.
    gram_KK, cross_OK = torch.full((2, 2), 2.0), torch.tensor([[4.0, 4.0]])
    solved_OK, _ = solve(gram_KK, cross_OK, torch.zeros(1, 2), 0.5)
    assert solved_OK[0].tolist() == [pytest.approx(0.8), pytest.approx(0.8)]


@pytest.mark.parametrize("has_bias", [False, True])
def test_it_is_least_squares_with_rows_for_the_damping(has_bias: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    x_NI = torch.randn(50, 7, generator=generator)
    y_NO, weight_N1 = (torch.randn(50, c, generator=generator) for c in (4, 1))
    start_OK = torch.randn(4, 8 if has_bias else 7, generator=generator)
    sums = Sums()
    for x, y, weight in zip(x_NI.split(30), y_NO.split(30), weight_N1.split(30), strict=True):
        sums.update(x[None], y[None], weight[None])
    count = 8 if has_bias else 7
    gram_KK, cross_OK = sums.gram_KK[:count, :count], sums.cross_YK[:, :count]
    solved_OK, _ = solve(gram_KK, cross_OK, start_OK, 0.1, has_bias)

    m = 0.1 * (x_NI * weight_N1).square().sum(0).mean()
    design_NK = torch.cat([x_NI, torch.ones(50, 1)], 1)[:, :count] * weight_N1
    rows_KK = m.sqrt() * torch.eye(count)
    if has_bias:
        rows_KK[-1] = 0
    target_NO = torch.cat([y_NO * weight_N1, rows_KK @ start_OK.T])
    expected_KO = torch.linalg.lstsq(torch.cat([design_NK, rows_KK]), target_NO).solution
    torch.testing.assert_close(solved_OK.float(), expected_KO.T, atol=1e-4, rtol=1e-4)


def test_a_factorisation_that_fails_takes_more_damping() -> None:
    # Indefinite by more than the damping, as rounding makes it of a matrix that is singular.
    gram_KK = torch.tensor([[1.0, 1.1], [1.1, 1.0]])
    solved_OK, used = solve(gram_KK, torch.ones(1, 2), torch.zeros(1, 2), 0.02)
    assert used == pytest.approx(0.2)
    assert bool(solved_OK.isfinite().all())
    # Inputs that are never read keep their weights.
    solved_OK, used = solve(torch.zeros(2, 2), torch.zeros(1, 2), torch.tensor([[3.0, 4.0]]), 0.01)
    assert (solved_OK[0].tolist(), used) == (pytest.approx([3.0, 4.0]), 0.01)


@pytest.mark.parametrize(("family", "variant"), ROWS)
def test_every_family_comes_closer_to_the_dense_model(
    family: str, variant: str, tmp_path: Path
) -> None:
    overrides = VARIANTS[family][variant]
    base = tiny_family_folder(tmp_path / "base", family, **overrides)
    model = tiny_model(family, **overrides)
    dense = copy.deepcopy(model.state_dict())
    for plan in (uneven_plan(base), uneven_plan(base, removed=REMOVED), random_plan(model, 0.7)):
        narrow = cut(model, plan)
        others = {n: p.clone() for n, p in narrow.named_parameters() if "proj" not in n}
        before = error(model, narrow)
        records = refit(model, narrow, plan, WINDOWS_WT)
        assert error(model, narrow) < (0.9 if "gemma" in family else 0.8) * before
        stays = [
            f"{block}.{projection.path}"
            for block in range(4)
            for projection in plan.family.projections
            if plan.keeps(block, "mlp" if "mlp" in str(projection) else "attn")
        ]
        assert sorted(record.name for record in records) == sorted(stays)
        for record in records:
            if record.error_before is not None and record.error_after is not None:
                assert record.error_after <= record.error_before + 1e-6
        layers = ("proj", "fc1", "fc2", "dense")
        for name, parameter in narrow.named_parameters():
            if not any(layer in name for layer in layers):
                assert torch.equal(parameter, others[name]), name
    assert all(torch.equal(tensor, dense[name]) for name, tensor in model.state_dict().items())


def test_a_model_that_lost_nothing_stays_what_it_is() -> None:
    model = tiny_llama(attention_bias=True, mlp_bias=True)
    plan = full_plan(model, "base")
    narrow = cut(model, plan)
    records = refit(model, narrow, plan, WINDOWS_WT)
    for name, parameter in narrow.named_parameters():
        expected = model.get_parameter(name)
        torch.testing.assert_close(parameter, expected, atol=2e-3, rtol=0)
    assert error(model, narrow) < 1e-6
    assert all(abs(record.error_after or 0) < 1e-6 for record in records)


def test_damping_counts_in_tokens_per_input() -> None:
    # The same text twice says twice as much, and the weights before as much as the damping says.
    model = tiny_llama()
    plan = random_plan(model)
    once, twice = cut(model, plan), cut(model, plan)
    refit(model, once, plan, WINDOWS_WT, Refit(damping=3.0))
    refit(model, twice, plan, torch.cat([WINDOWS_WT, WINDOWS_WT]), Refit(damping=6.0))
    for name, weight in once.state_dict().items():
        torch.testing.assert_close(twice.state_dict()[name], weight, atol=1e-4, rtol=1e-3)


@torch.no_grad()
def test_the_last_writer_minimises_what_the_stream_lacks() -> None:
    model = tiny_llama()
    plan = random_plan(model)
    narrow = cut(model, plan)
    refit(model, narrow, plan, WINDOWS_WT, Refit(damping=1e-6))

    def stream(of: PreTrainedModel) -> Tensor:
        found: list[Tensor] = []
        handle = of.model.layers[-1].register_forward_hook(lambda m, a, out: found.append(out))
        of(WINDOWS_WT)
        handle.remove()
        return found[0]

    def lack(changed: PreTrainedModel) -> Tensor:
        dense_BTD = stream(model)
        weight_BT1 = dense_BTD.square().mean(-1, keepdim=True).rsqrt()
        lack_BTD = (dense_BTD - stream(changed)) * weight_BT1
        return lack_BTD[..., plan.index(2, "mlp_out")].square().sum()

    best = lack(narrow)
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        other = copy.deepcopy(narrow)
        weight = other.model.layers[-1].mlp.down_proj.weight
        weight += 0.01 * torch.randn(weight.shape, generator=generator)
        assert lack(other) > best


@pytest.mark.parametrize("family", ["llama", "gemma2", "opt", "phi"])
def test_a_narrow_model_that_is_pruned_again_is_refitted(family: str, tmp_path: Path) -> None:
    base = tiny_family_folder(tmp_path / "base", family)
    removed = [(0, "attn"), (2, "mlp")]
    first = cut(tiny_model(family), uneven_plan(base, removed=removed))
    plan = random_plan(first, 0.6)
    second = cut(first, plan)
    before = error(first, second)
    refit(first, second, plan, WINDOWS_WT)
    assert error(first, second) < 0.9 * before


def test_the_batch_size_does_not_matter_and_mode_and_gradients_stay() -> None:
    model = tiny_llama().train()
    plan = random_plan(model)
    results = []
    for batch_size in (1, 7, 24):
        narrow = cut(model, plan)
        refit(model, narrow, plan, WINDOWS_WT, Refit(batch_size=batch_size))
        assert narrow.training
        assert model.training
        assert all(parameter.requires_grad for parameter in narrow.parameters())
        results.append(narrow.state_dict())
    for name, tensor in results[0].items():
        for other in results[1:]:
            torch.testing.assert_close(other[name], tensor, atol=1e-3, rtol=1e-3)


def test_bf16_is_refitted_in_bf16() -> None:
    model = tiny_llama().bfloat16()
    plan = random_plan(model)
    narrow = cut(model, plan)
    before = error(model, narrow)
    refit(model, narrow, plan, WINDOWS_WT)
    assert narrow.dtype == torch.bfloat16
    assert error(model, narrow) < 0.8 * before


def test_text_and_settings_that_do_harm_are_refused() -> None:
    model = tiny_llama()
    plan = random_plan(model)
    narrow = cut(model, plan)
    for damping in (0.0, math.inf, -1.0):
        with pytest.raises(
            ValueError, match=f"`damping` must be finite and above 0, got {damping}"
        ):
            Refit(damping=damping)
    with pytest.raises(ValueError, match="`batch_size` must be 1 or more, got 0"):
        Refit(batch_size=0)
    with pytest.raises(ValueError, match=r"have 40 tokens, .* needs at least \d+"):
        refit(model, narrow, plan, WINDOWS_WT[:2])
    with torch.no_grad():
        list(blocks_of(model, family_of(model.config)))[1].mlp.down_proj.weight.fill_(math.nan)
    with pytest.raises(ValueError, match=r"1\.mlp\.down_proj .* not finite"):
        refit(model, narrow, plan, WINDOWS_WT)
    assert LayerRefit("0.mlp.down_proj", 0.01).error_before is None


@torch.no_grad()
@pytest.mark.parametrize(("family", "variant"), ROWS)
def test_zeros_stay_and_the_model_comes_closer(family: str, variant: str) -> None:
    dense, plain, sparse = (tiny_model(family, **VARIANTS[family][variant]) for _ in range(3))
    generator, blocks = torch.Generator().manual_seed(0), f"{family_of(dense.config).blocks}."
    masks: list[dict[str, Tensor]] = [{} for _ in blocks_of(dense, family_of(dense.config))]
    for linears in linears_of(dense):
        for linear in linears:
            mask_OI = torch.rand(linear.shape, generator=generator) < 0.5
            mask_OI[:, 0] = True  # a row may not be empty
            masks[linear.block][linear.path] = mask_OI
            for model in (plain, sparse):
                model.get_submodule(f"{blocks}{linear.name}").weight.mul_(mask_OI)
    plan = full_plan(dense, "base")
    states = CalibrationStates(LiveBlocks(dense), WINDOWS_WT, 8)
    hidden = [*states.hidden]
    for index, own in enumerate(masks):
        pair = BlockPair(
            index, *(blocks_of(m, family_of(m.config))[index] for m in (dense, sparse)), plan
        )
        batches = [
            Batch(call, replace(call, hidden_BTD=hidden_BTD))
            for call, hidden_BTD in zip(states.calls(index), hidden, strict=True)
        ]
        refit_block(pair, batches, 0.01, own)
        for number, batch in enumerate(batches):
            states.hidden[number], hidden[number] = outputs(pair, batch)
        for path, mask_OI in own.items():
            assert bool((pair.narrow.get_submodule(path).weight[~mask_OI] == 0).all())
    assert error(dense, sparse) < 0.8 * error(dense, plain)


def test_a_masked_solution_is_the_best_under_its_mask() -> None:
    generator = torch.Generator().manual_seed(0)
    x_NI, y_NO = (torch.randn(40, c, generator=generator).double() for c in (6, 3))
    mask_OI = torch.rand(3, 6, generator=generator) < 0.5
    gram_II, cross_OI = x_NI.T @ x_NI, y_NO.T @ x_NI
    free_OI, used = solve(gram_II, cross_OI, torch.zeros(3, 6), 0.1)
    found_OI = under_mask(free_OI, mask_OI, damped(gram_II, used))
    m = 0.1 * float(gram_II.diagonal().mean())
    for row in range(3):
        kept = mask_OI[row]
        design = torch.cat([x_NI[:, kept], math.sqrt(m) * torch.eye(int(kept.sum())).double()])
        target = torch.cat([y_NO[:, row], torch.zeros(int(kept.sum())).double()])
        expected = torch.linalg.lstsq(design, target[:, None]).solution[:, 0]
        torch.testing.assert_close(found_OI[row, kept], expected)
        assert not bool(found_OI[row, ~kept].any())
