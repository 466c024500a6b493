from __future__ import annotations

import logging
import os
import signal
import threading
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO

import pytest
import torch
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.pytorch import LightningModule
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import distributed

from secateur.callbacks import SaveCheckpoint
from secateur.callbacks._preemption import SIGNALS, Preempted, requeue
from secateur.callbacks.save_checkpoint import WholeFiles
from secateur.pruning.files.checkpoints import (
    best_checkpoint,
    latest_checkpoint,
    next_run,
    read_figures,
)
from tests.callbacks.fakes import fake_trainer


class _Strategy:
    """Of one rank; or of two, of which the other has got a signal or starts at another step."""

    def __init__(
        self, other_asked: bool = False, first: int | None = None, io: WholeFiles | None = None
    ) -> None:
        self.other_asked, self.first = other_asked, first
        self.checkpoint_io = io or WholeFiles(1)

    def barrier(self, name: str) -> None:
        pass

    def broadcast(self, step: int) -> int:
        return step if self.first is None else self.first

    def reduce_boolean_decision(self, decision: bool, all: bool) -> bool:
        return decision if all else decision or self.other_asked


def trainer_at(root: Path, step: int, **more: Any) -> Any:
    settings = {"strategy": _Strategy(), "ckpt_path": None, "global_rank": 0} | more
    settings.setdefault("state", SimpleNamespace(fn=TrainerFn.FITTING))
    settings.setdefault("lightning_module", torch.nn.Linear(1, 1))
    settings.setdefault("accumulate_grad_batches", 1)
    settings.setdefault("val_check_interval", 1)
    settings.setdefault("limit_val_batches", 1)
    settings.setdefault("max_steps", 100)
    settings.setdefault("callbacks", [])
    between = settings.pop("between_batches", False)
    loop = SimpleNamespace(_should_accumulate=lambda: between)
    settings["fit_loop"] = SimpleNamespace(epoch_loop=loop)
    trainer = fake_trainer(root, step, **settings)

    def save(path: Path, weights_only: bool) -> None:
        assert weights_only is False
        content = {"global_step": trainer.global_step, "x": torch.arange(1000)}
        trainer.strategy.checkpoint_io.save_checkpoint(content, path)

    trainer.save_checkpoint = save
    return trainer


def train(callback: SaveCheckpoint, root: Path, steps: range) -> None:
    module = LightningModule()
    run = WholeFiles(next_run(root / "checkpoints"))
    callback.on_fit_start(trainer_at(root, steps[0]), module)
    for step in steps:
        trainer = trainer_at(root, step, strategy=_Strategy(io=run))
        callback.on_train_batch_end(trainer, module, None, None, 0)
    callback.on_train_end(trainer, module)
    callback.teardown(trainer, module, "fit")


def names(root: Path) -> set[str]:
    return {path.name for path in (root / "checkpoints").iterdir()}


def test_the_newest_stay_and_the_end_is_saved_too(tmp_path: Path) -> None:
    callback = SaveCheckpoint(every_n_steps=5, keep=3)
    train(callback, tmp_path, range(1, 23))
    assert names(tmp_path) == {"step=15.ckpt", "step=20.ckpt", "step=22.ckpt"}
    assert Path(callback.last_model_path).name == "step=22.ckpt"


