"""What a run keeps to go on from: complete or refused, ended or not, of one run at a time."""

from __future__ import annotations

import fcntl
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import pytest
import torch

from secateur.modules import CausalLM
from secateur.pruning.files.checkpoints import seal, write_whole
from tests.runs import (
    NOISE,
    call,
    content,
    learn_masks,
    make_inputs,
    on_text,
    with_callbacks,
)

pytestmark = NOISE


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def saved(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a run that learns masks, in the middle."""
    root = tmp_path_factory.mktemp("saved")
    call([*learn_masks(inputs, root, 8, ["SaveCheckpoint"]), "--trainer.logger=false"])
    return root / "checkpoints" / "step=6.ckpt"


def recovery(inputs: Path, root: Path, max_steps: int, *callbacks: str) -> list[str]:
    return [
        "fit",
        "--model=CausalLM",
        f"--model.base={inputs / 'base'}",
        "--model.warmup_steps=1",
        *on_text(inputs, root),
        f"--trainer.max_steps={max_steps}",
        "--trainer.logger=false",
        *callbacks,
        *with_callbacks(["SaveCheckpoint", "ExportModel"], every_n_steps=2),
    ]


# What is incomplete


def without(key: str) -> Callable[[dict[str, Any]], object]:
    return lambda checkpoint: checkpoint.pop(key)


def without_weight(checkpoint: dict[str, Any]) -> None:
    del checkpoint["state_dict"]["start_N"]


def with_other_shape(checkpoint: dict[str, Any]) -> None:
    checkpoint["state_dict"]["start_N"] = checkpoint["state_dict"]["start_N"][1:]


INCOMPLETE: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "no weights": (lambda checkpoint: checkpoint["state_dict"].clear(), "lacks state_dict"),
    "no settings": (without("secateur"), "lacks secateur"),
    "no loops": (without("loops"), "lacks loops"),
    "no optimiser": (without("optimizer_states"), "lacks optimizer_states"),
    "no averages": (
        lambda checkpoint: checkpoint["optimizer_states"][0]["state"].clear(),
        "lacks the state of the optimiser",
    ),
    "a weight less": (without_weight, "lacks the weights start_N"),
    "settled masks": (
        lambda checkpoint: checkpoint["state_dict"].pop("settled_N"),
        "lacks the weights settled_N",
    ),
    "another shape": (with_other_shape, r"has start_N in shape \([0-9]+,\) instead of"),
}


@pytest.mark.parametrize(("change", "message"), INCOMPLETE.values(), ids=INCOMPLETE)
def test_an_incomplete_checkpoint_is_refused(
    change: Callable[[dict[str, Any]], object],
    message: str,
    inputs: Path,
    saved: Path,
    tmp_path: Path,
) -> None:
    """Though it has a right checksum, as by another program."""
    checkpoint = torch.load(saved, weights_only=True)
    change(checkpoint)

    def write(file: BinaryIO) -> None:
        torch.save(checkpoint, file)
        seal(file, 1, 6)

    write_whole(tmp_path / "step=6.ckpt", write)
    run = learn_masks(inputs, tmp_path / "run", 8, ["SaveCheckpoint"])
    with pytest.raises(ValueError, match=message):
        call([*run, "--trainer.logger=false", f"--ckpt_path={tmp_path / 'step=6.ckpt'}"])


# What has ended


def test_training_that_was_stopped_early_is_exported_again_and_not_trained_on(
    inputs: Path, tmp_path: Path
) -> None:
    stop = [
        "--trainer.callbacks+=lightning.pytorch.callbacks.EarlyStopping",
        "--trainer.callbacks.monitor=val_perplexity",
        "--trainer.callbacks.stopping_threshold=1.0e+9",
        "--trainer.val_check_interval=2",
    ]
    run = recovery(inputs, tmp_path / "run", 6, *stop)
    with pytest.warns(UserWarning, match="after 2 of 6 steps"):
        assert call(run).trainer.global_step == 2
    first = (tmp_path / "run" / "model" / "model.safetensors").read_bytes()
    with pytest.warns(UserWarning, match="after 2 of 6 steps"):
        assert call([*run, "--ckpt_path=last"]).trainer.global_step == 2
    assert (tmp_path / "run" / "model" / "model.safetensors").read_bytes() == first


def test_without_steps_a_failed_export_is_repeated_from_a_checkpoint(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prune = ["--trainer.callbacks+=PruneBlocks", "--trainer.callbacks.target=Blocks"]
    prune += ["--trainer.callbacks.target.count=1", "--trainer.callbacks.calibration_windows=4"]
    run = recovery(inputs, tmp_path / "run", 0, *prune)

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(CausalLM, "export", fail)
        with pytest.raises(OSError, match="No space left") as failure:
            call(run)
    assert "repeat the export without training" in failure.value.__notes__[0]
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step=0.ckpt"]
    call([*run, "--ckpt_path=last"])
    call([*recovery(inputs, tmp_path / "other", 0, *prune)])
    weights = "model/model.safetensors"
    assert content(tmp_path / "run")[weights] == content(tmp_path / "other")[weights]


# One run at a time


def test_a_folder_in_use_is_refused_before_anything_is_read(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That another process holds the lock is tested beside it."""

    def held(*_: object) -> None:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(fcntl, "lockf", held)
    run = learn_masks(inputs, tmp_path / "run")
    with pytest.raises(ValueError, match="`--trainer.default_root_dir` .*/run is in use by"):
        call([*run, f"--data.cache_dir={tmp_path / 'cache'}"])
    assert {path.name for path in tmp_path.rglob("*")} == {"run", ".lock"}
