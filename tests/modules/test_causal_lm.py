from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from secateur.modules.causal_lm import CausalLM
from secateur.modules.data.text_data import TextData
from secateur.modules.strategies.zero import Zero
from secateur.pruning.depth import Unit
from secateur.pruning.families import family_of
from secateur.pruning.files.fingerprint import fingerprint
from secateur.pruning.lora import LoRA
from secateur.pruning.losses import LossWeights
from secateur.pruning.measure.perplexity import perplexity
from tests.runs import NOISE, make_inputs
from tests.tiny import tiny_folder, tiny_llama, tiny_tokenizer

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


def test_float16_trains_low_rank_updates_only(inputs: Path, tmp_path: Path) -> None:
    """All weights would be no numbers after the first step."""
    half: Any = {"base": str(inputs / "base"), "dtype": "float16"}
    with pytest.raises(ValueError, match=r"`dtype` float16 is float16 here: .* Set `dtype` to"):
        trainer(tmp_path).fit(CausalLM(**half), data(inputs))
    module = CausalLM(**half, lora=LoRA(rank=2), warmup_steps=0)
    trainer(tmp_path).fit(module, data(inputs))
    assert all(bool(p.isfinite().all()) for p in module.parameters() if p.requires_grad)


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


def recovery(inputs: Path, **settings: Any) -> CausalLM:
    return CausalLM(base=str(inputs / "base"), warmup_steps=0, **settings)


def test_distillation_is_the_divergence_from_the_dense_model(inputs: Path, tmp_path: Path) -> None:
    """Its gradients too, and the teacher stays what it was and where no optimiser finds it."""
    module = recovery(inputs, loss=LossWeights(0.5, 2.0), loss_chunk_tokens=7)
    run = trainer(tmp_path, max_steps=1)
    run.fit(module, data(inputs))
    module.remove_units([Unit(1)], {})
    logged: dict[str, Any] = {}
    module.log = lambda name, value, **_: logged.update({name: value})  # type: ignore[method-assign]
    input_BT = torch.randint(320, (2, 16), generator=torch.Generator().manual_seed(1))
    loss = module.training_step({"input_ids": input_BT}, 0)
    ours = torch.autograd.grad(loss, list(module.model.parameters()))

    teacher: Any = AutoModelForCausalLM.from_pretrained(inputs / "base")
    logits_PV = module.model(input_BT, use_cache=False).logits[:, :-1].flatten(0, 1)
    with torch.no_grad():
        target_PV = teacher(input_BT).logits[:, :-1].flatten(0, 1).softmax(-1)
    nll = F.cross_entropy(logits_PV, input_BT[:, 1:].flatten())
    kl = (target_PV * (target_PV.log() - logits_PV.log_softmax(-1))).sum(-1).mean()
    torch.testing.assert_close(loss, 0.5 * nll + 2.0 * kl)
    torch.testing.assert_close(logged["train_kl"], kl.detach())
    theirs = torch.autograd.grad(0.5 * nll + 2.0 * kl, list(module.model.parameters()))
    for got, wanted in zip(ours, theirs, strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-4)

    held = {id(p) for p in module.parameters()}
    assert module._teacher is not None
    assert module._teacher.model is not None
    frozen = list(module._teacher.model.parameters())
    assert not any(id(p) in held for p in frozen)
    for mine, base in zip(frozen, teacher.parameters(), strict=True):
        assert torch.equal(mine, base)
        assert not mine.requires_grad


def test_a_removed_block_leaves_the_optimiser_as_well(inputs: Path, tmp_path: Path) -> None:
    module = recovery(inputs)
    run = trainer(tmp_path)
    run.fit(module, data(inputs))
    (optimizer,) = run.optimizers
    before = {n: optimizer.state[p]["exp_avg"].clone() for n, p in module.named_parameters()}
    module.remove_units([Unit(1)], {"why": "a test"})
    assert module.kept_blocks == [0, 2]
    ours = list(module.parameters())
    trained = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(trained) == sorted(id(p) for p in ours)
    assert all(p.dim() == 1 for p in optimizer.param_groups[1]["params"])
    assert set(optimizer.state) == set(ours)
    for name, parameter in module.named_parameters():  # block 2 is now block 1
        old = name.replace("layers.1.", "layers.2.")
        assert torch.equal(optimizer.state[parameter]["exp_avg"], before[old])
    module.remove_units([Unit(2)], {})  # by its number in the base model
    assert module.kept_blocks == [0]
    with pytest.raises(ValueError, match=r"Blocks \['2'\] are not among the remaining blocks"):
        module.remove_units([Unit(2)], {})
    with pytest.raises(ValueError, match="No block would remain"):
        module.remove_units([Unit(0)], {})


