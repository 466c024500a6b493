"""Bytes of weights and cache, against those of loaded models and real caches."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache

from secateur.pruning.costs import Bytes, Parameters
from secateur.pruning.export.rewrite import prune_checkpoint
from secateur.pruning.families import FAMILIES, family_of, skeleton
from secateur.pruning.sites import find_sites
from secateur.pruning.widths.budget import Budget
from tests.pruning.export.plans import uneven_plan
from tests.tiny import VOCABULARY, tiny_family_folder, tiny_llama, tiny_llama_config, tiny_model


@pytest.mark.parametrize("removed", [(), [(1, "attn"), (2, "mlp")]])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_bytes_are_those_of_an_exported_model_and_its_cache(
    family: str, removed: list[tuple[int, str]], tmp_path: Path
) -> None:
    base = tiny_family_folder(tmp_path / "base", family)
    plan = uneven_plan(base, with_gains=False, removed=removed)
    prune_checkpoint(base, plan, tmp_path / "small")
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "small", trust_remote_code=True)
    generator = torch.Generator().manual_seed(0)
    tokens_BT = torch.randint(3, VOCABULARY, (2, 4), generator=generator)  # within all windows
    cache = DynamicCache(config=small.config)
    small(tokens_BT, past_key_values=cache)
    held = [t for layer in cache.layers if layer.is_initialized for t in (layer.keys, layer.values)]
    expected = sum(p.nbytes for p in small.parameters()) + sum(t.nbytes for t in held)
    cost = Bytes(context_tokens=4, batch_size=2, weight_bits=32.0, other_bits=32.0, cache_bits=32.0)
    table = cost.table(tiny_model(family), plan.family)
    assert float(table(torch.tensor(plan.widths).double())) == expected


def test_every_kind_of_number_has_its_bits_and_windows_bound_the_cache() -> None:
    model = tiny_llama(tie_word_embeddings=True)
    weights = Parameters().table(model).dense
    others = model.num_parameters() - weights
    cache = 100 * 3 * 2 * 2 * 3 * 4  # tokens, sequences, keys and values, heads, blocks, size
    expected = 4.5 / 8 * weights + 2 * others + cache
    assert Bytes(100, 3, 4.5, 16.0, 8.0).table(model).dense == expected
    config = tiny_model("gemma2").config  # two of four blocks have a window of 5
    one = Bytes(0, 1).table(skeleton(config)).dense
    for tokens, held in ((4, 16), (100, 2 * 100 + 2 * 5)):
        found = Bytes(tokens, 1).table(skeleton(config)).dense - one
        assert found == held * 2 * 2 * 6 * 2  # keys and values, heads, size, bytes


def test_the_same_memory_holds_less_of_a_model_with_a_longer_context() -> None:
    config = tiny_llama_config()
    model, family = skeleton(config), family_of(config)
    sites = find_sites(model, family)
    scores_N = torch.rand(
        sum(site.size for site in sites), generator=torch.Generator().manual_seed(0)
    )
    fits, left = 0.8 * Bytes(10).table(model).dense, []
    for context in (10, 50):
        table = Bytes(context).table(model)
        kept = Budget(fits / table.dense, Bytes(context)).finalise(scores_N, sites, table)
        widths_S = torch.tensor([len(index) for index in kept])
        assert float(table(widths_S)) <= fits
        left.append(float(Parameters().table(model)(widths_S)))
    assert left[1] < left[0]


def test_out_of_reach_and_out_of_range_are_told() -> None:
    model = skeleton(tiny_llama_config())
    cost = Bytes(context_tokens=100_000)
    sites = find_sites(model, family_of(model.config))
    with pytest.raises(ValueError, match=r"cannot be reached.*at least 0\.9\d+ .*`context_tokens`"):
        Budget(0.5, cost).check(sites, cost.table(model))
    with pytest.raises(ValueError, match="`context_tokens` must be 0 or more, got -1"):
        Bytes(-1)
    with pytest.raises(ValueError, match="`weight_bits` must be above 0, got 0"):
        Bytes(weight_bits=0.0)
