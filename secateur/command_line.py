"""The command line: Lightning's, with one output folder for all results of a run."""

from __future__ import annotations

import csv
import re
import signal
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NoReturn

import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.utilities import rank_zero_info

import secateur.callbacks
import secateur.modules
from secateur import named_callbacks, typed, yaml_text
from secateur.callbacks.settle_now import SettleNow
from secateur.callbacks.show_progress import ShowProgress
from secateur.explain import as_typed, forbidden_value, word_of, wrong_class, wrong_setting
from secateur.modules.language_modelling import LanguageModelling
from secateur.modules.mask_learning import MaskLearning
from secateur.pruning.commands import UsageError
from secateur.pruning.files.checkpoints import (
    FOLDER,
    best_checkpoint,
    check_whole,
    latest_checkpoint,
)
from secateur.pruning.files.lock import locked
from secateur.pruning.protocols import ChecksFirst
from secateur.ranks import CompareRanks
from secateur.trainer_settings import REFUSED_CALLBACKS, check_nodes, check_trainer, refuse_as_typed

DEFAULTS = {
    "default_root_dir": "runs/default",
    "max_epochs": -1,
    "check_val_every_n_epoch": None,  # validation is timed in steps, not in epochs
    "use_distributed_sampler": False,  # TextData divides the windows among the ranks itself
    "enable_model_summary": False,
}


