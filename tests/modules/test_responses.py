"""Losses, perplexities and lengths where only responses count."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor, nn
from torch.nn import functional as F

from secateur.modules.causal_lm import CausalLM
from secateur.modules.data.instruction_data import InstructionData
from secateur.modules.data.text_data import TextData
from secateur.modules.optimizers import decay_groups
from secateur.pruning.lora import LoRA
from secateur.pruning.losses import LossWeights
from tests.runs import NOISE, make_inputs
from tests.tiny import tiny_llama

pytestmark = NOISE


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_inputs(tmp_path_factory.mktemp("inputs"), max_position_embeddings=256)
    words = [
        "Cut",
        "above",
        "a",
        "bud",
        "at",
        "a",
        "slant",
        "and",
        "the",
        "rain",
        "will",
        "run",
        "off",
    ]
    rows = [
        {"instruction": words[n % 5], "output": " ".join(words[n % 3 : n % 7 + 4])}
        for n in range(60)
    ]
    (folder / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    return folder


def instructions(inputs: Path, **settings: Any) -> InstructionData:
    defaults: dict[str, Any] = {
        "tokenizer": str(inputs / "base"),
        "window_tokens": 256,
        "batch_size": 4,
        "cache_dir": str(inputs / "cache"),
        "held_out": 0.1,
    }
    return InstructionData(str(inputs / "rows.json"), **defaults | settings)


def made(inputs: Path, **settings: Any) -> CausalLM:
    module = CausalLM(base=str(inputs / "base"), warmup_steps=0, **settings)
    module.log = lambda *_, **__: None  # type: ignore[method-assign]
    module.configure_model()
    return module


def batch(seed: int = 0, rows: int = 3, tokens: int = 16) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "input_ids": torch.randint(320, (rows, tokens), generator=generator),
        "loss_mask": torch.rand(rows, tokens, generator=generator) < 0.4,
    }


@pytest.mark.parametrize("weights", [LossWeights(), LossWeights(1.0, 0.5)])
def test_the_loss_is_the_masked_one_of_transformers(inputs: Path, weights: LossWeights) -> None:
    module, found = made(inputs, loss=weights, loss_chunk_tokens=5), batch()
    with torch.no_grad():  # else teacher and student agree
        for parameter in module.model.parameters():
            parameter.mul_(1.1)
    loss = module.training_step(found, 0)
    labels_BT = found["input_ids"].masked_fill(~found["loss_mask"], -100)
    output = module.model(input_ids=found["input_ids"], labels=labels_BT)
    expected = weights.cross_entropy * output.loss
    if weights.distillation:
        dense = tiny_llama()(found["input_ids"]).logits[:, :-1].log_softmax(-1)
        made_BTV = output.logits[:, :-1].log_softmax(-1)
        kl_BT = F.kl_div(made_BTV, dense, reduction="none", log_target=True).sum(-1)
        expected = expected + weights.distillation * kl_BT[found["loss_mask"][:, 1:]].mean()
    torch.testing.assert_close(loss, expected, atol=1e-6, rtol=1e-6)
    parameters = list(module.model.parameters())
    pairs = zip(
        torch.autograd.grad(loss, parameters),
        torch.autograd.grad(expected, parameters),
        strict=True,
    )
    for got, wanted in pairs:
        torch.testing.assert_close(got, wanted, atol=1e-6, rtol=1e-4)


def test_padding_changes_nothing(inputs: Path) -> None:
    module, found = made(inputs), batch(rows=1)
    padded = {name: F.pad(value, (0, 8), value=0) for name, value in found.items()}
    expected = module.training_step(found, 0).detach()
    loss = module.training_step(padded, 0).detach()
    torch.testing.assert_close(loss, expected, atol=1e-6, rtol=1e-6)
    with torch.no_grad():
        module.validation_step(padded, 0)
    assert math.log(float(module.perplexity.compute())) == pytest.approx(float(expected), abs=1e-5)


def test_a_batch_without_a_response_changes_nothing(inputs: Path) -> None:
    module, found = made(inputs), batch()
    found["loss_mask"] = torch.zeros_like(found["loss_mask"])
    loss = module.training_step(found, 0)
    gradients = torch.autograd.grad(loss, list(module.model.parameters()))
    assert float(loss.detach()) == 0
    assert not any(bool(gradient.any()) for gradient in gradients)
    with torch.no_grad():
        module.validation_step(found, 0)
        assert all(math.isnan(value) for value in module.predict_step(found, 0))


def test_ranks_weigh_by_the_tokens_that_count(inputs: Path) -> None:
    """The mean over two ranks is the loss of one rank with all rows."""
    module, whole = made(inputs), batch(rows=4)
    expected = module.training_step(whole, 0)
    counted = whole["loss_mask"][:, 1:].sum()
    strategy = SimpleNamespace(reduce=lambda _, reduce_op: counted)
    module._trainer = SimpleNamespace(  # type: ignore[assignment]
        world_size=2, strategy=strategy, global_step=0, global_rank=0
    )
    losses = [
        module.training_step({name: value[at] for name, value in whole.items()}, 0)
        for at in (slice(0, 1), slice(1, 4))
    ]
    torch.testing.assert_close(sum(losses) / 2, expected, atol=1e-6, rtol=1e-6)


def test_weight_decay_is_for_matrices(inputs: Path) -> None:
    module = made(inputs)
    groups = module._optimizer().param_groups
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    found = [id(p) for group in groups for p in group["params"]]
    assert sorted(found) == sorted(id(p) for p in module.parameters())
    assert all(p.dim() == 1 for p in groups[1]["params"])
    assert len(groups[1]["params"]) == 2 * 3 + 1
    tied = tiny_llama(tie_word_embeddings=True)
    assert len(decay_groups([*tied.parameters()])[0]["params"]) == 1 + 3 * 7
    assert len(decay_groups([nn.Parameter(torch.ones(2, 2))])) == 1


class Save(Callback):
    def __init__(self, path: Path, step: int) -> None:
        self.path, self.step = path, step

    def on_train_batch_end(self, trainer: Trainer, *_: Any, **__: Any) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


def fit(
    module: CausalLM, data: Any, root: Path, *callbacks: Callback, steps: int, **settings: Any
) -> Trainer:
    trainer = Trainer(
        default_root_dir=root,
        accelerator="cpu",
        max_steps=steps,
        max_epochs=-1,
        logger=False,
        callbacks=[*callbacks],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        limit_val_batches=0,
    )
    trainer.fit(module, data, weights_only=True, **settings)
    return trainer


@pytest.mark.parametrize("packing", [False, True])
def test_a_resumed_run_ends_as_the_other(inputs: Path, tmp_path: Path, packing: bool) -> None:
    def module() -> CausalLM:
        return CausalLM(base=str(inputs / "base"), lora=LoRA(rank=2), warmup_steps=1)

    whole, save = module(), Save(tmp_path / "between.ckpt", step=3)
    fit(whole, instructions(inputs, packing=packing), tmp_path, save, steps=6)
    again = module()
    data = instructions(inputs, packing=packing)
    fit(again, data, tmp_path, steps=6, ckpt_path=save.path)
    state = again.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in whole.state_dict().items())
    assert again.tokens_seen == whole.tokens_seen
    order = data.train_dataloader().batch_sampler
    rows = [n for _, numbers in zip(range(6), order, strict=False) for n in numbers]
    part = data.train_parts[0]
    assert whole.tokens_seen == sum(len(part[n][0]) for n in rows)
    whole.export(tmp_path / "model", "test")
    card = (tmp_path / "model" / "README.md").read_text(encoding="utf-8")
    assert f"trained for 6 steps on {whole.tokens_seen:,} tokens" in card


def test_a_run_is_as_long_as_its_tokens(inputs: Path, tmp_path: Path) -> None:
    def text(**settings: Any) -> TextData:
        return TextData(
            str(inputs / "text.json"),
            tokenizer=str(inputs / "base"),
            window_tokens=16,
            batch_size=4,
            cache_dir=str(inputs / "cache"),
            **settings,
        )

    module = CausalLM(base=str(inputs / "base"), warmup_steps=0)
    trainer = fit(module, text(max_tokens=200), tmp_path, steps=-1)
    assert trainer.global_step == math.ceil(200 / 64) == 4
    assert module.tokens_seen == 4 * 64
    with pytest.raises(ValueError, match="`data.max_tokens` 200 is 4 steps, and `trainer.max_step"):
        fit(CausalLM(base=str(inputs / "base")), text(max_tokens=200), tmp_path, steps=7)
    padded = instructions(inputs, max_tokens=4000)
    module = CausalLM(base=str(inputs / "base"), warmup_steps=0)
    steps = fit(module, padded, tmp_path, steps=-1).global_step
    assert steps == math.ceil(4000 / (4 * padded.tokens_per_window))
    assert module.tokens_seen == pytest.approx(4000, rel=0.25)


def test_a_mixture_trains_on_its_sources(inputs: Path, tmp_path: Path) -> None:
    files = []
    for name, word in (("a", "tree"), ("b", "rain")):
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps([" ".join([word] * 30)] * 40), encoding="utf-8")
        files.append(str(path))

    def text(**settings: Any) -> TextData:
        return TextData(
            files,
            tokenizer=str(inputs / "base"),
            window_tokens=8,
            batch_size=10,
            cache_dir=str(tmp_path / "cache"),
            **settings,
        )

    data = text(weights=[4, 1], validation_windows=6)
    data.setup()
    first = set(data.train_parts[0][0].tolist())
    ids = torch.cat([batch["input_ids"] for batch in data.train_dataloader()])[:200]
    share = sum(set(window.tolist()) <= first | {1} for window in ids) / 200
    assert share == pytest.approx(0.8, abs=0.08)
    assert len(data.validation_set) == 6  # type: ignore[arg-type]
    assert len(data.train_windows.__getitems__([0, 50, 99])) == 3  # type: ignore[attr-defined]
    assert data.fingerprint != text(weights=[1, 1], validation_windows=6).fingerprint
    with pytest.raises(ValueError, match="`weights` must have one number above 0 for each of"):
        text(weights=[1.0])
