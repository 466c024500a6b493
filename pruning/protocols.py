"""What a callback may ask of the module that it meets: modules and callbacks import only this."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from pruning.budget import Budget, CostTable
from pruning.plan import PruningPlan
from pruning.sites import Site


@runtime_checkable
class LearnsMasks(Protocol):
    """A module that learns gates under a budget."""

    budget: Budget
    keep_target: float
    """Fraction of the cost that the penalty pulls to now, in (0, 1]."""
    temperature: float
    """Softness of the gates now, above 0."""
    sites: list[Site]
    table: CostTable

    @property
    def mask_steps(self) -> int:
        """Optimiser steps in which masks are learned; budget and temperature move over these."""

    def keep_probability(self) -> Tensor:
        """P(keep) of every gate, shape (N,)."""

    def plan(self) -> PruningPlan:
        """What would be exported now, on budget."""


@runtime_checkable
class Exports(Protocol):
    """A module that can leave a model folder behind."""

    def check_export_folder(self, folder: Path) -> None:
        """Raise ValueError if `folder` exists and could not be replaced by an export."""

    def export(self, folder: Path, command: str) -> None:
        """Write what was learned; `command` goes into the model card."""


@runtime_checkable
class ChecksFirst(Protocol):
    """A callback that can tell, before anything is read, that a run would end in an error."""

    def check_first(self, trainer: Any, module: Any) -> None:
        """Raise ValueError if the run could not do what the callback is there for."""


def learns_masks(module: object, needed_by: str) -> LearnsMasks:
    """The module itself, if it learns masks.

    Raises:
        ValueError: It does not.
    """
    if not isinstance(module, LearnsMasks):
        raise _unsuited(module, needed_by, "learns masks, such as MaskLearning")
    return module


def exports(module: object, needed_by: str) -> Exports:
    """The module itself, if it can leave a model behind.

    Raises:
        ValueError: It cannot.
    """
    if not isinstance(module, Exports):
        raise _unsuited(module, needed_by, "exports, such as MaskLearning or CausalLM")
    return module


def _unsuited(module: object, needed_by: str, what: str) -> ValueError:
    return ValueError(
        f"`{needed_by}` needs a module that {what}; got {type(module).__name__}. "
        "Remove the callback or choose another module."
    )
