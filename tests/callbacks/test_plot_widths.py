from __future__ import annotations

from pathlib import Path

import pytest
from lightning.pytorch import LightningModule
from matplotlib.image import imread

from secateur.callbacks import PlotWidths
from tests.callbacks.fakes import Masks, fake_trainer


def test_a_picture_follows_every_validation_and_the_end(tmp_path: Path) -> None:
    module, callback = Masks(), PlotWidths()
    callback.on_validation_end(fake_trainer(tmp_path, step=0, sanity_checking=True), module)
    callback.on_validation_end(fake_trainer(tmp_path, step=40), module)
    callback.on_fit_end(fake_trainer(tmp_path, step=100), module)
    pictures = sorted((tmp_path / "plots").iterdir())
    assert [path.name for path in pictures] == ["widths.png", "widths_step_000040.png"]
    for path in pictures:
        pixels = imread(path)
        assert pixels.shape[:2] == (int((1.5 + 0.45 * 5) * 150), 750)  # 5 sites; 5 inches wide
        assert len({tuple(pixel) for pixel in pixels.reshape(-1, pixels.shape[2])}) > 10


def test_one_rank_draws(tmp_path: Path) -> None:
    PlotWidths().on_fit_end(fake_trainer(tmp_path, is_global_zero=False), Masks())
    assert not list(tmp_path.iterdir())


def test_a_module_without_masks_is_refused_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`PlotWidths` needs a module that learns masks"):
        PlotWidths().on_fit_start(fake_trainer(tmp_path), LightningModule())
