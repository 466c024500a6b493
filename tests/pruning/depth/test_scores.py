from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from secateur.pruning.depth import (
    AngularDistance,
    BlockInfluence,
    BlockMagnitude,
    BlockScore,
    HalfBlocks,
    Perplexity,
    ReverseOrder,
    Taylor,
    Unit,
    bypassed,
    peak_bytes,
)
from secateur.pruning.depth.similarity import cosine
from secateur.pruning.families import blocks_of, family_of
from tests.pruning.depth.memory import LiveBytes
from tests.tiny import VOCABULARY, tiny_llama, tiny_model

SCORES = (
    Perplexity(2), Taylor(2), BlockMagnitude(), BlockInfluence(2),
    AngularDistance(2), ReverseOrder(),
)  # fmt: skip
FAMILIES = ("llama", "gemma3_text", "opt", "phi")


def tokens(*shape: int) -> Tensor:
    return torch.randint(3, VOCABULARY, shape, generator=torch.Generator().manual_seed(1))


def nll(model: PreTrainedModel, windows_NT: Tensor) -> Tensor:
    """Mean negative log-likelihood of every window."""
    logits_NTV = model(windows_NT, use_cache=False).logits[:, :-1]
    losses = F.cross_entropy(logits_NTV.transpose(1, 2), windows_NT[:, 1:], reduction="none")
    return losses.double().mean(1)


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_perplexity_is_that_of_the_bypassed_model(family: str) -> None:
    model, windows_NT = tiny_model(family), tokens(5, 12)
    units = [Unit(0), Unit(1, "attn"), Unit(1, "mlp"), Unit(2), Unit(3, "attn"), Unit(3, "mlp")]
    found = Perplexity(batch_size=2)(model, windows_NT, units)
    assert found.errors is not None
    dense_N = nll(model, windows_NT)
    for index, unit in enumerate(units):
        with bypassed(model, [unit]):
            nll_N = nll(model, windows_NT)
        value = float(nll_N.mean().exp())
        assert float(found.values[index]) == pytest.approx(value, rel=1e-5)
        error = value * float((nll_N - dense_N).std()) / math.sqrt(5)
        assert float(found.errors[index]) == pytest.approx(error, rel=1e-3)


def test_perplexity_runs_half_of_the_blocks() -> None:
    model, windows_NT, calls = tiny_llama(num_hidden_layers=6), tokens(2, 8), []
    for block in blocks_of(model, family_of(model.config)):
        block.register_forward_hook(lambda *_: calls.append(1))
    Perplexity()(model, windows_NT)
    assert len(calls) == 6 * 7 // 2


@pytest.mark.parametrize("family", FAMILIES)
def test_taylor_is_weight_times_the_gradient_of_backpropagation(family: str) -> None:
    model, windows_NT = tiny_model(family), tokens(5, 12)
    units = [*HalfBlocks().all(4)[:4], Unit(2), Unit(3)]
    found = Taylor(batch_size=2)(model, windows_NT, units)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    nll(model, windows_NT).mean().backward()
    family_row = family_of(model.config)
    for index, unit in enumerate(units):
        expected = sum(
            float((tensor.detach() * tensor.grad).abs().sum())
            for name, tensor in unit.tensors(model.get_submodule(family_row.blocks), family_row)
            if name.endswith("weight") and tensor.grad is not None
        )
        assert float(found.values[index]) == pytest.approx(expected, rel=1e-4)
    assert found.errors is None


