from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule

from secateur.callbacks import TrackBudget
from tests.callbacks.fakes import Masks, fake_trainer


def look(callback: TrackBudget, module: Masks, root: Path, step: int, total: int = 100) -> None:
    callback.on_train_batch_end(fake_trainer(root, step, total), module, None, None, 0)


def look_at_all(callback: TrackBudget, module: Masks, root: Path, steps: int) -> None:
    for step in range(1, steps + 1):
        look(callback, module, root, step)


def test_it_logs_expected_and_hard_budget_widths_and_undecided_gates(tmp_path: Path) -> None:
    module = Masks()
    # mlp_mid is undecided and leans to removal, all else is kept for certain.
    module.probability_N = torch.cat(
        [torch.full((site.size,), 0.25 if site.name == "mlp_mid" else 1.0) for site in module.sites]
    )
    look(TrackBudget(every_n_steps=5), module, tmp_path, step=5)
    (figures,) = module.logged
    # A block of 24 wide: attention 24 x (24 + 8 + 8) + 24 x 24 = 1536, MLP 3 x 24 x 37 = 2664.
    assert figures["budget/expected"] == pytest.approx((1536 + 0.25 * 2664) / 4200)
    assert figures["budget/hard"] == pytest.approx(1536 / 4200)
    assert figures["budget/undecided"] == pytest.approx(37 / (4 * 24 + 37))
    assert figures["widths/mlp_mid"] == pytest.approx(0.25)
    assert figures["widths/attn_in"] == 1
    assert set(figures) == {"budget/expected", "budget/hard", "budget/undecided"} | {
        f"widths/{name}" for name in ("attn_in", "attn_out", "mlp_in", "mlp_mid", "mlp_out")
    }


def test_it_looks_every_so_many_steps_and_once_per_step(tmp_path: Path) -> None:
    module, callback = Masks(keep=1.0), TrackBudget(every_n_steps=5)
    for step in (4, 5, 5, 6, 10):  # 5 twice: gradients are accumulated over two batches
        look(callback, module, tmp_path, step)
    assert len(module.logged) == 2


def test_it_warns_once_when_the_trend_does_not_reach_the_target(tmp_path: Path) -> None:
    module, callback = Masks(keep=0.5), TrackBudget(every_n_steps=10)
    for step in (10, 20, 30, 40):
        look(callback, module, tmp_path, step)  # too early to tell
    with pytest.warns(UserWarning, match="At step 50 of 100 .* keep 1.000 .* target is 0.500"):
        look(callback, module, tmp_path, 50)
    look(callback, module, tmp_path, 60)  # said once


@pytest.mark.parametrize(
    "probabilities",
    [
        {40: 0.75, 50: 0.7071, 60: 0.7071},  # there: the cost is the square of the width
        {40: 0.99, 50: 0.94, 60: 0.90, 70: 0.85},  # not there, but on the way
    ],
)
def test_it_is_silent_where_the_budget_will_be_reached(
    probabilities: dict[int, float], tmp_path: Path
) -> None:
    module, callback = Masks(keep=0.5), TrackBudget(every_n_steps=10, tolerance=0.2)
    for step, probability in probabilities.items():
        module.set(probability)
        look(callback, module, tmp_path, step)


def test_one_look_is_no_trend_before_the_last_step(tmp_path: Path) -> None:
    look(TrackBudget(every_n_steps=10), Masks(keep=0.5), tmp_path, 70)
    with pytest.warns(UserWarning, match="At step 100 of 100 .* keep 1.000"):
        look(TrackBudget(every_n_steps=30), Masks(keep=0.5), tmp_path, 100)


@pytest.mark.parametrize("mask_steps", [3, 12, 59])
def test_a_short_run_is_warned_in_time(mask_steps: int, tmp_path: Path) -> None:
    module, callback = Masks(keep=0.5), TrackBudget()
    module.mask_steps = mask_steps
    with pytest.warns(UserWarning, match=f"of {mask_steps} the gates .* keep 1.000") as told:
        look_at_all(callback, module, tmp_path, mask_steps)
    assert int(str(told[0].message).split()[2]) <= 0.7 * mask_steps + 1


def test_a_resumed_run_goes_on_from_the_looks_before(tmp_path: Path) -> None:
    module, callback = Masks(keep=0.5), TrackBudget(every_n_steps=10)
    for step in (30, 40):
        look(callback, module, tmp_path, step)
    resumed, trainer, checkpoint = TrackBudget(every_n_steps=10), fake_trainer(tmp_path), {}
    callback.on_save_checkpoint(trainer, module, checkpoint)
    resumed.on_load_checkpoint(trainer, module, checkpoint)
    with pytest.warns(UserWarning, match="At step 50 of 100"):
        look(resumed, module, tmp_path, 50)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"every_n_steps": 0}, "`every_n_steps` must be 1 or more, got 0"),
        ({"tolerance": 0}, "`tolerance` must be above 0, got 0"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrackBudget(**settings)


def test_a_module_without_masks_is_refused_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`TrackBudget` needs a module that learns masks"):
        TrackBudget().on_fit_start(fake_trainer(tmp_path), LightningModule())