def test_updates_of_low_rank_train_alone_and_are_added_up(inputs: Path, tmp_path: Path) -> None:
    module = recovery(inputs, lora=LoRA(rank=3), optimizer=_fast)
    run = trainer(tmp_path, max_steps=4)
    run.fit(module, data(inputs))
    base: Any = AutoModelForCausalLM.from_pretrained(inputs / "base")
    trained = {name for name, p in module.model.named_parameters() if p.requires_grad}
    assert trained
    assert all("lora_" in name for name in trained)
    assert all(p.dtype == torch.float32 for p in module.model.parameters() if p.requires_grad)
    layers = {name.rpartition(".lora_")[0].rpartition("layers.")[2] for name in trained}
    assert {layer.split(".", 1)[1] for layer in layers} == {
        p.path for p in family_of(base.config).projections
    }
    ids = torch.randint(320, (2, 16), generator=torch.Generator().manual_seed(1))
    module.model.eval()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with torch.no_grad():
        live = module.model(ids).logits
        with module.plain() as plain:
            names = set(plain.state_dict())
            torch.testing.assert_close(plain(ids).logits, live, atol=1e-4, rtol=1e-4)
        assert float((live - base(ids).logits).abs().max()) > 1e-3  # they do something
    assert names == set(base.state_dict())
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    run.save_checkpoint(tmp_path / "some.ckpt")
    state = torch.load(tmp_path / "some.ckpt", weights_only=True)["state_dict"]
    assert set(state) == {f"model.{name}" for name in trained}
    module.export(tmp_path / "model", "the command")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, live, atol=1e-4, rtol=1e-4)


def test_pruned_weights_below_updates_do_not_go_on_where_checkpoints_leave_them_out(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = recovery(inputs, lora=LoRA(rank=2))
    run = trainer(tmp_path, max_steps=1)
    run.fit(module, data(inputs))
    module.record("weights", {"by": "a callback"})
    run.save_checkpoint(tmp_path / "some.ckpt")
    checkpoint = torch.load(tmp_path / "some.ckpt", weights_only=True)
    module.on_load_checkpoint(checkpoint)
    monkeypatch.setattr(CausalLM, "_reader", Zero(stage=2))
    with pytest.raises(ValueError, match="leave out frozen weights. Resume under ddp"):
        module.on_load_checkpoint(checkpoint)


def test_a_target_that_names_nothing_is_refused() -> None:
    with pytest.raises(
        ValueError, match="`targets` has 'self_attn.w_proj', which matches no layer"
    ):
        LoRA(targets=["self_attn.q_proj", "self_attn.w_proj"]).inject(tiny_llama())


def test_an_absurd_rank_is_refused_before_the_model_is_read(inputs: Path, tmp_path: Path) -> None:
    module = recovery(inputs, lora=LoRA(rank=999_999))
    with pytest.raises(ValueError, match="`rank` must be .* widest layer, got 999999"):
        trainer(tmp_path, max_steps=1).fit(module, data(inputs))


def test_a_missing_peft_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ValueError, match="`lora` needs the package peft"):
        LoRA().inject(tiny_llama())


