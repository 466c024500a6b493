"""Stand-ins for what callbacks meet: as much of a trainer and of a module as they ask for."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from secateur.pruning.costs import Parameters
from secateur.pruning.families import family_of
from secateur.pruning.plan import Plan, plan_from_indices
from secateur.pruning.sites import find_sites
from secateur.pruning.widths.budget import Budget
from tests.tiny import tiny_llama


class Masks(LightningModule):
    """Learns masks as far as callbacks can tell: P(keep) is whatever a test sets."""

    def __init__(self, keep: float = 0.5, probability: float = 1.0) -> None:
        super().__init__()
        model = tiny_llama()
        self.budget = Budget(keep=keep, cost=Parameters())
        self.sites = find_sites(model, family_of(model.config))
        self.table = self.budget.cost.table(model)
        self.annealed, self.temperature = 1.0, 0.4
        self.mask_steps = 100
        self.dense = model
        self.set(probability)
        self.settled = False
        self.logged: list[dict[str, float]] = []

    def set(self, probability: float) -> None:
        self.probability_N = torch.full((sum(site.size for site in self.sites),), probability)

    @property
    def keep_target(self) -> float:
        return 1.0 + (self.budget.keep - 1.0) * self.annealed

    def keep_probability(self) -> Tensor:
        return self.probability_N

    def plan(self) -> Plan:
        scores_N = torch.linspace(0, 1, len(self.probability_N))
        kept = self.budget.finalise(scores_N, self.sites, self.table)
        return plan_from_indices(self.dense, "0" * 64, kept, {"kept": 0.5})

    def settle_now(self) -> None:
        self.settled = True

    def log_dict(self, dictionary: Any, **_: Any) -> None:
        self.logged.append(dict(dictionary))


def fake_trainer(root: Path, step: int = 0, total: int = 100, **more: Any) -> Any:
    settings = {
        "default_root_dir": str(root),
        "global_step": step,
        "estimated_stepping_batches": total,
        "fast_dev_run": 0,
        "is_global_zero": True,
        "sanity_checking": False,
    }
    return SimpleNamespace(**settings | more)
