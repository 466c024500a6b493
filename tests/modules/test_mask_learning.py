from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from secateur.modules.data.text_data import TextData
from secateur.modules.frozen_base import FrozenBase
from secateur.modules.mask_learning import MaskLearning
from secateur.modules.settling import AllWeights, Gains, LowRank, Settle, Trained
from secateur.pruning.costs import Parameters
from secateur.pruning.files.base_model import BaseModel
from secateur.pruning.lora import LoRA
from secateur.pruning.losses import LossWeights
from secateur.pruning.measure.perplexity import perplexity
from secateur.pruning.sites import split
from secateur.pruning.widths.budget import Budget, log_ratio_penalty
from secateur.pruning.widths.feature_statistics import WandaWidth
from secateur.pruning.widths.gate_gradient import Fisher
from secateur.pruning.widths.gate_hooks import GateHooks
from secateur.pruning.widths.gates import GateSampler, StraightThrough, Stream
from secateur.pruning.widths.gradual_ranking import GradualRanking
from secateur.pruning.widths.hypernetwork import FreeLogits
from secateur.pruning.widths.learning import (
    ExactBudget,
    GateLearning,
    Importance,
    Penalty,
    Pressure,
)
from secateur.pruning.widths.policy_gradient import (
    Baseline,
    LeaveOneOut,
    MovingAverage,
    PolicyGradient,
)
from tests.runs import NOISE, make_inputs

pytestmark = NOISE
PENALTY = GateLearning(Penalty(), start=None)  # as in the paper: from open gates, by a penalty
QUICK = GateLearning(start=Importance(search=GradualRanking(2, 1, 4), scale=4.0))
FEW = {"refit_windows": 40, "held_back_windows": 8}
Make = Callable[..., MaskLearning]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture
def make(inputs: Path) -> Make:
    """A module with its model made, at step 0 of a run of 100."""

    def module(**settings: Any) -> MaskLearning:
        made = MaskLearning(str(inputs / "base"), **settings)
        made.trainer = trainer(inputs, max_steps=100)
        made.configure_model()
        made.log = lambda *_, **__: None  # type: ignore[method-assign]
        return made

    return module


@pytest.fixture
def data(inputs: Path) -> TextData:
    return TextData(
        str(inputs / "text.json"),
        tokenizer=str(inputs / "base"),
        window_tokens=16,
        batch_size=4,
        validation_windows=6,
        cache_dir=str(inputs / "cache"),
    )


def trainer(root: Path, *callbacks: Callback, **settings: Any) -> Trainer:
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "max_steps": 3,
        "max_epochs": -1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "use_distributed_sampler": False,
    }
    return Trainer(default_root_dir=root, callbacks=list(callbacks), **defaults | settings)


