"""Tell at the start of a run whether it fits its device, instead of hours later."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_warn
from transformers import PreTrainedConfig

from pruning.measure.memory import Run, check_fits


def check_memory(trainer: Trainer, config: PreTrainedConfig, run: Run) -> None:
    """Compare the memory that a run needs with that of its device, and warn if it is more.

    Args:
        trainer: Its strategy says how the model is divided, its device what there is.
        config: Of the base model.
        run: Settings of the run, as on one rank that holds the model whole.

    Raises:
        ValueError: Weights and trained state alone are more than the device has.
    """
    device = trainer.strategy.root_device
    available = memory_of(device, ranks=trainer.num_devices)
    if available is not None:
        warning = check_fits(config, divided(run, trainer), available, str(device))
        if warning is not None:
            rank_zero_warn(warning)


def divided(run: Run, trainer: Trainer) -> Run:
    """The run as the strategy of a trainer divides it."""
    strategy: Any = trainer.strategy
    if not getattr(strategy, "divides_models", False):
        return run
    return replace(
        run,
        shards=trainer.world_size,
        live_parameters=getattr(strategy, "live_parameters", run.live_parameters),
        offloaded=getattr(strategy, "offload_parameters", False),
    )


def memory_of(device: torch.device, ranks: int) -> int | None:
    """Memory of a device in bytes; None where nobody can say.

    Args:
        device: Of this rank.
        ranks: Ranks on this machine, which share its memory if they run on the CPU; 1 or more.
    """
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    if device.type == "cpu" and hasattr(os, "sysconf"):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // ranks
    return None


def optimizer_bytes(optimizer: torch.optim.Optimizer) -> float:
    """Bytes of state per trained parameter: two numbers, in 8 bit with a scale per 256, or whole.

    A bound where an optimiser keeps less than Adam does.
    """
    bits = getattr(getattr(optimizer, "args", None), "optim_bits", 32)  # of bitsandbytes
    return 2 * (bits / 8 + (4 / 256 if bits == 8 else 0))
