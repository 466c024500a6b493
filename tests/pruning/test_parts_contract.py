"""Blocks without attention, without MLP, or gone: what holds for every family.

The first attention is where caches count tokens, so it goes in one of the plans; in the other one a
middle attention does, between layers of both types where a family has sliding windows.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, StaticCache

from secateur.pruning.costs import Cost, Flops, Parameters
from secateur.pruning.export.rewrite import prune_checkpoint
from secateur.pruning.export.verify import ExportError, verify_export
from secateur.pruning.families import FAMILIES, skeleton
from secateur.pruning.files.fingerprint import fingerprint
from secateur.pruning.files.headers import WEIGHTS
from secateur.pruning.measure.sizes import count
from secateur.pruning.plan import Plan, plan_without
from secateur.pruning.widths.gate_hooks import GateHooks
from tests.pruning.export.plans import uneven_plan
from tests.pruning.export.test_rewrite import tensors_of
from tests.tiny import VOCABULARY, tiny_family_folder, tiny_folder, tiny_llama, tiny_model

REMOVED = {
    "the first": [(0, "attn"), (1, "mlp"), (2, "attn"), (2, "mlp")],
    "a middle one": [(1, "attn"), (2, "mlp")],
}
TOKENS_BT = torch.randint(3, VOCABULARY, (2, 14), generator=torch.Generator().manual_seed(0))


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)


@pytest.mark.parametrize("which", REMOVED)
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_masked_equals_exported(family: str, which: str, tmp_path: Path) -> None:
    base = tiny_family_folder(tmp_path / "base", family)
    plan = uneven_plan(base, removed=REMOVED[which])
    prune_checkpoint(base, plan, tmp_path / "small")
    dense, small = tiny_model(family), load(tmp_path / "small")
    hooks = GateHooks(dense, plan.family)
    with hooks.applied(plan.gates(), plan.gains):
        expected_BTV = dense(TOKENS_BT).logits
    assert expected_BTV.std() > 0.1
    torch.testing.assert_close(small(TOKENS_BT).logits, expected_BTV, atol=1e-3, rtol=0)
    # Token by token, beyond the sliding windows, in every kind of cache.
    for cache in (
        DynamicCache(),
        DynamicCache(config=small.config),
        StaticCache(small.config, max_cache_len=14),
    ):
        for begin, end in ((0, 6), *((t, t + 1) for t in range(6, 14))):
            found_BtV = small(TOKENS_BT[:, begin:end], past_key_values=cache).logits
            torch.testing.assert_close(found_BtV, expected_BTV[:, begin:end], atol=1e-3, rtol=0)
            assert int(cache.get_seq_length()) == end
    # Counted by walking the modules, as the table promised.
    counts, widths_S = count(small), torch.tensor(plan.widths).double()
    promised: dict[Cost, int] = {
        Parameters(whole_model=True): counts.parameters,
        Parameters(): counts.block_projection_parameters,
        Flops(whole_model=True, context_tokens=48): counts.flops_per_token(48),
    }
    for cost, found in promised.items():
        assert float(cost.table(dense, plan.family)(widths_S)) == found, cost
    small.save_pretrained(tmp_path / "again")
    assert torch.equal(load(tmp_path / "again")(TOKENS_BT).logits, small(TOKENS_BT).logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_closed_gate_is_a_part_that_is_not_there(family: str) -> None:
    # By closing it the stream passes unchanged, whatever norms and biases follow the projections.
    model = tiny_model(family)
    hooks = GateHooks(model, FAMILIES[family].with_parts())
    block = model.get_submodule(FAMILIES[family].blocks)[1]  # type: ignore[index]
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def see(module: Any, args: Any, kwargs: Any, output: Any) -> None:
        seen.append((args[0] if args else kwargs["hidden_states"], output))

    block.register_forward_hook(see, with_kwargs=True)
    gates = [torch.full((s.size,), float(s.block != 1 or not s.is_part)) for s in hooks.sites]
    with hooks.applied(gates), torch.no_grad():
        model(TOKENS_BT)
    assert torch.equal(*seen[0])


def test_whole_blocks_leave_a_stock_model(tmp_path: Path) -> None:
    base = tiny_folder(tmp_path / "base")
    model = skeleton(AutoConfig.from_pretrained(base))
    plan = plan_without(model, fingerprint(base), [(0, "mlp"), (0, "attn")], {"method": "hand"})
    prune_checkpoint(base, plan, tmp_path / "small")
    config = json.loads((tmp_path / "small" / "config.json").read_text())
    assert (config["model_type"], config["num_hidden_layers"]) == ("llama", 2)
    assert config["secateur"]["kept_blocks"] == [1, 2]
    dense, small = tensors_of(base), tensors_of(tmp_path / "small")
    names = {
        n: n.replace("layers.1.", "layers.0.").replace("layers.2.", "layers.1.") for n in dense
    }
    left = {n: new for n, new in names.items() if ".layers.0." not in n}
    assert small.keys() == set(left.values())
    assert all(torch.equal(small[new], dense[name]) for name, new in left.items())
    assert not list((tmp_path / "small").glob("*.py"))
    verify_export(tiny_llama(), plan, tmp_path / "small", TOKENS_BT)


def test_verification_names_the_block_of_the_base_model(tmp_path: Path) -> None:
    base = tiny_folder(tmp_path / "base", num_hidden_layers=4)
    plan = uneven_plan(base, removed=[(1, "attn"), (1, "mlp"), (2, "mlp")])
    prune_checkpoint(base, plan, tmp_path / "small")
    dense = tiny_llama(num_hidden_layers=4)
    verify_export(dense, plan, tmp_path / "small", TOKENS_BT)
    tensors = load_file(tmp_path / "small" / WEIGHTS)
    tensors["model.layers.1.self_attn.o_proj.weight"] += 0.5
    save_file(tensors, tmp_path / "small" / WEIGHTS, metadata={"format": "pt"})
    (tmp_path / "small" / "secateur.json").unlink()  # which tells that it was changed
    with pytest.raises(ExportError, match="first difference is in block 2"):
        verify_export(dense, plan, tmp_path / "small", TOKENS_BT)


def test_plans_of_parts_are_kept_and_checked(tmp_path: Path) -> None:
    model = tiny_llama()
    plan = plan_without(model, "x", [(1, "attn")], {})
    plan.save(tmp_path)
    again = Plan.load(tmp_path)
    assert again.widths == plan.widths
    assert [again.keeps(block, "attn") for block in range(3)] == [True, False, True]
    assert (again.kept_blocks(), again.stock_widths()) == ([0, 1, 2], None)
    again.verify(model.config)
    kept = list(plan.kept)
    place = [site.key for site in plan.sites].index("1.attn_in")
    kept[place] = torch.arange(2)
    with pytest.raises(ValueError, match=r"1\.attn_in keeps entries of a part that is removed"):
        Plan("llama", "x", plan.sites, tuple(kept))
    with pytest.raises(ValueError, match="keeps no attention"):
        plan_without(model, "x", [(block, "attn") for block in range(3)], {})
    with pytest.raises(ValueError, match=r"`removed` names \[\(3, 'attn'\)\]"):
        plan_without(model, "x", [(3, "attn")], {})
