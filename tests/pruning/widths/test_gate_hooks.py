from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

from secateur.pruning.sites import Site
from secateur.pruning.widths.gate_hooks import GateHooks
from tests.tiny import VOCABULARY, tiny_llama

VARIANTS: tuple[dict[str, object], ...] = (
    {},
    {"num_key_value_heads": 6, "tie_word_embeddings": True},
    {"attention_bias": True, "mlp_bias": True},
    {"head_dim": 10},
)


def _tokens(seed: int = 0) -> Tensor:
    return torch.randint(VOCABULARY, (2, 11), generator=torch.Generator().manual_seed(seed))


def _random_gates(sites: list[Site], hard: bool) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    gates = [torch.rand(site.size, generator=generator) for site in sites]
    return tuple(gate.round() for gate in gates) if hard else tuple(gates)


def _masked_forward(model: LlamaForCausalLM, ids_BT: Tensor, gates: tuple[Tensor, ...]) -> Tensor:
    """Llama from its equations, on its raw tensors, with every gate where the method puts it."""
    config, tensors = model.config, dict(model.named_parameters())
    head_size = config.head_dim

    def linear(name: str, x: Tensor) -> Tensor:
        return F.linear(x, tensors[f"{name}.weight"], tensors.get(f"{name}.bias"))

    def normalise(name: str, x: Tensor) -> Tensor:
        root = (x.square().mean(-1, keepdim=True) + config.rms_norm_eps).sqrt()
        return x / root * tensors[f"{name}.weight"]

    def heads(x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, head_size)).transpose(1, 2)

    def rotate(x: Tensor) -> Tensor:
        half = head_size // 2
        speed = 10_000.0 ** (-torch.arange(half) / half)
        angle = torch.arange(x.shape[2])[:, None] * speed
        left, right = x[..., :half], x[..., half:]
        cos, sin = angle.cos(), angle.sin()
        return torch.cat([left * cos - right * sin, right * cos + left * sin], -1)

    x = F.embedding(ids_BT, tensors["model.embed_tokens.weight"])
    length = ids_BT.shape[1]
    future = torch.ones(length, length).triu(1).bool()
    for block in range(config.num_hidden_layers):
        attn_in, attn_out, mlp_in, mlp_mid, mlp_out = gates[5 * block : 5 * block + 5]
        name = f"model.layers.{block}"
        h = normalise(f"{name}.input_layernorm", x) * attn_in
        q = rotate(heads(linear(f"{name}.self_attn.q_proj", h)))
        k = rotate(heads(linear(f"{name}.self_attn.k_proj", h)))
        v = heads(linear(f"{name}.self_attn.v_proj", h))
        shared = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(shared, 1), v.repeat_interleave(shared, 1)
        scores = (q @ k.transpose(-1, -2) / math.sqrt(head_size)).masked_fill(future, -math.inf)
        mixed = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
        x = x + linear(f"{name}.self_attn.o_proj", mixed) * attn_out
        h = normalise(f"{name}.post_attention_layernorm", x) * mlp_in
        middle = F.silu(linear(f"{name}.mlp.gate_proj", h)) * linear(f"{name}.mlp.up_proj", h)
        x = x + linear(f"{name}.mlp.down_proj", middle * mlp_mid) * mlp_out
    head = "lm_head.weight" if "lm_head.weight" in tensors else "model.embed_tokens.weight"
    return F.linear(normalise("model.norm", x), tensors[head])


@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("overrides", VARIANTS)
@torch.no_grad()
def test_hooks_equal_the_masked_equations(overrides: dict[str, object], hard: bool) -> None:
    model = tiny_llama(**overrides)
    hooks = GateHooks(model)
    gates = _random_gates(hooks.sites, hard)
    with hooks.applied(gates):
        logits = model(_tokens()).logits
    torch.testing.assert_close(
        logits, _masked_forward(model, _tokens(), gates), rtol=1e-4, atol=1e-4
    )
    assert not torch.allclose(logits, model(_tokens()).logits, atol=0.1)


