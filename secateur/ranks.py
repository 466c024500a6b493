"""Refuse to start if ranks have different settings, models, text or checkpoints."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import distributed

from secateur.pruning.files.checkpoints import read_seal

# Paths may differ between machines; the contents may not.
_PLACES = (
    "ckpt_path",
    "config",
    "data.cache_dir",
    "data.tokenizer",
    "data.train",
    "data.validation",
    "model.base",
    "model.teacher",
    "trainer.default_root_dir",
)


class CompareRanks(Callback):
    """Compare the settings and files of all ranks before training.

    Ranks that train on different data, or with different settings, would raise no error and export
    a wrong model; with different numbers of steps they wait for each other forever.

    Args:
        settings: All settings of this rank, nested as the command line has them.
    """

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self.settings = settings

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Compare with the other ranks, once the process group exists.

        Raises:
            ValueError: Ranks differ; names the rank and the setting.
        """
        if trainer.world_size == 1 or not distributed.is_initialized():
            return
        mine = {name: value for name, value in flat(self.settings) if name not in _PLACES}
        mine |= {"seed_everything": os.environ.get("PL_GLOBAL_SEED")}
        contents = _contents(trainer, pl_module, self.settings.get("ckpt_path"))
        told: list[Any] = [None] * trainer.world_size
        distributed.all_gather_object(told, (socket.gethostname(), mine, contents))
        refuse_differences([(host, settings) for host, settings, _ in told])
        refuse_differences([(host, found) for host, _, found in told])


def refuse_differences(told: Sequence[tuple[str, Mapping[str, Any]]]) -> None:
    """Refuse ranks that differ from rank 0.

    Args:
        told: Host of every rank, and its settings by name.

    Raises:
        ValueError: Ranks differ; names the first rank that does, and all its differing settings.
    """
    _, first = told[0]
    for rank, (host, settings) in enumerate(told):
        names = sorted({*first, *settings})
        found = [name for name in names if first.get(name) != settings.get(name)]
        if found:
            differences = "; ".join(
                f"`--{name}` is {settings.get(name)} there and {first.get(name)} on rank 0"
                for name in found
            )
            raise ValueError(
                f"Rank {rank} ({host}) was started with other settings or files: {differences}. "
                "Start all ranks with the same command, and let them see the same files."
            )


def flat(settings: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Settings by their names on the command line, with their values as text."""
    if isinstance(settings, Mapping):
        for key, value in settings.items():
            yield from flat(value, name if key == "init_args" else f"{name}.{key}".lstrip("."))
    elif isinstance(settings, list) and any(isinstance(item, Mapping) for item in settings):
        for item in settings:
            chosen = item.get("class_path", "") if isinstance(item, Mapping) else item
            for key, value in flat(item, name):
                yield f"{key} of {chosen.rpartition('.')[2]}" if chosen else key, value
    else:
        yield name, str(settings)


def _contents(trainer: Trainer, module: LightningModule, checkpoint: str | None) -> dict[str, Any]:
    """Hashes of the files that are read, by the settings that name them."""
    found: dict[str, Any] = {}
    if getattr(module, "base", None) is not None:
        found["model.base"] = module.base_fingerprint
    if (teacher := getattr(module, "_teacher", None)) is not None:
        found["model.teacher"] = teacher.base.fingerprint
    data: Any = getattr(trainer, "datamodule", None)
    if data is not None:
        found["data.train"] = data.fingerprint
    if checkpoint:
        found["ckpt_path"] = getattr(read_seal(Path(checkpoint)), "checksum", None)
    return found