def test_taylor_leaves_gradients_and_flags_alone() -> None:
    model, windows_NT = tiny_llama(), tokens(2, 8)
    model.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    kept = torch.ones_like(model.lm_head.weight)
    model.lm_head.weight.grad = kept
    Taylor()(model.train(), windows_NT)
    assert model.training
    assert model.lm_head.weight.grad is kept
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == [
        "model.layers.0.mlp.up_proj.weight"
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_of_taylor_is_as_predicted(dtype: torch.dtype) -> None:
    model = tiny_llama(hidden_size=120, intermediate_size=320, num_hidden_layers=4).to(dtype)
    live = LiveBytes(list(model.parameters()))
    with live:
        Taylor(batch_size=2)(model, tokens(8, 48))
    promised = peak_bytes(model.config, 8, 48, batch_size=2, dtype=dtype)
    assert live.peak == pytest.approx(promised.total, rel=0.1)
    whole_model = sum(4 * p.numel() for p in model.model.layers.parameters())
    assert promised.gradients < 0.4 * whole_model


def test_influence_and_angle_by_hand() -> None:
    # Two blocks turn (1, 0) by 45 degrees each.
    states = torch.tensor([[1.0, 0.0], [2.0, 2.0], [0.0, 3.0]])
    assert float(1 - cosine(states[0], states[1])) == pytest.approx(1 - math.sqrt(0.5))
    assert float(cosine(states[0], states[2]).acos() / math.pi) == pytest.approx(0.5)
    half = torch.tensor([300.0, 300.0]).half()  # its square is infinite in float16
    assert float(cosine(half, half)) == pytest.approx(1.0)


@torch.no_grad()
def test_influence_and_angle_of_hidden_states() -> None:
    model, windows_NT = tiny_llama(num_hidden_layers=4), tokens(5, 9)
    last: list[Tensor] = []
    model.model.norm.register_forward_pre_hook(lambda module, args: last.append(args[0]))
    states = model(windows_NT, output_hidden_states=True).hidden_states[:-1]
    states = [state_NTD.double() for state_NTD in (*states, last[0])]
    influence, angles = (score(2)(model, windows_NT) for score in (BlockInfluence, AngularDistance))
    assert influence.errors is not None
    assert angles.errors is not None
    assert angles.runs is not None
    for n in range(4):
        cos_NT = F.cosine_similarity(states[n], states[n + 1], dim=-1)
        assert float(influence.values[n]) == pytest.approx(float(1 - cos_NT.mean()), rel=1e-5)
        error = float(cos_NT.mean(1).std()) / math.sqrt(5)
        assert float(influence.errors[n]) == pytest.approx(error, rel=1e-4)
        for m in range(n + 1, 5):
            cos_N = F.cosine_similarity(states[n][:, -1], states[m][:, -1], dim=-1)
            expected = float(cos_N.acos().mean() / math.pi)
            assert float(angles.runs[n, m - n - 1]) == pytest.approx(expected, rel=1e-5)
        assert bool(angles.runs[n, 4 - n :].isnan().all())
    assert torch.equal(angles.values, angles.runs[:, 0])


def test_magnitude_counts_norms_and_no_biases() -> None:
    model = tiny_llama(attention_bias=True, mlp_bias=True)
    block = model.model.layers[1]
    linears = sum(
        m.weight.detach().abs().sum() for m in block.modules() if isinstance(m, torch.nn.Linear)
    )
    norms = block.input_layernorm.weight.detach().sum()
    norms = norms + block.post_attention_layernorm.weight.detach().sum()
    found = BlockMagnitude()(model)
    assert float(found.values[1]) == pytest.approx(float(linears + norms), rel=1e-5)


def test_reverse_order_keeps_the_last_for_last() -> None:
    values = ReverseOrder()(tiny_llama(num_hidden_layers=6)).values
    assert values.argsort().tolist() == [3, 2, 1, 0, 4, 5]


@pytest.mark.parametrize("score", SCORES, ids=lambda score: type(score).__name__)
def test_the_batch_size_and_what_is_bypassed_already(score: BlockScore) -> None:
    model, windows_NT = tiny_llama(num_hidden_layers=4), tokens(5, 9)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    both = score(model, windows_NT)
    assert len(both.values) == 4
    if hasattr(score, "batch_size"):
        torch.testing.assert_close(
            both.values, type(score)(5)(model, windows_NT).values, rtol=1e-5, atol=1e-8
        )
    left = [Unit(0), Unit(3)]
    with bypassed(model, [1, 2]):
        shorter = score(model, windows_NT, left)
    assert shorter.units == tuple(left)
    if not isinstance(score, BlockMagnitude | ReverseOrder):  # these see the block alone
        assert not torch.allclose(shorter.values, both.values[[0, 3]], rtol=1e-3)
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())


@pytest.mark.parametrize("score", SCORES[:-1], ids=lambda score: type(score).__name__)
def test_nan_is_named(score: BlockScore) -> None:
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight[0, 0] = math.nan
    # Without block 2 the model is sound, so that its perplexity is as well.
    broken = "0, 1" if isinstance(score, Perplexity) else ".*2"
    with pytest.raises(ValueError, match=f"of block {broken} is not finite"):
        score(model, tokens(3, 8))


@pytest.mark.parametrize("score", SCORES[:2], ids=lambda score: type(score).__name__)
def test_too_little_text(score: BlockScore) -> None:
    for windows_NT in (None, tokens(0, 8)):
        with pytest.raises(ValueError, match="needs calibration text and got none"):
            score(tiny_llama(), windows_NT)
    with pytest.raises(ValueError, match="the calibration text is too short"):
        score(tiny_llama(), tokens(3, 1))


def test_what_cannot_be_scored() -> None:
    model, windows_NT = tiny_llama(), tokens(2, 8)
    for score in (BlockInfluence(), AngularDistance(), ReverseOrder()):
        with pytest.raises(ValueError, match="scores whole blocks only"):
            score(model, windows_NT, [Unit(1, "mlp")])
    for kind in (Perplexity, Taylor, BlockInfluence, AngularDistance):
        with pytest.raises(ValueError, match="`batch_size` must be 1 or more, got 0"):
            kind(0)
    packed = torch.zeros(4, dtype=torch.uint8)
    model.model.layers[1].mlp.up_proj.weight = torch.nn.Parameter(packed, requires_grad=False)
    with pytest.raises(ValueError, match="block 1 are quantised .* Perplexity or BlockInfluence"):
        Taylor()(model, windows_NT)


def test_one_window_has_no_standard_error() -> None:
    for score in (Perplexity(), BlockInfluence(), AngularDistance()):
        assert score(tiny_llama(), tokens(1, 8)).errors is None
