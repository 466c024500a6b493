from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchmetrics.text import Perplexity as TorchMetricsPerplexity
from transformers import AutoModelForCausalLM, AutoTokenizer

from secateur.pruning.measure.perplexity import cut_windows, perplexity
from tests.tiny import VOCABULARY, tiny_llama


class Bigram(nn.Module):
    """Logits that depend on the last token alone, given as a table of probabilities."""

    def __init__(self, probabilities: list[list[float]]) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.tensor(probabilities).log())

    def forward(self, input_ids: Tensor, **_: Any) -> SimpleNamespace:
        return SimpleNamespace(logits=self.table[input_ids])


def windows(count: int = 5, tokens: int = 11) -> Tensor:
    return torch.randint(VOCABULARY, (count, tokens), generator=torch.Generator().manual_seed(1))


def test_a_case_worked_by_hand() -> None:
    """Windows 0 0 1 and 1 0 0 with P(0|0) = 1/2, P(1|0) = 1/2, P(0|1) = 1/4.

    Window means: (ln 2 + ln 2) / 2 = ln 2, and (ln 4 + ln 2) / 2 = 1.5 ln 2; their mean is
    1.25 ln 2, the perplexity 2^1.25; standard deviation 0.5 ln 2 / sqrt 2, over sqrt 2: ln 2 / 4.
    """
    result = perplexity(Bigram([[0.5, 0.5], [0.25, 0.75]]), torch.tensor([[0, 0, 1], [1, 0, 0]]))
    assert result.value == pytest.approx(2**1.25, rel=1e-6)
    assert result.mean_nll == pytest.approx(1.25 * math.log(2), rel=1e-6)
    assert result.standard_error == pytest.approx(math.log(2) / 4, rel=1e-6)
    assert result.num_predictions == 4


def test_agrees_with_the_loss_of_transformers_and_with_torchmetrics() -> None:
    model, windows_NT = tiny_llama(), windows()
    result = perplexity(model, windows_NT, batch_size=2)
    with torch.no_grad():
        output = model(input_ids=windows_NT, labels=windows_NT)
    assert result.mean_nll == pytest.approx(float(output.loss), rel=1e-5)
    metric = TorchMetricsPerplexity()
    metric.update(output.logits[:, :-1], windows_NT[:, 1:])
    assert result.value == pytest.approx(float(metric.compute()), rel=1e-4)
    assert result.num_predictions == 5 * 10


def test_batches_and_chunks_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    model, windows_NT = tiny_llama(), windows()
    expected = perplexity(model, windows_NT)
    monkeypatch.setattr("secateur.pruning.measure.perplexity._CHUNK", 3)
    result = perplexity(model, windows_NT, batch_size=1)
    assert result.mean_nll == pytest.approx(expected.mean_nll, rel=1e-6)
    assert result.standard_error == pytest.approx(expected.standard_error, rel=1e-5)


def test_half_precision_logits_are_summed_in_single() -> None:
    model, windows_NT = tiny_llama().bfloat16(), windows()
    result = perplexity(model, windows_NT)
    with torch.no_grad():
        logits = model(input_ids=windows_NT).logits.double()
    nll = -logits[:, :-1].log_softmax(-1).gather(-1, windows_NT[:, 1:, None]).mean()
    assert result.mean_nll == pytest.approx(float(nll), rel=1e-5)


def test_the_model_keeps_its_mode_and_one_window_has_no_error() -> None:
    model = tiny_llama(attention_dropout=0.5).train()
    result = perplexity(model, windows(1))
    assert model.training
    assert result.standard_error is None
    assert result == perplexity(model, windows(1))  # without dropout


def test_a_model_that_diverged_has_no_finite_perplexity() -> None:
    model = tiny_llama()
    with torch.no_grad():
        model.lm_head.weight.fill_(math.nan)
    assert math.isnan(perplexity(model, windows()).value)


def test_windows_are_cut_in_order() -> None:
    assert cut_windows(list(range(11)), 4).tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert cut_windows(torch.arange(4, dtype=torch.int32), 4).dtype == torch.int64


def test_bad_settings_are_named() -> None:
    with pytest.raises(ValueError, match="`window_tokens` must be 2 or more, got 1"):
        cut_windows([1, 2], 1)
    with pytest.raises(ValueError, match="3 tokens, less than one window of `window_tokens` 4"):
        cut_windows([1, 2, 3], 4)
    with pytest.raises(ValueError, match="`batch_size` must be 1 or more, got 0"):
        perplexity(tiny_llama(), windows(), batch_size=0)
    for shape in ((0, 8), (3, 1)):
        with pytest.raises(ValueError, match=f"got {shape[0]} of {shape[1]}"):
            perplexity(tiny_llama(), torch.zeros(shape, dtype=torch.long))


@pytest.mark.slow
def test_real_text_has_the_perplexity_of_the_reference(data: Any) -> None:
    folder = data / "models" / "llama7m"
    text = (data / "text" / "tinystories_val.txt").read_text(encoding="utf-8")
    # The tokens of a prefix differ from those of the whole at its very end only.
    ids = AutoTokenizer.from_pretrained(folder)(text[:300_000], verbose=False)["input_ids"]
    windows_NT = cut_windows(ids, 256)[:200]
    result = perplexity(AutoModelForCausalLM.from_pretrained(folder), windows_NT)
    assert result.value == pytest.approx(38.49, abs=0.01)
