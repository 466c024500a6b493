"""Gates that close while a model trains, by a score that its training steps yield.

Legend: N = all gates, S = sites.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from lightning.pytorch import Trainer
from torch import Tensor
from transformers import PreTrainedModel

from secateur.pruning.costs import CostModel
from secateur.pruning.sites import Site, find_sites
from secateur.pruning.widths.budget import Budget
from secateur.pruning.widths.gradual_ranking import Ranking, close_worst
from secateur.pruning.widths.training_score import TrainingScore, Watch


class TrainingGates:
    """The moving average of a score, and the gates that have closed so far.

    Args:
        score: Values of the gates, from the steps of the training.
        budget: Which sites may lose entries, and what is counted.
    """

    def __init__(self, score: TrainingScore, budget: Budget) -> None:
        self.score, self.budget = score, budget
        self.average_N: Tensor | None = None
        self.closed_N: Tensor | None = None
        """Rise at which a gate closed, counted from 1; 0 for open ones. None before the first."""
        self.rises = 0
        self.step = 0
        """The step of the last rise."""
        self.sites: list[Site] = []
        self._table: CostModel | None = None
        self._watch: Watch | None = None

    def begin(self, model: PreTrainedModel) -> None:
        """Watch a live model; gates that have closed before are closed in it.

        Raises:
            ValueError: The model lacks what the score reads.
        """
        self.end()
        family = self.budget.family(model.config)
        self.sites, self._table = find_sites(model, family), self.budget.cost.table(model, family)
        self._watch = self.score.watch(model, family, self.budget.prunes)
        if self.closed_N is not None:
            self._watch.close(self._ranking().gates(self.sites))

    def end(self) -> None:
        """Leave the model; nothing happens if it is not watched."""
        if self._watch is not None:
            self._watch.remove()
        self._watch = None

    @property
    def watches(self) -> bool:
        """Whether a model is watched."""
        return self._watch is not None

    def before_batch(self, windows: int) -> None:
        """Prepare for a batch of so many windows."""
        if self._watch is not None:
            self._watch.before_batch(windows)

    def after_backward(self) -> None:
        """Read the gradients of a batch."""
        if self._watch is not None:
            self._watch.after_backward()

    def before_optimizer_step(self, trainer: Trainer) -> None:
        """Take the values of a step into the average, the same on all ranks."""
        if self._watch is None:
            return
        values_N = self._watch.values().to(trainer.strategy.root_device)
        mean: Any = trainer.strategy.reduce(values_N, reduce_op="mean")
        value_N: Tensor = mean.cpu()
        if not bool(value_N.isfinite().all()):  # a step that mixed precision leaves out, too
            return
        share = self.score.average
        before_N = 0 if self.average_N is None else share * self.average_N
        self.average_N = before_N + (1 - share) * value_N

    def close(self, model: PreTrainedModel, keep: float, step: int) -> None:
        """Close the lowest-ranked gates until a fraction of the cost is kept.

        Args:
            model: The live model.
            keep: Fraction of the cost, in (0, 1].
            step: The present step.

        Raises:
            ValueError: No step has given finite values yet, or blocks were removed meanwhile.
        """
        assert self._table is not None
        if find_sites(model, self.budget.family(model.config)) != self.sites:
            raise ValueError(
                "Blocks were removed while gates of PruneWidths close in training. Put "
                "PruneBlocks, with `removals` AtOnce, before PruneWidths."
            )
        if self.average_N is None:
            raise ValueError(
                f"`score` {self.score!r} found no step with finite gradients before step {step}; "
                "train in float32 or bfloat16, or raise `gradually.every_n_steps`."
            )
        budget = replace(self.budget, keep=keep)
        found = close_worst(
            self._ranking(), self.average_N, self.score, budget, self.sites, self._table
        )
        self.closed_N, self.rises, self.step = found.closed_in_N, found.rounds, step
        if self._watch is not None:
            self._watch.close(found.gates(self.sites))

    def kept(self) -> tuple[Tensor, ...]:
        """Sorted indices (int64) of the open gates, one vector per site."""
        return self._ranking().kept(self.sites)

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds."""
        names = ("average_N", "closed_N", "rises", "step")
        return {name: getattr(self, name) for name in names}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        for name, value in state.items():
            setattr(self, name, value)

    def _ranking(self) -> Ranking:
        start = Ranking.start(self.sites)
        closed_N = start.closed_in_N if self.closed_N is None else self.closed_N
        return Ranking(self.rises, closed_N, start.scores_N)
