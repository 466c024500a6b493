from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import LightningModule

from secateur.callbacks import AnnealSparsity
from secateur.pruning.schedules import Cosine, Cubic, Linear
from tests.callbacks.fakes import Masks, fake_trainer


def follow(callback: AnnealSparsity, module: Masks, root: Path, steps: range, total: int) -> Any:
    """(target, temperature) at every step."""
    module.mask_steps = total
    callback.on_fit_start(fake_trainer(root, steps[0], total), module)
    callback.on_train_start(fake_trainer(root, steps[0], total), module)
    seen = []
    for step in steps:
        callback.on_train_batch_start(fake_trainer(root, step, total), module, None, 0)
        seen.append((module.keep_target, module.temperature))
    return seen


@pytest.mark.parametrize(
    ("curve", "expected"),
    [
        # 8 steps to the budget of 0.5: the target falls by half of the curve's value.
        (Linear(), {0: 1.0, 2: 0.875, 4: 0.75, 8: 0.5, 12: 0.5}),
        (Cubic(), {0: 1.0, 2: 1 - (1 - 0.75**3) / 2, 4: 0.5625, 8: 0.5, 15: 0.5}),
        (Cosine(), {0: 1.0, 4: 0.75, 8: 0.5}),
    ],
)
def test_the_target_follows_its_curve(
    curve: Any, expected: dict[int, float], tmp_path: Path
) -> None:
    callback = AnnealSparsity(over=0.5, curve=curve)
    seen = follow(callback, Masks(), tmp_path, range(16), 16)
    for step, target in expected.items():
        assert seen[step][0] == pytest.approx(target), step
    assert [target for target, _ in seen] == sorted((t for t, _ in seen), reverse=True)
    assert {temperature for _, temperature in seen} == {0.4}  # left alone unless asked


def test_over_zero_asks_for_the_budget_at_once(tmp_path: Path) -> None:
    seen = follow(AnnealSparsity(over=0), Masks(keep=0.3), tmp_path, range(3), 10)
    assert [target for target, _ in seen] == pytest.approx([0.3] * 3)


def test_the_temperature_moves_from_the_modules_to_its_end(tmp_path: Path) -> None:
    callback = AnnealSparsity(end_temperature=0.1)
    seen = follow(callback, Masks(), tmp_path, range(11), 10)
    assert seen[0][1] == pytest.approx(0.4)
    assert seen[5][1] == pytest.approx(0.25)
    assert seen[10][1] == pytest.approx(0.1)


def test_a_resumed_run_follows_the_same_curves(tmp_path: Path) -> None:
    def new() -> AnnealSparsity:
        return AnnealSparsity(over=0.7, end_temperature=0.1)

    whole = follow(new(), Masks(), tmp_path, range(20), 20)
    first, second = new(), new()
    head = follow(first, Masks(), tmp_path, range(9), 20)
    second.load_state_dict(first.state_dict())  # Lightning loads before the run starts
    assert head + follow(second, Masks(), tmp_path, range(9, 20), 20) == whole


@pytest.mark.parametrize(
    ("other", "total", "message"),
    [
        (AnnealSparsity(over=0.6), 20, "`over` was 0.5 and is now 0.6"),
        (AnnealSparsity(over=0.5, curve=Linear()), 20, "`curve` was 'Cubic' and is now 'Linear'"),
        (
            AnnealSparsity(over=0.5, end_temperature=0.1),
            20,
            "`end_temperature` was None and is now 0.1",
        ),
        (AnnealSparsity(over=0.5), 30, "`steps` was 20 and is now 30"),
    ],
)
def test_a_run_goes_on_along_the_same_curves_only(
    other: AnnealSparsity, total: int, message: str, tmp_path: Path
) -> None:
    first = AnnealSparsity(over=0.5)
    follow(first, Masks(), tmp_path, range(2), 20)
    other.load_state_dict(first.state_dict())
    with pytest.raises(ValueError, match=message):
        follow(other, Masks(), tmp_path, range(2, 4), total)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"over": 1.5}, r"`over` must be in \[0, 1\], got 1.5"),
        ({"end_temperature": 0}, "`end_temperature` must be above 0, got 0"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AnnealSparsity(**settings)


def test_a_module_without_masks_is_refused_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`AnnealSparsity` needs a module that learns masks"):
        AnnealSparsity().on_fit_start(fake_trainer(tmp_path), LightningModule())
