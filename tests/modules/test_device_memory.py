from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy

from secateur.modules import ShardedDDP, Zero, device_memory
from secateur.modules.device_memory import check_memory, divided, memory_of
from secateur.pruning.widths.memory import Run
from tests.runs import NOISE, call, learn_masks, make_inputs
from tests.tiny import tiny_config

pytestmark = NOISE


class FakeTrainer:
    """What is asked of a trainer."""

    world_size, num_devices = 4, 2

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
def test_a_strategy_divides_the_weights(
    strategy: Any, shards: int, offloaded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_gpu = property(lambda self: torch.device("cuda", 0))
    monkeypatch.setattr(type(strategy), "root_device", on_gpu)
    run: Run = divided(Run(), FakeTrainer(strategy))  # type: ignore[arg-type]
    assert (run.shards, run.offloaded) == (shards, offloaded)


def test_on_the_cpu_nothing_can_be_put_aside(monkeypatch: pytest.MonkeyPatch) -> None:
    strategy = Zero(stage=3, offload_parameters=True, live_parameters=7)
    monkeypatch.setattr(Zero, "root_device", property(lambda self: torch.device("cpu", 0)))
    run = divided(Run(), FakeTrainer(strategy))  # type: ignore[arg-type]
    assert (run.shards, run.live_parameters, run.offloaded) == (4, 7, False)


def test_weights_on_the_host_have_to_fit_there(monkeypatch: pytest.MonkeyPatch) -> None:
    strategy = Zero(stage=3, offload_parameters=True)
    monkeypatch.setattr(Zero, "root_device", property(lambda self: torch.device("cuda", 0)))
    memory = {"cuda": 80 * 10**9, "cpu": 1000}
    monkeypatch.setattr(device_memory, "memory_of", lambda device, ranks: memory[device.type])
    trainer: Any = FakeTrainer(strategy)
    with pytest.raises(ValueError, match="`offload_parameters` keeps .* with 2 ranks, which has"):
        check_memory(trainer, tiny_config("llama"), Run())
    memory["cpu"] = 10**9
    check_memory(trainer, tiny_config("llama"), Run())


@pytest.mark.parametrize(
    ("groups", "files", "limits"),
    [
        ("0::/job/step\n", {"job/memory.max": "700", "job/step/memory.max": "max"}, [700]),
        (
            "4:cpu,memory:/job\n0::/\n",
            {"memory/job/memory.limit_in_bytes": "5", "memory/memory.limit_in_bytes": "9"},
            [5, 9],
        ),
        ("2:cpu:/\n", {}, []),
    ],
)
def test_limits_of_a_scheduler_are_found(
    groups: str, files: dict[str, str], limits: list[int], tmp_path: Path
) -> None:
    (tmp_path / "own").write_text(groups)
    for name, text in files.items():
        path = tmp_path / "root" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")
    assert device_memory._limits(tmp_path / "root", tmp_path / "own") == limits


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
        "secateur.modules.mask_learning.MaskLearning.configure_model",
        lambda self: pytest.fail("the model was read"),
    )
    with pytest.raises(ValueError, match=r"This run needs about .*No setting of one such device"):
        call(learn_masks(tmp_path, tmp_path / "out", callbacks=()))
