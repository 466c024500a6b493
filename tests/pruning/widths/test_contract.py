"""What every width score and compensation keeps: one row per method, and none without a row."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import secateur.pruning.blocks
import secateur.pruning.widths
from secateur.callbacks import PruneWidths
from secateur.modules.causal_lm import CausalLM
from secateur.pruning.blocks.refit import Refit
from secateur.pruning.export.cut import cut
from secateur.pruning.families import family_of
from secateur.pruning.files.base_model import BaseModel
from secateur.pruning.lora import LoRA
from secateur.pruning.plan import Plan
from secateur.pruning.sites import find_sites
from secateur.pruning.weights.gradually import Gradually
from secateur.pruning.widths.budget import Budget
from secateur.pruning.widths.evolution import Evolution
from secateur.pruning.widths.exchange import Exchange
from secateur.pruning.widths.feature_statistics import Fluctuation, WandaWidth
from secateur.pruning.widths.gate_gradient import Fisher, GateGradient
from secateur.pruning.widths.gate_taylor import GateTaylor
from secateur.pruning.widths.gradual_ranking import GradualRanking, WidthSearch
from secateur.pruning.widths.lora_taylor import LoRATaylor
from secateur.pruning.widths.scores import WidthScore
from secateur.pruning.widths.training_score import TrainingScore
from secateur.pruning.widths.width_magnitude import RandomOrder, WidthMagnitude
from tests import fits
from tests.runs import NOISE, make_inputs

pytestmark = NOISE

AXES = (WidthScore, TrainingScore, WidthSearch, Refit)
RANKING = GradualRanking(rounds=2, batches_per_round=1, batch_size=4)
SEARCHES = {
    Evolution: Evolution(RANKING, 2, 3, 2, windows=4, text_windows=8, held_back_windows=4),
    Exchange: Exchange(RANKING, rounds=3, batches_per_round=1, changes=0.2),
}
ROWS: dict[type, tuple[WidthScore | TrainingScore, Refit | None]] = {
    GradualRanking: (WidthMagnitude(), None),
    Evolution: (WidthMagnitude(), None),
    Exchange: (WidthMagnitude(), None),
    RandomOrder: (RandomOrder(3), None),
    WidthMagnitude: (WidthMagnitude(), None),
    GateGradient: (GateGradient(), None),
    Fisher: (Fisher(), None),
    WandaWidth: (WandaWidth(), None),
    Fluctuation: (Fluctuation(), None),
    GateTaylor: (GateTaylor(), None),
    LoRATaylor: (LoRATaylor(), None),
    Refit: (Fisher(), Refit()),
}
KEEP = 0.6


def methods() -> Iterator[type]:
    for package in (secateur.pruning.widths, secateur.pruning.blocks):
        for module in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
            for value in vars(importlib.import_module(module.name)).values():
                ours = inspect.isclass(value) and value.__module__ == module.name
                if ours and issubclass(value, AXES) and not inspect.isabstract(value):
                    yield value


def test_every_method_has_a_row() -> None:
    assert set(methods()) == set(ROWS)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_inputs(tmp_path_factory.mktemp("inputs"))


def callback(method: type) -> PruneWidths:
    score, refit = ROWS[method]
    return PruneWidths(
        Budget(KEEP),
        score,
        Exchange() if trains(method) else SEARCHES.get(method, RANKING),
        compensation=refit,
        gradually=Gradually(1, over=0.5),
        calibration_windows=48,
        held_back_windows=6,
    )


def trains(method: type) -> bool:
    """Whether the score is read off training steps: its gates close, and one cut follows."""
    return issubclass(method, TrainingScore)


def fit(method: type, inputs: Path, root: Path, callbacks: list[Callback], **settings: Any) -> Any:
    lora = {"lora": LoRA(rank=2)} if trains(method) else {}
    return fits.fit(inputs, root, callbacks, **lora | settings)[0]


class SaveOnce(Callback):
    """Writes one checkpoint, after a step."""

    def __init__(self, path: Path, step: int) -> None:
        self.path, self.step = path, step

    def on_train_batch_end(self, trainer: Trainer, *_: Any, **__: Any) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


@pytest.mark.parametrize("method", ROWS, ids=lambda method: method.__name__)
def test_the_method_keeps_the_contract(method: type, inputs: Path, tmp_path: Path) -> None:
    base = BaseModel(inputs / "base")
    whole, between = callback(method), SaveOnce(tmp_path / "between.ckpt", step=1)
    module = fit(method, inputs, tmp_path / "whole", [whole, between], max_steps=4)

    # The budget of the base model is met: not exceeded, and used up to less than one entry (of
    # the dearest site: those that an earlier cut or round took cannot come back).
    plan = module._plan()
    assert plan is not None
    family = family_of(base.config)
    sites = find_sites(base.skeleton(), family)
    table = Budget(KEEP).cost.table(base.skeleton(), family)
    widths_S = torch.tensor([float(width) for width in plan.widths])
    kept = float(table.fraction(widths_S))
    dearest = max(
        float(table.fraction(widths_S + step_S)) - kept
        for step_S in torch.eye(len(sites))
        if bool((widths_S + step_S <= table.full_S).all())
    )
    assert kept <= KEEP < kept + dearest + 1e-6
    assert len(whole.history) == 2 - trains(method)
    assert whole.history[-1]["kept"] == pytest.approx(kept, abs=1e-6)

    # Before any training the live model is the base model under the plan's cut.
    if ROWS[method][1] is None and not trains(method):
        zero = fits.fit(inputs, tmp_path / "zero", [at_once(method)], max_steps=0)[0]
        expected = cut(base.load(), present(zero))
        assert all(torch.equal(zero.model.state_dict()[n], t) for n, t in weights(expected).items())

    # A run that goes on from between the two cuts ends as the other, bit by bit.
    again = fit(
        method,
        inputs,
        tmp_path / "again",
        [callback(method)],
        max_steps=4,
        ckpt_path=between.path,
    )
    expected_state, state = weights(module.model), weights(again.model)
    assert state.keys() == expected_state.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in expected_state.items())

    # What is exported says what the live model says, and carries the plan.
    module.export(tmp_path / "model", "test")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model", trust_remote_code=True)
    input_BT = torch.randint(3, 300, (2, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), module.plain() as live:
        torch.testing.assert_close(loaded(input_BT).logits, live.eval()(input_BT).logits)
    exported = Plan.load(tmp_path / "model" / "plan")
    assert all(map(torch.equal, exported.kept, plan.kept))


def at_once(method: type) -> PruneWidths:
    once = callback(method)
    return PruneWidths(once.budget, once.score, once.search, None, None, 48, 6)


def test_text_too_short_for_the_refit_is_refused_before_widths_are_ranked(
    inputs: Path, tmp_path: Path
) -> None:
    short = PruneWidths(Budget(KEEP), WidthMagnitude(), calibration_windows=2)
    with pytest.raises(ValueError, match=r"windows have \d+ tokens, .* `calibration_windows`"):
        fit(WidthMagnitude, inputs, tmp_path, [short], max_steps=1)
    assert not short.history


def present(module: CausalLM) -> Plan:
    plan = module._plan()
    assert plan is not None
    return plan
