"""Scores of training steps: LoRAPrune's estimate, and gradients of gates under low-rank updates."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedModel

from secateur.callbacks import PruneWidths
from secateur.callbacks._training_gates import TrainingGates
from secateur.modules.causal_lm import CausalLM
from secateur.pruning.families import blocks_of, family_of
from secateur.pruning.lora import ADAPTER, LoRA, adapted
from secateur.pruning.measure.perplexity import window_nll
from secateur.pruning.sites import Site
from secateur.pruning.weights.gradually import Gradually
from secateur.pruning.widths.budget import Budget
from secateur.pruning.widths.evolution import Evolution
from secateur.pruning.widths.gate_gradient import GateGradient
from secateur.pruning.widths.gate_taylor import GateTaylor
from secateur.pruning.widths.lora_taylor import LoRATaylor, importances
from secateur.pruning.widths.training_score import TrainingScore
from tests import fits
from tests.runs import NOISE, make_inputs
from tests.tiny import tiny_llama

pytestmark = NOISE
MLP: Callable[[Site], bool] = lambda site: site.name == "mlp_mid"  # noqa: E731
WINDOWS_BT = torch.randint(3, 300, (3, 12), generator=torch.Generator().manual_seed(0))


def updated(targets: list[str] | None = None) -> PreTrainedModel:
    """A model with updates that are not zero, without dropout."""
    model = tiny_llama()
    torch.manual_seed(0)
    LoRA(rank=2, dropout=0.0, targets=targets).inject(model)
    with torch.no_grad():
        for layer in adapted(model).values():
            layer.lora_B[ADAPTER].weight.normal_(std=0.1)
    return model


def test_the_case_worked_by_hand() -> None:
    rows_O, columns_J = importances(
        torch.tensor([[1.0, -1.0]]),
        a_RJ=torch.tensor([[1.0, 2.0]]),
        b_OR=torch.zeros(1, 1),
        grad_a_RJ=torch.zeros(1, 2),
        grad_b_OR=torch.tensor([[3.0]]),
        gamma=2.0,
    )
    assert rows_O.tolist() == [9.0]
    assert columns_J.tolist() == [3.0, 6.0]


def test_the_importance_is_that_of_the_dense_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("secateur.pruning.widths.lora_taylor._CHUNK_BYTES", 4 * 7 * 2)
    draw = torch.Generator().manual_seed(1)
    shapes = ((5, 7), (2, 7), (5, 2), (2, 7), (5, 2))
    weight, a, b, da, db = (torch.randn(shape, generator=draw) for shape in shapes)
    estimate = db @ a + b @ da - db @ da
    expected = (estimate * (weight + 1.5 * b @ a)).abs()
    rows_O, columns_J = importances(weight, a, b, da, db, 1.5)
    torch.testing.assert_close(rows_O, expected.sum(1))
    torch.testing.assert_close(columns_J, expected.sum(0))


def test_the_gate_gradient_is_that_of_finite_differences() -> None:
    model, family = updated().double(), family_of(tiny_llama().config)
    watch = GateTaylor().watch(model, family, MLP)
    watch.before_batch(len(WINDOWS_BT))
    window_nll(model, WINDOWS_BT).sum().backward()
    watch.after_backward()
    found_N, place = watch.values(), 4
    at = sum(site.size for site in watch.hooks.sites[:3]) + place  # block 0, mlp_mid
    losses = []
    for gate in (1 - 1e-3, 1 + 1e-3):
        gates: Any = [torch.ones(site.size, dtype=torch.float64) for site in watch.hooks.sites]
        gates[3][place] = gate
        with torch.no_grad(), watch.hooks.applied(gates):
            losses.append(window_nll(model, WINDOWS_BT))
    expected = ((losses[1] - losses[0]) / 2e-3).abs().sum()
    torch.testing.assert_close(float(found_N[at]), float(expected), rtol=1e-3, atol=0.0)
    assert not bool(watch.values().any())  # the next step starts anew
    assert not bool(found_N[: at - place].any())  # other sites are not pruned


def test_it_is_the_score_of_calibration_windows_under_merged_updates() -> None:
    model, family = updated(), family_of(tiny_llama().config)
    watch = GateTaylor().watch(model, family, lambda site: True)
    for part_BT in WINDOWS_BT.split(2):  # two batches of one step
        watch.before_batch(len(part_BT))
        window_nll(model, part_BT).sum().backward()
        watch.after_backward()
    found_N = watch.values()
    watch.remove()
    expected_N = GateGradient().values(model, family, windows_WT=WINDOWS_BT)
    torch.testing.assert_close(found_N / len(WINDOWS_BT), expected_N, rtol=1e-4, atol=1e-6)


def test_a_closed_gate_gives_its_updates_no_gradient() -> None:
    model, family = updated(), family_of(tiny_llama().config)
    watch = GateTaylor().watch(model, family, MLP)
    gates = [torch.ones(site.size) for site in watch.hooks.sites]
    gates[3][5] = 0
    watch.close(gates)
    watch.before_batch(len(WINDOWS_BT))
    window_nll(model, WINDOWS_BT).sum().backward()
    mlp: Any = blocks_of(model, family)[0].mlp
    assert not bool(mlp.gate_proj.lora_B[ADAPTER].weight.grad[5].any())
    assert not bool(mlp.up_proj.lora_B[ADAPTER].weight.grad[5].any())
    assert not bool(mlp.down_proj.lora_A[ADAPTER].weight.grad[:, 5].any())
    assert bool(mlp.up_proj.lora_B[ADAPTER].weight.grad[4].any())


def test_lora_taylor_reads_rows_and_columns_of_a_site() -> None:
    model, family = updated(), family_of(tiny_llama().config)
    watch = LoRATaylor().watch(model, family, MLP)
    window_nll(model, WINDOWS_BT).sum().backward()
    found_N, start = watch.values(), sum(site.size for site in watch.hooks.sites[:3])
    mlp, total_I = blocks_of(model, family)[0].mlp, torch.zeros(37)
    for name, axis in (("gate_proj", 0), ("up_proj", 0), ("down_proj", 1)):
        layer: Any = getattr(mlp, name)
        a, b = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
        weight = layer.get_base_layer().weight
        value_I = importances(weight, a, b, a.grad, b.grad, 8.0)[axis]
        total_I += value_I / value_I.norm()
    torch.testing.assert_close(found_N[start : start + 37], total_I)


def test_updates_that_the_score_does_not_find_are_named() -> None:
    model = updated(["gate_proj", "up_proj"])
    with pytest.raises(ValueError, match=r"site 0.mlp_mid needs .* of mlp.down_proj, which `model"):
        LoRATaylor().watch(model, family_of(model.config), MLP)


def callback(score: TrainingScore, keep: float = 0.7, **budget: Any) -> PruneWidths:
    return PruneWidths(
        Budget(keep, **(budget or {"sites": ["mlp_mid"]})),
        score,
        gradually=Gradually(2, over=0.7, after=0.2),
        compensation=None,
        calibration_windows=6,
        held_back_windows=6,
    )


class Follow(Callback):
    """Notes the open gates before every step, and saves one checkpoint."""

    def __init__(self, callback: PruneWidths, path: Path, step: int) -> None:
        self.callback, self.path, self.step = callback, path, step
        self.open: list[set[int]] = []

    def on_train_batch_end(self, trainer: Trainer, *_: Any, **__: Any) -> None:
        gates = self.callback._gates
        if gates is not None and gates.closed_N is not None:
            self.open.append(set((gates.closed_N == 0).nonzero().flatten().tolist()))
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_inputs(tmp_path_factory.mktemp("inputs"))


def fit(inputs: Path, root: Path, callbacks: list[Callback], **settings: Any) -> CausalLM:
    lora = settings.pop("lora", LoRA(rank=2))
    return fits.fit(inputs, root, callbacks, max_steps=10, lora=lora, **settings)[0]


@pytest.mark.parametrize("score", [LoRATaylor(), GateTaylor()])
def test_gates_close_step_by_step_and_a_resumed_run_ends_alike(
    inputs: Path, tmp_path: Path, score: TrainingScore
) -> None:
    """Rises before steps 4, 6 and 8; the checkpoint lies between the first two."""
    pruning = callback(score)
    follow = Follow(pruning, tmp_path / "between.ckpt", step=5)
    module = fit(inputs, tmp_path, [pruning, follow])
    sizes = [len(found) for found in follow.open]
    assert all(after <= before for before, after in zip(follow.open, follow.open[1:], strict=False))
    assert len(set(sizes)) == 3
    (event,) = pruning.history
    assert event["step"] == 8
    assert 0.7 - 0.01 < event["kept"] <= 0.7
    # The model under its gates is the cut one, its updates merged.
    assert event["perplexity_after"] == pytest.approx(event["perplexity_before"], rel=1e-4)
    again = fit(inputs, tmp_path, [callback(score)], ckpt_path=follow.path)
    state = again.state_dict()
    assert all(torch.equal(state[name], value) for name, value in module.state_dict().items())
    module.export(tmp_path / "model", "test")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model", trust_remote_code=True)
    with torch.no_grad(), module.plain() as live:
        torch.testing.assert_close(loaded(WINDOWS_BT).logits, live(WINDOWS_BT).logits)


def test_a_uniform_budget_leaves_a_stock_model(inputs: Path, tmp_path: Path) -> None:
    module = fit(inputs, tmp_path, [callback(GateTaylor(), uniform=True)])
    module.export(tmp_path / "model", "test")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert type(loaded) is LlamaForCausalLM
    assert loaded.config.intermediate_size < 37


def test_steps_that_are_not_finite_are_left_out() -> None:
    gates = TrainingGates(GateTaylor(average=0.5), Budget(0.7, sites=["mlp_mid"]))
    gates.begin(tiny_llama())
    found = [torch.ones(3), torch.full((3,), torch.nan), torch.tensor([3.0, 1.0, 1.0])]
    gates._watch = _Fixed(found)  # type: ignore[assignment]
    for _ in range(3):
        gates.before_optimizer_step(_TRAINER)
    assert gates.average_N is not None
    assert gates.average_N.tolist() == [0.25 + 1.5, 0.75, 0.75]


class _Fixed:
    def __init__(self, values: list[Tensor]) -> None:
        self.values = lambda: values.pop(0)


class _Strategy:
    root_device = torch.device("cpu")

    def reduce(self, value: Tensor, reduce_op: str) -> Tensor:
        return value


_TRAINER: Any = type("_Trainer", (), {"strategy": _Strategy()})()


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`:UserWarning")
def test_a_measurement_sees_the_gates_of_the_checkpoint(inputs: Path, tmp_path: Path) -> None:
    pruning = callback(GateTaylor())
    follow = Follow(pruning, tmp_path / "between.ckpt", step=7)
    fit(inputs, tmp_path, [pruning, follow])
    perplexities = []
    for again in (callback(GateTaylor()), None):
        module = CausalLM(base=str(inputs / "base"), warmup_steps=0, lora=LoRA(rank=2))
        trainer = Trainer(
            default_root_dir=tmp_path,
            accelerator="cpu",
            max_steps=10,
            max_epochs=-1,
            gradient_clip_val=0.1,
            callbacks=[again] if again else [],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
        )
        text = fits.text_of(inputs)
        (found,) = trainer.validate(module, text, follow.path, verbose=False, weights_only=True)
        perplexities.append(found["val_perplexity"])
    assert perplexities[0] != pytest.approx(perplexities[1], rel=1e-3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gradually": None}, "`score` GateTaylor is read off training steps and needs `gradua"),
        ({"search": Evolution()}, "`search` ranks on calibration windows, which `score` GateTay"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PruneWidths(Budget(0.7), GateTaylor(), **{"gradually": Gradually(2)} | settings)


def test_the_estimate_needs_updates(inputs: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"LoRATaylor of site 0.mlp_mid needs a low-rank update"):
        fit(inputs, tmp_path, [callback(LoRATaylor())], lora=None)
    with pytest.raises(ValueError, match=r"`average` must be in \[0, 1\), got 1"):
        GateTaylor(average=1.0)
