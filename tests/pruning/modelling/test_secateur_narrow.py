from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    PreTrainedModel,
    StaticCache,
)
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from secateur.pruning.costs import Parameters
from secateur.pruning.export.rewrite import prune_checkpoint
from secateur.pruning.modelling.modeling_secateur_llama import (
    SecateurLlamaConfig,
    SecateurLlamaForCausalLM,
)
from secateur.pruning.modelling.secateur_narrow import LeanRMSNorm, SelectiveRMSNormGather
from secateur.pruning.plan import Plan
from secateur.pruning.widths.gate_hooks import GateHooks
from tests.pruning.export.plans import uneven_plan
from tests.tiny import VOCABULARY, tiny_folder, tiny_llama

VARIANTS: dict[str, dict[str, Any]] = {
    "grouped": {},
    "multi-head": {"num_key_value_heads": 6},
    "multi-query": {"num_key_value_heads": 1},
    "tied": {"tie_word_embeddings": True},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "head_dim": {"head_dim": 10},
    "rope": {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
}


def load(folder: Path, **kwargs: Any) -> PreTrainedModel:
    model: Any = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **kwargs)
    assert isinstance(model, PreTrainedModel)
    return model


@contextmanager
def masked(model: PreTrainedModel, plan: Plan) -> Iterator[PreTrainedModel]:
    hooks = GateHooks(model)
    with hooks.applied(plan.gates(), plan.gains):
        yield model
    hooks.remove()


def tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(3, VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Plan, Path]:
    """A plan of the tiny Llama and the folder exported by it; nothing may write there."""
    path = tmp_path_factory.mktemp("pair")
    plan = uneven_plan(tiny_folder(path / "base"), with_gains=False)  # gradients are compared
    prune_checkpoint(path / "base", plan, path / "small")
    return plan, path / "small"


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_masked_equals_exported(variant: str, tmp_path: Path) -> None:
    overrides = VARIANTS[variant]
    base = tiny_folder(tmp_path / "base", **overrides)
    plan = uneven_plan(base)
    prune_checkpoint(base, plan, tmp_path / "small")
    dense, small = tiny_llama(**overrides), load(tmp_path / "small")
    windows_BT = tokens(3, 20)
    with masked(dense, plan):
        expected_BTV = dense(windows_BT).logits
        torch.testing.assert_close(small(windows_BT).logits, expected_BTV, atol=1e-3, rtol=0)
    assert (dense(windows_BT).logits - expected_BTV).abs().max() > 0.1  # the plan does matter
    table = Parameters(whole_model=True).table(dense)
    assert small.num_parameters() == int(table(torch.tensor(plan.widths).double()))
    assert {type(m).__name__ for m in (small, small.model)} == {
        "SecateurLlamaForCausalLM",
        "SecateurLlamaModel",
    }


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["dynamic", "static"])
@torch.no_grad()
def test_cached_decode_equals_the_masked_model(
    pair: tuple[Plan, Path], attention: str, kind: str
) -> None:
    plan, folder = pair
    dense, small = tiny_llama(), load(folder, attn_implementation=attention)
    given_Bt = tokens(2, 7)
    caches = [
        DynamicCache() if kind == "dynamic" else StaticCache(model.config, max_cache_len=20)
        for model in (dense, small)
    ]
    with masked(dense, plan):
        for _ in range(6):
            expected_BtV = dense(given_Bt, past_key_values=caches[0]).logits
            found_BtV = small(given_Bt, past_key_values=caches[1]).logits
            torch.testing.assert_close(found_BtV, expected_BtV, atol=1e-3, rtol=0)
            given_Bt = expected_BtV[:, -1:].argmax(-1)


@torch.no_grad()
def test_left_padding_changes_nothing(pair: tuple[Plan, Path]) -> None:
    small = load(pair[1])
    windows_BT = tokens(2, 9)
    mask_BT = torch.ones(2, 12, dtype=torch.long)
    mask_BT[:, :3] = 0
    padded_BT = torch.cat([torch.zeros(2, 3, dtype=torch.long), windows_BT], dim=1)
    place_BT = (mask_BT.cumsum(-1) - 1).clamp(min=0)
    found_BTV = small(padded_BT, attention_mask=mask_BT, position_ids=place_BT).logits[:, 3:]
    torch.testing.assert_close(found_BTV, small(windows_BT).logits, atol=1e-3, rtol=0)
    settings: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    padded = small.generate(padded_BT, attention_mask=mask_BT, **settings)
    plain = small.generate(windows_BT, attention_mask=torch.ones_like(windows_BT), **settings)
    assert torch.equal(padded[:, 3:], plain)
    static = small.generate(
        windows_BT,
        attention_mask=torch.ones_like(windows_BT),
        cache_implementation="static",
        disable_compile=True,
        **settings,
    )
    assert torch.equal(static, plain)


