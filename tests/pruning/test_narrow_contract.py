"""What holds for every family where the base model is narrow itself: it is a base like any other.

The base has blocks of width 1, of full, odd and aligned widths, a block without attention and one
without an MLP, between layers of both types where a family has sliding windows.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, StaticCache

from secateur.pruning.costs import Cost, Flops, Parameters
from secateur.pruning.depth import HalfBlocks, Unit, bypassed, remove_blocks
from secateur.pruning.export.cut import cut
from secateur.pruning.export.deliver import export
from secateur.pruning.export.rewrite import prune_blocks, prune_checkpoint
from secateur.pruning.families import FAMILIES
from secateur.pruning.files.base_model import BaseModel
from secateur.pruning.heads import HEADS, num_groups
from secateur.pruning.measure.sizes import count
from secateur.pruning.plan import Plan, full_plan
from secateur.pruning.widths.gate_hooks import GateHooks
from tests.pruning.export.plans import uneven_plan, uniform_plan
from tests.stranger import by_its_own_code
from tests.tiny import VOCABULARY, tiny_family_folder, tiny_folder

TOKENS_BT = torch.randint(3, VOCABULARY, (2, 14), generator=torch.Generator().manual_seed(0))
FIRST = [(0, "attn"), (3, "mlp")]
# Families, two of them with heads as a site.
BASES: dict[str, tuple[str, list[str]]] = {family: (family, []) for family in FAMILIES} | {
    "llama, heads": ("llama", [HEADS]),
    "opt, heads": ("opt", [HEADS]),
}
SECOND = {"widths": None, "parts": [(1, "mlp"), (2, "attn")], "a block": [(1, "attn"), (1, "mlp")]}


@dataclass(frozen=True)
class Narrow:
    """A stock model, a plan of it, and the narrow base that the plan leaves."""

    stock: Path
    plan: Plan
    folder: Path

    @property
    def base(self) -> BaseModel:
        return BaseModel(self.folder)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Narrow]:
    """The narrow bases; nothing may write there."""
    found = {}
    for number, (name, (family, also)) in enumerate(BASES.items()):
        path = tmp_path_factory.mktemp(f"base{number}")
        stock = tiny_family_folder(path / "stock", family)
        plan = uneven_plan(stock, removed=FIRST, also=also)
        prune_checkpoint(stock, plan, path / "narrow")
        found[name] = Narrow(stock, plan, path / "narrow")
    return found


@pytest.fixture(params=BASES)
def narrow(request: pytest.FixtureRequest, made: dict[str, Narrow]) -> Narrow:
    return made[request.param]


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=0)


def check_decoding(model: Any, expected_BTV: Tensor) -> None:
    """Token by token, beyond the sliding windows, in every kind of cache."""
    for cache in (
        DynamicCache(),
        DynamicCache(config=model.config),
        StaticCache(model.config, max_cache_len=14),
    ):
        for begin, end in ((0, 6), *((t, t + 1) for t in range(6, 14))):
            found_BtV = model(TOKENS_BT[:, begin:end], past_key_values=cache).logits
            close(found_BtV, expected_BTV[:, begin:end])
            assert int(cache.get_seq_length()) == end


def test_its_sites_are_those_that_the_plan_left(narrow: Narrow) -> None:
    hooks = GateHooks(narrow.base.skeleton())
    left = [
        (site.block, site.name, width)
        for site, width in zip(narrow.plan.sites, narrow.plan.widths, strict=True)
        if width and not site.is_part
    ]
    assert [(site.block, site.name, site.size) for site in hooks.sites] == left


@pytest.mark.parametrize("which", SECOND)
@torch.no_grad()
def test_masked_equals_exported(narrow: Narrow, which: str, tmp_path: Path) -> None:
    plan = uneven_plan(narrow.folder, seed=1, removed=SECOND[which])
    export(narrow.folder, plan, tmp_path / "small")  # which proves it as well
    dense, small = narrow.base.load(), BaseModel(tmp_path / "small").load()
    assert type(small) is type(dense)
    hooks = GateHooks(dense, plan.family)
    with hooks.applied(plan.gates(), plan.gains):
        expected_BTV = dense(TOKENS_BT).logits
    assert expected_BTV.std() > 0.1
    assert (dense(TOKENS_BT).logits - expected_BTV).abs().max() > 0.1  # the plan does matter
    close(small(TOKENS_BT).logits, expected_BTV)
    check_decoding(small, expected_BTV)
    close(by_its_own_code(tmp_path / "small")(TOKENS_BT).logits, expected_BTV)
    close(cut(narrow.base.load(), plan)(TOKENS_BT).logits, expected_BTV)
    # Counted by walking the modules, as the table promised.
    counts, widths_S = count(small), torch.tensor(plan.widths).double()
    promised: dict[Cost, int] = {
        Parameters(whole_model=True): counts.parameters,
        Parameters(): counts.block_projection_parameters,
        Flops(): counts.block_flops_per_token,
        Flops(whole_model=True, context_tokens=48): counts.flops_per_token(48),
    }
    for cost, found in promised.items():
        assert float(cost.table(dense, plan.family)(widths_S)) == found, cost
    assert count(dense).parameters == Parameters(True).table(dense, plan.family).dense


@pytest.mark.parametrize("which", SECOND)
def test_two_plans_are_one(narrow: Narrow, which: str, tmp_path: Path) -> None:
    second = uneven_plan(narrow.folder, seed=1, removed=SECOND[which])
    prune_checkpoint(narrow.folder, second, tmp_path / "twice")
    both = narrow.plan.then(second)
    prune_checkpoint(narrow.stock, both, tmp_path / "once")
    found, expected = tensors_of(tmp_path / "once"), tensors_of(tmp_path / "twice")
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], atol=0, rtol=1e-6, msg=name)
        assert tensor.is_floating_point() or torch.equal(tensor, expected[name])
    configs = [BaseModel(tmp_path / name).config.to_dict() for name in ("once", "twice")]
    for config in configs:  # who removed which blocks is told stage by stage
        config.pop("secateur", None)
        config.pop("_name_or_path", None)
    assert configs[0] == configs[1]
    assert both.base == narrow.plan.base
    stages = [narrow.plan.provenance, second.provenance]
    bases = [narrow.plan.base, second.base]
    assert both.provenance["stages"] == [
        {"base": base, **stage} for base, stage in zip(bases, stages, strict=True)
    ]


def test_plans_of_stock_results_compose(tmp_path: Path) -> None:
    stock = tiny_folder(tmp_path / "stock", num_hidden_layers=4)
    first = uniform_plan(stock)
    prune_checkpoint(stock, first, tmp_path / "uniform")
    second = uneven_plan(tmp_path / "uniform", removed=[(1, "attn"), (1, "mlp"), (2, "mlp")])
    prune_checkpoint(tmp_path / "uniform", second, tmp_path / "narrow")
    third = uneven_plan(tmp_path / "narrow", seed=2)
    prune_checkpoint(tmp_path / "narrow", third, tmp_path / "thrice")
    both = first.then(second).then(third)
    assert len(both.provenance["stages"]) == 3
    other = first.then(second.then(third))
    assert other.provenance == both.provenance
    prune_checkpoint(stock, both, tmp_path / "once")
    prune_checkpoint(stock, other, tmp_path / "again")
    expected = tensors_of(tmp_path / "thrice")
    for name in ("once", "again"):
        found = tensors_of(tmp_path / name)
        assert found.keys() == expected.keys()
        for key, tensor in found.items():
            torch.testing.assert_close(tensor, expected[key], atol=0, rtol=1e-6)


def test_plans_that_do_not_follow_are_refused(made: dict[str, Narrow], tmp_path: Path) -> None:
    first = made["llama"].plan
    with pytest.raises(ValueError, match="leaves no 'llama' model"):
        first.then(first)
    with pytest.raises(ValueError, match="leaves no 'secateur_opt' model"):
        first.then(uneven_plan(made["opt"].folder))
    other = uneven_plan(made["llama"].stock, seed=5, removed=FIRST)
    prune_checkpoint(made["llama"].stock, other, tmp_path / "other")
    with pytest.raises(ValueError, match="its sites differ from those of the model"):
        first.then(uneven_plan(tmp_path / "other"))


def test_gates_of_a_narrow_model_count_and_learn(narrow: Narrow) -> None:
    model = narrow.base.load()
    model.requires_grad_(False)
    hooks = GateHooks(model, narrow.base.family.with_parts())
    gates = [torch.full((site.size,), 0.8, requires_grad=True) for site in hooks.sites]
    with hooks.applied(gates):
        loss = model(TOKENS_BT, labels=TOKENS_BT).loss
    for site, gradient in zip(hooks.sites, torch.autograd.grad(loss, gates), strict=True):
        assert gradient.isfinite().all()
        if site.size > 1:  # a single neuron may rest
            assert gradient.abs().max() > 0, site


UNITS = {
    "a block": [Unit(1)],
    "halves": [Unit(1, "mlp"), Unit(2, "attn")],
    "the half that is left": [Unit(0, "mlp"), Unit(2, "attn")],
}


@pytest.mark.parametrize("which", UNITS)
@torch.no_grad()
def test_blocks_and_halves_leave_a_live_narrow_model(
    narrow: Narrow, which: str, tmp_path: Path
) -> None:
    model: Any = narrow.base.load()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    there = HalfBlocks().of(model)
    assert [unit for unit in HalfBlocks().all(4) if unit not in there] == [
        Unit(block, part)  # type: ignore[arg-type]
        for block, part in FIRST
    ]
    with bypassed(model, UNITS[which]):
        expected_BTV = model(TOKENS_BT, use_cache=False).logits
        assert set(HalfBlocks().of(model)) < set(there)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert HalfBlocks().of(model) == there
    remove_blocks(model, UNITS[which])
    close(model(TOKENS_BT).logits, expected_BTV)
    check_decoding(model, expected_BTV)
    # What is left is what the configuration says, and can be saved as it is.
    model.save_pretrained(tmp_path / "saved")
    again = BaseModel(tmp_path / "saved").load()
    assert again.config.block_widths == model.config.block_widths
    assert getattr(again.config, "layer_types", None) == getattr(model.config, "layer_types", None)
    assert again.state_dict().keys() == model.state_dict().keys()
    close(again(TOKENS_BT).logits, expected_BTV)
    check_decoding(again, expected_BTV)


@torch.no_grad()
def test_blocks_leave_a_narrow_checkpoint(narrow: Narrow, tmp_path: Path) -> None:
    prune_blocks(narrow.folder, tmp_path / "short", remove=[0, 2])
    live: PreTrainedModel = narrow.base.load()
    remove_blocks(live, [0, 2])
    short = BaseModel(tmp_path / "short").load()
    whole = (HEADS, num_groups(live.config))  # files leave unsaid that a block has all heads
    told = [dict(w.items() - {whole}) for w in live.config.block_widths]
    assert short.config.block_widths == told
    expected_BTV = live(TOKENS_BT).logits
    close(short(TOKENS_BT).logits, expected_BTV)
    check_decoding(short, expected_BTV)
    close(by_its_own_code(tmp_path / "short")(TOKENS_BT).logits, expected_BTV)


def test_a_narrow_base_stays_narrow(made: dict[str, Narrow]) -> None:
    base = made["llama"].base
    plan = full_plan(base.skeleton(), base.fingerprint)
    assert plan.stock_widths() is None
    heading, first, *_ = (line.split() for line in plan.describe().splitlines())
    assert heading == ["block", "attn_in", "attn_out", "mlp_in", "mlp_mid", "mlp_out"]
    assert first == ["0", "1/1", "1/1", "1/1"]  # sizes differ from block to block
