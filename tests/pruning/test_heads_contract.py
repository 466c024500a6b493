"""Heads as a site: what holds for every family, with one, several and all queries per key.

A group of heads is a key-value head and the query heads that read it. Block 0 keeps one group,
block 1 all, block 2 an odd number; the other sites are cut as well, or not at all.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel, StaticCache

from secateur.pruning.costs import Bytes, Cost, Flops, Parameters
from secateur.pruning.export.cut import cut
from secateur.pruning.export.deliver import export
from secateur.pruning.export.rewrite import prune_checkpoint
from secateur.pruning.families import FAMILIES
from secateur.pruning.files.base_model import BaseModel
from secateur.pruning.heads import HEADS, num_groups
from secateur.pruning.measure.sizes import count
from secateur.pruning.plan import Plan
from secateur.pruning.widths.budget import Budget
from secateur.pruning.widths.gate_hooks import GateHooks
from tests.pruning.export.plans import random_plan, uneven_plan
from tests.tiny import VARIANTS, VOCABULARY, tiny_config, tiny_family_folder, tiny_model

ROWS = [(family, variant) for family, variants in VARIANTS.items() for variant in variants]
TOKENS_BT = torch.randint(3, VOCABULARY, (2, 14), generator=torch.Generator().manual_seed(0))


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=0)


@torch.no_grad()
def masked(model: PreTrainedModel, plan: Plan) -> Tensor:
    """Logits of a dense model with the gates and gains of a plan."""
    hooks = GateHooks(model, plan.family)
    with hooks.applied(plan.gates(), plan.gains):
        logits_BTV: Tensor = model(TOKENS_BT).logits
    hooks.remove()
    return logits_BTV


def alone(plan: Plan) -> Plan:
    """The plan that cuts nothing but heads."""
    sites = zip(plan.sites, plan.kept, strict=True)
    kept = (i if site.name == HEADS else torch.arange(site.size) for site, i in sites)
    return replace(plan, kept=tuple(kept))


ALL, ALONE = "all sites", "heads alone"
CASES = [(*row, ALL) for row in ROWS] + [("llama", "grouped", ALONE), ("opt", "tied", ALONE)]


@pytest.mark.parametrize(("family", "variant", "which"), CASES, ids=map("-".join, CASES))
@torch.no_grad()
def test_masked_equals_exported(family: str, variant: str, which: str, tmp_path: Path) -> None:
    dense = tiny_model(family, **VARIANTS[family][variant])
    base = tiny_family_folder(tmp_path / "base", family, **VARIANTS[family][variant])
    plan = uneven_plan(base, also=[HEADS])
    plan = alone(plan) if which == ALONE else plan
    groups = [plan.index(block, HEADS) for block in range(4)]
    expected_BTV = masked(dense, plan)
    if num_groups(dense.config) > 1:  # the heads do matter
        assert len(groups[0]) == 1 < len(groups[1]) == num_groups(dense.config)
        whole = tuple(
            torch.arange(site.size) if site.name == HEADS else index_W
            for site, index_W in zip(plan.sites, plan.kept, strict=True)
        )
        uncut_BTV = masked(dense, replace(plan, kept=whole))
        assert (uncut_BTV - expected_BTV).abs().max() > 0.1
    prune_checkpoint(base, plan, tmp_path / "small")
    small = BaseModel(tmp_path / "small").load()
    close(small(TOKENS_BT).logits, expected_BTV)
    close(cut(dense, plan)(TOKENS_BT).logits, expected_BTV)
    assert Plan.load(tmp_path / "small").widths == plan.widths
    # Token by token, beyond the sliding windows, in every kind of cache, which holds fewer heads.
    for cache in (
        DynamicCache(),
        DynamicCache(config=small.config),
        StaticCache(small.config, max_cache_len=14),
    ):
        for begin, end in ((0, 6), *((t, t + 1) for t in range(6, 14))):
            found_BtV = small(TOKENS_BT[:, begin:end], past_key_values=cache).logits
            close(found_BtV, expected_BTV[:, begin:end])
        held = [(layer.keys.shape[1], layer.values.shape[1]) for layer in cache.layers]
        assert held == [(len(kept), len(kept)) for kept in groups]
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
    of_cache = (
        float(Bytes(context_tokens=tokens, batch_size=2).table(dense, plan.family)(widths_S))
        for tokens in (4, 0)
    )
    held_bytes = sum(  # of the 4 tokens, which fit every window
        2 * layer[:, :, :4].numel() for c in cache.layers for layer in (c.keys, c.values)
    )
    assert next(of_cache) - next(of_cache) == held_bytes


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_equal_heads_leave_a_stock_model_where_its_configuration_can_tell(
    family: str, tmp_path: Path
) -> None:
    base = tiny_family_folder(tmp_path / "base", family)
    budget = Budget(0.6, Parameters(), uniform=True, sites=[HEADS, "mlp_mid"])
    plan = random_plan(base, budget)
    dense = tiny_model(family)
    full = num_groups(dense.config)
    widths = plan.stock_widths()
    assert widths is not None
    assert 1 <= widths[HEADS] < full
    assert 1 < widths["mlp_mid"] < getattr(dense.config, FAMILIES[family].mlp_width)
    kept = {tuple(plan.index(block, HEADS).tolist()) for block in range(4)}
    assert len(kept) > 1  # which ones stay differs
    export(base, plan, tmp_path / "small")  # which proves it as well
    small: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "small", trust_remote_code=True)
    close(small(TOKENS_BT).logits, masked(dense, plan))
    heads = widths[HEADS] * (dense.config.num_attention_heads // full)
    if FAMILIES[family].stock_heads(24, heads):
        assert type(small) is type(dense)
        assert (small.config.num_attention_heads, num_groups(small.config)) == (
            heads,
            widths[HEADS],
        )
        card = (tmp_path / "small" / "README.md").read_text()
        assert f"and {widths[HEADS]} key-value heads with their queries in its attention" in card
    else:
        assert small.config.block_widths == [{**plan.widths_by_block()[0]}] * 4
    close(cut(dense, plan)(TOKENS_BT).logits, masked(dense, plan))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_row_says_which_numbers_of_heads_a_stock_model_may_have(family: str) -> None:
    config = tiny_config(family)
    row = FAMILIES[family]
    assert row.stock_heads(24, 3) == ("head_dim" in type(config).__annotations__)
    other = {"num_attention_heads": 5, "num_key_value_heads": 5, "head_dim": 4}  # 20 of 24 entries
    if row.stock_heads(24, 3) and not row.stock_heads(24, 5):
        with pytest.raises(Exception, match="is not a multiple of the number of attention heads"):
            tiny_config(family, **other)
    elif row.stock_heads(24, 5):
        assert tiny_model(family, **other)(TOKENS_BT).logits.isfinite().all()