@pytest.mark.parametrize("dtype", ["auto", "float32"])
def test_the_export_is_stock_in_the_type_of_the_base_and_says_where_it_is_from(
    dtype: str, inputs: Path, tmp_path: Path
) -> None:
    half = tmp_path / "half"
    base: Any = AutoModelForCausalLM.from_pretrained(inputs / "base", dtype=torch.bfloat16)
    base.save_pretrained(half)
    tiny_tokenizer().save_pretrained(half)
    (half / "LICENSE").write_text("Do as you like.", encoding="utf-8")
    module = CausalLM(base=str(half), dtype=dtype, export_dtype="auto")
    run = trainer(tmp_path, max_steps=2)
    run.fit(module, data(inputs))
    module.remove_units([Unit(0)], {"why": "a test"})
    module.export(tmp_path / "model", "the command")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert type(loaded) is LlamaForCausalLM
    assert loaded.dtype == torch.bfloat16
    assert module.model.dtype == (torch.bfloat16 if dtype == "auto" else torch.float32)
    assert (tmp_path / "model" / "LICENSE").read_bytes() == (half / "LICENSE").read_bytes()
    mark = json.loads((tmp_path / "model" / "secateur.json").read_text(encoding="utf-8"))
    (stage,) = mark["stages"]
    assert stage["provenance"]["depth"]["kept_blocks"] == [1, 2]
    assert stage["base_fingerprint"] == fingerprint(half)
    card = (tmp_path / "model" / "README.md").read_text(encoding="utf-8")
    for said in ("stock model of its family", "the command", "a test", "perplexity"):
        assert said in card
    figures = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))["models"]
    assert figures["pruned"]["kept_parameters"] < 1
    windows_NT = torch.stack(data_of(run))
    loaded_nll = perplexity(loaded, windows_NT).value
    assert figures["pruned"]["perplexity"]["validation"]["value"] == pytest.approx(
        loaded_nll, rel=1e-2 if dtype == "float32" else 1e-5
    )


def data_of(run: Trainer) -> Any:
    windows = run.datamodule.validation_set  # type: ignore[attr-defined]
    return [windows[place] for place in range(len(windows))]


def test_the_report_of_a_chain_starts_at_its_first_model(inputs: Path, tmp_path: Path) -> None:
    for name, base in (("first", inputs / "base"), ("second", tmp_path / "first" / "model")):
        module = CausalLM(base=str(base), teacher=str(inputs / "base"), loss=LossWeights(0.0, 1.0))
        run = trainer(tmp_path, max_steps=1)
        run.fit(module, data(inputs))
        module.remove_units([Unit(0)], {"stage": name})
        module.export(tmp_path / name / "model", f"the {name} command")
    model = tmp_path / "second" / "model"
    stages = json.loads((model / "secateur.json").read_text(encoding="utf-8"))["stages"]
    assert [stage["command"] for stage in stages] == ["the first command", "the second command"]
    made = [stage["models"]["pruned"]["parameters"] for stage in stages]
    assert stages[1]["models"]["dense"]["parameters"] == made[0] > made[1]
    for text in (model / "README.md", tmp_path / "second" / "report.md"):
        table = text.read_text(encoding="utf-8")
        assert "stage 1: depth" in table
        assert "stage 2: depth" in table
    assert json.loads((tmp_path / "second" / "report.json").read_text())["stages"] == stages


def test_another_vocabulary_cannot_teach(inputs: Path, tmp_path: Path) -> None:
    tiny_folder(tmp_path / "other", vocab_size=400)
    module = recovery(inputs, teacher=str(tmp_path / "other"), loss=LossWeights(0.0, 1.0))
    with pytest.raises(ValueError, match="has a vocabulary of 400 tokens and the model one of 320"):
        trainer(tmp_path).fit(module, data(inputs))


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
        ({"architecture": ARCHITECTURE, "lora": LoRA()}, "`lora` needs a `base`"),
        (
            {"architecture": ARCHITECTURE, "loss": LossWeights(1.0, 1.0)},
            "`loss.distillation` needs a `base`",
        ),
        ({"base": "some/hub", "teacher": "another/hub"}, "`loss.distillation` is 0"),
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
        (ARCHITECTURE | {"vocab_size": 100}, {}, "`tokenizer` makes of the text the id 319"),
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
    with pytest.raises(ValueError, match="exists and is not what Secateur writes there"):
        CausalLM(architecture=ARCHITECTURE).check_export_folder(tmp_path)