def test_training_that_ended_early_has_ended(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The checkpoint of its last step, written at that step, is written again at the end."""
    callback = SaveCheckpoint(every_n_steps=5)
    train(callback, tmp_path, range(1, 11))
    saved: dict[str, Any] = {}
    callback.on_save_checkpoint(trainer_at(tmp_path, 10), LightningModule(), saved)
    again = SaveCheckpoint(every_n_steps=5)
    trainer = trainer_at(tmp_path, 10, ckpt_path=callback.last_model_path)
    again.on_load_checkpoint(trainer, LightningModule(), saved)
    with caplog.at_level(logging.INFO):
        again.on_fit_start(trainer, LightningModule())
    assert trainer.should_stop
    assert "Training has ended early" in caplog.text
    again.teardown(trainer, LightningModule(), "fit")
    whole = SaveCheckpoint(every_n_steps=5)
    train(whole, tmp_path / "other", range(91, 101))
    whole.on_save_checkpoint(trainer_at(tmp_path, 100), LightningModule(), saved)
    assert saved == {"ended_early": False}


def test_without_steps_there_is_a_checkpoint_to_repeat_the_export_from(tmp_path: Path) -> None:
    callback, trainer = SaveCheckpoint(), trainer_at(tmp_path, 0, max_steps=0)
    callback.on_fit_start(trainer, LightningModule())
    callback.teardown(trainer, LightningModule(), "fit")
    assert names(tmp_path) == {"step=0.ckpt"}


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


@pytest.mark.parametrize(("name", "least"), [("every_n_steps", 1), ("keep", 1), ("keep_best", 0)])
def test_settings_out_of_range_are_refused(name: str, least: int) -> None:
    with pytest.raises(ValueError, match=f"`{name}` must be {least} or more, got {least - 1}"):
        SaveCheckpoint(**{name: least - 1})


# The best


def course(
    callback: SaveCheckpoint, root: Path, figures: dict[int, float], start: int = 0
) -> SaveCheckpoint:
    """A run whose validations after these steps give these figures."""
    module = LightningModule()
    ckpt_path = root / "checkpoints" / f"step={start}.ckpt" if start else None
    run = _Strategy(io=WholeFiles(next_run(root / "checkpoints")))
    at_start = trainer_at(root, start, ckpt_path=ckpt_path, strategy=run)
    try:
        for hook in (callback.on_fit_start, callback.on_train_start):
            hook(at_start, module)
        for step, figure in figures.items():
            metrics = {"val_perplexity": torch.tensor(figure)}
            trainer = trainer_at(root, step, callback_metrics=metrics, strategy=run)
            callback.on_train_batch_end(trainer, module, None, None, 0)
            callback.on_validation_end(trainer, module)
    finally:
        callback.teardown(at_start, module, "fit")
    return callback


def test_the_best_stay_beside_the_newest(tmp_path: Path) -> None:
    """By hand: 7 is lowest, then the first of two 8s; the infinite and the NaN never count."""
    figures = {1: 9.0, 2: 8.0, 3: float("nan"), 4: 7.0, 5: 8.0, 6: float("inf"), 7: 30.0, 8: 20.0}
    course(SaveCheckpoint(every_n_steps=3, keep=1, keep_best=2), tmp_path, figures)
    assert names(tmp_path) == {"step=2.ckpt", "step=4.ckpt", "step=6.ckpt", "best.json"}
    assert read_figures(tmp_path / "checkpoints") == {"step=4.ckpt": 7.0, "step=2.ckpt": 8.0}
    assert best_checkpoint(tmp_path) == tmp_path / "checkpoints" / "step=4.ckpt"
    assert latest_checkpoint(tmp_path) == tmp_path / "checkpoints" / "step=6.ckpt"


def test_a_resumed_run_goes_on_choosing_and_a_new_one_starts_anew(tmp_path: Path) -> None:
    settings = {"every_n_steps": 1, "keep": 1, "keep_best": 2}
    course(SaveCheckpoint(**settings), tmp_path, {1: 5.0, 2: 3.0, 3: 4.0})
    course(SaveCheckpoint(**settings), tmp_path, {4: 9.0, 5: 3.5}, start=3)
    assert names(tmp_path) == {"step=2.ckpt", "step=5.ckpt", "best.json"}
    course(SaveCheckpoint(**settings), tmp_path, {3: 1.0}, start=2)  # back: 5 has not been yet
    assert read_figures(tmp_path / "checkpoints") == {"step=3.ckpt": 1.0, "step=2.ckpt": 3.0}
    assert names(tmp_path) == {"step=2.ckpt", "step=3.ckpt", "best.json"}
    with pytest.warns(UserWarning, match="of an earlier run"):
        course(SaveCheckpoint(**settings), tmp_path, {2: 8.0})
    assert read_figures(tmp_path / "checkpoints") == {"step=2.ckpt": 8.0}
    assert names(tmp_path) == {"step=2.ckpt", "best.json"}
    # One that chooses nothing leaves what has been chosen.
    course(SaveCheckpoint(every_n_steps=1, keep=1, monitor="loss"), tmp_path, {3: 8.0}, start=2)
    assert names(tmp_path) == {"step=2.ckpt", "step=3.ckpt", "best.json"}
    assert read_figures(tmp_path / "checkpoints", "val_perplexity") == {"step=2.ckpt": 8.0}


def test_a_figure_of_another_name_is_refused(tmp_path: Path) -> None:
    course(SaveCheckpoint(keep=1, keep_best=1, monitor="val_perplexity"), tmp_path, {1: 5.0})
    with pytest.raises(
        ValueError, match="`monitor` is 'loss', and .* selected by 'val_perplexity'"
    ):
        course(SaveCheckpoint(keep_best=1, monitor="loss"), tmp_path, {2: 5.0}, start=1)
    assert names(tmp_path) == {"step=1.ckpt", "best.json"}


def test_nothing_is_chosen_between_the_batches_of_a_step(tmp_path: Path) -> None:
    callback, module = SaveCheckpoint(keep_best=2), LightningModule()
    trainer = trainer_at(tmp_path, 0, accumulate_grad_batches=2, val_check_interval=3)
    with pytest.raises(ValueError, match=r"every 3 batches falls .*to a multiple of 2"):
        callback.check_first(trainer, module)
    metrics = {"val_perplexity": torch.tensor(1.0)}
    settings: dict[str, Any] = {"callback_metrics": metrics, "accumulate_grad_batches": 2}
    trainer = trainer_at(tmp_path, 1, between_batches=True, **settings)
    with pytest.raises(ValueError, match="falls between the 2 batches of a step"):
        callback.on_validation_end(trainer, module)
    assert not (tmp_path / "checkpoints").exists()


def test_a_monitor_that_is_not_logged_is_refused_with_what_is(tmp_path: Path) -> None:
    trainer = trainer_at(
        tmp_path, 0, sanity_checking=True, callback_metrics={"val_perplexity": torch.tensor(1.0)}
    )
    with pytest.raises(ValueError, match=r"`monitor` is 'loss', .*; it logs val_perplexity\."):
        SaveCheckpoint(keep_best=1, monitor="loss").on_validation_end(trainer, LightningModule())


def test_without_validation_there_is_no_best(tmp_path: Path) -> None:
    callback, module = SaveCheckpoint(keep_best=1), LightningModule()
    with pytest.raises(ValueError, match="`keep_best` is 1 and `trainer.limit_val_batches` is 0"):
        callback.check_first(trainer_at(tmp_path, 0, limit_val_batches=0), module)
    with pytest.warns(UserWarning, match="no validation has given a figure"):
        callback.on_train_end(trainer_at(tmp_path, 1), module)


def test_parameters_that_are_no_numbers_are_not_saved(tmp_path: Path) -> None:
    callback, broken = SaveCheckpoint(every_n_steps=1), torch.nn.Linear(1, 1)
    train(callback, tmp_path, range(1, 3))
    torch.nn.init.constant_(broken.weight, float("nan"))
    trainer = trainer_at(tmp_path, 3, lightning_module=broken)
    with pytest.raises(FloatingPointError, match=r"Step 3 made .* last good checkpoint: .*step=2"):
        callback.on_train_batch_end(trainer, LightningModule(), None, None, 0)
    assert "step=3.ckpt" not in names(tmp_path)


def test_a_trial_saves_nothing(tmp_path: Path) -> None:
    SaveCheckpoint().on_train_end(trainer_at(tmp_path, 1, fast_dev_run=1), LightningModule())
    assert not (tmp_path / "checkpoints").exists()


def test_a_write_that_is_cut_off_leaves_nothing_under_the_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    callback, module = SaveCheckpoint(every_n_steps=2), LightningModule()
    callback.on_train_batch_end(trainer_at(tmp_path, 2), module, None, None, 0)
    trainer = trainer_at(tmp_path, 4)

    def die(content: object, file: BinaryIO) -> None:
        file.write(b"half of")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", die)
    with pytest.raises(OSError, match="No space left"):
        callback.on_train_batch_end(trainer, module, None, None, 0)
    assert callback.last_model_path.endswith("step=2.ckpt")
    assert names(tmp_path) == {"step=2.ckpt"}


def test_a_checkpoint_is_not_put_together_in_memory_first(tmp_path: Path) -> None:
    """What a write holds beside the tensors does not grow with them."""
    content = {"x": torch.zeros(2**24), "global_step": 3}  # 64 MB, in memory before
    peaks = []
    for io in (TorchCheckpointIO(), WholeFiles(1)):
        tracemalloc.start()
        io.save_checkpoint(content, tmp_path / f"{len(peaks)}.ckpt")
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[0] > 2**26 > 50 * peaks[1]
    plain, sealed = ((tmp_path / f"{n}.ckpt").read_bytes() for n in (0, 1))
    assert plain[:-2] == sealed[: len(plain) - 2]  # then come the length of the seal and the seal


def test_another_way_to_write_checkpoints_is_refused(tmp_path: Path) -> None:
    strategy = SingleDeviceStrategy(checkpoint_io=AsyncCheckpointIO())
    with pytest.raises(ValueError, match="`trainer.plugins` has AsyncCheckpointIO, .* remove it"):
        SaveCheckpoint().setup(trainer_at(tmp_path, 0, strategy=strategy), LightningModule(), "fit")


def test_ranks_that_start_at_different_steps_are_refused(tmp_path: Path) -> None:
    callback, module = SaveCheckpoint(), LightningModule()
    trainer = trainer_at(tmp_path, 3, strategy=_Strategy(first=6), global_rank=1)
    with pytest.raises(ValueError, match="Rank 1 starts at step 3, rank 0 at step 6: .* share"):
        callback.on_train_start(trainer, module)
    callback.teardown(trainer, module, "fit")


# Signals


@pytest.fixture
def heard() -> Iterator[None]:
    """Signals do what they do by default, though nohup or a shell may ignore some of them."""
    before = [signal.getsignal(number) for number in SIGNALS]
    for number in SIGNALS:
        handler = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
        signal.signal(number, handler)
    yield
    for number, handler in zip(SIGNALS, before, strict=True):
        signal.signal(number, handler)


@pytest.fixture
def running(heard: None, tmp_path: Path) -> Iterator[SaveCheckpoint]:
    """A callback of a run that has made one step; what signals did before is there again after."""
    before = [signal.getsignal(number) for number in SIGNALS]
    callback, module = SaveCheckpoint(every_n_steps=5), LightningModule()
    callback.on_fit_start(trainer_at(tmp_path, 0), module)
    callback.on_train_start(trainer_at(tmp_path, 0), module)
    callback.on_train_batch_end(trainer_at(tmp_path, 1), module, None, None, 0)
    yield callback
    callback.teardown(trainer_at(tmp_path, 1), module, "fit")
    assert [signal.getsignal(number) for number in SIGNALS] == before


@pytest.mark.parametrize("number", SIGNALS, ids=lambda n: n.name)
def test_a_signal_ends_the_step_and_saves(
    number: int, running: SaveCheckpoint, tmp_path: Path
) -> None:
    os.kill(os.getpid(), number)
    assert not (tmp_path / "checkpoints").exists()
    # A batch that ends no optimiser step: what it has accumulated is in no checkpoint.
    running.on_train_batch_end(trainer_at(tmp_path, 1), LightningModule(), None, None, 1)
    with pytest.raises(Preempted) as stop:
        running.on_train_batch_end(trainer_at(tmp_path, 2), LightningModule(), None, None, 2)
    assert stop.value.code == 75
    assert names(tmp_path) == {"step=2.ckpt"}


def test_a_signal_of_one_rank_stops_all(running: SaveCheckpoint, tmp_path: Path) -> None:
    trainer = trainer_at(tmp_path, 2, strategy=_Strategy(other_asked=True))
    with pytest.raises(Preempted):
        running.on_train_batch_end(trainer, LightningModule(), None, None, 0)
    assert names(tmp_path) == {"step=2.ckpt"}


def test_a_second_interrupt_works_at_once(running: SaveCheckpoint) -> None:
    signal.raise_signal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT], ids=["nohup", "background"])
def test_a_signal_that_is_ignored_stays_so(number: int, tmp_path: Path) -> None:
    before = signal.signal(number, signal.SIG_IGN)
    callback = SaveCheckpoint()
    try:
        callback.on_fit_start(trainer_at(tmp_path, 0), LightningModule())
        assert signal.getsignal(number) == signal.SIG_IGN
        callback.teardown(trainer_at(tmp_path, 0), LightningModule(), "fit")
        assert signal.getsignal(number) == signal.SIG_IGN
    finally:
        signal.signal(number, before)


def test_after_training_there_is_nothing_to_wait_for(
    running: SaveCheckpoint, tmp_path: Path
) -> None:
    running.on_train_end(trainer_at(tmp_path, 2), LightningModule())
    with pytest.raises(Preempted):
        signal.raise_signal(signal.SIGTERM)
    assert names(tmp_path) == {"step=2.ckpt"}


def test_a_handler_that_lightning_puts_back_passes_the_signal_on(
    running: SaveCheckpoint, tmp_path: Path
) -> None:
    ours = signal.getsignal(signal.SIGUSR1)
    running.teardown(trainer_at(tmp_path, 1), LightningModule(), "fit")
    received: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda number, frame: received.append(number))
    running._signals._before[signal.SIGUSR1] = signal.getsignal(signal.SIGUSR1)
    signal.signal(signal.SIGUSR1, ours)
    signal.raise_signal(signal.SIGUSR1)
    assert received == [signal.SIGUSR1]
    running._signals._before[signal.SIGUSR1] = before


def test_no_rank_goes_before_rank_0_is_through(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The first that goes has the others killed, and with rank 0 its request for a requeue."""
    store = distributed.HashStore()
    monkeypatch.setattr(distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed.distributed_c10d, "_get_default_store", lambda: store)
    events: list[str] = []

    def stop(rank: int) -> None:
        trainer = trainer_at(tmp_path, 2, global_rank=rank, is_global_zero=rank == 0)
        with pytest.raises(Preempted):
            SaveCheckpoint()._leave(trainer)
        events.append(f"rank {rank} goes")

    def slowly() -> str:
        other.join(0.3)
        events.append("requeued")
        return ""

    monkeypatch.setattr("secateur.callbacks.save_checkpoint.requeue", slowly)
    other = threading.Thread(target=stop, args=(1,))
    other.start()
    stop(0)
    other.join(10)
    assert events[0] == "requeued"
    assert sorted(events[1:]) == ["rank 0 goes", "rank 1 goes"]


# Requeueing, against programs of these names that note how they are called


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder first in PATH whose `squeue` says RUNNING; what is called goes into `calls`."""
    for name, answer in (("squeue", "echo RUNNING"), ("scontrol", "exit 0")):
        script = tmp_path / name
        script.write_text(f'#!/bin/sh\necho {name} "$@" >> {tmp_path}/calls\n{answer}\n')
        script.chmod(0o700)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    for variable in ("SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_STEP_ID", "0")
    return tmp_path


def test_a_running_job_is_requeued(slurm: Path) -> None:
    assert requeue() == "Job 7 is requeued and will resume from there."
    assert "scontrol requeue 7\n" in (slurm / "calls").read_text()


def test_it_is_told_apart_from_a_failure_that_the_requeueing_ends_its_own_command(
    slurm: Path,
) -> None:
    (slurm / "scontrol").write_text("#!/bin/sh\nkill -TERM $$\n")
    assert requeue() == "Job 7 is requeued and will resume from there."


def test_of_an_array_only_the_task_is_requeued(
    slurm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "5")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "2")
    assert "Job 5_2 is requeued" in requeue()
    assert "scontrol requeue 5_2\n" in (slurm / "calls").read_text()


def test_a_cancelled_job_stays_cancelled(slurm: Path) -> None:
    (slurm / "squeue").write_text("#!/bin/sh\necho COMPLETING\n")
    assert requeue() == "Job 7 is COMPLETING: SLURM decides whether it runs again."
    assert not (slurm / "calls").exists()


def test_a_refusal_is_told_with_what_to_do(slurm: Path) -> None:
    (slurm / "scontrol").write_text("#!/bin/sh\necho operation is disabled >&2\nexit 1\n")
    said = requeue()
    assert "Job 7 could not be requeued (operation is disabled); the same command with" in said


@pytest.mark.usefixtures("slurm")
def test_outside_of_slurm_the_user_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("SLURM_STEP_ID")  # as in a batch script that does not use `srun`
    assert requeue() == "Run again: the same command with `--ckpt_path last` resumes."
    assert not (tmp_path / "calls").exists()
