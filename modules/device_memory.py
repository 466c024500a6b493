"""Check at the start of a run that it fits the memory of its device."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_warn
from transformers import PreTrainedConfig

from secateur.pruning.widths.memory import GB, Run, check_fits, footprint


def check_memory(trainer: Trainer, config: PreTrainedConfig, run: Run) -> None:
    """Compare the memory that a run needs with that of its device, and warn if it is more.

    Args:
        trainer: Its strategy defines how the model is sharded, its device the available memory.
        config: Configuration of the base model.
        run: Settings of the run for one rank with the complete model.

    Raises:
        ValueError: Weights and trained state alone are more than the device has.
    """
    device = trainer.strategy.root_device
    run, num_ranks = divided(run, trainer), trainer.num_devices
    available = memory_of(device, ranks=num_ranks)
    if available is not None:
        warning = check_fits(config, run, available, str(device))
        if warning is not None:
            rank_zero_warn(warning)
    host = memory_of(torch.device("cpu"), ranks=1)
    if run.offloaded and host is not None:
        needed = num_ranks * footprint(config, run).host
        if needed > host:
            raise ValueError(
                f"`offload_parameters` keeps {needed / GB:.1f} GB of weights in the memory of a "
                f"machine with {num_ranks} ranks, which has {host / GB:.1f} GB; use more nodes, or "
                "leave it out if the shards fit on the GPUs."
            )


def divided(run: Run, trainer: Trainer) -> Run:
    """The run as the strategy of a trainer shards it."""
    strategy: Any = trainer.strategy
    if not getattr(strategy, "divides_models", False):
        return run
    on_host = strategy.root_device.type == "cpu"  # host memory is device memory
    return replace(
        run,
        shards=trainer.world_size,
        live_parameters=strategy.live_parameters,
        offloaded=getattr(strategy, "offload_parameters", False) and not on_host,
    )


def memory_of(device: torch.device, ranks: int) -> int | None:
    """Memory of a device in bytes that this process may use; None if unknown.

    Args:
        device: Device of this rank.
        ranks: Ranks on this machine, which share its memory if they run on the CPU; 1 or more.
    """
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    if device.type == "cpu" and hasattr(os, "sysconf"):
        whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return min([whole, *_limits()]) // ranks
    return None


def _limits(
    root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")
) -> list[int]:
    """Memory limits of the control groups of this process, set by a scheduler or a container.

    Args:
        root: Folder of the groups: of version 2, or, in its folder `memory`, of version 1.
        own: The file that names the groups of the process.
    """
    found = []
    for line in own.read_text(encoding="utf-8").splitlines() if own.is_file() else ():
        _, controllers, group = line.split(":", 2)
        if not controllers:
            top, name = root, "memory.max"
        elif "memory" in controllers.split(","):
            top, name = root / "memory", "memory.limit_in_bytes"
        else:
            continue
        folder = top / group.lstrip("/")
        files = [at / name for at in (folder, *folder.parents) if at.is_relative_to(top)]
        texts = [file.read_text(encoding="utf-8").strip() for file in files if file.is_file()]
        found += [int(text) for text in texts if text != "max"]
    return found


def optimizer_bytes(optimizer: torch.optim.Optimizer) -> float:
    """Bytes of state per trained parameter: two numbers in float32, or in 8 bit with scales.

    An upper bound for an optimiser that keeps less state than Adam.
    """
    bits = state_bits(optimizer)
    return 2 * (bits / 8 + (4 / 256 if bits == 8 else 0))


def state_bits(optimizer: torch.optim.Optimizer) -> int:
    """Bits per number in the states of an optimiser: 32 except for some of bitsandbytes."""
    return int(getattr(getattr(optimizer, "args", None), "optim_bits", 32))
