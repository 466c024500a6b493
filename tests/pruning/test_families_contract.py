"""What holds for every family and variant, from the table to a stranger's process.

The rows are `tests.tiny.VARIANTS`; every export has blocks of width 1, of full, odd and aligned
widths.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

from secateur.pruning.costs import Flops, Parameters
from secateur.pruning.export.rewrite import prune_checkpoint
from secateur.pruning.families import FAMILIES, skeleton
from secateur.pruning.measure.sizes import count
from secateur.pruning.plan import Plan
from secateur.pruning.widths.gate_hooks import GateHooks
from tests.pruning.export.plans import uneven_plan, uniform_plan
from tests.stranger import run_as_stranger
from tests.tiny import VARIANTS, VOCABULARY, tiny_config, tiny_family_folder, tiny_model

ROWS = [(family, variant) for family, variants in VARIANTS.items() for variant in variants]


@dataclass(frozen=True)
class Pair:
    """A dense model, a plan of it, and the model that the plan leaves."""

    dense: PreTrainedModel
    plan: Plan
    folder: Path

    def small(self, **kwargs: Any) -> PreTrainedModel:
        model: Any = AutoModelForCausalLM.from_pretrained(
            self.folder, trust_remote_code=True, **kwargs
        )
        assert isinstance(model, PreTrainedModel)
        return model

    @contextmanager
    def masked(self) -> Iterator[PreTrainedModel]:
        hooks = GateHooks(self.dense)
        with hooks.applied(self.plan.gates(), self.plan.gains):
            yield self.dense
        hooks.remove()


def tokens(*shape: int) -> Tensor:
    return torch.randint(3, VOCABULARY, shape, generator=torch.Generator().manual_seed(0))


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=0)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Pair]:
    """All rows, exported; nothing may write there."""
    made = {}
    for number, (family, variant) in enumerate(ROWS):
        path = tmp_path_factory.mktemp(f"row{number}")
        overrides = VARIANTS[family][variant]
        base = tiny_family_folder(path / "base", family, **overrides)
        plan = uneven_plan(base)
        prune_checkpoint(base, plan, path / "small")
        made[family, variant] = Pair(tiny_model(family, **overrides), plan, path / "small")
    return made


@pytest.fixture(params=ROWS, ids="-".join)
def pair(request: pytest.FixtureRequest, pairs: dict[tuple[str, str], Pair]) -> Pair:
    return pairs[request.param]


def test_every_family_has_rows_for_all_that_it_can_be() -> None:
    assert set(VARIANTS) == set(FAMILIES)
    for family, variants in VARIANTS.items():
        configs = [tiny_config(family, **overrides) for overrides in variants.values()]
        assert {config.tie_word_embeddings for config in configs} == {True, False}, family
        for field in ("attention_bias", "mlp_bias", "enable_bias", "qk_layernorm"):
            if hasattr(configs[0], field):
                assert {getattr(c, field) for c in configs} == {True, False}, (family, field)
        if hasattr(configs[0], "num_key_value_heads"):  # OPT has as many as queries
            shared = {c.num_attention_heads > c.num_key_value_heads for c in configs}
            assert shared == {True, False}, family


def test_the_widths_are_those_where_exports_go_wrong(pair: Pair) -> None:
    for site, width in zip(pair.plan.sites, pair.plan.widths, strict=True):
        assert width == {0: 1, 1: site.size}.get(site.block, width)
        assert site.block != 2 or width % 2 == 1
        assert site.block != 3 or (width % 8 == 0 and width < site.size)
    assert {site.block for site in pair.plan.sites} == {0, 1, 2, 3}


@torch.no_grad()
def test_masked_equals_exported(pair: Pair) -> None:
    small, windows_BT = pair.small(), tokens(3, 20)
    with pair.masked() as dense:
        expected_BTV = dense(windows_BT).logits
    close(small(windows_BT).logits, expected_BTV)
    assert (pair.dense(windows_BT).logits - expected_BTV).abs().max() > 0.1  # the plan does matter
    assert expected_BTV.std() > 0.1


@torch.no_grad()
def test_cached_decode_equals_the_masked_model(pair: Pair) -> None:
    small, given_Bt = pair.small(), tokens(2, 7)
    caches = [DynamicCache(config=model.config) for model in (pair.dense, small)]
    seen_BT = given_Bt
    with pair.masked() as dense:
        for _ in range(6):
            expected_BtV = dense(given_Bt, past_key_values=caches[0]).logits
            close(small(given_Bt, past_key_values=caches[1]).logits, expected_BtV)
            given_Bt = expected_BtV[:, -1:].argmax(-1)
            seen_BT = torch.cat([seen_BT, given_Bt], 1)
    # The caches hold what a pass without a cache computes.
    close(small(seen_BT[:, :-1]).logits[:, -1:], expected_BtV[:, -1:])


@torch.no_grad()
def test_left_padding_changes_nothing(pair: Pair) -> None:
    small, windows_BT = pair.small(), tokens(2, 9)
    mask_BT = torch.ones(2, 12, dtype=torch.long)
    mask_BT[:, :3] = 0
    padded_BT = torch.cat([torch.zeros(2, 3, dtype=torch.long), windows_BT], dim=1)
    batch = {
        "input_ids": padded_BT,
        "attention_mask": mask_BT,
        "position_ids": (mask_BT.cumsum(-1) - 1).clamp(min=0),
    }
    found_BTV = small(**batch).logits[:, 3:]
    close(found_BTV, small(windows_BT).logits)
    with pair.masked() as dense:
        close(found_BTV, dense(**batch).logits[:, 3:])


def test_promised_costs_equal_counted_ones(pair: Pair) -> None:
    counts = count(pair.small())
    widths_S = torch.tensor(pair.plan.widths).double()
    promised = {
        Parameters(whole_model=True): counts.parameters,
        Parameters(): counts.block_projection_parameters,
        Flops(): counts.block_flops_per_token,
        Flops(whole_model=True, context_tokens=48): counts.flops_per_token(48),
    }
    for cost, found in promised.items():
        assert float(cost.table(pair.dense)(widths_S)) == found, cost
        assert cost.table(pair.dense).dense > found
    assert count(pair.dense).parameters == Parameters(whole_model=True).table(pair.dense).dense


@torch.no_grad()
def test_torch_counts_the_same_products(pair: Pair) -> None:
    # torch counts every matrix product that runs, biases and additions not. Scores are counted for
    # all pairs of tokens, and the angles of the rotary embedding are no products of ours.
    small, length = pair.small(attn_implementation="eager"), 12
    with FlopCounterMode(display=False, depth=9) as counter:
        small(tokens(1, length), use_cache=False)
    by_module = counter.get_flop_counts()
    rotary = sum(sum(c.values()) for name, c in by_module.items() if name.endswith("rotary_emb"))
    found = (counter.get_total_flops() - rotary) / length
    widths_S = torch.tensor(pair.plan.widths).double()
    promised = float(Flops(whole_model=True, context_tokens=length).table(pair.dense)(widths_S))
    blocks = small.get_submodule(FAMILIES[pair.plan.model_type].blocks)
    linears = (m for m in blocks.modules() if isinstance(m, torch.nn.Linear))
    biases = sum(m.bias.numel() for m in linears if m.bias is not None)
    assert found == promised - biases


_STRANGER = """
import sys

