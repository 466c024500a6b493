from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from lightning.pytorch import LightningModule

from secateur.callbacks import SettleNow
from tests.callbacks.fakes import Masks, fake_trainer


@pytest.fixture(autouse=True)
def ended_by_it() -> Iterator[None]:
    """The signal does what it does by default, though a shell may ignore it."""
    before = signal.signal(signal.SIGUSR2, signal.SIG_DFL)
    yield
    assert signal.getsignal(signal.SIGUSR2) == signal.SIG_DFL  # the callback has restored it
    signal.signal(signal.SIGUSR2, before)


def at(root: Path, step: int, other_asked: bool = False) -> Any:
    def decide(asked: bool, all: bool) -> bool:
        assert not all
        return asked or other_asked

    return fake_trainer(root, step, strategy=SimpleNamespace(reduce_boolean_decision=decide))


def test_a_signal_lets_the_masks_settle_after_the_step(tmp_path: Path) -> None:
    callback, module = SettleNow(), Masks()
    callback.on_fit_start(at(tmp_path, 3), module)
    callback.on_train_start(at(tmp_path, 3), module)
    callback.on_train_batch_end(at(tmp_path, 4), module, None, None, 0)
    assert not module.settled
    os.kill(os.getpid(), signal.SIGUSR2)
    callback.on_train_batch_end(at(tmp_path, 4), module, None, None, 1)
    assert not module.settled  # a further batch of a step that is not over
    callback.on_train_batch_end(at(tmp_path, 5), module, None, None, 2)
    assert module.settled
    module.settled = False
    callback.on_train_batch_end(at(tmp_path, 6), module, None, None, 3)
    assert not module.settled  # one signal asks once
    callback.teardown(at(tmp_path, 6), module, "fit")


def test_a_signal_of_one_rank_counts_for_all(tmp_path: Path) -> None:
    callback, module = SettleNow(), Masks()
    callback.on_train_start(at(tmp_path, 0), module)
    callback.on_train_batch_end(at(tmp_path, 1, other_asked=True), module, None, None, 0)
    assert module.settled
    callback.on_exception(at(tmp_path, 1), module, KeyboardInterrupt())


def test_a_signal_that_came_while_the_model_was_read_counts(tmp_path: Path) -> None:
    """The program blocks it until then."""
    callback, module = SettleNow(), Masks()
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2})
    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR2)
    callback.on_train_start(at(tmp_path, 0), module)
    callback.on_train_batch_end(at(tmp_path, 1), module, None, None, 0)
    assert module.settled
    callback.teardown(at(tmp_path, 1), module, "fit")


def test_a_module_without_masks_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`SettleNow` needs a module that learns masks"):
        SettleNow().on_fit_start(at(tmp_path, 0), LightningModule())
