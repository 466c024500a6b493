"""Interfaces between callbacks and modules; neither package imports the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from transformers import PreTrainedModel

from secateur.pruning.costs import CostModel
from secateur.pruning.depth.compensation import Compensation
from secateur.pruning.depth.units import Unit
from secateur.pruning.files.base_model import BaseModel
from secateur.pruning.plan import Plan
from secateur.pruning.sites import Site
from secateur.pruning.widths.budget import Budget


@runtime_checkable
class LearnsMasks(Protocol):
    """A module that learns gates under a budget."""

    budget: Budget
    annealed: float
    """How far the target has come from the dense model to the budget, in [0, 1]."""
    temperature: float
    """Present temperature of the gates, above 0."""
    sites: list[Site]
    table: CostModel

    @property
    def keep_target(self) -> float:
        """Present target of the kept fraction of the cost, in (0, 1]."""

    @property
    def mask_steps(self) -> int:
        """Optimiser steps in which masks are learned; budget and temperature move over these."""

    def keep_probability(self) -> Tensor:
        """P(keep) of every gate, shape (N,)."""

    def plan(self) -> Plan:
        """The plan that would be exported now, on budget."""

    def settle_now(self) -> None:
        """Learn masks no longer: they settle, and the steps planned after that follow."""


@runtime_checkable
class Exports(Protocol):
    """A module that can export a model folder."""

    def check_export_folder(self, folder: Path) -> None:
        """Raise ValueError if `folder` exists and must not be replaced by an export."""

    def export(self, folder: Path, command: str) -> None:
        """Export the model; `command` goes into the model card."""


@runtime_checkable
class ChecksFirst(Protocol):
    """A callback that can check, before anything is read, whether a run would fail."""

    def check_first(self, trainer: Any, module: Any) -> None:
        """Raise ValueError if the callback could not do its work in this run."""


@runtime_checkable
class HasPhases(Protocol):
    """A module or a callback that tells, before a run begins, what it is going to do."""

    def phases(self, trainer: Any) -> list[tuple[int, str]]:
        """First optimiser step and description of each phase, in order."""


def learns_masks(module: object, needed_by: str) -> LearnsMasks:
    """The module itself, if it learns masks.

    Raises:
        ValueError: It does not.
    """
    if not isinstance(module, LearnsMasks):
        raise _unsuited(module, needed_by, "learns masks, such as MaskLearning")
    return module


def exports(module: object, needed_by: str) -> Exports:
    """The module itself, if it can export a model.

    Raises:
        ValueError: It cannot export.
    """
    if not isinstance(module, Exports):
        raise _unsuited(module, needed_by, "exports, such as MaskLearning or CausalLM")
    return module


def _unsuited(module: object, needed_by: str, what: str) -> ValueError:
    return ValueError(
        f"`{needed_by}` needs a module that {what}; got {type(module).__name__}. "
        "Remove the callback or choose another module."
    )


@runtime_checkable
class TrainsWeights(Protocol):
    """A module that trains the weights of a base model, which a callback may prune meanwhile."""

    model: Any
    """The live model."""
    base_model: BaseModel
    """The base model; ValueError if training started from random weights."""
    base_folder: Path
    """Its folder."""
    base_fingerprint: str
    """Content hash of the base model."""
    kept_blocks: list[int]
    """Numbers, in the base model, of the blocks that are not entirely removed; empty before the
    model is read."""
    removed_units: list[Unit]
    """Removed blocks and halves of blocks, by their numbers in the base model, in order."""

    def plain(self) -> AbstractContextManager[PreTrainedModel]:
        """The model as it would be exported now, in evaluation mode, to score and to measure;
        changes made inside may be undone at the end.
        """

    def check_removals(self, strategy: Any) -> None:
        """Check before training that blocks can be removed under a strategy.

        Raises:
            ValueError: It shards weights or optimiser states.
        """

    def check_compensation(self) -> None:
        """Check before training that the weights that remain may be changed.

        Raises:
            ValueError: They are frozen.
        """

    def remove_units(
        self,
        units: Sequence[Unit],
        provenance: Mapping[str, Any],
        compensation: Compensation | None = None,
    ) -> None:
        """Remove units, by their numbers in the base model, and make up for them if that helps.

        Raises:
            ValueError: They cannot be removed, or not under this strategy.
        """

    def adopt(self, narrow: PreTrainedModel, plan: Plan) -> None:
        """Train a narrow model, which a plan has cut from `plain`, instead of the present one."""

    def record(self, method: str, provenance: Mapping[str, Any]) -> None:
        """Record for the model card how weights were changed: JSON values only."""


def trains_weights(module: object, needed_by: str) -> TrainsWeights:
    """The module itself, if it trains the weights of a base model.

    Raises:
        ValueError: It does not.
    """
    if not isinstance(module, TrainsWeights):
        raise _unsuited(module, needed_by, "trains the weights of a base model, such as CausalLM")
    return module


@runtime_checkable
class HoldsWindows(Protocol):
    """A data module with windows of tokens to train on."""

    train_windows: Any
    """Windows, indexed by a list of numbers through `__getitems__`: int64 of shape (B, T)."""


def calibration_windows(data: object, count: int, seed: int, needed_by: str) -> Tensor:
    """Draw windows to score on from the training data: int64 of shape (N, T).

    Args:
        data: The data module.
        count: Number of windows, 1 or more.
        seed: Seed of the draw.
        needed_by: Name of the caller, for the message.

    Raises:
        ValueError: The data has no windows, or fewer than `count`.
    """
    if not isinstance(data, HoldsWindows):
        raise ValueError(
            f"`{needed_by}` needs data that holds windows of tokens, as TextData does."
        )
    if count > (found := len(data.train_windows)):
        raise ValueError(
            f"`calibration_windows` is {count} and the training data has {found} windows; give "
            "more text or lower it."
        )
    order_N = torch.randperm(found, generator=torch.Generator().manual_seed(seed))
    windows_NT: Tensor = data.train_windows.__getitems__(order_N[:count].sort().values.tolist())
    return windows_NT