@torch.no_grad()
def test_every_site_matters() -> None:
    model = tiny_llama(attention_bias=True, mlp_bias=True)
    hooks = GateHooks(model)
    dense = model(_tokens()).logits
    for closed in range(len(hooks.sites)):
        gates = [torch.ones(site.size) for site in hooks.sites]
        gates[closed][0] = 0
        with hooks.applied(gates):
            assert not torch.equal(model(_tokens()).logits, dense), hooks.sites[closed]


@torch.no_grad()
def test_open_gates_are_the_dense_model_exactly() -> None:
    model = tiny_llama()
    dense = model(_tokens()).logits
    hooks = GateHooks(model)
    assert torch.equal(model(_tokens()).logits, dense)
    with hooks.applied([torch.ones(site.size) for site in hooks.sites]):
        assert torch.equal(model(_tokens()).logits, dense)


@torch.no_grad()
def test_the_context_restores_what_was_there_even_after_an_error() -> None:
    model = tiny_llama()
    hooks = GateHooks(model)
    outer = _random_gates(hooks.sites, hard=True)
    hooks.gates = outer
    with hooks.applied(None):
        assert hooks.gates is None
    assert hooks.gates is outer
    with pytest.raises(RuntimeError, match="stop"), hooks.applied(None):
        raise RuntimeError("stop")
    assert hooks.gates is outer


@torch.no_grad()
def test_removed_hooks_leave_no_trace() -> None:
    model = tiny_llama()
    dense = model(_tokens()).logits
    hooks = GateHooks(model)
    hooks.gates = _random_gates(hooks.sites, hard=True)
    hooks.remove()
    assert torch.equal(model(_tokens()).logits, dense)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_the_loss_reaches_every_gate_and_no_weight_of_a_frozen_model() -> None:
    model = tiny_llama().requires_grad_(False)
    hooks = GateHooks(model)
    gates = tuple(torch.ones(site.size, requires_grad=True) for site in hooks.sites)
    with hooks.applied(gates):
        model(_tokens(), labels=_tokens()).loss.backward()
    for site, gate in zip(hooks.sites, gates, strict=True):
        assert gate.grad is not None, site
        assert bool((gate.grad != 0).all()), site
    assert all(parameter.grad is None for parameter in model.parameters())


@torch.no_grad()
def test_half_precision_models_stay_in_half_precision() -> None:
    model = tiny_llama().bfloat16()
    hooks = GateHooks(model)
    with hooks.applied(_random_gates(hooks.sites, hard=False)):
        assert model(_tokens()).logits.dtype == torch.bfloat16


@torch.no_grad()
def test_cached_generation_is_masked_like_the_whole_sequence() -> None:
    model = tiny_llama()
    hooks = GateHooks(model)
    ids = _tokens()
    with hooks.applied(_random_gates(hooks.sites, hard=True)):
        whole = model(ids).logits
        first = model(ids[:, :6], use_cache=True)
        rest = model(ids[:, 6:], past_key_values=first.past_key_values)
    torch.testing.assert_close(
        torch.cat([first.logits, rest.logits], 1), whole, rtol=1e-4, atol=1e-4
    )


def test_a_missing_module_is_named() -> None:
    for path in ("mlp.up_proj", "input_layernorm"):
        model = tiny_llama()
        parent, _, name = path.rpartition(".")
        delattr(model.model.layers[1].get_submodule(parent), name)
        with pytest.raises(ValueError, match=f"Block 1 has no '{path}'"):
            GateHooks(model)


def test_an_unknown_family_is_refused() -> None:
    model = GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=11))
    with pytest.raises(ValueError, match="'gpt2' is not a known family"):
        GateHooks(model)


@torch.no_grad()
def test_a_real_model_masked_equals_its_masked_equations(data: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(data / "models/stories260K", dtype=torch.float32)
    hooks = GateHooks(model)
    gates = _random_gates(hooks.sites, hard=True)
    with hooks.applied(gates):
        logits = model(_tokens()).logits
    torch.testing.assert_close(
        logits, _masked_forward(model, _tokens(), gates), rtol=1e-4, atol=1e-4
    )
