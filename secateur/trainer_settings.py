"""Check settings that Lightning's trainer would accept but not apply as the user means."""

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
    "keeps copies of the weights that checkpoints, masks and exports here lack; leave it out"
)
REFUSED_CALLBACKS = {
    "EMAWeightAveraging": _COPY_WEIGHTS,
    "ModelCheckpoint": (
        "writes checkpoints that `--ckpt_path last` does not find. Use SaveCheckpoint: it always "
        "keeps the last, and its `keep_best` and `monitor` do what `save_top_k` does"
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
    devices = str(trainer.devices)
    if devices == "0" or (devices.startswith("-") and devices != "-1"):
        raise ValueError(f"`trainer.devices` must be 1 or more, or -1 for all, got {devices}.")
    gpu = trainer.accelerator in ("cuda", "gpu")
    if gpu and not torch.cuda.is_available() and not torch.backends.mps.is_available():
        raise ValueError(
            f"`trainer.accelerator` is {trainer.accelerator}, and torch {torch.__version__} sees "
            "no GPU here; use cpu, or a torch that is built for the GPU and its driver."
        )
