"""Secateur's command line: `python train.py fit|validate|test|predict --config FILE`."""

from __future__ import annotations

import csv
import logging
import os
import warnings
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from callbacks.save_checkpoint import check_readable, latest_checkpoint

DEFAULTS = {
    "default_root_dir": "runs/default",
    "max_epochs": -1,
    "check_val_every_n_epoch": None,  # validation is timed in steps, whatever an epoch is
    "use_distributed_sampler": False,  # TextData deals windows out to ranks itself
    "enable_model_summary": False,
}


class TrainCLI(LightningCLI):
    """Lightning's command line with an output folder that holds everything of a run."""

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse, and find out which checkpoint is meant before anybody reads it.

        Raises:
            ValueError: The checkpoint cannot be read, or there is none to measure.
        """
        super().parse_arguments(parser, args)
        subcommand = self.config["subcommand"]
        config: Any = self.config[subcommand]
        if config.ckpt_path == "last":
            root = config.trainer.default_root_dir
            found = latest_checkpoint(Path(root))
            if found is None and subcommand != "fit":
                raise ValueError(
                    f"`ckpt_path` is last, but {root}/checkpoints holds none; fit first."
                )
            config.ckpt_path = str(found) if found else None
        elif config.ckpt_path:
            check_readable(Path(config.ckpt_path))

    def before_instantiate_classes(self) -> None:
        """Fill in what follows from other settings.

        Raises:
            ValueError: Training would never end.
        """
        config: Any = self.config[self.subcommand]
        root = config.trainer.default_root_dir
        if config.trainer.logger is None:
            config.trainer.logger = [
                _object("lightning.pytorch.loggers.CSVLogger", save_dir=root, name="metrics"),
                _object("lightning.pytorch.loggers.TensorBoardLogger", save_dir=root, name="logs"),
            ]
        limits = (config.trainer.max_steps, config.trainer.max_epochs)
        if self.subcommand == "fit" and limits in ((-1, -1), (-1, None)):
            raise ValueError(
                "`trainer.max_steps` must be set: schedules end with it; 1000 is a start."
            )
        if config.weights_only is None:
            config.weights_only = True  # a checkpoint is data: nothing in it may run
        if config.data.init_args.get("tokenizer") is None:
            config.data.init_args.tokenizer = config.model.init_args.get("base")

    def instantiate_classes(self) -> None:
        """Make model, data and trainer; what a constructor refuses is told in its own words."""
        try:
            super().instantiate_classes()
        except ValueError as error:
            first: BaseException = error
            while first.__cause__ is not None:
                first = first.__cause__
            raise first from None

    def after_predict(self) -> None:
        """Write one line per window: its number and its mean negative log-likelihood in nats."""
        rank, num_ranks = self.trainer.global_rank, self.trainer.world_size
        batches: Any = self.trainer.predict_loop.predictions
        path = Path(self.trainer.default_root_dir) / f"predictions_{rank}.csv"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", encoding="utf-8", newline="") as file:
            lines = csv.writer(file)
            lines.writerow(["window", "nll"])
            values = (value for batch in batches for value in batch)
            lines.writerows((rank + i * num_ranks, value) for i, value in enumerate(values))


def _object(class_path: str, **init_args: Any) -> dict[str, Any]:
    return {"class_path": class_path, "init_args": init_args}


class _Without(logging.Filter):
    """Passes every message that does not contain a text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text = text

    def filter(self, record: logging.LogRecord) -> bool:
        return self.text not in str(record.msg)


def _quieten() -> None:
    """Drop four messages of libraries that tell a user of this program nothing."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for logger, text in (
        ("DeepSpeed", "Setting accelerator to CPU"),
        ("bitsandbytes.backends.cpu.ops", "gemm_4bit_forward"),
        ("lightning.pytorch.utilities.rank_zero", "Tip: For seamless cloud"),
    ):
        logging.getLogger(logger).addFilter(_Without(text))
    # TextData reads a memory map: workers would only cost.
    warnings.filterwarnings("ignore", ".*does not have many workers")
    # Lightning's own use of what torch has deprecated.
    warnings.filterwarnings("ignore", ".*LeafSpec.*is deprecated", FutureWarning)


def main(args: list[str] | None = None) -> TrainCLI:
    """Parse the command line (or a list of arguments) and run it."""
    _quieten()
    # Imported so that configs can name their classes; here, because their imports are not quiet.
    import callbacks  # noqa: F401
    import modules  # noqa: F401

    return TrainCLI(
        LightningModule,
        LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        trainer_defaults=DEFAULTS,
        seed_everything_default=0,
        save_config_kwargs={"overwrite": True},
        args=args,
    )


if __name__ == "__main__":
    try:
        main()
    except (ValueError, FloatingPointError, OSError) as error:
        if os.environ.get("SECATEUR_DEBUG"):
            raise
        notes = [str(error), *getattr(error, "__notes__", ()), "SECATEUR_DEBUG=1 shows where."]
        raise SystemExit("\n".join(["", "error: " + notes[0], *notes[1:]])) from error
