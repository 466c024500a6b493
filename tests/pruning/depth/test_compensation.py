from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from pruning.depth import remove_blocks, remove_compensated
from pruning.depth.compensation import stream_factors
from pruning.measure.perplexity import perplexity
from tests.tiny import VARIANTS, VOCABULARY, tiny_llama, tiny_model

FAMILIES = [name for name in VARIANTS if not name.startswith("gemma")]


def tokens(*shape: int) -> Tensor:
    return torch.randint(3, VOCABULARY, shape, generator=torch.Generator().manual_seed(1))


def with_small_embeddings(model: PreTrainedModel, factor: float = 0.2) -> PreTrainedModel:
    """A model whose first block makes the stream larger, as real ones do."""
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(factor)
    return model


def test_a_factor_by_hand() -> None:
    # Two channels: 1 -> 2 and 2 -> 8 in the mean over two tokens: (2 + 4) / 2.
    model = tiny_llama(hidden_size=2, num_attention_heads=1, num_key_value_heads=1, head_dim=2)
    before = torch.tensor([[[1.0, -4.0], [-1.0, 0.0]]])
    after = torch.tensor([[[3.0, 8.0], [1.0, -8.0]]])
    block = model.model.layers[1]
    block.register_forward_pre_hook(lambda module, args: (before, *args[1:]))
    block.register_forward_hook(lambda module, args, output: after)
    assert stream_factors(model, [1], tokens(1, 2)) == {1: pytest.approx(3.0)}


@pytest.mark.parametrize("family", FAMILIES)
def test_folded_weights_do_what_was_measured(family: str, tmp_path: Path) -> None:
    made = [with_small_embeddings(tiny_model(family, tie_word_embeddings=True)) for _ in "12"]
    model, plain = made
    windows_NT = tokens(4, 12)
    result = remove_compensated(model, [0, 2], windows_NT, {"score": "by hand"})
    remove_blocks(plain, [0, 2])
    assert result.without == pytest.approx(perplexity(plain, windows_NT).value, rel=1e-5)
    assert result.kept  # or nothing would have been folded
    assert perplexity(model, windows_NT).value == pytest.approx(result.compensated, rel=2e-3)
    record = model.config.secateur["removals"][0]
    assert record["compensation"] == {str(b): f for b, f in result.factors.items()}
    assert record["score"] == "by hand"
    model.save_pretrained(tmp_path / "saved")
    again: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    with torch.no_grad():
        logits = [m(windows_NT).logits for m in (model, again)]
    torch.testing.assert_close(*logits, atol=1e-5, rtol=0)
    assert not again.config.tie_word_embeddings


def test_it_stays_where_it_helps_and_only_there() -> None:
    kept = set()
    for seed in range(6):
        model, windows_NT = tiny_llama(seed, tie_word_embeddings=True), tokens(4, 12)
        before = model.model.embed_tokens.weight.clone()
        result = remove_compensated(model, [1], windows_NT)
        kept.add(result.kept)
        assert result.kept == (result.compensated < result.without)
        assert torch.equal(model.model.embed_tokens.weight, before) != result.kept
        assert (model.lm_head.weight is model.model.embed_tokens.weight) != result.kept
        assert torch.equal(model.lm_head.weight, before)  # the head is never scaled
        assert model.config.tie_word_embeddings != result.kept
    assert kept == {True, False}


def test_norms_behind_what_blocks_add_are_refused() -> None:
    model = tiny_model("gemma2")
    with pytest.raises(ValueError, match="'gemma2' models cannot be compensated"):
        remove_compensated(model, [1], tokens(2, 8))
    assert model.config.num_hidden_layers == 4
