"""Remove blocks while a model trains: score, choose, remove, train on.

Sources: "Shortened LLaMA" (arXiv 2402.02834), at once and then recovery; "SLEB" (arXiv 2402.09025)
scores again after every block; the gradual schedule does so with training in between.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from transformers import PreTrainedModel

from secateur.callbacks.prune import Prune, check_at_least
from secateur.pruning.blocks.compensation import ModelCompensation
from secateur.pruning.depth import (
    Cached,
    Compensation,
    OneShot,
    Perplexity,
    Search,
    Target,
    Unit,
    UnitCount,
)
from secateur.pruning.depth.plots import plot_scores
from secateur.pruning.depth.search import names
from secateur.pruning.measure.perplexity import perplexity
from secateur.pruning.modelling import is_narrow
from secateur.pruning.protocols import TrainsWeights


class Removals(ABC):
    """When blocks, or halves of them, are removed: a pure function of the optimiser step."""

    @abstractmethod
    def due(self, step: int, total: int) -> int:
        """Number of units that are removed when a step begins.

        Args:
            step: Number of the optimiser step, 0 or more.
            total: Units to remove in total, 1 or more.
        """

    @abstractmethod
    def last_step(self, total: int) -> int:
        """The step before which the last unit is removed."""


@dataclass(frozen=True)
class AtOnce(Removals):
    """Remove all units before the first step; with 0 steps, the model is pruned and not trained."""

    def due(self, step: int, total: int) -> int:
        return total

    def last_step(self, total: int) -> int:
        return -1


@dataclass(frozen=True)
class OneByOne(Removals):
    """Remove one block, or one half, every few steps; score the model anew each time.

    Args:
        every_n_steps: Optimiser steps from one removal to the next, 1 or more.
        first_step: The step before which the first unit is removed, 0 or more.

    Raises:
        ValueError: A setting is outside its range.

    Example: every 20 steps from step 10 on, two of three blocks are removed when step 30 begins.
    """

    every_n_steps: int
    first_step: int = 0

    def __post_init__(self) -> None:
        check_at_least(1, every_n_steps=self.every_n_steps)
        check_at_least(0, first_step=self.first_step)

    def due(self, step: int, total: int) -> int:
        if step < self.first_step:
            return 0
        return min(total, 1 + (step - self.first_step) // self.every_n_steps)

    def last_step(self, total: int) -> int:
        return self.first_step + (total - 1) * self.every_n_steps


class PruneBlocks(Prune):
    """Score the blocks of the model, remove the least important, and train on.

    Around every removal the loss and the perplexity of the calibration windows are logged. The
    scores are written below `folder`, with a picture; a later run with the same model, text and
    score reuses the files. Removing whole blocks leaves a stock model; with `search.units`
    HalfBlocks, attention and MLP of a block can be removed separately, and the exported model
    includes the code that loads it.

    Args:
        target: How much to remove, counted on the base model.
        search: How to choose. One-shot by perplexity if not given.
        removals: When blocks are removed; all at once before training if not given.
        calibration_windows: Windows of the training text to score on, 1 or more.
        calibration_seed: Seed of the draw of these windows, 0 or more.
        compensation: Changes the remaining weights to make up for what was removed, on the
            calibration windows, if that lowers the perplexity of held-back windows: `Refit`, or
            `ScaledStream` (Prune&Comp, arXiv 2507.18212); none if not given.
        held_back_windows: Further windows, to test the compensation on, 1 or more.
        folder: Where scores and pictures go, below `trainer.default_root_dir`.

    Raises:
        ValueError: A setting is outside its range.
    """

    moved_settings: ClassVar[Mapping[str, str]] = {"compensate": "compensation"}

    def __init__(
        self,
        target: Target,
        search: Search | None = None,
        removals: Removals | None = None,
        calibration_windows: int = 128,
        calibration_seed: int = 0,
        compensation: ModelCompensation | None = None,
        held_back_windows: int = 32,
        folder: str = "depth",
    ) -> None:
        super().__init__(calibration_windows, held_back_windows, calibration_seed, folder)
        self.target, self.search = target, search or OneShot(Perplexity())
        self.removals = removals or AtOnce()
        self.compensation = compensation
        self._total = 0  # units to remove in total

    def when(self, trainer: Trainer) -> str:
        if isinstance(self.removals, AtOnce):
            return super().when(trainer)
        return f"as `removals` {self.removals!r} says"

    def check_first(self, trainer: Trainer, module: LightningModule) -> None:
        super().check_first(trainer, module)
        if self.compensation is not None:
            self.pruned(module).check_compensation()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check that the target can be reached in time; remove what is due at once.

        Raises:
            ValueError: The target cannot be reached in time, or `compensation` does not suit the
                units or the text.
        """
        self.check_first(trainer, pl_module)
        module = self.pruned(pl_module)
        if self.compensation is not None:
            dense = module.base_model.skeleton()
            tokens = self.calibration_tokens(trainer)
            self.compensation.check(dense, self.search.units.of(dense), tokens)
        self._total = units_to_remove(module.base_model.skeleton(), self.search, self.target)
        last, steps = self.removals.last_step(self._total), trainer.estimated_stepping_batches
        if last >= steps:
            raise ValueError(
                f"`removals` {self.removals} would take out the last of {self._total} units "
                f"before step {last}, and training has {steps} steps; raise `trainer.max_steps` "
                "or remove them sooner."
            )
        if trainer.ckpt_path is None:  # else the optimiser of the checkpoint is still to be read
            self.catch_up(trainer, module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check that the target was met.

        Raises:
            ValueError: It was not met after all steps, for example when a run without this callback
                is resumed from its last checkpoint.
        """
        removed = len(self.pruned(pl_module).removed_units)
        if removed < self._total and trainer.global_step >= trainer.estimated_stepping_batches:
            raise ValueError(
                f"`target` {self.target} of PruneBlocks is {self._total} units, and {removed} were "
                f"removed when training ended at step {trainer.global_step}. Start without "
                "`--ckpt_path`, or from its exported model as `base`."
            )

    def settings(self) -> dict[str, Any]:
        return {
            "target": repr(self.target),
            "search": repr(self.search),
            "removals": repr(self.removals),
            "calibration_windows": self.calibration_windows,
            "calibration_seed": self.calibration_seed,
            "compensation": repr(self.compensation),
            "held_back_windows": self.held_back_windows,
        }

    def catch_up(self, trainer: Trainer, module: TrainsWeights) -> None:
        done = len(module.removed_units)
        if (due := self.removals.due(trainer.global_step, self._total)) > done:
            self._remove(trainer, module, due - done)

    def _remove(self, trainer: Trainer, module: TrainsWeights, count: int) -> None:
        removal: dict[str, Any] = {}
        if trainer.is_global_zero:  # the others wait for its choice
            removal = self._choose(trainer, module, count)
        removal = trainer.strategy.broadcast(removal)
        units = [Unit.of_key(key) for key in removal.pop("units")]
        windows_NT, compensation = self.windows(trainer), None
        if self.compensation is not None:
            compensation = Compensation(self.compensation, *self.split_windows(trainer))
        module.remove_units(units, removal, compensation)
        with module.plain() as model:
            after = perplexity(model, windows_NT)
        removal |= {"loss_after": after.mean_nll, "perplexity_after": after.value}
        self.history.append({"units": [unit.key for unit in units]} | removal)
        self.publish(trainer, removal | {"kept_blocks": float(len(module.kept_blocks))})
        rank_zero_info(
            f"Step {trainer.global_step}: removed block{'s' if len(units) > 1 else ''} "
            f"{names(units)} of the base model, "
            f"{len(module.kept_blocks)} are left; perplexity of the calibration windows "
            f"{removal['perplexity_before']:.2f} -> {after.value:.2f}."
        )

    def _choose(self, trainer: Trainer, module: TrainsWeights, count: int) -> dict[str, Any]:
        """The units to remove, by their names in the base model, and their present scores."""
        folder, windows_NT = Path(trainer.default_root_dir) / self.folder, self.windows(trainer)
        search = replace(self.search, score=Cached(self.search.score, folder))
        with module.plain() as model:
            before = perplexity(model, windows_NT)
            chosen = search(model, windows_NT, UnitCount(count))
        chosen = chosen.better or chosen  # the search has logged it

        def in_base(units: Iterable[Unit]) -> tuple[Unit, ...]:
            return tuple(Unit(module.kept_blocks[unit.block], unit.part) for unit in units)

        units = in_base(chosen.removed)
        plot_scores(
            replace(chosen.scores, units=in_base(chosen.scores.units)),
            folder / f"scores_step_{trainer.global_step:06d}.png",
            units,
            f"{type(self.search.score).__name__} by block, step {trainer.global_step}",
        )
        return {
            "units": [unit.key for unit in units],
            "step": trainer.global_step,
            "search": repr(self.search),
            "calibration_windows": self.calibration_windows,
            "calibration_seed": self.calibration_seed,
            "loss_before": before.mean_nll,
            "perplexity_before": before.value,
        }


def units_to_remove(model: PreTrainedModel, search: Search, target: Target) -> int:
    """Units of the base model, all of one size, that reach a target.

    Args:
        model: The base model, live or on the meta device.
        search: Defines which units may be removed.
        target: How much to remove.

    Raises:
        ValueError: All removable units are not enough, or units differ in size, so that their
            number depends on the choice.
    """
    config = model.config
    candidates, _ = search.check(config, search.units.of(model), target)
    sizes = target.sizes(config, candidates)
    if max(sizes) > min(sizes) * (1 + 1e-9):
        units = "blocks" if is_narrow(config.model_type) else "attention and MLP"
        raise ValueError(
            f"`target` {target} gives {units} different costs, so that their number is unknown "
            "before they are chosen; use Blocks or BlockFraction."
        )
    return next(count for count in range(1, len(sizes) + 1) if target.reached(sizes[:count]))
