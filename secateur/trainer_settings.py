"""Check settings of Lightning's trainer that it would take and do something else with."""

from __future__ import annotations

from typing import Any

import torch

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
    "keeps copies of the weights that checkpoints, masks and exports here do not know; leave it out"
)
REFUSED_CALLBACKS = {
    "EMAWeightAveraging": _COPY_WEIGHTS,
    "ModelCheckpoint": (
        "writes checkpoints that `--ckpt_path last` does not find. Take SaveCheckpoint: it always "
        "has the last, and its `keep_best` and `monitor` do what `save_top_k` does"
    ),
    "OnExceptionCheckpoint": (
        "writes checkpoints that `--ckpt_path last` does not find; SaveCheckpoint has the last"
    ),
    "StochasticWeightAveraging": _COPY_WEIGHTS,
    "WeightAveraging": _COPY_WEIGHTS,
}
"""Callbacks of Lightning by name, and why they do not go with what is here."""


def check_trainer(trainer: Any, fitting: bool) -> None:
    """Check settings before anything is made.

    Args:
        trainer: Settings of the trainer, by attribute.
        fitting: Whether it will train.

    Raises:
        ValueError: One is out of its range, or does not go with what is here.
    """
    for name, least in _AT_LEAST.items():
        if (value := getattr(trainer, name)) is not None and value < least:
            raise ValueError(f"`trainer.{name}` must be {least} or more, got {value}.")
    every = trainer.val_check_interval  # None, text or a time: of a clock
    if isinstance(every, float) or (isinstance(every, int) and every < 1):
        raise ValueError(
            f"`trainer.val_check_interval` must be a whole number of batches, 1 or more, got "
            f"{every}: validation is timed in batches, whatever an epoch is."
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
            f"`trainer.precision` {trainer.precision} rounds what is made from the weights at "
            "export, too. Take 32-true with `--model.dtype bfloat16`, or bf16-mixed."
        )
    if str(trainer.strategy).endswith(("_spawn", "_fork", "_notebook")):
        raise ValueError(
            f"`trainer.strategy` {trainer.strategy} makes ranks of copies of one process, which "
            "neither signals nor errors reach; take ddp, which starts them anew."
        )
    devices = str(trainer.devices)
    if devices == "0" or (devices.startswith("-") and devices != "-1"):
        raise ValueError(f"`trainer.devices` must be 1 or more, or -1 for all, got {devices}.")
    gpu = trainer.accelerator in ("cuda", "gpu")
    if gpu and not torch.cuda.is_available() and not torch.backends.mps.is_available():
        raise ValueError(
            f"`trainer.accelerator` is {trainer.accelerator}, and torch {torch.__version__} sees "
            "no GPU here; take cpu, or a torch that is built for the GPU and its driver."
        )
