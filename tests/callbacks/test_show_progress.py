from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import LightningModule
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