def batch(windows: int = 2, tokens: int = 16, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {"input_ids": torch.randint(320, (windows, tokens), generator=generator)}


# The loss


@pytest.mark.parametrize(("ce", "kl"), [(1.0, 0.0), (0.5, 2.0)])
def test_the_loss_is_that_of_one_sample_of_gates_on_the_whole(
    make: Make, inputs: Path, ce: float, kl: float
) -> None:
    module = make(learning=GateLearning(Penalty(4.0), LossWeights(ce, kl), None))
    loss = module.training_step(batch(), 0)

    dense: Any = BaseModel(inputs / "base").load()
    gates = split(module.sampler(module.hypernetwork(), Stream(0)), module.sites)
    input_BT = batch()["input_ids"]
    open_BTV = dense(input_BT).logits[:, :-1].log_softmax(-1)
    with GateHooks(dense).applied(gates):
        log_p_BTV = dense(input_BT).logits[:, :-1].log_softmax(-1)
    nll = -log_p_BTV.gather(-1, input_BT[:, 1:, None]).mean()
    divergence = (open_BTV.exp() * (open_BTV - log_p_BTV)).sum(-1).mean()
    fraction = module.table.fraction(torch.stack([gate.sum() for gate in gates]))
    expected = ce * nll + kl * divergence + log_ratio_penalty(fraction, 0.5, 4.0)
    torch.testing.assert_close(loss, expected.to(loss.dtype), rtol=1e-4, atol=1e-4)


def test_noise_depends_on_the_step_and_on_nothing_else(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = make()
    first = module.training_step(batch(), 0)
    torch.manual_seed(123)
    assert torch.equal(module.training_step(batch(), 7), first)
    monkeypatch.setattr(type(module), "global_step", 1)
    assert not torch.equal(module.training_step(batch(), 0), first)


def test_only_the_hypernetwork_learns(make: Make) -> None:
    module = make(learning=GateLearning(loss=LossWeights(distillation=1.0)))
    before = {name: tensor.clone() for name, tensor in module.model.state_dict().items()}
    module.training_step(batch(), 0).backward()
    assert all(parameter.grad is None for parameter in module.model.parameters())
    for name, parameter in module.hypernetwork.named_parameters():
        assert parameter.grad is not None, name
        assert float(parameter.grad.abs().sum()) > 0, name
    optimiser: Any = module.configure_optimizers()["optimizer"]
    trained = {id(p) for group in optimiser.param_groups for p in group["params"]}
    assert trained >= {id(p) for p in module.hypernetwork.parameters()}
    assert not trained & {id(p) for p in module.model.parameters()}
    optimiser.step()
    for name, tensor in module.model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_gradient_checkpointing_changes_no_gradient(make: Make) -> None:
    gradients = []
    for checkpointing in (False, True):
        module = make(
            frozen=FrozenBase(gradient_checkpointing=checkpointing),
            learning=GateLearning(loss=LossWeights(1.0, 1.0)),
        )
        assert module.model.model.layers[0].gradient_checkpointing == checkpointing
        module.training_step(batch(), 0).backward()
        gradients.append([parameter.grad for parameter in module.hypernetwork.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed)


def test_the_size_of_the_loss_chunk_changes_no_loss(make: Make) -> None:
    small, odd, large = (
        make(frozen=FrozenBase(loss_chunk_tokens=c)).training_step(batch(), 0) for c in (1, 7, 1024)
    )
    torch.testing.assert_close(small, large, rtol=1e-5, atol=0)
    torch.testing.assert_close(odd, large, rtol=1e-5, atol=0)


# The plan


def test_the_plan_is_deterministic_and_exactly_on_budget(make: Make) -> None:
    budget = Budget(keep=0.4, cost=Parameters(), min_width=2, width_multiple=2)
    module = make(budget=budget)
    plan, again = module.plan(), module.plan()
    assert all(torch.equal(a, b) for a, b in zip(plan.kept, again.kept, strict=True))
    widths_S = torch.tensor(plan.widths)
    unit = 2 * float(module.table.marginal(widths_S).min()) / module.table.dense
    assert 0.4 - unit < float(module.table.fraction(widths_S)) <= 0.4
    assert all(width >= 2 for width in plan.widths)
    assert plan.base == module.base_fingerprint


def test_learned_scores_decide_what_stays(make: Make) -> None:
    module = make()
    with torch.no_grad():
        logits = split(module.hypernetwork(), module.sites)
    for index_W, logits_I in zip(module.plan().kept, logits, strict=True):
        left_out = torch.ones(len(logits_I), dtype=torch.bool).index_fill(0, index_W, False)
        if bool(left_out.any()):
            assert float(logits_I[index_W].min()) >= float(logits_I[left_out].max())


def test_validation_measures_the_hard_plan(inputs: Path, data: TextData, tmp_path: Path) -> None:
    module = MaskLearning(str(inputs / "base"))
    run = trainer(tmp_path)
    (measured,) = run.validate(module, data, verbose=False)
    dense: Any = BaseModel(inputs / "base").load()
    windows_NT = torch.cat([piece["input_ids"] for piece in data.val_dataloader()])
    with GateHooks(dense).applied(module.plan().gates(), module.plan().gains):
        expected = perplexity(dense, windows_NT).value
    assert measured["val_perplexity"] == pytest.approx(expected, rel=1e-4)
    assert measured["val_perplexity"] != pytest.approx(perplexity(dense, windows_NT).value)
    assert run.test(module, data, verbose=False)[0]["test_perplexity"] == pytest.approx(expected)


def test_gates_are_open_outside_of_training_and_validation(make: Make, inputs: Path) -> None:
    module = make()
    module.training_step(batch(), 0)
    dense: Any = BaseModel(inputs / "base").load()
    input_BT = batch()["input_ids"]
    torch.testing.assert_close(module.model(input_BT).logits, dense(input_BT).logits)


# In a trainer


class _Record(Callback):
    def __init__(self) -> None:
        self.seen: list[tuple[int, float]] = []

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *_: Any
    ) -> None:
        self.seen.append((trainer.global_step, float(outputs["loss"])))


def test_training_brings_the_gates_towards_the_budget(
    inputs: Path, data: TextData, tmp_path: Path
) -> None:
    sampler = GateSampler(relaxation=StraightThrough(), offset=0.5)
    learning = GateLearning(Penalty(20.0), start=None)
    module = MaskLearning(
        str(inputs / "base"), sampler=sampler, learning=learning, optimizer=_fast, settle=None
    )
    run = trainer(tmp_path, max_steps=40, limit_val_batches=0)
    module.configure_model()
    start = _expected_fraction(module)
    run.fit(module, data)
    assert abs(_expected_fraction(module) - 0.5) < abs(start - 0.5) / 2


def _fast(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-2)


def _expected_fraction(module: MaskLearning) -> float:
    per_site = split(module.keep_probability(), module.sites)
    return float(module.table.fraction(torch.stack([p.sum() for p in per_site])))


def test_two_runs_of_one_seed_are_equal(inputs: Path, data: TextData, tmp_path: Path) -> None:
    seen = []
    for _ in range(2):
        record = _Record()
        module = MaskLearning(
            str(inputs / "base"), learning=QUICK, settle=Settle(fraction=0.3, **FEW)
        )
        trainer(tmp_path, record).fit(module, data)
        seen.append(record.seen)
    assert seen[0] == seen[1]
    assert [step for step, _ in seen[0]] == [1, 2, 3]


def test_testing_keeps_what_was_learned_and_a_second_fit_starts_afresh(
    inputs: Path, data: TextData, tmp_path: Path
) -> None:
    module = MaskLearning(str(inputs / "base"), learning=QUICK, settle=Settle(fraction=0.5, **FEW))
    records = [_Record(), _Record()]
    trainer(tmp_path, records[0], max_steps=4).fit(module, data)
    assert module.settled is not None
    settled = {name: tensor.clone() for name, tensor in module.settled.state_dict().items()}
    assert bool((settled["gains"] != 1).any())
    trainer(tmp_path).test(module, data, verbose=False)
    for name, tensor in module.settled.state_dict().items():
        assert torch.equal(settled[name], tensor)
    trainer(tmp_path, records[1], max_steps=4).fit(module, data)
    assert records[1].seen == records[0].seen


class _Poison(Callback):
    """A hypernetwork that goes wrong before a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if trainer.global_step == self.step:
            with torch.no_grad():
                next(pl_module.hypernetwork.parameters()).fill_(torch.nan)


class _Saved(Callback):
    last_model_path = "checkpoints/step=2.ckpt"


def test_a_nan_stops_the_run_before_the_step_with_its_cause(
    inputs: Path, data: TextData, tmp_path: Path
) -> None:
    module = MaskLearning(str(inputs / "base"), learning=QUICK)
    run = trainer(tmp_path, _Poison(2), max_steps=5)
    with pytest.raises(FloatingPointError) as stop:
        run.fit(module, data)
    for fact in ("At step 2", "a logit of the gates", "nan", "none was saved"):
        assert fact in str(stop.value)
    assert run.global_step == 2  # the third step was not taken
    states = [state["step"] for state in run.optimizers[0].state.values()]
    assert all(int(step) == 2 for step in states)


def test_a_nan_budget_and_a_nan_loss_have_different_messages(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = make(learning=PENALTY)
    monkeypatch.setattr(type(module.trainer), "checkpoint_callback", _Saved(), raising=True)
    monkeypatch.setattr(Penalty, "penalty", lambda self, fraction, keep: fraction * torch.nan)
    with pytest.raises(FloatingPointError, match="the budget penalty became nan.*step=2.ckpt"):
        module.training_step(batch(), 0)


# Settings


@pytest.mark.parametrize(
    ("make_setting", "message"),
    [
        (lambda: Penalty(0.0), "`strength` must be above 0, got 0"),
        (lambda: ExactBudget(0.0), "`temperature` must be above 0, got 0"),
        (lambda: Importance(scale=0.0), "`scale` must be above 0, got 0"),
        (lambda: Settle(fraction=1.5), r"`fraction` must be in \[0, 1\], got 1.5"),
        (lambda: Settle(refit_windows=0), "`refit_windows` must be 1 or more, got 0"),
        (lambda: Gains(lr=0.0), "`lr` must be above 0, got 0"),
        (lambda: FrozenBase(loss_chunk_tokens=0), "`loss_chunk_tokens` must be 1 or more, got 0"),
    ],
)
def test_settings_out_of_range_are_refused(
    make_setting: Callable[[], object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make_setting()


def test_half_precision_weights_train(make: Make) -> None:
    module = make(frozen=FrozenBase(dtype="bfloat16"))
    loss = module.training_step(batch(), 0)
    loss.backward()
    assert module.model.dtype == torch.bfloat16
    assert all(p.dtype == torch.float32 for p in module.hypernetwork.parameters())
    assert bool(loss.isfinite())


def test_dropout_of_the_base_is_switched_off(tmp_path: Path) -> None:
    make_inputs(tmp_path, attention_dropout=0.5)
    module = MaskLearning(str(tmp_path / "base"))
    module.configure_model()
    input_BT = batch()["input_ids"]
    assert module.model.training
    torch.testing.assert_close(module.model(input_BT).logits, module.model(input_BT).logits)


class _Plans(Callback):
    """The indices that would be exported and the trained tensors, after every step."""

    def __init__(self) -> None:
        self.kept: list[tuple[Tensor, ...]] = []
        self.hypernetwork: list[Tensor] = []
        self.gains: list[Tensor | None] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        assert isinstance(pl_module, MaskLearning)
        self.kept.append(pl_module.plan().kept)
        weights = [p.detach().flatten() for p in pl_module.hypernetwork.parameters()]
        self.hypernetwork.append(torch.cat(weights))
        settled: Any = pl_module.settled
        self.gains.append(None if settled is None else settled.gains.detach().clone())


def test_masks_settle_and_only_then_gains_of_the_cut_model_are_learned(
    inputs: Path, data: TextData, tmp_path: Path
) -> None:
    plans = _Plans()
    module = MaskLearning(
        str(inputs / "base"), learning=QUICK, settle=Settle(fraction=0.5, **FEW), optimizer=_fast
    )
    trainer(tmp_path, plans, max_steps=8, limit_val_batches=0).fit(module, data)
    assert module.mask_steps == 4
    for before, after in ((0, 1), (2, 3)):  # masks are learned
        assert not torch.equal(plans.hypernetwork[before], plans.hypernetwork[after])
        assert plans.gains[after] is None
    for after in range(4, 8):  # masks rest, gains are learned
        assert torch.equal(plans.hypernetwork[3], plans.hypernetwork[after])
        assert all(map(torch.equal, plans.kept[4], plans.kept[after]))
        gains, before_them = plans.gains[after], plans.gains[after - 1]
        assert gains is not None
        assert before_them is None or not torch.equal(before_them, gains)
    assert module.settled is not None
    counted = sum(p.numel() for p in module.settled.model.parameters())
    assert counted < sum(p.numel() for p in module.model.parameters())


def test_masks_may_be_those_of_the_ranking_alone(
    inputs: Path, data: TextData, tmp_path: Path
) -> None:
    plans = _Plans()
    module = MaskLearning(str(inputs / "base"), learning=QUICK, settle=Settle(fraction=1.0, **FEW))
    trainer(tmp_path, plans, max_steps=3, limit_val_batches=0).fit(module, data)
    assert module.mask_steps == 0
    assert all(gains is not None for gains in plans.gains)
    logits_N = (module.hypernetwork() + module.start_N).detach()
    ranked = module.budget.finalise(logits_N, module.sites, module.table)
    assert all(map(torch.equal, ranked, module.plan().kept))


@pytest.mark.parametrize("train", [LowRank(LoRA(rank=2, dropout=0.0)), AllWeights()], ids=str)
def test_weights_of_the_cut_model_train_and_can_be_undone(
    inputs: Path, data: TextData, tmp_path: Path, train: Trained
) -> None:
    module = MaskLearning(
        str(inputs / "base"), learning=QUICK, settle=Settle(fraction=0.5, train=train, **FEW)
    )
    seen: list[Tensor] = []
    windows_BT = batch()["input_ids"]

    class Look(Callback):
        def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
            if pl_module.settled is not None:
                with torch.no_grad():
                    seen.append(pl_module.settled.model(windows_BT).logits)

    trainer(tmp_path, Look(), max_steps=6, limit_val_batches=0).fit(module, data)
    assert module.settled is not None
    assert not torch.equal(seen[0], seen[-1])
    dense = {name: p.clone() for name, p in BaseModel(inputs / "base").load().named_parameters()}
    for name, parameter in module.model.named_parameters():
        assert torch.equal(parameter, dense[name])  # the dense model stays the teacher
    module.settled.reset()
    with module.settled.plain() as model, torch.no_grad():
        undone = model(windows_BT).logits
    assert not torch.allclose(undone, seen[-1], atol=1e-6)


def test_training_is_judged_on_the_windows_that_it_started_from(
    inputs: Path, data: TextData, tmp_path: Path
) -> None:
    settle = Settle(fraction=0.5, train=Gains(lr=1e-12), held_back_windows=3, refit_windows=20)
    module = MaskLearning(str(inputs / "base"), learning=QUICK, settle=settle)
    trainer(tmp_path, max_steps=4, limit_val_batches=0).fit(module, data)
    module.export(tmp_path / "model", "the command")
    notes = module.plan().provenance
    assert notes["perplexity_trained"] == pytest.approx(notes["perplexity_settled"], rel=1e-5)
    assert notes["perplexity_masks_learned"] > 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"refit_windows": 3}, r"windows have 48 tokens, .* needs at least \d+\. .*refit_windows"),
        ({"held_back_windows": 999}, r"`settle.held_back_windows` is 999, .* has \d+ windows"),
    ],
)
def test_too_short_a_text_is_refused_before_the_gates_are_ranked(
    inputs: Path, data: TextData, tmp_path: Path, settings: dict[str, int], message: str
) -> None:
    module = MaskLearning(str(inputs / "base"), learning=QUICK, settle=Settle(**settings))
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, max_steps=2, limit_val_batches=0).fit(module, data)
    assert not bool(module.start_N.any())


def test_no_window_is_held_back_and_read_by_the_refit(
    inputs: Path, data: TextData, tmp_path: Path
) -> None:
    """All windows are asked for, and more."""
    module = MaskLearning(str(inputs / "base"), learning=QUICK, settle=Settle(refit_windows=999))
    trainer(tmp_path, max_steps=2, limit_val_batches=0).fit(module, data)
    assert module.settle is not None
    held_WT, refit_WT = module._settling_text(module.settle)
    assert len(held_WT) + len(refit_WT) == len(data.train_windows)
    assert len(held_WT) == module.settle.held_back_windows


def test_an_absurd_rank_is_refused_at_the_start(
    inputs: Path, data: TextData, tmp_path: Path
) -> None:
    settle = Settle(fraction=0.5, train=LowRank(LoRA(rank=999_999)), **FEW)
    module = MaskLearning(str(inputs / "base"), learning=QUICK, settle=settle)
    with pytest.raises(ValueError, match="`rank` must be .* widest layer, got 999999"):
        trainer(tmp_path, max_steps=2, limit_val_batches=0).fit(module, data)


@pytest.mark.parametrize("train", [LowRank(LoRA(rank=2, dropout=0.0)), AllWeights()], ids=str)
def test_weights_train_in_float32_and_products_stay_in_bfloat16(
    inputs: Path, data: TextData, tmp_path: Path, train: Trained
) -> None:
    module = MaskLearning(
        str(inputs / "base"),
        learning=QUICK,
        frozen=FrozenBase(dtype="bfloat16"),
        settle=Settle(fraction=1.0, train=train, **FEW),
    )
    types: set[torch.dtype] = set()

    class Look(Callback):
        def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
            types.update(parameter.dtype for parameter in pl_module.settled.trained())
            model = pl_module.settled.model
            model.get_output_embeddings().register_forward_hook(
                lambda _, inputs, output: types.add(output.dtype)
            )

    trainer(tmp_path, Look(), max_steps=2, limit_val_batches=0).fit(module, data)
    assert types == {torch.float32, torch.bfloat16}


def test_every_sample_is_on_budget(make: Make) -> None:
    module = make(budget=Budget(0.4))
    for step in range(3):
        logits_N = module.hypernetwork() + module.start_N
        drawn = ExactBudget().draw(module.sampler, logits_N, Stream(step), module._on_budget)
        gates_N = drawn.gates_N
        assert set(gates_N.detach().round(decimals=5).unique().tolist()) <= {0.0, 1.0}
        widths_S = torch.stack([gate.detach().sum() for gate in split(gates_N, module.sites)])
        assert 0.39 < float(module.table.fraction(widths_S)) <= 0.4 + 1e-6
        (gradient_N,) = torch.autograd.grad(gates_N.sum(), logits_N)
        assert bool((gradient_N > 0).all())
        assert bool((gradient_N <= 0.5).all())


@pytest.mark.parametrize("power", [1, 2])
def test_the_gradient_on_budget_is_that_of_quadratic_losses(power: int) -> None:
    """The mean of a gate, and of its square, is p, whose derivative is p (1 - p)."""
    sampler, draws, gates = GateSampler(offset=0.0), 500, 400
    first_N = torch.linspace(-4, 4, gates)

    def best(scores_N: Tensor) -> Tensor:
        return torch.zeros(gates).index_fill(0, scores_N.topk(gates // 2).indices, 1.0)

    total_N = torch.zeros(gates)
    for step in range(draws):
        logits_N = first_N.clone().requires_grad_()
        gates_N = ExactBudget(1.0).draw(sampler, logits_N, Stream(step), best).gates_N
        total_N += torch.autograd.grad((gates_N**power).sum(), logits_N)[0]
    p_N = first_N.sigmoid()
    found, expected = (x_N.view(40, -1).mean(1) for x_N in (total_N / draws, p_N * (1 - p_N)))
    torch.testing.assert_close(found, expected, atol=0.01, rtol=0)


@pytest.mark.parametrize("settles", [True, False])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_learned_masks_are_kept_only_if_they_are_better_than_the_ranking(
    inputs: Path, data: TextData, tmp_path: Path, sign: float, settles: bool
) -> None:
    """With the sign turned, what is learned is the ranking upside down."""

    class Turn(Callback):
        def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
            if trainer.global_step == 1:
                pl_module.start_N.mul_(sign)
                trainer.save_checkpoint(tmp_path / "turned.ckpt")

    def run(to: str, **kwargs: Any) -> MaskLearning:
        settle = Settle(fraction=0.5, **FEW) if settles else None
        module = MaskLearning(str(inputs / "base"), learning=QUICK, settle=settle)
        trainer(tmp_path / to, Turn(), max_steps=4, limit_val_batches=0).fit(module, data, **kwargs)
        if not settles:
            module.export(tmp_path / to / "model", "the command")
        return module

    module = run("whole")
    assert module._ranked_N is not None
    ranked = module.budget.finalise(module._ranked_N, module.sites, module.table)
    learned = module.budget.finalise(module._cpu_logits(), module.sites, module.table)
    losses = {name: module._notes[f"perplexity_masks_{name}"] for name in ("learned", "ranking")}
    better = min(losses, key=lambda name: losses[name])
    assert module._notes["masks"] == better
    expected = learned if better == "learned" else ranked
    assert all(map(torch.equal, module.plan().kept, expected))
    assert not all(map(torch.equal, learned, ranked))
    again = run("again", ckpt_path=tmp_path / "turned.ckpt")
    assert again._notes == module._notes
    assert all(map(torch.equal, again.plan().kept, module.plan().kept))


@pytest.mark.parametrize("pressure", [ExactBudget(), Penalty()], ids=str)
@pytest.mark.parametrize("baseline", [LeaveOneOut(), MovingAverage()], ids=str)
def test_a_policy_gradient_runs_forward_only_and_resumes(
    inputs: Path, data: TextData, tmp_path: Path, pressure: Pressure, baseline: Baseline
) -> None:
    start = Importance(WandaWidth(), GradualRanking(1, 1, 4))
    gradient = PolicyGradient(3, baseline)
    learning = GateLearning(pressure, start=start, gradient=gradient)

    class NoGraph(Callback):
        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            if trainer.global_step == 2:
                trainer.save_checkpoint(Path(trainer.default_root_dir) / "half.ckpt")

        def on_before_backward(self, trainer: Trainer, pl_module: Any, loss: Tensor) -> None:
            seen, todo = set(), [loss.grad_fn]
            while todo:
                node = todo.pop()
                if node is not None and node not in seen:
                    seen.add(node)
                    todo += [parent for parent, _ in node.next_functions]
            names = {type(node).__name__ for node in seen}
            assert "_SumOverChunksBackward" not in names  # the language model has no graph

    def run(to: Path, **kwargs: Any) -> MaskLearning:
        module = MaskLearning(str(inputs / "base"), learning=learning, settle=None)
        assert not module._back_propagates
        trainer(to, NoGraph(), max_steps=4, limit_val_batches=0).fit(module, data, **kwargs)
        return module

    whole = run(tmp_path / "whole")
    again = run(tmp_path / "again", ckpt_path=tmp_path / "whole" / "half.ckpt")
    assert all(map(torch.equal, whole.plan().kept, again.plan().kept))
    assert all(map(torch.equal, whole.hypernetwork.parameters(), again.hypernetwork.parameters()))
    first = MaskLearning(str(inputs / "base"), learning=learning, settle=None)
    first.configure_model()
    trained = zip(whole.hypernetwork.parameters(), first.hypernetwork.parameters(), strict=True)
    assert not all(torch.equal(after, before) for after, before in trained)


def test_without_a_step_the_ranking_decides(inputs: Path, data: TextData, tmp_path: Path) -> None:
    module = MaskLearning(str(inputs / "base"), learning=QUICK, settle=None)
    trainer(tmp_path, max_steps=0).fit(module, data)
    search = GradualRanking(2, 1, 4)
    text_WT = module._text(search.windows_read(Fisher()), 0)
    ranking = search.choose(module.model, module.budget, Fisher(), text_WT)
    same = sum(
        len(set(ours.tolist()) & set(theirs.tolist()))
        for ours, theirs in zip(module.plan().kept, ranking.kept(module.sites), strict=True)
    )
    assert same >= 0.95 * sum(module.plan().widths)


def test_parts_learn_and_go(make: Make) -> None:
    module = make(budget=Budget(0.5, parts=True), hypernetwork=FreeLogits, learning=PENALTY)
    places = {site.key: place for place, site in enumerate(module.sites)}
    logits = split(module.hypernetwork.logits.detach(), module.sites)  # type: ignore[arg-type]
    logits[places["1.attn"]].fill_(-20)
    module.training_step(batch(), 0).backward()
    gradient = split(module.hypernetwork.logits.grad, module.sites)  # type: ignore[arg-type]
    assert all(bool(gradient[places[f"{block}.mlp"]] != 0) for block in range(3))
    # Nothing of a closed part is paid for, so nothing pulls at its widths.
    assert not bool(gradient[places["1.attn_in"]].any())
    plan = module.plan()
    assert not plan.keeps(1, "attn")
    assert float(module.table.fraction(torch.tensor(plan.widths).double())) <= 0.5
