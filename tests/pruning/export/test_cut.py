from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from secateur.pruning.export.cut import cut
from secateur.pruning.export.rewrite import prune_checkpoint
from secateur.pruning.export.slices import Slices
from secateur.pruning.plan import Plan, plan_without
from secateur.pruning.widths.gate_hooks import GateHooks
from tests.pruning.export.plans import uneven_plan, uniform_plan
from tests.tiny import VARIANTS, VOCABULARY, tiny_family_folder, tiny_folder, tiny_llama, tiny_model

ROWS = [(family, variant) for family, variants in VARIANTS.items() for variant in variants]
REMOVED = [(0, "attn"), (1, "mlp"), (2, "attn"), (2, "mlp")]
TOKENS_BT = torch.randint(3, VOCABULARY, (3, 20), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def masked(model: PreTrainedModel, plan: Plan) -> Tensor:
    hooks = GateHooks(model, plan.family)
    with hooks.applied(plan.gates(), plan.gains):
        logits_BTV: Tensor = model(TOKENS_BT).logits
    hooks.remove()
    return logits_BTV


def plans(folder: Path) -> Iterator[Plan]:
    yield uneven_plan(folder)
    yield uneven_plan(folder, removed=REMOVED)
    yield uniform_plan(folder)


@pytest.mark.parametrize(("family", "variant"), ROWS)
@torch.no_grad()
def test_the_cut_model_is_the_masked_one(family: str, variant: str, tmp_path: Path) -> None:
    overrides = VARIANTS[family][variant]
    base = tiny_family_folder(tmp_path / "base", family, **overrides)
    model = tiny_model(family, **overrides)
    for plan in plans(base):
        expected_BTV, narrow = masked(model, plan), cut(model, plan)
        torch.testing.assert_close(narrow(TOKENS_BT).logits, expected_BTV, atol=1e-3, rtol=0)
        assert (type(narrow) is type(model)) == (plan.stock_widths() is not None)
        assert narrow.config._attn_implementation == model.config._attn_implementation


@pytest.mark.parametrize("removed", [None, REMOVED])
@torch.no_grad()
def test_it_is_bit_by_bit_what_the_checkpoint_is_cut_to(
    removed: list[tuple[int, str]] | None, tmp_path: Path
) -> None:
    base = tiny_folder(tmp_path / "base", num_hidden_layers=4)
    plan = uneven_plan(base, removed=removed)
    prune_checkpoint(base, plan, tmp_path / "small")
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "small", trust_remote_code=True)
    narrow = cut(AutoModelForCausalLM.from_pretrained(base), plan)
    assert narrow.state_dict().keys() == small.state_dict().keys()
    for name, tensor in small.state_dict().items():
        assert torch.equal(narrow.state_dict()[name], tensor), name
    narrow.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", trust_remote_code=True)
    assert torch.equal(again(TOKENS_BT).logits, small(TOKENS_BT).logits)
    assert narrow.config.block_widths == small.config.block_widths


@torch.no_grad()
def test_weights_that_have_changed_are_cut(tmp_path: Path) -> None:
    plan = uneven_plan(tiny_folder(tmp_path / "base", num_hidden_layers=4))
    changed = tiny_llama(seed=1, num_hidden_layers=4)
    expected_BTV = masked(changed, plan)
    torch.testing.assert_close(
        cut(changed, plan)(TOKENS_BT).logits, expected_BTV, atol=1e-4, rtol=0
    )


def test_types_gradients_mode_and_ties_are_kept_and_no_memory_is_shared(tmp_path: Path) -> None:
    base = tiny_folder(tmp_path / "base", tie_word_embeddings=True)
    model = tiny_llama(tie_word_embeddings=True).bfloat16().train()
    model.model.rotary_emb.float()
    model.model.norm.weight.requires_grad_(False)
    narrow = cut(model, uneven_plan(base))
    assert narrow.training
    assert narrow.get_input_embeddings().weight is narrow.get_output_embeddings().weight
    for name, parameter in narrow.named_parameters():
        assert parameter.dtype == torch.bfloat16
        assert parameter.requires_grad == (name != "model.norm.weight")
    assert not any(tensor.is_meta for tensor in [*narrow.parameters(), *narrow.buffers()])
    own = {tensor.data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    assert own.isdisjoint(t.data_ptr() for t in [*narrow.parameters(), *narrow.buffers()])
    assert torch.equal(narrow.model.rotary_emb.inv_freq, model.model.rotary_emb.inv_freq)
    narrow(TOKENS_BT).logits.float().square().mean().backward()
    assert all(p.grad is not None for p in narrow.parameters() if p.requires_grad)


@torch.no_grad()
def test_whole_blocks_that_go_leave_a_stock_model() -> None:
    model = tiny_llama()
    plan = plan_without(model, "base", [(1, "attn"), (1, "mlp")], {"method": "test"})
    narrow = cut(model, plan)
    assert type(narrow) is type(model)
    assert narrow.config.num_hidden_layers == 2
    assert model.config.num_hidden_layers == 3
    torch.testing.assert_close(narrow(TOKENS_BT).logits, masked(model, plan), atol=1e-5, rtol=0)


def test_what_cannot_be_cut_is_refused(tmp_path: Path) -> None:
    plan = uneven_plan(tiny_folder(tmp_path / "base", num_hidden_layers=4))
    with pytest.raises(ValueError, match="The plan does not fit"):
        cut(tiny_llama(), plan)
    wrapped = tiny_llama(num_hidden_layers=4)
    layer = wrapped.model.layers[0].mlp
    layer.up_proj = torch.nn.Sequential(layer.up_proj)
    with pytest.raises(ValueError, match="no tensor for 'model.layers.0.mlp.up_proj.weight'"):
        cut(wrapped, plan)
    quantised = tiny_llama(num_hidden_layers=4)
    quantised.config.quantization_config = {"quant_method": "some"}
    with pytest.raises(ValueError, match="`quantization_config`.* Cut the original model"):
        cut(quantised, plan)
    with pytest.raises(ValueError, match=r"'model.layers.1.mlp.up_proj.weight' has shape \[7\]"):
        Slices(plan).of("model.layers.1.mlp.up_proj.weight", [7])
