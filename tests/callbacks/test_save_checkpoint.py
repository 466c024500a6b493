from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule

from callbacks import SaveCheckpoint
from callbacks.save_checkpoint import check_readable, is_readable, latest_checkpoint
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


def test_last_is_the_newest_written_even_if_an_earlier_run_got_further(tmp_path: Path) -> None:
    train(SaveCheckpoint(every_n_steps=10, keep=2), tmp_path, range(1, 41))
    with pytest.warns(UserWarning, match="of an earlier run.* add `--ckpt_path last`"):
        train(SaveCheckpoint(every_n_steps=10, keep=2), tmp_path, range(1, 11))
    found = latest_checkpoint(tmp_path)
    assert found is not None
    assert found.name == "step=10.ckpt"


def damage(path: Path) -> None:
    times = path.stat()
    path.write_bytes(path.read_bytes()[:-200])
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def test_a_damaged_checkpoint_is_passed_over_with_a_warning(tmp_path: Path) -> None:
    train(SaveCheckpoint(every_n_steps=5, keep=2), tmp_path, range(1, 11))
    damage(tmp_path / "checkpoints" / "step=10.ckpt")
    with pytest.warns(UserWarning, match="step=10.ckpt is damaged"):
        found = latest_checkpoint(tmp_path)
    assert found == tmp_path / "checkpoints" / "step=5.ckpt"


def test_a_flipped_bit_is_found(tmp_path: Path) -> None:
    train(SaveCheckpoint(every_n_steps=5), tmp_path, range(1, 6))
    path = tmp_path / "checkpoints" / "step=5.ckpt"
    assert is_readable(path)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1  # in the numbers of the tensor
    path.write_bytes(content)
    assert not is_readable(path)


@pytest.mark.filterwarnings("ignore:.*is damaged")
def test_nothing_readable_is_an_error_and_nothing_at_all_is_none(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path) is None
    train(SaveCheckpoint(every_n_steps=5, keep=2), tmp_path, range(1, 11))
    for path in (tmp_path / "checkpoints").iterdir():
        damage(path)
    with pytest.raises(ValueError, match="None of the 2 checkpoints .* can be read"):
        latest_checkpoint(tmp_path)
    with pytest.raises(ValueError, match="there is no good one beside it"):
        check_readable(tmp_path / "checkpoints" / "step=5.ckpt")


def test_a_missing_checkpoint_is_named_with_the_one_that_is_there(tmp_path: Path) -> None:
    train(SaveCheckpoint(every_n_steps=5), tmp_path, range(1, 6))
    with pytest.raises(ValueError, match="step=7.ckpt does not exist; resume from .*step=5.ckpt"):
        check_readable(tmp_path / "checkpoints" / "step=7.ckpt")


def test_a_sharded_checkpoint_is_a_folder_of_whole_archives(tmp_path: Path) -> None:
    train(SaveCheckpoint(every_n_steps=5), tmp_path, range(1, 6))
    sharded = tmp_path / "step=9.ckpt"
    sharded.mkdir()
    assert not is_readable(sharded)
    shutil.copy(tmp_path / "checkpoints" / "step=5.ckpt", sharded / "rank_0.pt")
    assert is_readable(sharded)
    damage(sharded / "rank_0.pt")
    assert not is_readable(sharded)


@pytest.mark.parametrize("name", ["every_n_steps", "keep"])
def test_settings_out_of_range_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"`{name}` must be 1 or more, got 0"):
        SaveCheckpoint(**{name: 0})
