"""A run that learns masks is told to settle now, by a signal or when it is resumed."""

from __future__ import annotations

import math
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer

from secateur.callbacks import PlotWidths
from secateur.pruning.plan import Plan
from tests.runs import NOISE, call, content, learn_masks, make_inputs

pytestmark = NOISE
KEEP_ALL = ("--callbacks.SaveCheckpoint.every_n_steps=1", "--callbacks.SaveCheckpoint.keep=20")
SETTLED_LR = 0.02


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_inputs(tmp_path_factory.mktemp("inputs"))


def command(inputs: Path, root: Path, *settings: str, max_steps: int = 12) -> list[str]:
    """Nine steps that learn masks, and three after."""
    base = learn_masks(inputs, root, max_steps)
    settle = ("--model.settle.fraction=0.25", f"--model.settle.train.lr={SETTLED_LR}")
    return [*base, *settle, *KEEP_ALL, *settings]


def ask_at(step: int, monkeypatch: pytest.MonkeyPatch, rates: dict[int, list[float]]) -> None:
    """Send the signal when a step has ended; note the learning rates of the step after each."""

    def on_train_batch_end(self: PlotWidths, trainer: Trainer, *_: Any) -> None:
        rates[trainer.global_step] = [g["lr"] for g in trainer.optimizers[0].param_groups]
        if trainer.global_step == step:
            signal.raise_signal(signal.SIGUSR2)

    monkeypatch.setattr(PlotWidths, "on_train_batch_end", on_train_batch_end)


def test_a_signal_settles_the_masks_and_the_rest_follows_as_planned(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Asked during step 2, so settled at 3 instead of 9: three more steps make 6 instead of 12."""
    caplog.set_level("INFO")
    rates: dict[int, list[float]] = {}
    with monkeypatch.context() as patch:
        ask_at(2, patch, rates)
        call(command(inputs, tmp_path / "run"))
    said = caplog.text
    assert "masks settle at step 3 instead of 9, 3 steps follow as planned" in said
    assert "the run ends at step 6 instead of 12" in said
    record = {"at_step": 3, "settled_at": 3, "max_steps_before": 12, "max_steps": 6}
    assert Plan.load(tmp_path / "run" / "plan").provenance["shortened"] == [record]
    assert '"settled_at": 3' in (tmp_path / "run" / "model" / "README.md").read_text("utf-8")
    assert "settled_at: 3" in (tmp_path / "run" / "report.html").read_text("utf-8")

    # The gates rest from step 3 on; the settled model's rate warms up (a tenth of three steps is
    # less than one) and falls to 0 along a cosine.
    gates, settled = zip(*(rates[step] for step in sorted(rates)), strict=True)
    assert gates[2] > gates[3] == gates[4] == gates[5] == 0
    assert settled[:3] == (0, 0, settled[2])
    falling = [SETTLED_LR * (1 + math.cos(math.pi * done / 3)) / 2 for done in (1, 2, 3)]
    assert settled[3:] == pytest.approx(falling)

    # What is resumed in between ends as the run that was told, under the settings of the first.
    resumed = command(inputs, tmp_path / "again")
    call([*resumed, f"--ckpt_path={tmp_path / 'run' / 'checkpoints' / 'step=4.ckpt'}"])
    assert "told to settle at step 3: it ends at step 6" in caplog.text
    weights = [content(tmp_path / run / "model")["model.safetensors"] for run in ("run", "again")]
    assert weights[0] == weights[1]
    assert content(tmp_path / "run" / "plan") == content(tmp_path / "again" / "plan")


def test_once_masks_have_settled_there_is_nothing_to_ask_for(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        ask_at(10, patch, {})
        with pytest.warns(UserWarning, match="masks have settled at step 9"):
            call(command(inputs, tmp_path / "run"))
    assert "shortened" not in Plan.load(tmp_path / "run" / "plan").provenance


def test_without_steps_after_the_masks_the_run_ends(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        ask_at(2, patch, {})
        run = call(command(inputs, tmp_path / "run", "--model.settle.fraction=0"))
    assert run.trainer.global_step == 3
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()


@pytest.fixture(scope="module")
def whole(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of a run of twelve steps."""
    root = tmp_path_factory.mktemp("whole")
    call(command(inputs, root / "run"))
    return root / "run" / "checkpoints"


def test_a_resumed_run_may_settle_sooner_by_another_fraction(
    inputs: Path, whole: Path, tmp_path: Path
) -> None:
    """From step 4 of 12: with half of the steps, masks settle at 6 instead of 9."""
    settings = ["--model.settle.fraction=0.5", f"--ckpt_path={whole / 'step=4.ckpt'}"]
    with pytest.warns(UserWarning, match="masks settle at step 6 instead of 9"):
        call(command(inputs, tmp_path / "run", *settings))
    record = {"at_step": 4, "settle_fraction_before": 0.25, "settle_fraction": 0.5}
    assert Plan.load(tmp_path / "run" / "plan").provenance["shortened"] == [record]
    folder = tmp_path / "run" / "checkpoints"
    settled = {
        step: bool(torch.load(folder / f"step={step}.ckpt")["state_dict"]["settled_N"].any())
        for step in (5, 6, 7, 12)
    }
    assert settled == {5: False, 6: False, 7: True, 12: True}


@pytest.mark.parametrize(
    ("step", "fraction", "why"),
    [(4, 0.1, "masks would learn longer"), (10, 0.5, "they have settled")],
)
def test_masks_do_not_settle_later_or_again(
    inputs: Path, whole: Path, tmp_path: Path, step: int, fraction: float, why: str
) -> None:
    settings = [f"--model.settle.fraction={fraction}", f"--ckpt_path={whole / f'step={step}.ckpt'}"]
    with pytest.raises(ValueError, match=r"`--model.settle` was .*fraction=0.25"):
        call(command(inputs, tmp_path / "run", *settings))
