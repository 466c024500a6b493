"""The command line: Lightning's, with an output folder that holds everything of a run."""

from __future__ import annotations

import csv
import signal
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint, OnExceptionCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities import rank_zero_info

import secateur.callbacks
import secateur.modules  # noqa: F401 (configs name what is in these two)
from secateur.pruning.files.checkpoints import (
    FOLDER,
    best_checkpoint,
    check_readable,
    latest_checkpoint,
)
from secateur.pruning.protocols import ChecksFirst

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
        choose = {"last": latest_checkpoint, "best": best_checkpoint}.get(config.ckpt_path)
        if choose:
            root = config.trainer.default_root_dir
            if found := choose(Path(root)):
                rank_zero_info(f"Resuming from {found}")
            elif config.ckpt_path == "best":
                raise ValueError(
                    f"`ckpt_path` is best, but {root}/{FOLDER} notes none; fit with `keep_best` of "
                    "SaveCheckpoint first, or take last."
                )
            elif subcommand != "fit":
                raise ValueError(f"`ckpt_path` is last, but {root}/{FOLDER} holds none; fit first.")
            else:
                rank_zero_info(f"No checkpoint in {root}/{FOLDER}: starting at step 0.")
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
        strategy = config.trainer.strategy
        if isinstance(strategy, str) and "." in strategy:  # a class, where a name is expected
            config.trainer.strategy = _object(strategy)
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

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Make the trainer: checkpoints are those of SaveCheckpoint, or there are none.

        Raises:
            ValueError: Lightning's own are asked for, which `--ckpt_path last` does not find.
        """
        given = self.config_init[self.subcommand].trainer.callbacks
        callbacks = given if isinstance(given, list) else [given]
        for callback in callbacks:
            if isinstance(callback, ModelCheckpoint | OnExceptionCheckpoint):
                raise ValueError(
                    f"`trainer.callbacks` has {type(callback).__name__}, whose checkpoints "
                    "`--ckpt_path last` does not find. Take SaveCheckpoint: it always "
                    "has the last; `keep_best` and `monitor` do what `save_top_k` does."
                )
        if not any(isinstance(callback, Checkpoint) for callback in callbacks):
            kwargs["enable_checkpointing"] = False  # else Lightning adds its own
        return super().instantiate_trainer(**kwargs)

    def before_fit(self) -> None:
        """Ask callbacks that may refuse to, before text is tokenised and a model is read."""
        if not self.trainer.checkpoint_callbacks:  # nobody to whom signals could wait
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR1, signal.SIGTERM})
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, ChecksFirst):
                callback.check_first(self.trainer, self.model)

    def before_predict(self) -> None:
        """Find out before the model runs whether there will be something to write.

        Raises:
            ValueError: Predictions are to be thrown away.
        """
        if self.config[self.subcommand].return_predictions is False:
            raise ValueError(
                "`return_predictions` must be true: they are what is written to predictions_0.csv."
            )

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


def main(arguments: list[str] | None = None) -> TrainCLI:
    """Parse the command line (or a list of arguments) and run it."""
    return TrainCLI(
        LightningModule,
        LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        trainer_defaults=DEFAULTS,
        auto_configure_optimizers=False,  # modules have an optimizer of their own
        seed_everything_default=0,
        save_config_kwargs={"overwrite": True},
        args=arguments,
    )
