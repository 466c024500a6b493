"""Learning rates: warm-up, then cosine, linear, constant, or stable with a decay."""

from __future__ import annotations

import pytest
import torch
from transformers import get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup

from secateur.modules.rate_schedule import RateSchedule, rate_of_masks, rate_of_settled
from secateur.pruning.schedules import Linear


def rates(schedule: RateSchedule, warmup_steps: int, steps: int) -> list[float]:
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    scheduler = schedule.of(optimizer, warmup_steps, steps)
    return [_next(optimizer, scheduler) for _ in range(steps)]


def _next(
    optimizer: torch.optim.Optimizer, scheduler: torch.optim.lr_scheduler.LRScheduler
) -> float:
    rate = scheduler.get_last_lr()[0]
    optimizer.step()
    scheduler.step()
    return rate


@pytest.mark.parametrize(
    ("schedule", "theirs"),
    [
        (RateSchedule(), get_cosine_schedule_with_warmup),
        (RateSchedule(Linear()), get_linear_schedule_with_warmup),
    ],
)
def test_cosine_and_linear_are_those_of_transformers(
    schedule: RateSchedule, theirs: object
) -> None:
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    scheduler = theirs(optimizer, 5, 20)  # type: ignore[operator]
    expected = [_next(optimizer, scheduler) for _ in range(20)]
    assert rates(schedule, 5, 20) == pytest.approx(expected, abs=1e-12)


def test_the_case_worked_by_hand() -> None:
    schedule = RateSchedule(Linear(), start=0.5, floor=0.2)
    assert [schedule(x) for x in (0.0, 0.5, 0.75, 1.0)] == pytest.approx([1, 1, 0.6, 0.2])


def test_a_constant_rate_and_warm_up_stable_decay() -> None:
    assert rates(RateSchedule(start=1.0), 2, 6) == [0.0, 0.5, 1, 1, 1, 1]
    stable = rates(RateSchedule(Linear(), start=0.5), 2, 10)
    assert stable == pytest.approx([0, 0.5, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25])
    assert rates(RateSchedule(), 0, 1) == [1.0]


@pytest.mark.parametrize(("name", "value"), [("start", 1.5), ("floor", -0.1)])
def test_a_setting_outside_its_range_is_refused(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"`{name}` must be in \[0, 1\], got {value}"):
        RateSchedule(**{name: value})


def test_rates_of_gates_and_settled_model_worked_by_hand() -> None:
    """Four steps of masks; of the twenty after them, the rate rises in the first two."""
    assert [rate_of_masks(step, 4) for step in (0, 2, 4)] == pytest.approx([1, 0.5, 0])
    settled = [rate_of_settled(step, 4, 24) for step in (3, 4, 14, 24)]
    assert settled == pytest.approx([0, 0.5, 0.5, 0])
    assert rate_of_masks(0, 0) == 0  # no step learns masks
    assert rate_of_settled(0, 0, 1) == 1
