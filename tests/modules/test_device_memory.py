from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy

from modules import ShardedDDP, Zero, device_memory
from modules.device_memory import check_memory, divided, memory_of
from pruning.measure.memory import Run
from tests.runs import NOISE, call, learn_masks, make_inputs
from tests.tiny import tiny_config

pytestmark = NOISE


class FakeTrainer:
    """What is asked of a trainer."""

    world_size = 4

    def __init__(self, strategy: Any) -> None:
        self.strategy = strategy


@pytest.mark.parametrize(
    ("strategy", "shards", "offloaded"),
    [
        (Zero(stage=3), 4, False),
        (Zero(stage=3, offload_parameters=True), 4, True),
        (Zero(stage=2), 1, False),
        (ShardedDDP(), 4, False),
        (DDPStrategy(), 1, False),
    ],
)
def test_a_strategy_divides_the_weights(strategy: Any, shards: int, offloaded: bool) -> None:
    run: Run = divided(Run(), FakeTrainer(strategy))  # type: ignore[arg-type]
    assert (run.shards, run.offloaded) == (shards, offloaded)


def test_ranks_on_the_cpu_share_its_memory() -> None:
    whole = memory_of(torch.device("cpu"), ranks=1)
    assert whole is not None
    assert whole > 10**8
    assert memory_of(torch.device("cpu"), ranks=4) == whole // 4
    assert memory_of(torch.device("meta"), ranks=1) is None


def test_a_step_that_will_not_fit_is_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    check_memory(trainer, tiny_config("llama"), Run())
    monkeypatch.setattr(device_memory, "memory_of", lambda device, ranks: 2_000_000)
    with pytest.warns(UserWarning, match="This run needs about .* GB per rank and cpu has"):
        check_memory(trainer, tiny_config("llama"), Run(window_tokens=2048))


def test_a_run_whose_weights_do_not_fit_stops_before_they_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_inputs(tmp_path)
    monkeypatch.setattr(device_memory, "memory_of", lambda device, ranks: 1000)
    monkeypatch.setattr(
        "modules.mask_learning.MaskLearning.configure_model",
        lambda self: pytest.fail("the model was read"),
    )
    with pytest.raises(ValueError, match=r"This run needs about .*No setting of one such device"):
        call(learn_masks(tmp_path, tmp_path / "out", callbacks=()))
