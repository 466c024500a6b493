"""Check settings that Lightning's trainer would accept but not apply as the user means."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any, NoReturn

import torch
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import Strategy, StrategyRegistry

from secateur import modules
from secateur.pruning.commands import did_you_mean
from secateur.typed import Leaf, Node

_AT_LEAST = {
    "accumulate_grad_batches": 1,
    "gradient_clip_val": 0,
    "log_every_n_steps": 0,
    "max_epochs": -1,
    "max_steps": -1,
    "num_nodes": 1,
    "num_sanity_val_steps": -1,
}

_COPY_WEIGHTS = (
    "keeps copies of the weights that checkpoints, masks and exports here lack; leave it out"
)
REFUSED_CALLBACKS = {
    "EMAWeightAveraging": _COPY_WEIGHTS,
    "ModelCheckpoint": (
        "writes checkpoints that `--ckpt_path last` does not find. Use SaveCheckpoint: it always "
        "keeps the last, and its keep_best and monitor do what save_top_k does"
    ),
    "OnExceptionCheckpoint": (
        "writes checkpoints that `--ckpt_path last` does not find; SaveCheckpoint keeps the last"
    ),
    "StochasticWeightAveraging": _COPY_WEIGHTS,
    "WeightAveraging": _COPY_WEIGHTS,
}
"""Callbacks of Lightning that cannot be used here, by name, each with the reason."""


def check_trainer(trainer: Any, fitting: bool) -> None:
    """Check settings before any object is made.

    Args:
        trainer: Settings of the trainer, by attribute.
        fitting: Whether it will train.

    Raises:
        ValueError: A setting is out of its range, or not supported here.
    """
    if not str(trainer.default_root_dir or ""):
        raise ValueError("`trainer.default_root_dir` must name a folder, such as runs/disp.")
    for name, least in _AT_LEAST.items():
        if (value := getattr(trainer, name)) is not None and value < least:
            raise ValueError(f"`trainer.{name}` must be {least} or more, got {value}.")
    every = trainer.val_check_interval  # may also be None, text or a timedelta
    if isinstance(every, float) or (isinstance(every, int) and every < 1):
        raise ValueError(
            f"`trainer.val_check_interval` must be a whole number of batches, 1 or more, got "
            f"{every}: validation is timed in batches, not in epochs."
        )
    if fitting and trainer.limit_train_batches == 0:
        raise ValueError(
            "`trainer.limit_train_batches` is 0, so that nothing is trained; `trainer.max_steps 0` "
            "exports without training."
        )
    if trainer.barebones:
        raise ValueError("`trainer.barebones` leaves out logs and checkpoints; leave it out.")
    if trainer.precision in ("16-true", "bf16-true"):
        raise ValueError(
            f"`trainer.precision` {trainer.precision} would also round computations on the weights "
            "at export. Use 32-true with `--model.dtype bfloat16`, or bf16-mixed."
        )
    if str(trainer.strategy).endswith(("_spawn", "_fork", "_notebook")):
        raise ValueError(
            f"`trainer.strategy` {trainer.strategy} forks ranks from one process; signals and "
            "errors do not reach them. Use ddp, which starts new processes."
        )
    _check_strategy(trainer.strategy)
    devices = str(trainer.devices)
    if devices == "0" or (devices.startswith("-") and devices != "-1"):
        raise ValueError(f"`trainer.devices` must be 1 or more, or -1 for all, got {devices}.")
    gpu = trainer.accelerator in ("cuda", "gpu")
    if gpu and not torch.cuda.is_available() and not torch.backends.mps.is_available():
        raise ValueError(
            f"`trainer.accelerator` is {trainer.accelerator}, and torch {torch.__version__} sees "
            "no GPU here; use cpu, or a torch that is built for the GPU and its driver."
        )


def _check_strategy(strategy: Any) -> None:
    """Refuse the name of a strategy that is not known; what is known may not fit, see the modules.

    Raises:
        ValueError: It is not.
    """
    ours = [name for name in modules.__all__ if issubclass(getattr(modules, name), Strategy)]
    known = ["auto", *ours, *StrategyRegistry.available_strategies()]
    if isinstance(strategy, str) and "." not in strategy and strategy not in known:
        raise ValueError(
            f"`trainer.strategy` {strategy} is not known; for several devices there are ddp, "
            f"{' and '.join(ours)}.{did_you_mean(strategy, known)}"
        )


def check_nodes(trainer: Trainer) -> None:
    """Refuse several nodes if nothing tells them of each other: they would wait for 30 minutes.

    Raises:
        ValueError: Nothing does.
    """
    alone = isinstance(trainer._accelerator_connector.cluster_environment, LightningEnvironment)
    if trainer.num_nodes > 1 and alone and "MASTER_ADDR" not in os.environ:
        raise ValueError(
            f"`trainer.num_nodes` is {trainer.num_nodes}, and nothing here starts ranks on other "
            "nodes; start the program by srun or torchrun, or set MASTER_ADDR, MASTER_PORT and "
            "NODE_RANK on every node."
        )


def refuse_as_typed(error: Exception, typed: Mapping[str, Node]) -> NoReturn:
    """Raise an error of Lightning with the setting that it is about in front, and its value.

    Args:
        error: Its message names a setting, or repeats a value.
        typed: The settings of the trainer that were typed.

    Raises:
        ValueError: Always.
    """
    named: list[tuple[int, str, Any]] = []
    message = str(error)
    for name, node in typed.items():
        value = node.value if isinstance(node, Leaf) else None
        told = re.search(rf"\b{name}\b", message)
        told = told or (value and re.search(re.escape(f"'{value}'"), message)) or None
        named += [(told.start(), name, value)] if told else []
    if named:
        _, name, value = min(named, key=lambda found: found[:2])
        message = f"`--trainer.{name}`{'' if value is None else f' {value}'}: {message}"
    raise ValueError(message) from error
