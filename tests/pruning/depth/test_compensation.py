from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from secateur.pruning.blocks.compensation import ModelCompensation
from secateur.pruning.blocks.refit import Refit
from secateur.pruning.depth import Compensation, ScaledStream, Unit, bypassed, remove_blocks
from secateur.pruning.depth.compensation import fold_factors, stream_factors
from secateur.pruning.families import blocks_of, family_of
from secateur.pruning.measure.perplexity import perplexity
from secateur.pruning.plan import plan_without
from tests.tiny import VARIANTS, VOCABULARY, tiny_llama, tiny_model

FAMILIES = [name for name in VARIANTS if not name.startswith("gemma")]


def tokens(*shape: int) -> Tensor:
    return torch.randint(3, VOCABULARY, shape, generator=torch.Generator().manual_seed(1))


def test_a_factor_by_hand() -> None:
    # Two channels: 1 -> 2 and 2 -> 8 in the mean over two tokens: (2 + 4) / 2.
    model = tiny_llama(hidden_size=2, num_attention_heads=1, num_key_value_heads=1, head_dim=2)
    before = torch.tensor([[[1.0, -4.0], [-1.0, 0.0]]])
    after = torch.tensor([[[3.0, 8.0], [1.0, -8.0]]])
    block = model.model.layers[1]
    block.register_forward_pre_hook(lambda module, args: (before, *args[1:]))
    block.register_forward_hook(lambda module, args, output: after)
    assert stream_factors(model, [1], tokens(1, 2)) == {1: pytest.approx(3.0)}


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_folded_factors_scale_the_stream_where_blocks_were(family: str, tmp_path: Path) -> None:
    # Large entries, so that the epsilon of the norms, which no factor scales, does not show.
    dense, short = (tiny_model(family, tie_word_embeddings=True) for _ in range(2))
    windows_NT, factors = tokens(4, 12), {0: 3.0, 2: 1.5}
    row = family_of(dense.config)
    for model in (dense, short):
        for embedding in model.get_submodule(row.blocks.rpartition(".")[0]).children():
            if isinstance(embedding, torch.nn.Embedding):
                embedding.weight.mul_(10)
    with bypassed(dense, factors):
        for block, factor in factors.items():
            blocks_of(dense, row)[block].register_forward_hook(
                lambda module, args, output, factor=factor: output * factor
            )
        expected_NTV = dense(windows_NT, use_cache=False).logits
    remove_blocks(short, factors)
    fold_factors(short, [1, 3], factors)
    close = {"atol": 1e-3 * float(expected_NTV.abs().max()), "rtol": 0}
    torch.testing.assert_close(short(windows_NT).logits, expected_NTV, **close)
    short.save_pretrained(tmp_path / "saved")
    again: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert torch.equal(short(windows_NT).logits, again(windows_NT).logits)
    assert not again.config.tie_word_embeddings


def test_compensation_is_kept_only_if_it_helps() -> None:
    kept = set()
    for seed in range(6):
        model, windows_NT = tiny_llama(seed, tie_word_embeddings=True), tokens(4, 12)
        before = model.model.embed_tokens.weight.clone()
        result = Compensation(ScaledStream(), windows_NT, windows_NT).remove(model, [1])
        kept.add(result.kept)
        assert result.kept == (result.compensated < result.without)
        expected = min(result.compensated, result.without)
        assert perplexity(model, windows_NT).value == pytest.approx(expected, rel=1e-4)
        assert ("compensation" in model.config.secateur["removals"][0]) == result.kept
        assert torch.equal(model.model.embed_tokens.weight, before) != result.kept
        assert (model.lm_head.weight is model.model.embed_tokens.weight) != result.kept
        assert torch.equal(model.lm_head.weight, before)  # the head is never scaled
        assert model.config.tie_word_embeddings != result.kept
    assert kept == {True, False}


@torch.no_grad()
@pytest.mark.parametrize("units", [[Unit(1)], [Unit(0, "attn"), Unit(1, "mlp")]], ids=str)
@pytest.mark.parametrize("family", VARIANTS)
def test_a_refit_brings_the_model_without_units_closer(family: str, units: list[Unit]) -> None:
    dense, plain, model = (tiny_model(family) for _ in range(3))
    windows_NT = tokens(24, 20)
    text_NT = dense.generate(tokens(24, 1), max_new_tokens=19, do_sample=False, min_new_tokens=19)
    remove_blocks(plain, units)
    result = Compensation(Refit(), windows_NT, text_NT).remove(model, units)
    assert result.facts["refit_windows"] == 24
    changed = not result.kept
    for name, weight in model.state_dict().items():
        own = f"{family_of(model.config).blocks}." in name
        changed |= not torch.equal(weight, plain.state_dict()[name])
        assert own or torch.equal(weight, plain.state_dict()[name])  # only layers of blocks
    assert changed
    shorter = tiny_model(family)
    remove_blocks(shorter, units)
    parts = {(unit.block, part) for unit in units for part in unit.parts}
    Refit()(dense, shorter, plan_without(dense, "", parts, {}), windows_NT)
    expected_NTV = dense(windows_NT).logits
    errors = [(m(windows_NT).logits - expected_NTV).square().mean() for m in (plain, shorter)]
    assert errors[1] < 0.9 * errors[0]
    if result.kept:
        assert torch.equal(model(windows_NT).logits, shorter(windows_NT).logits)


class _Worse(ModelCompensation):
    def check(self, model: Any, units: Any, tokens: int) -> None:
        """Refuse nothing."""

    def __call__(self, dense: Any, smaller: Any, plan: Any, windows_NT: Any) -> dict[str, Any]:
        smaller.lm_head.weight.data *= -50
        return {}


def test_what_harms_held_back_text_is_left_out() -> None:
    plain, model = (tiny_llama(3) for _ in range(2))
    windows_NT = tokens(4, 20)
    remove_blocks(plain, [1])
    result = Compensation(_Worse(), windows_NT, windows_NT).remove(model, [1])
    assert not result.kept
    assert not result.provenance
    for name, weight in plain.state_dict().items():
        assert torch.equal(model.state_dict()[name], weight)


@pytest.mark.parametrize(
    ("family", "unit", "message"),
    [
        ("gemma2", Unit(1), "`compensation` ScaledStream has no effect on 'gemma2' models"),
        (
            "llama",
            Unit(1, "mlp"),
            "ScaledStream is for whole blocks, not for halves such as 1.mlp",
        ),
    ],
)
def test_what_cannot_be_scaled_is_refused(family: str, unit: Unit, message: str) -> None:
    model = tiny_model(family)
    with pytest.raises(ValueError, match=message):
        Compensation(ScaledStream(), tokens(2, 8), tokens(2, 8)).remove(model, [unit])
    assert model.config.num_hidden_layers == 4
