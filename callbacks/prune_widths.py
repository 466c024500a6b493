"""Reduce the widths of blocks while a model trains: rank the entries, cut, refit, train on.

Sources: gate gradients, "LoRAPrune" (arXiv 2305.18403, section 3.2, without its approximation by
low-rank updates); the squared gradient is the diagonal of the empirical Fisher information, as in
"A Fast Post-Training Pruning Framework for Transformers" (arXiv 2204.09656). Both are used in
rounds, with a closed-form refit of the kept weights.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from transformers import PreTrainedModel

import secateur.pruning.widths
from secateur.callbacks.prune import Prune
from secateur.pruning.blocks.refit import Refit
from secateur.pruning.commands import import_all
from secateur.pruning.export.cut import cut
from secateur.pruning.families import skeleton
from secateur.pruning.measure.perplexity import perplexity
from secateur.pruning.plan import Plan, plan_from_indices
from secateur.pruning.protocols import TrainsWeights
from secateur.pruning.sites import find_sites
from secateur.pruning.weights.gradually import Gradually
from secateur.pruning.widths.budget import Budget
from secateur.pruning.widths.gate_gradient import Fisher
from secateur.pruning.widths.gradual_ranking import GradualRanking, WidthSearch
from secateur.pruning.widths.scores import WidthScore

import_all(secateur.pruning.widths)


class PruneWidths(Prune):
    """Cut the widths of the blocks of a model down to a budget, and train on.

    The model is cut permanently: the smaller model trains from then on. Low-rank updates are merged
    before a cut and start again at zero, and the optimiser state is reset. With `compensation`, the
    kept weights are refitted in closed form if that lowers the perplexity of held-back windows; log
    and report state this.

    Args:
        budget: How much of the base model is kept, and in which shapes.
        score: Score of the entries of a width: `Fisher` (if not given), `GateGradient`,
            `Fluctuation`, `WandaWidth`, `WidthMagnitude` or `RandomOrder`.
        search: How entries are ranked: in rounds, each of which removes the lowest-ranked
            (`GradualRanking`), or such a ranking improved by `Evolution`.
        compensation: Refits the kept weights; None leaves them unchanged.
        gradually: How the widths shrink while the model trains; all at once before the first step
            if not given.
        calibration_windows: Windows of the training text that weights are refitted on, 1 or more;
            the search reads the number that its rounds need.
        held_back_windows: Further windows, to test the refit on and to measure, 1 or more.
        calibration_seed: Seed of the draw of all these windows, 0 or more.
        folder: Where results go, below `trainer.default_root_dir`.

    Raises:
        ValueError: A setting is outside its range.
    """

    def __init__(
        self,
        budget: Budget,
        score: WidthScore | None = None,
        search: WidthSearch = GradualRanking(),  # noqa: B008 (frozen)
        compensation: Refit | None = Refit(),  # noqa: B008 (frozen)
        gradually: Gradually | None = None,
        calibration_windows: int = 256,
        held_back_windows: int = 32,
        calibration_seed: int = 0,
        folder: str = "widths",
    ) -> None:
        super().__init__(calibration_windows, held_back_windows, calibration_seed, folder)
        self.budget, self.score, self.search = budget, score or Fisher(), search
        self.compensation, self.gradually = compensation, gradually

    def settings(self) -> dict[str, Any]:
        return {
            "budget": repr(self.budget),
            "score": repr(self.score),
            "search": repr(self.search),
            "compensation": repr(self.compensation),
            "gradually": self.gradually and self.gradually.settings(),
            "calibration_windows": self.calibration_windows,
            "held_back_windows": self.held_back_windows,
            "calibration_seed": self.calibration_seed,
        }

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check that the budget can be met in time; prune what is due at once.

        Raises:
            ValueError: It cannot be met, or not before training ends.
        """
        module = self.pruned(pl_module)
        model = skeleton(module.model.config)
        family = self.budget.family(model.config)
        if not self.history:
            self.budget.check(find_sites(model, family), self.budget.cost.table(model, family))
        steps = int(trainer.estimated_stepping_batches)
        if self.gradually is not None and (last := self.gradually.last_step(steps)) >= steps:
            raise ValueError(
                f"`gradually` {self.gradually.settings()} would meet the budget before step "
                f"{last}, and training has {steps} steps; raise `trainer.max_steps`, or lower "
                "`over` or `every_n_steps`."
            )
        if trainer.ckpt_path is None:  # else the optimiser of the checkpoint is still to be read
            self.catch_up(trainer, module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check that the budget was met.

        Raises:
            ValueError: Training ended before the last cut.
        """
        if (done := self._kept()) > self.budget.keep:
            raise ValueError(
                f"`budget.keep` of PruneWidths is {self.budget.keep}, and {done:.4f} are left when "
                f"training ends at step {trainer.global_step}. Go on with `--ckpt_path last`, or "
                "start without `--ckpt_path`."
            )

    def catch_up(self, trainer: Trainer, module: TrainsWeights) -> None:
        keep, step = self.budget.keep, 0
        if self.gradually is not None:
            steps = int(trainer.estimated_stepping_batches)
            step = self.gradually.due(trainer.global_step, steps)
            keep = 1 - self.gradually.sparsity(step, steps, 1 - keep)
        done = self.history[-1]["step"] if self.history else -1
        if step > done and keep < self._kept():
            self._prune(trainer, module, step, keep)

    def _kept(self) -> float:
        """Fraction of the cost of the base model that is left after the cuts of this callback."""
        return float(self.history[-1]["kept"]) if self.history else 1.0

    def _prune(self, trainer: Trainer, module: TrainsWeights, step: int, keep: float) -> None:
        news: Any = None
        if trainer.is_global_zero:  # the others wait for the result
            narrow, plan, event = self._choose(trainer, module, step, keep)
            news = plan.state(), event, narrow.state_dict() if trainer.world_size > 1 else None
        state, event, weights = trainer.strategy.broadcast(news)
        if not trainer.is_global_zero:
            plan = Plan.from_state(state)
            with module.plain() as model:
                narrow = cut(model, plan)
            narrow.load_state_dict(weights)
        self.history.append(event)
        module.adopt(narrow, plan)
        module.record("widths", self.settings() | {"cuts": len(self.history)} | event)
        self.publish(trainer, event)
        rank_zero_info(
            f"Step {trainer.global_step}: {event['kept']:.4f} of the {self.budget.cost.label} are "
            f"left; perplexity of the windows held back {event['perplexity_before']:.2f} -> "
            f"{event['perplexity_after']:.2f}, {event['refit']}."
        )

    def _choose(
        self, trainer: Trainer, module: TrainsWeights, step: int, keep: float
    ) -> tuple[PreTrainedModel, Plan, dict[str, Any]]:
        """The narrow model, the plan that it was cut by, and figures for log and report."""
        search_WT, refit_WT, held_WT = self._windows(trainer)
        with module.plain() as model:
            family = self.budget.family(model.config)
            sites, table = find_sites(model, family), self.budget.cost.table(model, family)
            # The budget is a fraction of the base model; `done` is the fraction that is left now.
            done = self._kept()
            budget = replace(self.budget, keep=min(1.0, keep / done))
            kept = self.search.choose(model, budget, self.score, search_WT).kept(sites)
            widths_S = torch.tensor([float(len(index_W)) for index_W in kept])
            share = done * float(table.fraction(widths_S))
            facts = {"step": step, "keep": keep, "kept": share, "counted": self.budget.cost.label}
            origin = {"method": f"widths by {self.score!r}"} | facts
            base = module.base_fingerprint
            plan = plan_from_indices(model, base, kept, origin, family=family)
            before = perplexity(model, held_WT)
            narrow = cut(model, plan)
            after = perplexity(narrow, held_WT)
            refit = "no refit was set"
            if self.compensation is not None:
                refitted = cut(model, plan)
                self.compensation(model, refitted, plan, refit_WT)
                found = perplexity(refitted, held_WT)
                better = found.value < after.value
                refit = f"refit {'kept' if better else 'left out'}: {found.value:.2f} with it, "
                refit += f"{after.value:.2f} without"
                if better:
                    narrow, after = refitted, found
        event = facts | {"refit": refit}
        event |= {"perplexity_before": before.value, "perplexity_after": after.value}
        return narrow, plan, event

    def _windows(self, trainer: Trainer) -> tuple[Tensor | None, Tensor, Tensor]:
        """Windows to rank on, windows to refit on, and windows held back from both."""
        ranked = self.search.windows_read(self.score)
        rest_WT, held_WT = self.split_windows(trainer, max(ranked, self.calibration_windows))
        return rest_WT[:ranked] if ranked else None, rest_WT[: self.calibration_windows], held_WT
