"""Reduce the widths of blocks while a model trains: rank the entries, cut, refit, train on.

Sources: gate gradients, "LoRAPrune" (arXiv 2305.18403, section 3.2, without its approximation by
low-rank updates); the squared gradient is the diagonal of the empirical Fisher information, as in
"A Fast Post-Training Pruning Framework for Transformers" (arXiv 2204.09656). Both are used in
rounds, with a closed-form refit of the kept weights. By a `TrainingScore`, gates close while the
model trains, and it is cut once, as in LoRAPrune.
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
from secateur.callbacks._training_gates import TrainingGates
from secateur.callbacks.prune import Prune
from secateur.pruning.blocks.refit import Refit
from secateur.pruning.commands import import_all
from secateur.pruning.export.cut import cut
from secateur.pruning.families import skeleton
from secateur.pruning.measure.perplexity import perplexity
from secateur.pruning.modes import evaluation
from secateur.pruning.plan import Plan, plan_from_indices
from secateur.pruning.protocols import TrainsWeights
from secateur.pruning.sites import find_sites
from secateur.pruning.weights.gradually import Gradually
from secateur.pruning.widths.budget import Budget
from secateur.pruning.widths.exchange import Exchange
from secateur.pruning.widths.gate_gradient import Fisher
from secateur.pruning.widths.gradual_ranking import WidthSearch
from secateur.pruning.widths.scores import WidthScore
from secateur.pruning.widths.training_score import TrainingScore

import_all(secateur.pruning.widths)

_ROUNDING = 1e-6  # what is left is a product of fractions in float32, one per cut


class PruneWidths(Prune):
    """Cut the widths of the blocks of a model down to a budget, and train on.

    The model is cut permanently: the smaller model trains from then on. Low-rank updates are merged
    before a cut and start again at zero, and the optimiser state is reset. With `compensation`, the
    kept weights are refitted in closed form if that lowers the perplexity of held-back windows; log
    and report state this.

    Args:
        budget: How much of the base model is kept, and in which shapes.
        score: Score of the entries of a width: `Fisher` (if not given), `GateGradient`,
            `Fluctuation`, `WandaWidth`, `WidthMagnitude` or `RandomOrder`. With `GateTaylor` or
            `LoRATaylor`, which are read off the training steps, gates close at every rise of
            `gradually`, and the model is cut at the last.
        search: How entries are ranked: in rounds, each of which removes the lowest-ranked
            (`GradualRanking`), or such a ranking improved by `Exchange` or `Evolution`.
        compensation: Refits the kept weights; None leaves them unchanged.
        gradually: How the widths shrink while the model trains; all at once before the first step
            if not given, for which scores of training steps come too late.
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
        score: WidthScore | TrainingScore | None = None,
        search: WidthSearch = Exchange(),  # noqa: B008 (frozen)
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
        self._gates: TrainingGates | None = None
        if isinstance(self.score, TrainingScore):
            self._check_training_score(self.score)
            self._gates = TrainingGates(self.score, budget)

    def _check_training_score(self, score: TrainingScore) -> None:
        """Refuse settings that a score of training steps does not use.

        Raises:
            ValueError: `gradually` is missing, or a search is set.
        """
        name = type(score).__name__
        if self.gradually is None:
            raise ValueError(
                f"`score` {name} is read off training steps and needs `gradually`; set "
                "`gradually.every_n_steps`, or choose a score such as Fisher."
            )
        if self.search != Exchange():
            raise ValueError(
                f"`search` ranks on calibration windows, which `score` {name} does not read; leave "
                "`search` out, or choose a score such as Fisher."
            )

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
            ValueError: It cannot be met, or not before training ends, or the text is too short.
        """
        module = self.pruned(pl_module)
        if self.compensation is not None:
            dense = module.base_model.skeleton()
            self.compensation.check(dense, (), self.calibration_tokens(trainer))
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
        self._watch(module)
        if trainer.ckpt_path is None:  # else the optimiser of the checkpoint is still to be read
            self.catch_up(trainer, module)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Prune what is due at this step, and prepare the gates for the batch."""
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        if self._gates is not None:
            self._gates.before_batch(len(batch["input_ids"]))

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Read the gradients of the gates."""
        if self._gates is not None:
            self._gates.after_backward()

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Any
    ) -> None:
        """Read the gradients of the step, before they are clipped."""
        if self._gates is not None:
            self._gates.before_optimizer_step(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure the model with the gates of the checkpoint closed."""
        self._watch(self.pruned(pl_module))

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """As for validation."""
        self._watch(self.pruned(pl_module))

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """As for validation."""
        self._watch(self.pruned(pl_module))

    def _watch(self, module: TrainsWeights) -> None:
        """Watch the model until it is cut."""
        if self._gates is not None and not self._gates.watches and not self.history:
            self._gates.begin(module.model)

    def state_dict(self) -> dict[str, Any]:
        """As of every `Prune`, and the state of gates that close in training."""
        return super().state_dict() | ({"gates": self._gates.state()} if self._gates else {})

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint.

        Raises:
            ValueError: It was written under other settings.
        """
        super().load_state_dict(state_dict)
        if self._gates is not None:
            self._gates.end()
            self._gates.load(state_dict["gates"])

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check that the budget was met.

        Raises:
            ValueError: Training ended before the last cut.
        """
        if (done := self._kept()) > self.budget.keep + _ROUNDING:
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
        if step <= done or keep >= self._kept():
            return
        if self._gates is not None and step > self._gates.step:
            self._gates.close(module.model, keep, step)
            label = self.budget.cost.label
            rank_zero_info(f"Step {step}: gates are closed; {keep:.4f} of the {label} are left.")
        if self._gates is None or keep <= self.budget.keep:
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
        if self._gates is not None:
            self._gates.end()
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
        masked = None
        if self._gates is not None:
            with evaluation(module.model):
                masked = perplexity(module.model, held_WT)
            self._gates.end()  # what is cut has no gates
        with module.plain() as model:
            family = self.budget.family(model.config)
            sites, table = find_sites(model, family), self.budget.cost.table(model, family)
            # The budget is a fraction of the base model; `done` is the fraction that is left now.
            done = self._kept()
            budget = replace(self.budget, keep=min(1.0, keep / done))
            if isinstance(self.score, WidthScore):
                kept = self.search.choose(model, budget, self.score, search_WT).kept(sites)
            else:
                assert self._gates is not None
                kept = self._gates.kept()
            widths_S = torch.tensor([float(len(index_W)) for index_W in kept])
            share = done * float(table.fraction(widths_S))
            facts = {"step": step, "keep": keep, "kept": share, "counted": self.budget.cost.label}
            origin = {"method": f"widths by {self.score!r}"} | facts
            base = module.base_fingerprint
            plan = plan_from_indices(model, base, kept, origin, family=family)
            before = masked or perplexity(model, held_WT)
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
        ranked = 0
        if isinstance(self.score, WidthScore):
            ranked = self.search.windows_read(self.score)
        rest_WT, held_WT = self.split_windows(trainer, max(ranked, self.calibration_windows))
        return rest_WT[:ranked] if ranked else None, rest_WT[: self.calibration_windows], held_WT
