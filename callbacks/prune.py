"""The base class of callbacks that prune a model in training."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from secateur.callbacks._output import check_folder
from secateur.pruning.files.settings import refuse_other
from secateur.pruning.protocols import TrainsWeights, calibration_windows, trains_weights
from secateur.pruning.weights.gradually import Gradually


class Prune(Callback, ABC):
    """Prune what is due, at the start of training and before every step.

    A subclass defines in `catch_up` what is due and how it is removed. Its settings and the history
    of its prunings are part of the checkpoint.

    Args:
        calibration_windows: Windows of the training text to measure on, 1 or more.
        held_back_windows: Further windows, to test on what is done to the kept weights, 1 or more.
        calibration_seed: Seed of the draw of all these windows, 0 or more.
        folder: Where results go, below `trainer.default_root_dir`.

    Raises:
        ValueError: A setting is outside its range.
    """

    gradually: Gradually | None = None
    """How what is pruned grows while the model trains; None if it does not grow in this way."""

    def __init__(
        self, calibration_windows: int, held_back_windows: int, calibration_seed: int, folder: str
    ) -> None:
        check_at_least(
            1, calibration_windows=calibration_windows, held_back_windows=held_back_windows
        )
        check_at_least(0, calibration_seed=calibration_seed)
        check_folder(self.name, folder, "depth", "weights", "widths")
        self.calibration_windows, self.held_back_windows = calibration_windows, held_back_windows
        self.calibration_seed = calibration_seed
        self.folder = folder
        self.history: list[dict[str, Any]] = []
        """What was pruned so far, with the quality before and after: JSON values."""

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """Settings that decide what is pruned; a checkpoint resumes only under the same."""

    @abstractmethod
    def catch_up(self, trainer: Trainer, module: TrainsWeights) -> None:
        """Prune what is due at the current step and has not been pruned yet."""

    def check_first(self, trainer: Trainer, module: LightningModule) -> None:
        """Check module and strategy before anything is read.

        Raises:
            ValueError: The module does not train a base model, or the strategy shards the trained
                weights.
        """
        self.pruned(module).check_removals(trainer.strategy)

    def phases(self, trainer: Trainer) -> list[tuple[int, str]]:
        """The pruning: before the first step, or while the model trains."""
        return [(0, f"prune by {self.name}, {self.when(trainer)}")]

    def when(self, trainer: Trainer) -> str:
        """When this callback prunes, in words."""
        if self.gradually is None:
            return "before the first step"
        last = self.gradually.last_step(int(trainer.estimated_stepping_batches))
        return f"every {self.gradually.every_n_steps} steps until step {last}"

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Prune what is due at this step."""
        self.catch_up(trainer, self.pruned(pl_module))

    def state_dict(self) -> dict[str, Any]:
        """The history of prunings, and the settings that decide the rest."""
        return {"settings": self.settings(), "history": self.history}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint.

        Raises:
            ValueError: It was written under other settings.
        """
        refuse_other(state_dict["settings"], self.settings(), self.name)
        self.history = state_dict["history"]

    @property
    def name(self) -> str:
        """Name in messages."""
        return type(self).__name__

    def pruned(self, module: object) -> TrainsWeights:
        """The module, if it trains the weights of a base model.

        Raises:
            ValueError: It does not.
        """
        return trains_weights(module, self.name)

    def calibration_tokens(self, trainer: Trainer) -> int:
        """Number of tokens of the calibration windows."""
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        return self.calibration_windows * int(data.window_tokens)

    def windows(self, trainer: Trainer, count: int | None = None) -> Tensor:
        """Draw calibration windows: int64 of shape (N, T).

        Args:
            trainer: The trainer.
            count: Number of windows; `calibration_windows` if not given.

        Raises:
            ValueError: The training data has fewer.
        """
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        count = self.calibration_windows if count is None else count
        return calibration_windows(data, count, self.calibration_seed, self.name)

    def split_windows(self, trainer: Trainer, count: int | None = None) -> tuple[Tensor, Tensor]:
        """Windows to measure on, and windows held back from them; in random order.

        Args:
            trainer: The trainer.
            count: Number of windows to measure on; `calibration_windows` if not given.

        Raises:
            ValueError: The training data has fewer.
        """
        count = (self.calibration_windows if count is None else count) + self.held_back_windows
        drawn_NT = self.windows(trainer, count)
        generator = torch.Generator().manual_seed(self.calibration_seed)
        drawn_NT = drawn_NT[torch.randperm(count, generator=generator)]
        return drawn_NT[self.held_back_windows :], drawn_NT[: self.held_back_windows]

    def publish(self, trainer: Trainer, event: Mapping[str, Any]) -> None:
        """Log the numbers of an event."""
        figures = {name: value for name, value in event.items() if isinstance(value, float)}
        for logger in trainer.loggers:
            logger.log_metrics(figures, step=trainer.global_step)


def check_at_least(least: int, **settings: int) -> None:
    """Check settings that are numbers.

    Args:
        least: Smallest value that is allowed.
        **settings: Values by name.

    Raises:
        ValueError: A value is smaller.
    """
    for name, value in settings.items():
        if value < least:
            raise ValueError(f"`{name}` must be {least} or more, got {value}.")