class _Parser(LightningArgumentParser):
    """A parser that raises errors, without printing a page of usage first."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if not self.exit_on_error:  # the parser of one object: raise for the outer parser
            super().error(message, ex)
        raise UsageError(message) from ex


class TrainCLI(LightningCLI):
    """Lightning's command line with one output folder for all results of a run.

    Settings must be given by their full names; former class names are still accepted. Errors
    name settings as they are typed.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._typed: dict[str, typed.Node] = {}
        try:
            super().__init__(*args, **kwargs)
        except ValueError as error:
            if type(error) is ValueError:  # subclasses carry more than a message
                error.args = (as_typed(str(error), error.__traceback__, self._typed),)
            raise
        except MisconfigurationException as error:  # of Lightning, about settings of its trainer
            refuse_as_typed(error, self._typed.get("trainer", {}))

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse, and resolve `ckpt_path` before the checkpoint is read.

        Raises:
            UsageError: A setting does not exist, or has an invalid value.
            ValueError: The checkpoint cannot be read, or there is no checkpoint to measure.
        """
        yaml_text.install()
        typed_in = [*map(_present, sys.argv[1:] if args is None else args)]
        arguments = _with_nulls(named_callbacks.resolve(typed_in))
        try:
            self.config = parser.parse_args(arguments)
        except (UsageError, UnicodeDecodeError) as error:  # the latter of a configuration file
            tree = named_callbacks.read(typed_in)
            raise UsageError(self._explain(arguments, tree, str(error))) from error
        self._typed = named_callbacks.read(typed_in)
        if wrong := forbidden_value(self._typed):
            raise UsageError(wrong)
        subcommand = self.config["subcommand"]
        config: Any = self.config[subcommand]
        if type(seed := config.seed_everything) is int and not 0 <= seed < 2**32:
            raise UsageError(f"`--seed_everything` must be in [0, 2^32), got {seed}.")
        choose = {"last": latest_checkpoint, "best": best_checkpoint}.get(config.ckpt_path)
        if choose:
            root = config.trainer.default_root_dir
            if found := choose(Path(root)):
                rank_zero_info(f"Resuming from {found}")
            elif config.ckpt_path == "best":
                raise ValueError(
                    f"`ckpt_path` is best, but {root}/{FOLDER} names none; fit with `keep_best` of "
                    f"SaveCheckpoint first, or take last."
                )
            elif subcommand != "fit":
                raise ValueError(f"`ckpt_path` is last, but {root}/{FOLDER} has none; fit first.")
            else:
                rank_zero_info(f"No checkpoint in {root}/{FOLDER}: starting at step 0.")
            config.ckpt_path = str(found) if found else None
        elif config.ckpt_path is not None:
            check_whole(Path(config.ckpt_path))

    def _explain(self, arguments: list[str], tree: dict[str, typed.Node], message: str) -> str:
        """Explain arguments that the parser rejected, by its own message if need be."""
        named = [name for name in self.subcommands() if name in arguments]
        if not named:
            return f"Name a command first: {', '.join(self.subcommands())}."
        known = {action.dest.split(".")[0] for action in self._parser(named[0])._actions}
        if found := wrong_setting(tree, known) or forbidden_value(tree):
            return found
        keys = re.findall(r'(?:Parser key "|argument -*)([\w.]+)', message)
        lines = [line.strip(" -") for line in message.splitlines()]
        noise = ("Given value", "Subtypes:", "Errors:", "Expected a <class 'NoneType'>")
        reason = next(line for line in reversed(lines) if line and not line.startswith(noise))
        reason = re.split(r"\.? Got value: Namespace\(", reason)[0].rstrip(".")
        kind, leaf = re.match(r"Expected a <class '(\w+)'>", reason), tree.get("".join(keys))
        if kind and isinstance(leaf, typed.Leaf):
            return f"`--{keys[0]}` must be {word_of(kind[1])}, got {leaf.value!r}."
        return f"`--{'.'.join(keys)}`: {reason}." if keys else f"{reason}."

    def _parse_ckpt_path(self) -> None:
        """Do nothing: Lightning would take settings from the checkpoint, and import a class named
        there.
        """

    def before_instantiate_classes(self) -> None:
        """Check settings of the trainer, and fill in what follows from others.

        Raises:
            ValueError: A setting is out of its range, or training would never end.
        """
        config: Any = self.config[self.subcommand]
        check_trainer(config.trainer, fitting=self.subcommand == "fit")
        root = config.trainer.default_root_dir
        if config.trainer.logger is None:
            config.trainer.logger = [
                _object("lightning.pytorch.loggers.CSVLogger", save_dir=root, name="metrics"),
                _object("lightning.pytorch.loggers.TensorBoardLogger", save_dir=root, name="logs"),
            ]
        strategy = config.trainer.strategy
        if isinstance(strategy, str) and strategy in secateur.modules.__all__:
            strategy = f"secateur.{strategy}"
        if isinstance(strategy, str) and "." in strategy:  # a class path instead of a name
            if found := wrong_class(strategy, Strategy, "trainer.strategy"):
                raise UsageError(found)
            config.trainer.strategy = _object(strategy)
        limits = (config.trainer.max_steps, config.trainer.max_epochs)
        in_tokens = config.data.init_args.get("max_tokens") is not None
        if self.subcommand == "fit" and limits in ((-1, -1), (-1, None)) and not in_tokens:
            raise ValueError(
                "`trainer.max_steps` must be set: schedules end with it; 1000 is a start."
            )
        if config.weights_only is None:
            config.weights_only = True  # a checkpoint is data: nothing in it may run
        if config.data.init_args.get("tokenizer") is None:
            config.data.init_args.tokenizer = config.model.init_args.get("base")
            if config.model.init_args.get("trust_remote_code"):
                config.data.init_args.trust_remote_code = True

    def instantiate_classes(self) -> None:
        """Make model, data and trainer; show the message of a constructor that raises an error."""
        try:
            super().instantiate_classes()
        except ValueError as error:
            raise _raised_here(error) from None

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Make the trainer; only SaveCheckpoint writes checkpoints.

        Raises:
            ValueError: A callback is incompatible with this library.
        """
        given = self.config_init[self.subcommand].trainer.callbacks
        callbacks = given if isinstance(given, list) else [given]
        for callback in callbacks:
            for kind in type(callback).__mro__:
                if why := REFUSED_CALLBACKS.get(kind.__name__):
                    raise ValueError(f"`trainer.callbacks` has {kind.__name__}, which {why}.")
        if not any(isinstance(callback, Checkpoint) for callback in callbacks):
            kwargs["enable_checkpointing"] = False  # else Lightning adds its own
        try:
            trainer = super().instantiate_trainer(**kwargs)
        except (TypeError, ValueError, MisconfigurationException) as error:
            refuse_as_typed(error, self._typed.get("trainer", {}))
        for kind in (ShowProgress, *([SettleNow] if isinstance(self.model, MaskLearning) else [])):
            if not any(isinstance(callback, kind) for callback in callbacks):
                trainer.callbacks.insert(0, kind())  # type: ignore[attr-defined]
        check_nodes(trainer)
        if trainer.world_size > 1:
            told = self._parser(self.subcommand).dump(self.config[self.subcommand], skip_none=False)
            trainer.callbacks.insert(0, CompareRanks(yaml.safe_load(told)))  # type: ignore[attr-defined]
        return trainer

    def _run_subcommand(self, subcommand: str) -> None:
        """Run a command after finding the base model; fitting locks the output folder."""
        if isinstance(self.model, LanguageModelling):
            self.model.check_bases()  # else a wrong base would be a wrong tokenizer
        root, setting = Path(self.trainer.default_root_dir), "trainer.default_root_dir"
        writes = subcommand == "fit" and self.trainer.is_global_zero
        with locked(root, setting) if writes else nullcontext():
            super()._run_subcommand(subcommand)

    def before_fit(self) -> None:
        """Let callbacks refuse before text is tokenised and a model is read."""
        if not self.trainer.checkpoint_callbacks:  # no SaveCheckpoint that handles signals
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR1, signal.SIGTERM})
        if not isinstance(self.model, MaskLearning):  # no SettleNow that handles it
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR2})
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, ChecksFirst):
                callback.check_first(self.trainer, self.model)

    def before_predict(self) -> None:
        """Check before the model runs that there will be something to write.

        Raises:
            ValueError: `return_predictions` is false.
        """
        if self.config[self.subcommand].return_predictions is False:
            raise ValueError(
                "`return_predictions` must be true: they are written to predictions_0.csv."
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


def _raised_here(error: BaseException) -> BaseException:
    """The outermost error of a chain that the package raised, else the innermost of all."""
    while error.__cause__ is not None:
        place = error.__traceback__
        while place is not None and place.tb_next is not None:
            place = place.tb_next
        module = place.tb_frame.f_globals.get("__name__", "") if place is not None else ""
        if module.startswith("secateur.") and module != __name__:
            return error
        error = error.__cause__
    return error


def _present(argument: str) -> str:
    """An argument with the current path of the class that it names."""
    name, equals, value = argument.rpartition("=")
    return f"{name}{equals}{yaml_text.present(value)}"


def _with_nulls(arguments: list[str]) -> list[str]:
    """Arguments with `--model.a.b null` as `--model.a {b: null}`.

    The parser reads null as text if the object that has the setting is made by default.
    """
    text = re.sub(
        r"(--(?:model|data)(?:\.\w+)+)\.(\w+)[=\0](?:null|None)(?=\0|$)",
        r"\1\0{\2: null}",
        "\0".join(arguments),
    )
    return text.split("\0") if arguments else []


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
        parser_class=_Parser,
        parser_kwargs={"allow_abbrev": False},
        auto_configure_optimizers=False,  # modules configure their optimizer
        seed_everything_default=0,
        save_config_kwargs={"overwrite": True},
        args=arguments,
    )
