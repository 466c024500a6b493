from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule

from callbacks import SaveCheckpoint
from pruning.checkpoints import latest_checkpoint
from tests.callbacks.fakes import fake_trainer


class _Strategy:
    def remove_checkpoint(self, path: Path) -> None:
        path.unlink()


def trainer_at(root: Path, step: int, **more: Any) -> Any:
    trainer = fake_trainer(root, step, strategy=_Strategy(), ckpt_path=None, **more)

    def save(path: str, weights_only: bool) -> None:
        assert weights_only is False
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        torch.save({"step": trainer.global_step, "x": torch.arange(1000)}, path)

    trainer.save_checkpoint = save
    return trainer


def train(callback: SaveCheckpoint, root: Path, steps: range) -> None:
    module = LightningModule()
    callback.on_fit_start(trainer_at(root, steps[0]), module)
    for step in steps:
        callback.on_train_batch_end(trainer_at(root, step), module, None, None, 0)
    callback.on_train_end(trainer_at(root, steps[-1]), module)


def names(root: Path) -> set[str]:
    return {path.name for path in (root / "checkpoints").iterdir()}


def test_the_newest_stay_and_the_end_is_saved_too(tmp_path: Path) -> None:
    callback = SaveCheckpoint(every_n_steps=5, keep=3)
    train(callback, tmp_path, range(1, 23))
    assert names(tmp_path) == {"step=15.ckpt", "step=20.ckpt", "step=22.ckpt"}
    assert Path(callback.last_model_path).name == "step=22.ckpt"


def test_a_step_is_saved_once_though_it_has_several_batches(tmp_path: Path) -> None:
    callback, module = SaveCheckpoint(every_n_steps=2), LightningModule()
    callback.on_train_batch_end(trainer_at(tmp_path, 2), module, None, None, 0)
    (path,) = (tmp_path / "checkpoints").iterdir()
    written = path.stat().st_mtime_ns
    callback.on_train_batch_end(trainer_at(tmp_path, 2), module, None, None, 1)
    assert path.stat().st_mtime_ns == written


def test_the_checkpoints_of_an_earlier_run_are_named_at_the_start(tmp_path: Path) -> None:
    train(SaveCheckpoint(every_n_steps=10, keep=2), tmp_path, range(1, 41))
    with pytest.warns(UserWarning, match="of an earlier run.* add `--ckpt_path last`"):
        train(SaveCheckpoint(every_n_steps=10, keep=2), tmp_path, range(1, 11))
    assert latest_checkpoint(tmp_path) == tmp_path / "checkpoints" / "step=10.ckpt"


@pytest.mark.parametrize("name", ["every_n_steps", "keep"])
def test_settings_out_of_range_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"`{name}` must be 1 or more, got 0"):
        SaveCheckpoint(**{name: 0})
