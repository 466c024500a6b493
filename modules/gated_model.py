"""A frozen language model with gates on its widths, and a hypernetwork that computes their logits.

Source: "DISP-LLM: Dimension-Independent Structural Pruning for Large Language Models"
(arXiv 2410.11988): gates multiply features of the frozen model (eqs. 5 to 8).

Differs from the paper: gates start from a ranking by importance, every sample of gates meets the
budget, logistic instead of Gumbel noise, and a deterministic, budget-exact selection.

Legend: N = all gates, W = windows, T = tokens of a window, D = model width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any

import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

import secateur.pruning.widths
from secateur.modules.frozen_base import FrozenBase, freeze
from secateur.modules.language_modelling import LanguageModelling
from secateur.modules.quantisation import check_quantised_run, load_quantised
from secateur.modules.recompute import recompute
from secateur.modules.teacher import predicted_tokens, predicting_states
from secateur.pruning.chains import Step
from secateur.pruning.commands import import_all
from secateur.pruning.families import skeleton
from secateur.pruning.files.base_model import BaseModel
from secateur.pruning.losses import LossWeights, TokenLosses, head_of, token_losses
from secateur.pruning.plan import Plan, plan_from_indices
from secateur.pruning.protocols import calibration_windows
from secateur.pruning.sites import Site, masks_of, split
from secateur.pruning.widths.budget import Budget
from secateur.pruning.widths.gate_hooks import GateHooks
from secateur.pruning.widths.gates import GateSampler, Stream
from secateur.pruning.widths.hypernetwork import Hypernetwork
from secateur.pruning.widths.learning import GateLearning, Importance
from secateur.pruning.widths.policy_gradient import Draw
from secateur.pruning.widths.sizes import nested_cuts

import_all(secateur.pruning.widths)


class GatedModel(LanguageModelling):
    """A frozen language model, gates on its widths, and the hypernetwork of their logits.

    The arguments are those of `MaskLearning`.
    """

    divisible = frozen_weights = True

    def __init__(
        self,
        base: BaseModel,
        budget: Budget,
        sampler: GateSampler | None,
        hypernetwork: Callable[[Sequence[int]], Hypernetwork],
        learning: GateLearning,
        frozen: FrozenBase,
    ) -> None:
        super().__init__(base)
        self.budget, self.learning, self.frozen = budget, learning, frozen
        self.sampler = sampler or GateSampler(offset=3.0 if learning.start is None else 0.0)
        self.annealed = 1.0
        if budget.keep not in self._keeps:
            raise ValueError(
                f"`budget.keep` {budget.keep} must be one of `learning.sizes.keep`, "
                f"{' '.join(map(str, self._keeps))}: the size that this run exports."
            )
        self.strict_loading = False  # checkpoints hold trained parameters, not the frozen model
        self._make_hypernetwork = hypernetwork
        self.sites: list[Site]
        self.start_N: Tensor
        self._ranked_N: Tensor | None = None  # the initial ranking

    def setup(self, stage: str) -> None:
        """Check base model and strategy before the model is read.

        Raises:
            ValueError: One of them does not suit the settings.
        """
        self.check_strategy()
        self.check_bases()
        self.base_model.refuse(Step.UNIFORM_WIDTHS if self.budget.uniform else Step.WIDTHS)
        if self.frozen.quantisation is not None:
            check_quantised_run(self.frozen.quantisation, self.trainer.strategy)
        if self.learning.start is not None and self.divided:
            raise ValueError(
                "`--model.learning.start` ranks gates on a complete model, and `trainer.strategy` "
                f"{type(self.trainer.strategy).__name__} shards it; set "
                "`--model.learning.start null`."
            )
        self.temperature = self.sampler.start_temperature

    # Everything that a strategy may shard is made here; called once, on every rank.
    def configure_model(self) -> None:
        """Read the frozen model, insert the gates, make the hypernetwork."""
        if self.model is not None:
            fitting = self.trainer.state.fn == TrainerFn.FITTING
            if fitting and self.trainer.ckpt_path is None:  # a second fit starts afresh
                self._begin()
            return
        # An unknown family is reported before the weights are read.
        family = self.budget.family(self.base_model.config)
        dtype, quantisation = self.frozen.dtype, self.frozen.quantisation
        if quantisation is None:
            self.model = self.read_model(self.base_model, dtype)
        else:
            device = self.trainer.strategy.root_device
            self.model = load_quantised(self.base_model, quantisation, dtype, device)
        freeze(self.model)
        self.hooks = GateHooks(self.model, family)
        if self.frozen.gradient_checkpointing:
            recompute(self.model, self.hooks)
        self.sites = self.hooks.sites
        self.table = self.budget.cost.table(skeleton(self.model.config), family)
        self._smallest.check(self.sites, self.table)
        self._begin()

    def _begin(self) -> None:
        """Reset the gates to their state before the first step."""
        sizes = [site.size for site in self.sites]
        self.hypernetwork = self._make_hypernetwork(sizes)
        self.register_buffer("start_N", torch.zeros(sum(sizes)))
        self._ranked_N = None

    @property
    def keep_target(self) -> float:
        """Present target of the kept fraction of the cost; `annealed` moves it from 1 to that of
        the step.
        """
        sizes = self.learning.sizes
        keep = self.budget.keep if sizes is None else sizes.of_step(self.global_step)
        return 1.0 + (keep - 1.0) * self.annealed

    @property
    def _keeps(self) -> Sequence[float]:
        """The budgets that masks are learned for, the largest first."""
        return self.learning.sizes.keep if self.learning.sizes else (self.budget.keep,)

    @property
    def _smallest(self) -> Budget:
        return replace(self.budget, keep=self._keeps[-1])

    @property
    def temperature(self) -> float:
        """The present temperature of the gates."""
        return self.sampler.temperature

    @temperature.setter
    def temperature(self, value: float) -> None:
        self.sampler.temperature = value

    @property
    def _data(self) -> Any:
        return self.trainer.datamodule  # type: ignore[attr-defined]

    def _text(self, count: int, seed: int) -> Tensor:
        """Windows of the training text (int64, shape (W, T)), repeated if it has fewer."""
        there = len(self._data.train_windows)
        if there < count:
            rank_zero_info(f"The training text has {there} windows; {count} are read from these.")
        drawn_WT = calibration_windows(self._data, min(count, there), seed, "MaskLearning")
        generator = torch.Generator().manual_seed(seed)
        drawn_WT = drawn_WT[torch.randperm(len(drawn_WT), generator=generator)]
        return drawn_WT.repeat(-(-count // len(drawn_WT)), 1)[:count]

    @torch.no_grad()
    def _rank(self, start: Importance) -> None:
        """Rank the gates; logits start from the ranking, whatever the hypernetwork computes."""
        found: Any = None
        if self.trainer.is_global_zero or self.divided:
            count = start.search.windows_read(start.score)
            windows_WT = self._text(count, start.seed) if count else None
            ranking = start.search.choose(self.model, self._smallest, start.score, windows_WT)
            found = ranking.positions_N()
        if not self.divided:
            found = self.trainer.strategy.broadcast(found)
        first_N: Tensor = self.hypernetwork().to(self.start_N)
        self._ranked_N = found
        self.start_N.copy_(start.scale * found.to(self.start_N) - first_N)

    @torch.no_grad()
    def _cpu_logits(self) -> Tensor:
        """Logits of all gates, float32 of shape (N,) on the CPU."""
        with self.whole():
            logits_N: Tensor = self.hypernetwork().float() + self.start_N
            return logits_N.cpu()

    def _draws(self) -> Callable[[int], Draw]:
        """The draws of the gates of this step, by number."""
        logits_N = self.hypernetwork() + self.start_N
        if not bool(logits_N.isfinite().all()):
            self.stop_diverged("a logit of the gates", logits_N.sum())

        def draw(number: int) -> Draw:
            place = Stream(self.global_step, self.global_rank, number)
            return self.learning.pressure.draw(self.sampler, logits_N, place, self._on_budget)

        return draw

    def _on_budget(self, scores_N: Tensor) -> Tensor:
        """Masks (N,) of the highest scores that fit the budget of this step."""
        budget = replace(self.budget, keep=self.keep_target)
        kept = budget.finalise(scores_N.float().cpu(), self.sites, self.table)
        return masks_of(kept, self.sites)

    def _by_site(self, gates_N: Tensor) -> tuple[Tensor, ...]:
        """The gates by site; they are one at sites that the budget does not prune."""
        return tuple(
            gate if self.budget.prunes(site) else torch.ones_like(gate)
            for gate, site in zip(split(gates_N, self.sites), self.sites, strict=True)
        )

    @torch.no_grad()
    def keep_probability(self) -> Tensor:
        """P(keep) of every gate, shape (N,), float32 on the CPU; deterministic."""
        pressure, logits_N = self.learning.pressure, self._cpu_logits()
        probability_N = pressure.keep_probability(self.sampler, logits_N, self._on_budget)
        return torch.cat(self._by_site(probability_N))

    @contextmanager
    def _gated(self, gates: Sequence[Tensor]) -> Iterator[Any]:
        """The model with the given gates, one vector per site."""
        with self.hooks.applied(gates):
            yield self.model

    def _losses(
        self,
        student: AbstractContextManager[Any],
        batch: Mapping[str, Tensor],
        weights: LossWeights,
    ) -> TokenLosses:
        """Losses of a model on one batch; its teacher is the model with all gates open."""
        counted = batch["input_ids"], batch.get("loss_mask")
        teacher_ND = None
        if weights.distillation:
            with torch.no_grad():
                teacher_ND = predicting_states(self.model, *counted)
        with student as model:
            head = [p for p in model.get_output_embeddings().parameters() if p.requires_grad]
            return token_losses(
                predicting_states(model, *counted),
                predicted_tokens(*counted),
                head_of(model),
                teacher_ND=teacher_ND,
                teacher_head=head_of(self.model),
                parameters=head,
                weights=weights,
                chunk_tokens=self.frozen.loss_chunk_tokens,
            )

    def _cut(self, scores_N: Tensor) -> dict[float, Tensor]:
        """Kept fraction to the masks (N,) that it leaves of a ranking, the largest first."""
        cuts = nested_cuts(self._keeps, self.budget, scores_N, self.sites, self.table)
        return {keep: masks_of(kept, self.sites) for keep, kept in cuts.items()}

    def _plan_of(
        self, masks_N: Tensor, facts: Mapping[str, Any], gains: dict[str, Tensor] | None
    ) -> Plan:
        """The plan of some masks; its provenance is the budget and then further facts."""
        kept = tuple(mask.nonzero().squeeze(1) for mask in split(masks_N, self.sites))
        widths_S = torch.tensor([float(len(index)) for index in kept])
        budget = self.budget.suited(self.sites)
        provenance = {
            "method": "DISP-LLM (arXiv 2410.11988)",
            "step": self.global_step,
            "keep": self.budget.keep,
            "kept": float(self.table.fraction(widths_S)),
            "counted": self.budget.cost.label,
            "cost": repr(self.budget.cost),
            "min_width": self.budget.min_width,
            "width_multiple": budget.width_multiple,
            "selection": budget.selection,
            "uniform": self.budget.uniform,
            "parts": self.budget.parts,
            "sites": None if self.budget.sites is None else list(self.budget.sites),
        } | dict(facts)
        family = self.budget.family(self.model.config)
        return plan_from_indices(self.model, self.base_fingerprint, kept, provenance, gains, family)