import torch
from transformers import AutoModelForCausalLM

given_BT = torch.load(sys.argv[1], weights_only=True)
settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
for folder in sys.argv[3:]:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    assert not any(name.split(".")[0] == "pruning" for name in sys.modules)
    logits_BTV = model(given_BT).logits.detach()
    model.save_pretrained(folder + "-again")
    again = AutoModelForCausalLM.from_pretrained(folder + "-again", trust_remote_code=True)
    assert torch.equal(again(given_BT).logits, logits_BTV)
    generated_BT = again.generate(given_BT, attention_mask=torch.ones_like(given_BT), **settings)
    torch.save({"logits": logits_BTV, "tokens": generated_BT}, folder + ".pt")
torch.save(len(sys.argv) - 3, sys.argv[2])
"""


def test_a_process_without_this_repository_loads_saves_reloads_and_generates(
    pairs: dict[tuple[str, str], Pair], tmp_path: Path
) -> None:
    given_BT = tokens(2, 9)
    torch.save(given_BT, tmp_path / "given.pt")
    folders = (pair.folder for pair in pairs.values())
    run_as_stranger(
        _STRANGER, tmp_path / "given.pt", tmp_path / "done.pt", *folders, folder=tmp_path
    )
    assert torch.load(tmp_path / "done.pt", weights_only=True) == len(ROWS)
    for pair in pairs.values():
        found = torch.load(f"{pair.folder}.pt", weights_only=True)
        steps_BT = given_BT
        with pair.masked() as dense, torch.no_grad():
            close(found["logits"], dense(given_BT).logits)
            for _ in range(5):
                steps_BT = torch.cat([steps_BT, dense(steps_BT).logits[:, -1:].argmax(-1)], dim=1)
        assert torch.equal(found["tokens"], steps_BT)


@pytest.mark.parametrize("family", VARIANTS)
def test_every_gate_counts_and_learns(family: str) -> None:
    # A gate that multiplied nowhere, or twice, would be exported as another function.
    model, windows_BT = tiny_model(family), tokens(2, 12)
    hooks = GateHooks(model)
    gates = [torch.full((site.size,), 0.8, requires_grad=True) for site in hooks.sites]
    with hooks.applied(gates):
        loss = model(windows_BT, labels=windows_BT).loss
    gradients = torch.autograd.grad(loss, gates)
    for site, gate, gradient in zip(hooks.sites, gates, gradients, strict=True):
        assert gradient.isfinite().all()
        entry = int(gradient.abs().argmax())
        assert gradient[entry] != 0, site
        if site.block == 1:  # the slope of the loss along one gate, by central difference
            step = torch.zeros(site.size).index_fill(0, torch.tensor(entry), 1e-2)
            nearby = []
            for sign in (1, -1):
                moved = [gate + sign * step if g is gate else g for g in gates]
                with torch.no_grad(), hooks.applied(moved):
                    nearby.append(float(model(windows_BT, labels=windows_BT).loss))
            slope = (nearby[0] - nearby[1]) / 2e-2
            assert slope == pytest.approx(float(gradient[entry]), rel=0.1, abs=1e-3), site


@torch.no_grad()
@pytest.mark.parametrize(("family", "variant"), ROWS, ids=map("-".join, ROWS))
def test_a_uniform_plan_leaves_a_stock_model(family: str, variant: str, tmp_path: Path) -> None:
    overrides = VARIANTS[family][variant]
    base = tiny_family_folder(tmp_path / "base", family, **overrides)
    plan, windows_BT = uniform_plan(base), tokens(2, 12)
    prune_checkpoint(base, plan, tmp_path / "small")
    small: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "small")  # no code is trusted
    pair = Pair(tiny_model(family, **overrides), plan, tmp_path / "small")
    assert type(small) is type(pair.dense)
    with pair.masked() as dense:
        close(small(windows_BT).logits, dense(windows_BT).logits)
    found, before = (set(model.state_dict()) for model in (small, pair.dense))
    assert found == before
    width = getattr(small.config, FAMILIES[family].mlp_width)
    assert plan.stock_widths() == {"mlp_mid": width}
    assert 1 < width < getattr(pair.dense.config, FAMILIES[family].mlp_width)
    neurons = [plan.index(block, "mlp_mid").tolist() for block in range(4)]
    assert len({tuple(index) for index in neurons}) == 4  # which ones stay differs


def test_a_dense_model_has_the_cost_of_its_skeleton(pair: Pair) -> None:
    assert count(skeleton(pair.dense.config)) == count(pair.dense)