@torch.no_grad()
def test_bf16_keeps_the_indices_and_stays_close(tmp_path: Path) -> None:
    # Indices above 256 are not exact in bf16: were they cast, this would fail.
    base = tiny_folder(tmp_path / "base", hidden_size=600, head_dim=8)
    plan = uneven_plan(base, with_gains=False)
    prune_checkpoint(base, plan, tmp_path / "small")
    small = load(tmp_path / "small", dtype=torch.bfloat16)
    block = small.model.layers[2]
    assert torch.equal(block.input_layernorm.index, plan.index(2, "attn_in"))
    assert torch.equal(block.mlp_out.index, plan.index(2, "mlp_out"))
    assert block.mlp.up_proj.weight.dtype == torch.bfloat16
    assert load(tmp_path / "small").half().model.layers[2].attn_out.index.dtype == torch.long
    dense = load(base, dtype=torch.bfloat16)
    windows_BT = tokens(2, 16)
    with masked(dense, plan):
        expected_BTV = dense(windows_BT).logits
    found_BTV = small(windows_BT).logits
    assert found_BTV.dtype == torch.bfloat16
    assert (found_BTV - expected_BTV).abs().max() < 0.03 * expected_BTV.abs().max()


def test_the_norm_is_exact_to_the_last_entry() -> None:
    # Worked by hand: the mean square of (3, 4, 0, 0) is 25 / 4, its root 2.5; entries 1 and 2 of
    # the normalised vector are 1.6 and 0, and the weights 10 and 7 make them 16 and 0.
    norm = SelectiveRMSNormGather(2, size=4, eps=0.0)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([10.0, 7.0]))
        norm.index.copy_(torch.tensor([1, 2]))
    found = norm(torch.tensor([[[3.0, 4.0, 0.0, 0.0]]]))
    torch.testing.assert_close(found, torch.tensor([[[16.0, 0.0]]]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_norm_of_the_whole_stream_is_the_stock_one(dtype: torch.dtype) -> None:
    stock, lean = LlamaRMSNorm(8).to(dtype), LeanRMSNorm(8, LlamaRMSNorm(8).variance_epsilon)
    lean.to(dtype).load_state_dict({"weight": torch.linspace(0.5, 2, 8)})
    stock.load_state_dict(lean.state_dict())
    stream_BTD = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    found = []
    for norm in (stock, lean):
        own_BTD = stream_BTD.clone().requires_grad_()
        out_BTD = norm(own_BTD)
        out_BTD.square().sum().backward()
        with torch.no_grad():
            found.append((out_BTD.detach(), norm(own_BTD), own_BTD.grad, norm.weight.grad))
        assert torch.equal(own_BTD, stream_BTD)
    torch.testing.assert_close(found[1], found[0])


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
def test_gradients_equal_the_masked_model_with_and_without_checkpointing(
    pair: tuple[Plan, Path],
) -> None:
    plan, folder = pair
    windows_BT = tokens(2, 12)

    def gradients(model: PreTrainedModel) -> dict[str, Tensor]:
        model.train()
        model(windows_BT, labels=windows_BT).loss.backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    plain = gradients(load(folder))
    for reentrant in (False, True):
        model = load(folder)
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
        found = gradients(model)
        assert found.keys() == plain.keys() == dict(model.named_parameters()).keys()
        for name, grad in found.items():
            torch.testing.assert_close(grad, plain[name], atol=0, rtol=0)
    with masked(tiny_llama(), plan) as dense:
        expected = gradients(dense)
    rows, columns = plan.index(2, "mlp_mid"), plan.index(2, "mlp_in")
    name = "model.layers.2.mlp.up_proj.weight"
    torch.testing.assert_close(plain[name], expected[name][rows][:, columns], atol=1e-5, rtol=1e-4)
    name = "model.embed_tokens.weight"
    torch.testing.assert_close(plain[name], expected[name], atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_tensors_of_callers_are_not_overwritten(pair: tuple[Plan, Path]) -> None:
    plan, folder = pair
    dense, small = tiny_llama(), load(folder)
    windows_BT = tokens(2, 10)
    with masked(dense, plan):
        expected = dense(windows_BT, output_hidden_states=True).hidden_states
    # Recorded by transformers, seen by a hook, given by the caller.
    hooked: list[Tensor] = []
    for layer in small.model.layers:
        layer.register_forward_hook(lambda module, args, output: hooked.append(output))
    recorded = small(windows_BT, output_hidden_states=True).hidden_states
    assert len(recorded) == len(expected) == len(hooked) + 1
    for found_BTD, expected_BTD in zip(recorded, expected, strict=True):
        torch.testing.assert_close(found_BTD, expected_BTD, atol=1e-3, rtol=0)
    for found_BTD, expected_BTD in zip(hooked, expected[1:-1], strict=False):
        torch.testing.assert_close(found_BTD, expected_BTD, atol=1e-3, rtol=0)
    embeds_BTD = small.get_input_embeddings()(windows_BT)
    before_BTD = embeds_BTD.clone()
    found_BTV = small(inputs_embeds=embeds_BTD).logits
    assert torch.equal(embeds_BTD, before_BTD)
    torch.testing.assert_close(found_BTV, small(windows_BT).logits, atol=0, rtol=0)


@torch.no_grad()
def test_attention_weights_can_be_recorded(pair: tuple[Plan, Path]) -> None:
    small = load(pair[1], attn_implementation="eager")
    weights = small(tokens(2, 5), output_attentions=True).attentions
    assert [w.shape for w in weights] == [(2, 6, 5, 5)] * 3


def test_save_and_reload_keeps_code_and_weights(pair: tuple[Plan, Path], tmp_path: Path) -> None:
    _, folder = pair
    small = load(folder)
    with torch.no_grad():
        small.model.layers[0].mlp.up_proj.weight.add_(1)
    small.save_pretrained(tmp_path / "again")
    code = [
        {path.name: path.read_bytes() for path in f.glob("*.py")}
        for f in (folder, tmp_path / "again")
    ]
    assert code[0] == code[1]
    assert code[0].keys() == {"modeling_secateur_llama.py", "secateur_narrow.py"}
    maps = [
        json.loads((f / "config.json").read_text())["auto_map"]
        for f in (folder, tmp_path / "again")
    ]
    assert maps[0] == maps[1]
    assert maps[0].keys() == {"AutoConfig", "AutoModel", "AutoModelForCausalLM"}
    again = load(tmp_path / "again")
    assert again.state_dict().keys() == small.state_dict().keys()
    assert all(torch.equal(t, small.state_dict()[n]) for n, t in again.state_dict().items())


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_lora_trains_merges_and_reloads(pair: tuple[Plan, Path], tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    names = ["q_proj", "o_proj", "up_proj", "down_proj"]
    tuned: Any = peft.get_peft_model(load(pair[1]), peft.LoraConfig(r=2, target_modules=names))
    windows_BT = tokens(2, 12)
    optimizer = torch.optim.SGD([p for p in tuned.parameters() if p.requires_grad], lr=0.1)
    losses = []
    for _ in range(4):
        loss = tuned(windows_BT, labels=windows_BT).loss
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    with torch.no_grad():
        expected_BTV = tuned.eval()(windows_BT).logits
        merged = tuned.merge_and_unload()
        merged.save_pretrained(tmp_path / "merged")
        found_BTV = load(tmp_path / "merged")(windows_BT).logits
    torch.testing.assert_close(found_BTV, expected_BTV, atol=1e-3, rtol=0)


def test_autocast_trains_in_bf16(pair: tuple[Plan, Path]) -> None:
    small, windows_BT = load(pair[1]), tokens(2, 12)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = small(windows_BT, labels=windows_BT).loss
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in small.parameters())


def test_widths_for_another_number_of_blocks_are_refused() -> None:
    with pytest.raises(
        ValueError, match="`block_widths` has 1 entries and `num_hidden_layers` is 3"
    ):
        SecateurLlamaConfig(num_hidden_layers=3, block_widths=[{"mlp_mid": 4}])


@pytest.mark.parametrize(
    "widths", [{"mlp_midd": 4}, {"attn_in": 9999}, {"mlp_mid": 0}, {"attn_in": -1}, {"attn": 2}]
)
def test_widths_that_no_site_has_are_refused(widths: dict[str, int]) -> None:
    config = SecateurLlamaConfig(num_hidden_layers=2, block_widths=[{}, widths])
    with torch.device("meta"), pytest.raises(ValueError, match="`block_widths` of block 1 has"):
        SecateurLlamaForCausalLM(config)
