from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from modules.causal_lm import CausalLM
from modules.text_data import TextData
from pruning.measure.perplexity import perplexity
from tests.runs import NOISE, make_inputs

pytestmark = NOISE
ARCHITECTURE = {
    "model_type": "llama",
    "vocab_size": 320,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "tie_word_embeddings": True,
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_inputs(tmp_path_factory.mktemp("inputs"))


def data(inputs: Path, **settings: Any) -> TextData:
    defaults: dict[str, Any] = {
        "tokenizer": str(inputs / "base"),
        "window_tokens": 16,
        "batch_size": 8,
        "validation_windows": 6,
        "cache_dir": str(inputs / "cache"),
    }
    return TextData(str(inputs / "text.json"), **defaults | settings)


def trainer(root: Path, max_steps: int = 3) -> Trainer:
    return Trainer(
        default_root_dir=root,
        accelerator="cpu",
        max_steps=max_steps,
        max_epochs=-1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        limit_val_batches=0,
    )


def test_the_loss_and_its_gradients_are_those_of_transformers(inputs: Path) -> None:
    """Tied embeddings are trained from both ends, which the chunked loss must not lose."""
    for overrides in ({}, {"tie_word_embeddings": False}):
        torch.manual_seed(0)
        module = CausalLM(architecture=ARCHITECTURE | overrides, loss_chunk_tokens=5)
        module.configure_model()
        module.log = lambda *_, **__: None  # type: ignore[method-assign]
        input_BT = torch.randint(320, (2, 16), generator=torch.Generator().manual_seed(1))
        loss = module.training_step({"input_ids": input_BT}, 0)
        ours = torch.autograd.grad(loss, list(module.model.parameters()))
        expected = F.cross_entropy(
            module.model(input_BT).logits[:, :-1].flatten(0, 1), input_BT[:, 1:].flatten()
        )
        torch.testing.assert_close(loss, expected)
        theirs = torch.autograd.grad(expected, list(module.model.parameters()))
        for got, wanted in zip(ours, theirs, strict=True):
            torch.testing.assert_close(got, wanted, atol=1e-6, rtol=1e-4)


def test_it_learns_and_leaves_a_stock_model_and_its_tokenizer(inputs: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = CausalLM(architecture=ARCHITECTURE, warmup_steps=2, optimizer=_fast)
    text, run = data(inputs), trainer(tmp_path, max_steps=30)
    run.limit_val_batches = 1.0
    before = run.validate(module, text, verbose=False)[0]["val_perplexity"]
    run.fit(module, text)
    module.export(tmp_path / "model", "the command")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert type(loaded) is LlamaForCausalLM
    windows_NT = torch.cat([batch["input_ids"] for batch in text.val_dataloader()])
    after = perplexity(loaded, windows_NT).value
    assert after < before / 4
    assert run.test(module, text, verbose=False)[0]["test_perplexity"] == pytest.approx(after)
    nll_N = [value for batch in run.predict(module, text) or [] for value in batch]
    assert sum(nll_N) / len(nll_N) == pytest.approx(perplexity(loaded, windows_NT).mean_nll)
    assert AutoTokenizer.from_pretrained(tmp_path / "model")("Cut")["input_ids"][0] == 1
    module.check_export_folder(tmp_path / "model")  # its own: may be replaced


def _fast(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-2)


def test_the_learning_rate_warms_up_and_falls_to_zero(inputs: Path, tmp_path: Path) -> None:
    module = CausalLM(base=str(inputs / "base"), warmup_steps=4)
    run = trainer(tmp_path, max_steps=20)
    run.fit(module, data(inputs))
    (schedule,) = (config.scheduler for config in run.lr_scheduler_configs)
    factor = schedule.lr_lambdas[0]
    assert [factor(step) for step in (0, 2, 4, 12, 20)] == pytest.approx([0, 0.5, 1, 0.5, 0])
    assert run.optimizers[0].param_groups[0]["lr"] == pytest.approx(0, abs=1e-12)


def test_a_base_is_trained_further(inputs: Path, tmp_path: Path) -> None:
    module = CausalLM(base=str(inputs / "base"), warmup_steps=0)
    trainer(tmp_path).fit(module, data(inputs))
    before: Any = AutoModelForCausalLM.from_pretrained(inputs / "base")
    moved = [
        not torch.equal(new, old)
        for new, old in zip(module.model.parameters(), before.parameters(), strict=True)
    ]
    assert all(moved)


def test_a_nan_stops_the_run_before_the_step(inputs: Path, tmp_path: Path) -> None:
    module = CausalLM(base=str(inputs / "base"))
    module.configure_model()
    with torch.no_grad():
        module.model.lm_head.weight[7] = torch.nan
    run = trainer(tmp_path)
    with pytest.raises(FloatingPointError, match="At step 0 the loss became nan.*none was saved"):
        run.fit(module, data(inputs))
    assert run.global_step == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "exactly one of `architecture` and `base`"),
        ({"architecture": ARCHITECTURE, "base": "x"}, "exactly one of `architecture` and `base`"),
        ({"architecture": ARCHITECTURE, "warmup_steps": -1}, "`warmup_steps` must be 0 or more"),
        ({"architecture": ARCHITECTURE, "loss_chunk_tokens": 0}, "`loss_chunk_tokens` must be 1"),
        ({"base": "/no/such"}, "`base` '/no/such' does not exist"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CausalLM(**settings)


@pytest.mark.parametrize(
    ("architecture", "settings", "message"),
    [
        ({"hidden_size": 16}, {}, "`architecture` needs a `model_type`"),
        ({"model_type": "elm"}, {}, "`architecture` is not one that transformers knows"),
        (ARCHITECTURE | {"vocab_size": 100}, {}, "`tokenizer` has token ids up to 319"),
        (
            ARCHITECTURE | {"max_position_embeddings": 8},
            {},
            "`window_tokens` 16 is longer than the 8 positions",
        ),
    ],
)
def test_what_does_not_fit_is_refused_before_the_model_is_made(
    architecture: dict[str, Any],
    settings: dict[str, Any],
    message: str,
    inputs: Path,
    tmp_path: Path,
) -> None:
    module = CausalLM(architecture=architecture)
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path).fit(module, data(inputs, **settings))
    assert module.model is None


def test_a_foreign_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "theirs").touch()
    with pytest.raises(ValueError, match="exists and is not a model written by Secateur"):
        CausalLM(architecture=ARCHITECTURE).check_export_folder(tmp_path)
