"""Learn which dimensions of a frozen language model to keep.

Source: "DISP-LLM: Dimension-Independent Structural Pruning for Large Language Models"
(arXiv 2410.11988): a hypernetwork computes the logits of all gates, and gates multiply features of
the frozen model (eqs. 5 to 8).

Differs from the paper: gates start from a ranking by importance, every sample of gates meets the
budget, logistic instead of Gumbel noise, one sample for loss and budget, and a deterministic,
budget-exact selection. In the last part of training the model is cut, refitted in closed form, and
trained by distillation from the dense one. docs/disp.md has the measured effect of each.

The file is long because one LightningModule has all hooks of a run; the maths is elsewhere: gates
and budget in `pruning.widths`, settling in `modules.settling`.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel

import secateur.pruning.widths
from secateur.modules.device_memory import check_memory, optimizer_bytes
from secateur.modules.frozen_base import FrozenBase, freeze
from secateur.modules.language_modelling import LanguageModelling
from secateur.modules.optimizers import describe_optimizer, made_optimizer
from secateur.modules.quantisation import (
    check_optimizer,
    check_quantised_run,
    load_original,
    load_quantised,
)
from secateur.modules.recompute import recompute
from secateur.modules.removal import let_rest, train_instead
from secateur.modules.settling import (
    Gains,
    MaskedGains,
    Settle,
    Settled,
    cut_and_refitted,
    named_gains,
)
from secateur.modules.shortening import end_at, reschedule
from secateur.modules.teacher import predicted_tokens, predicting_states
from secateur.pruning.chains import Step
from secateur.pruning.commands import import_all
from secateur.pruning.export.alignment import report_alignment
from secateur.pruning.export.cut import cut
from secateur.pruning.export.deliver import check_folder, deliver
from secateur.pruning.export.ranks import AllRanks, OneRank
from secateur.pruning.export.sources import FromFiles, FromModel
from secateur.pruning.export.stages import Origin
from secateur.pruning.families import skeleton
from secateur.pruning.files.base_model import BaseModel
from secateur.pruning.losses import TokenLosses, head_of, token_losses
from secateur.pruning.measure.perplexity import perplexity
from secateur.pruning.modes import evaluation
from secateur.pruning.plan import Plan, plan_from_indices
from secateur.pruning.protocols import calibration_windows
from secateur.pruning.sites import Site, split
from secateur.pruning.widths.budget import Budget
from secateur.pruning.widths.gate_hooks import GateHooks
from secateur.pruning.widths.gates import GateSampler, Stream
from secateur.pruning.widths.hypernetwork import GRUHypernetwork, Hypernetwork
from secateur.pruning.widths.learning import GateLearning, Importance, masks_of
from secateur.pruning.widths.memory import ORIGINAL, Run
from secateur.pruning.widths.policy_gradient import Draw
from secateur.pruning.widths.sizes import nested_cuts

import_all(secateur.pruning.widths)

_WARM_UP = 0.1  # fraction of the settled steps in which the learning rate rises


def _adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.05, fused=True)


class MaskLearning(LanguageModelling):
    """Learn DISP masks: a frozen language model, gates on its widths, a hypernetwork that trains.

    Args:
        base: The model to prune: a folder, or the id of a model on the hub.
        budget: How much of the model is kept, and in which shapes.
        sampler: How logits become gates.
        hypernetwork: Computes the logits; called with the list of site sizes.
        optimizer: Trains the hypernetwork, and then the settled model; called with one group of
            parameters for each.
        learning: Initial gates, training loss, and how gates meet the budget.
        settle: Refit and training of the cut model once the masks are chosen; None exports the
            masks alone.
        frozen: How the frozen weights are kept in memory.
        trust_remote_code: Whether Python files of the tokenizer of `base` may run. Models run by
            the code of transformers, or ours, in any case.
    """

    divisible = frozen_weights = True
    moved_settings: ClassVar[Mapping[str, str]] = {
        "penalty": "learning.pressure.strength",
        "loss": "learning.loss",
        "settle": "settle.fraction",
        "settled_loss": "settle.loss",
        "gain_lr": "settle.train.lr",
        "dtype": "frozen.dtype",
        "quantisation": "frozen.quantisation",
        "gradient_checkpointing": "frozen.gradient_checkpointing",
        "loss_chunk_tokens": "frozen.loss_chunk_tokens",
    }
    """New names of settings of earlier versions."""

    def __init__(
        self,
        base: str,
        budget: Budget = Budget(),  # noqa: B008 (frozen)
        sampler: GateSampler | None = None,
        hypernetwork: Callable[[Sequence[int]], Hypernetwork] = GRUHypernetwork,
        optimizer: OptimizerCallable = _adamw,
        learning: GateLearning = GateLearning(),  # noqa: B008 (frozen)
        settle: Settle | None = Settle(),  # noqa: B008 (frozen)
        frozen: FrozenBase = FrozenBase(),  # noqa: B008 (frozen)
        trust_remote_code: bool = False,
    ) -> None:
        super().__init__()
        self.base_model = BaseModel(base, "base", trust_remote_code)
        self.base_model.check()
        self.base, self.budget = base, budget
        self.sampler = sampler or GateSampler(offset=3.0 if learning.start is None else 0.0)
        self.learning, self.settle, self.frozen = learning, settle, frozen
        self.annealed = 1.0
        sizes = learning.sizes
        if sizes is not None and budget.keep not in sizes.keep:
            raise ValueError(
                f"`budget.keep` {budget.keep} must be one of `learning.sizes.keep`, "
                f"{' '.join(map(str, sizes.keep))}: the size that this run exports."
            )
        self.strict_loading = False  # checkpoints hold trained parameters, not the frozen model
        self._make_hypernetwork, self._make_optimizer = hypernetwork, optimizer
        self._trained = False
        self.sites: list[Site]
        self.start_N: Tensor
        self._average = torch.tensor(math.nan)  # the state of the baseline of a policy gradient
        self._ranked_N: Tensor | None = None  # the initial ranking
        self.settled_N: Tensor
        self._settled_at: int | None = None  # the step at which masks settled or have to settle
        self.settled: Settled | None = None
        self._notes: dict[str, Any] = {}
        self._nothing: nn.Parameter | None = None

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
        count = sum(site.size for site in self.sites)
        self.register_buffer("start_N", torch.zeros(count))
        self.register_buffer("settled_N", torch.zeros(count, dtype=torch.bool))
        self._begin()

    def _begin(self) -> None:
        """Reset the gates to their state before the first step."""
        self.hypernetwork = self._make_hypernetwork([site.size for site in self.sites])
        torch.nn.init.zeros_(self.start_N)
        torch.nn.init.zeros_(self.settled_N)
        self._average, self._ranked_N = torch.tensor(math.nan), None
        self._settled_at = None
        self.settled, self._notes = None, {}  # first: the following lines depend on it
        if self.settle is not None and not self._cuts:
            # Made now, for a strategy to divide.
            self.settled = MaskedGains(self.model, self.hooks)
        # A group of an optimiser may not be empty.
        self._nothing = nn.Parameter(torch.zeros(1)) if self.settled is None else None

    @property
    def _cuts(self) -> bool:
        """Whether the model is cut once masks settle: it is neither sharded nor packed."""
        whole = not self.divided and self.frozen.quantisation is None
        asked = self.settle is not None and self.settle.cut
        return whole and asked and not isinstance(self.settled, MaskedGains)

    @property
    def bases(self) -> list[BaseModel]:
        """The base model."""
        return [self.base_model]

    def setup(self, stage: str) -> None:
        """Check text, strategy and memory before the model is read.

        Raises:
            ValueError: One of them does not suit the model.
        """
        self.check_strategy()
        self.check_bases()
        config = self.base_model.config
        self.base_model.refuse(Step.UNIFORM_WIDTHS if self.budget.uniform else Step.WIDTHS)
        if self.frozen.quantisation is not None:
            check_quantised_run(self.frozen.quantisation, self.trainer.strategy)
        if self.learning.start is not None and self.divided:
            raise ValueError(
                "`--model.learning.start` ranks gates on a complete model, and `trainer.strategy` "
                f"{type(self.trainer.strategy).__name__} shards it; set "
                "`--model.learning.start null`."
            )
        if self.settle is not None and not self._cuts and not isinstance(self.settle.train, Gains):
            raise ValueError(
                f"`settle.train` {type(self.settle.train).__name__} trains weights of the cut "
                "model, and the base model is sharded or packed. Use Gains, export, "
                "and recover the exported model with CausalLM."
            )
        if self.settle is not None:
            self.settle.train.check(config)
        self.check_data(config)
        if stage == TrainerFn.FITTING and getattr(self.trainer, "datamodule", None) is not None:
            check_memory(self.trainer, config, self._run())
        self.temperature = self.sampler.start_temperature

    def configure_optimizers(self) -> Any:
        """One optimiser: the hypernetwork trains until the masks settle, then the settled model.

        Both learning rates fall to 0 along a cosine; that of the settled model rises first.
        """
        optimizer = self._optimizer()
        check_optimizer(optimizer, self.device)

        def falling(progress: float) -> float:
            return (1 + math.cos(math.pi * progress)) / 2

        def of_masks(step: int) -> float:
            return falling(step / self.mask_steps) if step < self.mask_steps else 0.0

        def of_settled(step: int) -> float:  # both ends may change while the run goes on
            begin, end = self.mask_steps, int(self.trainer.estimated_stepping_batches)
            if step < begin:
                return 0.0
            warm = min(1.0, (step + 1 - begin) / max(1.0, _WARM_UP * (end - begin)))
            return warm * falling((step - begin) / max(1, end - begin))

        schedule = LambdaLR(optimizer, [of_masks, of_settled])
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }

    @property
    def mask_steps(self) -> int:
        """Optimiser steps in which masks are learned; in the steps after, they have settled.

        Raises:
            ValueError: `max_steps` is not set, or there is no such step and no ranking to start
                from.
        """
        if self._settled_at is not None:
            return self._settled_at
        total = self.trainer.estimated_stepping_batches
        if not math.isfinite(total):
            raise ValueError("`trainer.max_steps` must be set: masks settle near the last step.")
        steps = round(total * (1 - (self.settle.fraction if self.settle else 0.0)))
        if steps < 1 and self.learning.start is None:
            raise ValueError(
                f"{total} steps leave no step to learn masks; lower `settle.fraction`, raise "
                "`trainer.max_steps`, or start from importance (`learning.start`)."
            )
        return steps

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
        return dataclasses.replace(self.budget, keep=self._keeps[-1])

    @property
    def base_folder(self) -> Path:
        """Local folder of the base model."""
        return self.base_model.folder

    @property
    def base_fingerprint(self) -> str:
        """Content hash of the base model."""
        return self.base_model.fingerprint

    @property
    def temperature(self) -> float:
        """The present temperature of the gates."""
        return self.sampler.temperature

    @temperature.setter
    def temperature(self, value: float) -> None:
        self.sampler.temperature = value

    def whole_parameters(self) -> list[nn.Parameter]:
        """All trained parameters: every rank computes gates and plans."""
        return [*self.hypernetwork.parameters(), *(self.settled.trained() if self.settled else [])]

    def on_fit_start(self) -> None:
        """Rank the gates to start from, unless a checkpoint has the ranking: that of a run without
        steps is written before this.
        """
        later = self.trainer.ckpt_path and self.trainer.strategy.restore_checkpoint_after_setup
        if self.learning.start is not None and not later and not bool(self.start_N.any()):
            self.start_N.copy_(self._ranked(self.learning.start))

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Fix the masks when the steps that learn them are over."""
        super().on_train_batch_start(batch, batch_idx)
        if self.global_step >= self.mask_steps and not bool(self.settled_N.any()):
            self._settle()

    def settle_now(self) -> None:
        """Learn masks no longer: they settle before the next step, and as many steps follow as were
        planned after that.
        """
        step, total = self.global_step, int(self.trainer.estimated_stepping_batches)
        if step >= (planned := self.mask_steps):
            rank_zero_warn(f"Asked to settle now, but masks have settled at step {planned}.")
            return
        self._settled_at, end = step, step + total - planned
        record = {"max_steps_before": self.trainer.max_steps, "max_steps": end}
        self.shortened.append({"at_step": step, "settled_at": step} | record)
        end_at(self.trainer, end)
        rank_zero_info(
            f"Asked to settle now: masks settle at step {step} instead of {planned}, {end - step} "
            f"steps follow as planned, and the run ends at step {end} instead of {total}. The "
            "model card says so."
        )

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Loss of one sample of masks on one batch of windows, `input_ids` (B, T)."""
        if self._has_settled:
            losses = self._losses(batch, None)
            fraction = losses.total.new_tensor(self._notes.get("kept", self.budget.keep))
            loss, penalty = losses.total, torch.zeros_like(fraction)
        else:
            draw, evaluate = self._draws(), partial(self._losses, batch)
            found = self.learning.gradient.estimate(draw, evaluate, self._average)
            self._average = found.average
            losses, gates = found.losses, self._open(split(found.gates_N, self.sites))
            fraction = self.table.fraction(torch.stack([gate.sum() for gate in gates]))
            penalty = self.learning.pressure.penalty(fraction, self.keep_target)
            loss = found.surrogate + penalty
        self._log_step(losses.cross_entropy, losses.distillation, fraction, penalty)
        if isinstance(self.trainer.model, DistributedDataParallel):  # waits for all gradients
            loss = loss + 0.0 * torch.stack([p.sum() for p in self._resting()]).sum()
        if not bool(loss.isfinite()):
            cause = "the budget penalty" if losses.total.isfinite() else "the language-model loss"
            self.stop_diverged(cause, loss)
        return loss * self.share_of_counted(batch)

    def _losses(self, batch: dict[str, Tensor], gates_N: Tensor | None) -> TokenLosses:
        """Losses of the model with the given gates on one batch; with None, of the settled one."""
        counted = batch["input_ids"], batch.get("loss_mask")
        settled = self.settle if gates_N is None else None
        weights = self.learning.loss if settled is None else settled.loss
        teacher_ND = None
        if weights.distillation:
            with torch.no_grad():
                teacher_ND = predicting_states(self.model, *counted)
        gates = None if gates_N is None else self._open(split(gates_N, self.sites))
        with self._applied(gates) as model:
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

    def _resting(self) -> list[nn.Parameter]:
        """Parameters that are not trained in this part of training."""
        if self._has_settled:
            return list(self.hypernetwork.parameters())
        return self._of_second_group()

    def _of_second_group(self) -> list[nn.Parameter]:
        """Parameters that train once the masks have settled, or a placeholder for them."""
        if self.settled is not None:
            return self.settled.trained()
        assert self._nothing is not None
        return [self._nothing]

    @property
    def _has_settled(self) -> bool:
        return bool(self.settled_N.any())

    @contextmanager
    def _applied(self, gates: Sequence[Tensor] | None) -> Iterator[Any]:
        """The model with the given gates; with None, the settled model."""
        if gates is None and self.settled is not None:
            with self.settled.applied():
                yield self.settled.model
        else:
            with self.hooks.applied(self.hooks.gates if gates is None else gates):
                yield self.model

    def on_train_start(self) -> None:
        """Record that gates have been trained."""
        super().on_train_start()
        self._trained = True

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Drop the zero gradients that DDP gives to the group that is not being trained."""
        if isinstance(self.trainer.model, DistributedDataParallel):
            for group in optimizer.param_groups:
                for parameter in group["params"] if group["lr"] == 0 else ():
                    parameter.grad = None

    def on_validation_start(self) -> None:
        """Compute the plan that would be exported now: hard and exactly on budget."""
        if not self._trained and self.trainer.ckpt_path is None and not self.trainer.training:
            rank_zero_info(
                "No `ckpt_path` is given: untrained gates are measured; `--ckpt_path last` "
                "measures those of the run."
            )
        self._measured = [gate_I.to(self.device) for gate_I in self.plan().gates()]

    def measured(self) -> AbstractContextManager[Any]:
        """The settled model, or, before that, the dense model with the gates of the plan."""
        return self._applied(None if self._has_settled else self._measured)

    @torch.no_grad()
    def keep_probability(self) -> Tensor:
        """P(keep) of every gate, shape (N,), float32 on the CPU; deterministic."""
        probability_N = self.learning.pressure.keep_probability(
            self.sampler, self._cpu_logits(), self._on_budget
        )
        return torch.cat(self._open(split(probability_N, self.sites)))

    @torch.no_grad()
    def plan(self) -> Plan:
        """The deterministic plan of the present gates, exactly on budget.

        Gains that are not in the weights of a cut model are part of it.
        """
        kept, gains = self._kept(), None
        if isinstance(self.settled, MaskedGains):
            with self.whole():
                own = self.settled.gains
                if bool((own != 1).any()):  # gains train only once the masks have settled
                    named = named_gains(own.float().cpu().clone(), self.settled.sizes)
                    gains = {name: gain_F.clone() for name, gain_F in named.items()}
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
            "learning": repr(self.learning),
            "settle": repr(self.settle),
            "learned_on": repr(self.frozen.quantisation or self.model.dtype),
        } | self._notes
        if self.shortened:
            provenance["shortened"] = self.shortened
        family = self.budget.family(self.model.config)
        return plan_from_indices(self.model, self.base_fingerprint, kept, provenance, gains, family)

    @torch.no_grad()
    def _ranked(self, start: Importance) -> Tensor:
        """Initial logits minus the hypernetwork's output before its first step."""
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
        ranked_N: Tensor = start.scale * found.to(self.start_N)
        return ranked_N - first_N

    def _text(self, count: int, seed: int) -> Tensor:
        """Windows of the training text (int64, shape (W, T)), repeated if it has fewer."""
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        there = len(data.train_windows)
        if there < count:
            rank_zero_info(f"The training text has {there} windows; {count} are read from these.")
        drawn_WT = calibration_windows(data, min(count, there), seed, "MaskLearning")
        generator = torch.Generator().manual_seed(seed)
        drawn_WT = drawn_WT[torch.randperm(len(drawn_WT), generator=generator)]
        return drawn_WT.repeat(-(-count // len(drawn_WT)), 1)[:count]

    def _settling_text(self, settle: Settle) -> Tensor:
        """The windows held back, always the same, and then those to refit on (int64, (W, T))."""
        return self._text(settle.held_back_windows + settle.refit_windows, self.sampler.seed)

    @torch.no_grad()
    def _settle(self) -> None:
        """Choose the final masks; cut and refit the model if it can be cut."""
        self._settled_at = self.global_step
        reschedule(self.trainer)  # it may be sooner than schedules have expected
        masks_N = masks_of(self._kept(), self.sites)
        which: dict[str, Any] = {}
        if self.settle is not None and self._ranked_N is not None:
            masks_N, which = self._better_masks(self._ranked_N, self.settle)
        self.settled_N.copy_(masks_N.bool())
        if self.settle is None:
            return
        if isinstance(self.settled, MaskedGains):
            self.settled.gates = split(masks_N, self.sites)
            self._notes = {"refit": "not made: the base model is packed or sharded"}
            return
        plan, narrow = self.plan(), None
        news: Any = None
        if self.trainer.is_global_zero:
            text_WT = self._settling_text(self.settle)
            narrow, notes = cut_and_refitted(self.model, plan, self.settle, text_WT)
            news = notes, narrow.state_dict() if self.trainer.world_size > 1 else None
        notes, weights = self.trainer.strategy.broadcast(news)
        self._notes = which | notes
        rank_zero_info(f"The masks have settled: {_shown(self._notes)}.")
        if narrow is None:
            narrow = cut(self.model, plan)
            narrow.load_state_dict(weights)
        self._take(narrow, self.settle)
        train_instead(self.trainer.strategy, self, self.settled.trained() if self.settled else [])

    def _better_masks(self, ranked_N: Tensor, settle: Settle) -> tuple[Tensor, dict[str, Any]]:
        """The learned masks, or those of the initial ranking if they have the lower perplexity on
        the windows held back; and the comparison for the report. Of several sizes the mean decides,
        so that all are cut from the same ranking.
        """
        both, found = {"learned": self._cut(self._cpu_logits()), "ranking": self._cut(ranked_N)}, {}
        if all(map(torch.equal, both["learned"].values(), both["ranking"].values())):
            return both["learned"][self.budget.keep], {}
        if self.trainer.is_global_zero:
            held_WT = self._settling_text(settle)[: settle.held_back_windows]
            for name, masks in both.items():
                nll = 0.0
                for mask_N in masks.values():
                    with self._applied(split(mask_N.to(self.device), self.sites)) as model:
                        nll += perplexity(model, held_WT).mean_nll / len(masks)
                found[name] = math.exp(nll)
        found = self.trainer.strategy.broadcast(found)
        best = min(found, key=lambda name: found[name])
        notes = {f"perplexity_masks_{name}": value for name, value in found.items()}
        return both[best][self.budget.keep], notes | {"masks": best}

    def _take(self, narrow: PreTrainedModel, settle: Settle) -> None:
        """Make the cut model the trained one."""
        freeze(narrow)
        self.settled = settle.train.of(narrow)
        if self.frozen.gradient_checkpointing:
            recompute(narrow)
        self.hypernetwork.requires_grad_(False)
        if self._nothing is not None:
            self._nothing.requires_grad_(False)

    def check_export_folder(self, folder: Path) -> None:
        """Refuse, before training, a folder that the export must not replace."""
        check_folder(folder, self.base_folder)

    def export(self, folder: Path, command: str) -> None:
        """Finalise, cut the base model's files, prove and measure the result; see `deliver`.

        With a width multiple, the widths that the same gates would have without it are also
        measured, see `report_alignment`; not if the model is sharded.
        """
        windows = self.trainer.datamodule.validation_set  # type: ignore[attr-defined]
        windows_NT = torch.stack([windows[place] for place in range(len(windows))])
        device, base = self.trainer.strategy.root_device, self.base_folder
        if not self.divided and not self.trainer.is_global_zero:
            return
        if self.settle is not None and self._cuts and not self._has_settled:
            self._settle()  # no step was left to settle in
        if self.settled is not None and self._cuts:
            self._undo_if_worse(self.settled)
        plan = self.plan()
        masks = {"masks": dict(plan.provenance)}
        origin = Origin(self.base, base, plan.base, command, self.global_step, masks)
        if self.divided:  # every rank exports a part
            deliver(FromFiles(plan), origin, folder, windows_NT, AllRanks(device), measured=True)
            return
        dense = self.model
        if self.frozen.quantisation is not None:  # packed weights are not used for the export
            dense = load_original(self.base_model, self.device, copies=2)
        one = OneRank(base, device, self.budget.cost.times)
        if self.settled is None or isinstance(self.settled, MaskedGains):
            deliver(FromFiles(plan, dense), origin, folder, windows_NT, one, measured=True)
        else:
            tokenizer = self.trainer.datamodule.tokenizer  # type: ignore[attr-defined]
            dtype = self.base_model.dtype_of("auto")
            with self.settled.plain() as model, evaluation(model):
                what = FromModel(model, tokenizer, dtype, dense, plan)
                deliver(what, origin, folder, windows_NT, one, measured=True)
        if self.budget.width_multiple not in (None, 1):
            free = dataclasses.replace(self.budget, width_multiple=1)
            kept = free.finalise(self._cpu_logits(), self.sites, self.table)
            unaligned = dataclasses.replace(plan, kept=kept, gains=None)
            report_alignment(dense, plan, unaligned, base, folder, windows_NT)

    def _undo_if_worse(self, settled: Settled) -> None:
        """Undo the training of the settled model if it raised the held-back perplexity."""
        assert self.settle is not None
        held_WT = self._settling_text(self.settle)[: self.settle.held_back_windows]
        with settled.plain() as model:
            found = perplexity(model, held_WT).value
        before = self._notes["perplexity_settled"]
        kept = "kept" if found <= before else "left out"
        if found > before:
            settled.reset()
        self._notes |= {"perplexity_trained": found, "training": kept}
        rank_zero_info(
            f"Perplexity of the windows held back {before:.2f} before the settled model was "
            f"trained, {found:.2f} after: its training is {kept}."
        )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Store trained parameters and settings, and the fingerprint of the base model."""
        checkpoint["state_dict"] = {
            key: value
            for key, value in checkpoint["state_dict"].items()
            if not key.startswith("model.")
        }
        cut_by = self._has_settled and self.settled is not None and self._cuts
        checkpoint["settled"] = {
            "plan": self.plan().state() if cut_by else None,
            "notes": self._notes,
            "average": self._average,
            "ranked": self._ranked_N,
            "settled_at": self._settled_at,
            "mask_steps": self.mask_steps,
            "fraction": self.settle and self.settle.fraction,
        }
        super().on_save_checkpoint(checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of other settings; cut the model if it had been cut.

        The weights are loaded and the optimiser is made after this.

        Raises:
            ValueError: The settings differ.
        """
        super().on_load_checkpoint(checkpoint)
        self._notes = checkpoint["settled"]["notes"]
        self._average = checkpoint["settled"].get("average", self._average)
        self._ranked_N = checkpoint["settled"].get("ranked")
        self._settled_at = checkpoint["settled"].get("settled_at")
        if (state := checkpoint["settled"]["plan"]) is not None:
            assert self.settle is not None
            with torch.no_grad():
                self._take(cut(self.model, Plan.from_state(state)), self.settle)
            return
        masks_N = checkpoint["state_dict"]["settled_N"].float()
        if self.settle is not None and self._cuts and bool(masks_N.any()):
            # It was written after the masks had settled, by a run that could not cut the model.
            self.settled = MaskedGains(self.model, self.hooks)
        if isinstance(self.settled, MaskedGains):
            self.settled.gates = split(masks_N, self.sites)

    def _accept(
        self, saved: dict[str, Any], current: dict[str, Any], checkpoint: Mapping[str, Any]
    ) -> None:
        """Accept also that masks settle sooner, by another fraction of the steps; and anything that
        follows the masks, if the checkpoint is the last one of a run that only learned masks.
        """
        of_masks, step = checkpoint["settled"], checkpoint["global_step"]
        planned, before = of_masks.get("mask_steps"), of_masks.get("fraction")
        settled_N = checkpoint["state_dict"].get("settled_N")
        settled = settled_N is None or bool(settled_N.any())
        if not settled and step == planned == saved.get("max_steps") == self.mask_steps:
            saved |= {name: current[name] for name in ("settle", "max_steps")}
            sizes = [repr(dataclasses.replace(self.budget, keep=keep)) for keep in self._keeps]
            saved["budget"] = current["budget"] if saved["budget"] in sizes else saved["budget"]
            return
        super()._accept(saved, current, checkpoint)
        if settled or self.settle is None or before in (None, now := self.settle.fraction):
            return
        same = repr(dataclasses.replace(self.settle, fraction=before)) == saved["settle"]
        if not same or self.mask_steps >= planned:
            return
        saved["settle"] = current["settle"]
        record = {"at_step": step, "settle_fraction_before": before, "settle_fraction": now}
        self.shortened.append(record)
        rank_zero_warn(
            f"`settle.fraction` was {before} and is {now} from step {step} on: masks settle at "
            f"step {max(step, self.mask_steps)} instead of {planned}. The model card says so."
        )

    def recipe(self) -> dict[str, Any]:
        """Base model and its data type, budget, gates, settling and optimiser."""
        return {
            "base": self.base_fingerprint,
            "budget": repr(self.budget),
            "hypernetwork": repr(self.hypernetwork),
            "sampler": json.dumps(self.sampler.recipe(), sort_keys=True),
            "learning": repr(self.learning),
            "settle": repr(self.settle),
            "frozen.dtype": self.frozen.dtype,
            "frozen.quantisation": repr(self.frozen.quantisation),
            "optimizer": describe_optimizer(self._optimizer()),
        }

    def _optimizer(self) -> torch.optim.Optimizer:
        settled = self._of_second_group()
        lr = self.settle.train.highest_lr if self.settle else 0.0
        group = {"params": settled, "lr": lr, "weight_decay": 0.0}
        groups = [{"params": self.hypernetwork.parameters()}, group]
        optimizer = made_optimizer(self._make_optimizer, groups)
        let_rest(optimizer)
        return optimizer

    def _run(self) -> Run:
        """The settings that affect the memory of a step."""
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        one = [nn.Parameter(torch.ones(1))]
        return Run(
            dtype=self.base_model.dtype_of(self.frozen.dtype),
            storage=self.frozen.quantisation.storage if self.frozen.quantisation else ORIGINAL,
            batch_size=data.batch_size,
            window_tokens=data.window_tokens,
            checkpointing=self.frozen.gradient_checkpointing,
            forward_only=not self._back_propagates,
            loss_chunk_tokens=self.frozen.loss_chunk_tokens,
            distillation=any(
                loss.distillation
                for loss in (self.learning.loss, self.settle and self.settle.loss)
                if loss
            ),
            hypernetwork=self._make_hypernetwork,
            optimizer_bytes=optimizer_bytes(made_optimizer(self._make_optimizer, one)),
        )

    @property
    def _back_propagates(self) -> bool:
        """Whether any part of the run needs a backward pass through the model."""
        start = self.learning.start
        return (
            self.learning.gradient.back_propagates
            or (start is not None and start.score.back_propagates)
            or (self.settle is not None and self.settle.fraction > 0)
        )

    @torch.no_grad()
    def _kept(self) -> tuple[Tensor, ...]:
        """Kept indices (int64) per site, exactly on budget; deterministic."""
        masks_N = (
            self.settled_N.cpu()
            if self._has_settled
            else self._cut(self._cpu_logits())[self.budget.keep]
        )
        return tuple(mask.nonzero().squeeze(1) for mask in split(masks_N, self.sites))

    def _cut(self, scores_N: Tensor) -> dict[float, Tensor]:
        """Kept fraction to the masks (N,) that it leaves of a ranking, the largest first."""
        cuts = nested_cuts(self._keeps, self.budget, scores_N, self.sites, self.table)
        return {keep: masks_of(kept, self.sites) for keep, kept in cuts.items()}

    @torch.no_grad()
    def _cpu_logits(self) -> Tensor:
        """Logits of all gates, float32 of shape (N,) on the CPU."""
        with self.whole():
            logits_N: Tensor = self.hypernetwork().float() + self.start_N
            return logits_N.cpu()

    def _on_budget(self, scores_N: Tensor) -> Tensor:
        """Masks (N,) of the highest scores that fit the budget of this step."""
        budget = dataclasses.replace(self.budget, keep=self.keep_target)
        kept = budget.finalise(scores_N.float().cpu(), self.sites, self.table)
        return masks_of(kept, self.sites)

    def _draws(self) -> Callable[[int], Draw]:
        """The draws of the gates of this step, by number."""
        logits_N = self.hypernetwork() + self.start_N
        if not bool(logits_N.isfinite().all()):
            self.stop_diverged("a logit of the gates", logits_N.sum())

        def draw(number: int) -> Draw:
            place = Stream(self.global_step, self.global_rank, number)
            return self.learning.pressure.draw(self.sampler, logits_N, place, self._on_budget)

        return draw

    def _open(self, gates: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Set gates to one at sites that the budget does not prune."""
        return tuple(
            gate if self.budget.prunes(site) else torch.ones_like(gate)
            for gate, site in zip(gates, self.sites, strict=True)
        )

    def _log_step(self, nll: Tensor, kl: Tensor, fraction: Tensor, penalty: Tensor) -> None:
        self.log("train_loss", nll, prog_bar=True)
        self.log("kept", fraction.float(), prog_bar=True)
        self.log("target", self.keep_target, prog_bar=True)
        self.log("penalty", penalty.float())
        self.log("train_kl", kl)


def _shown(notes: dict[str, Any]) -> str:
    return ", ".join(
        f"{name.replace('_', ' ')} {value if isinstance(value, str) else format(value, '.2f')}"
        for name, value in notes.items()
    )
