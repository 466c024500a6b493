from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.loggers import CSVLogger

from secateur.callbacks import show_progress
from secateur.callbacks.show_progress import ShowProgress
from tests.callbacks.fakes import fake_trainer


class Clock:
    """Stands in for the module `time`."""

    now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(show_progress, "time", clock)
    return clock


def train(root: Path, clock: Clock, steps: int, **more: Any) -> ShowProgress:
    """Ten seconds a step, two batches each, from step 20 on."""
    callback, module = ShowProgress(), LightningModule()
    figures = {"train_loss": 3.25, "kept": 0.71}
    more = {"progress_bar_callback": None, "progress_bar_metrics": figures, "loggers": []} | more
    callback.on_train_start(fake_trainer(root, 20, **more), module)
    for step in range(21, 21 + steps):
        clock.now += 10
        for batch in range(2):
            callback.on_train_batch_end(fake_trainer(root, step, **more), module, None, None, batch)
    return callback


def test_lines_have_step_figures_and_the_time_left(
    tmp_path: Path, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", logger="lightning.pytorch.utilities.rank_zero"):
        train(tmp_path, clock, steps=5)
    assert caplog.messages == [
        "Step 21 of 100, train_loss 3.25, kept 0.71, 13 min 10 s left.",
        "Step 24 of 100, train_loss 3.25, kept 0.71, 12 min 40 s left.",
    ]


def test_metrics_are_on_disk_every_minute_and_with_a_checkpoint(
    tmp_path: Path, clock: Clock
) -> None:
    logger = CSVLogger(tmp_path, name="metrics")
    file = tmp_path / "metrics" / "version_0" / "metrics.csv"
    logger.log_metrics({"loss": 1.0}, step=1)
    train(tmp_path, clock, steps=5, loggers=[logger])
    assert not file.exists()
    callback = train(tmp_path, clock, steps=6, loggers=[logger])
    assert "1.0" in file.read_text()
    logger.log_metrics({"loss": 2.0}, step=2)
    callback.on_save_checkpoint(fake_trainer(tmp_path, loggers=[logger]), LightningModule(), {})
    assert "2.0" in file.read_text()


class Phased(LightningModule):
    """Tells two phases of its own."""

    def phases(self, trainer: Any) -> list[tuple[int, str]]:
        return [(0, "learn masks for 40 steps"), (40, "cut the model"), (40, "train Gains")]


class Exporting(Callback):
    """Tells a last phase, though it comes first in the list of callbacks."""

    def phases(self, trainer: Any) -> list[tuple[int, str]]:
        return [(100, "export the model")]


def test_phases_are_listed_and_told_when_they_begin(
    tmp_path: Path, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    more = {"progress_bar_callback": None, "progress_bar_metrics": {}, "loggers": []}
    callback, module = ShowProgress(), Phased()

    def trainer(step: int) -> Any:
        return fake_trainer(tmp_path, step, callbacks=[Exporting(), callback], **more)

    with caplog.at_level("INFO", logger="lightning.pytorch.utilities.rank_zero"):
        callback.on_fit_start(trainer(20), module)
        callback.on_train_start(trainer(20), module)
        clock.now += 10
        for batch in range(2):
            callback.on_train_batch_end(trainer(21), module, None, None, batch)
    assert caplog.messages == [
        "Phases of this run:\n"
        "  1. learn masks for 40 steps\n"
        "  2. cut the model\n"
        "  3. train Gains\n"
        "  4. export the model",
        "Step 21 of 100, 13 min 10 s left.",
        "At the pace of these steps, phase 2 begins in 3 min 10 s, phase 4 begins in 13 min 10 s.",
    ]
