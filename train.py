"""Secateur's command line: `python train.py fit|validate|test|predict --config FILE`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.cli import LightningCLI

import callbacks
import modules
from callbacks.save_checkpoint import latest_checkpoint

_ = (callbacks, modules)  # imported so that configs can name their classes

DEFAULTS = {
    "default_root_dir": "runs/default",
    "max_epochs": -1,
    "check_val_every_n_epoch": None,  # validation is timed in steps, whatever an epoch is
    "use_distributed_sampler": False,  # TextData deals windows out to ranks itself
    "enable_model_summary": False,
}


class TrainCLI(LightningCLI):
    """Lightning's command line with an output folder that holds everything of a run."""

    def before_instantiate_classes(self) -> None:
        """Fill in what follows from other settings."""
        config: Any = self.config if self.subcommand is None else self.config[self.subcommand]
        root = config.trainer.default_root_dir
        if config.trainer.logger is None:
            config.trainer.logger = [
                _object("lightning.pytorch.loggers.CSVLogger", save_dir=root, name="metrics"),
                _object("lightning.pytorch.loggers.TensorBoardLogger", save_dir=root, name="logs"),
            ]
        if config.get("ckpt_path") == "last":
            found = latest_checkpoint(Path(root))
            config.ckpt_path = str(found) if found else None
        if config.data.init_args.get("tokenizer") is None:
            config.data.init_args.tokenizer = config.model.init_args.get("base")


def _object(class_path: str, **init_args: Any) -> dict[str, Any]:
    return {"class_path": class_path, "init_args": init_args}


def main(args: list[str] | None = None) -> TrainCLI:
    """Parse the command line (or a list of arguments) and run it."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    return TrainCLI(
        LightningModule,
        LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        trainer_defaults=DEFAULTS,
        save_config_kwargs={"overwrite": True},
        args=args,
    )


if __name__ == "__main__":
    main()
