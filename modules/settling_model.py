"""A gated model whose masks settle: it is cut, refitted in closed form, measured and exported.

Masks settle once, after `mask_steps`; `Settle` has the settings of what follows, and
`secateur.modules.settling` the models that train from then on.

Differs from DISP-LLM (arXiv 2410.11988): there training ends with the masks; the kept weights are
neither refitted nor trained.

Legend: N = all gates, W = windows, T = tokens of a window.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from transformers import PreTrainedModel

from secateur.modules.frozen_base import FrozenBase, freeze
from secateur.modules.gated_model import GatedModel
from secateur.modules.quantisation import load_original
from secateur.modules.recompute import recompute
from secateur.modules.removal import train_instead
from secateur.modules.settling import (
    Gains,
    MaskedGains,
    Settle,
    Settled,
    cut_and_refitted,
    perplexity_of_masks,
    undo_if_worse,
)
from secateur.modules.shortening import end_at, reschedule
from secateur.pruning.export.alignment import report_alignment
from secateur.pruning.export.cut import cut
from secateur.pruning.export.deliver import check_folder, deliver
from secateur.pruning.export.ranks import AllRanks, OneRank
from secateur.pruning.export.sources import FromFiles, FromModel
from secateur.pruning.export.stages import Origin
from secateur.pruning.files.base_model import BaseModel
from secateur.pruning.modes import evaluation
from secateur.pruning.plan import Plan
from secateur.pruning.sites import split
from secateur.pruning.widths.budget import Budget
from secateur.pruning.widths.gates import GateSampler
from secateur.pruning.widths.hypernetwork import Hypernetwork
from secateur.pruning.widths.learning import GateLearning


class SettlingModel(GatedModel):
    """A gated model, the masks that it settles on, and the smaller model that they leave.

    The arguments are those of `MaskLearning`.
    """

    def __init__(
        self,
        base: BaseModel,
        budget: Budget,
        sampler: GateSampler | None,
        hypernetwork: Callable[[Sequence[int]], Hypernetwork],
        learning: GateLearning,
        settle: Settle | None,
        frozen: FrozenBase,
    ) -> None:
        super().__init__(base, budget, sampler, hypernetwork, learning, frozen)
        self.settle = settle
        self.settled_N: Tensor
        self.settled: Settled | None = None
        self._settled_at: int | None = None  # the step at which masks settled or have to settle
        self._notes: dict[str, Any] = {}
        self._nothing: nn.Parameter | None = None

    def _begin(self) -> None:
        """Reset gates and masks to their state before the first step."""
        super()._begin()
        self.register_buffer("settled_N", torch.zeros(len(self.start_N), dtype=torch.bool))
        self._settled_at, self._notes = None, {}
        self.settled = None  # first: the following lines depend on it
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
    def _has_settled(self) -> bool:
        return bool(self.settled_N.any())

    def setup(self, stage: str) -> None:
        """Check base model, strategy, and what trains once masks have settled.

        Raises:
            ValueError: One of them does not suit the settings.
        """
        super().setup(stage)
        if self.settle is None:
            return
        if not self._cuts and not isinstance(self.settle.train, Gains):
            raise ValueError(
                f"`settle.train` {type(self.settle.train).__name__} trains weights of the cut "
                "model, and the base model is sharded or packed. Use Gains, export, "
                "and recover the exported model with CausalLM."
            )
        self.settle.train.check(self.base_model.config)

    def on_fit_start(self) -> None:
        """Check that there is text to refit on.

        Raises:
            ValueError: It is too short.
        """
        if self.settle is not None and self._cuts:
            data = self._data
            windows = len(data.train_windows)
            self.settle.check_text(self.base_model.config, windows, data.window_tokens)

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

    def phases(self, trainer: Any) -> list[tuple[int, str]]:
        """The ranking, the learning of masks, the cut, and the training of the cut model."""
        masks, settle = self.mask_steps, self.settle
        rest = int(trainer.estimated_stepping_batches) - masks
        found = []
        if self.learning.start is not None:
            found.append((0, f"rank gates by {type(self.learning.start.score).__name__}"))
        if masks:
            found.append((0, f"learn masks for {masks} steps"))
        if settle is not None and self._cuts:
            refit = f", refit it on {settle.refit_windows} windows" if settle.refit else ""
            found.append((masks, f"cut the model{refit}{'' if rest else ', at the export'}"))
        if settle is not None and rest:
            kind = type(settle.train if self._cuts else Gains()).__name__
            found.append((masks, f"train {kind} for {rest} steps"))
        return found

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

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Fix the masks when the steps that learn them are over."""
        super().on_train_batch_start(batch, batch_idx)
        if self.global_step >= self.mask_steps and not self._has_settled:
            self._settle()

    @torch.no_grad()
    def _settle(self) -> None:
        """Choose the final masks; cut and refit the model if it can be cut."""
        self._settled_at = self.global_step
        reschedule(self.trainer)  # it may be sooner than schedules have expected
        masks_N, self._notes = self._better_masks()
        self.settled_N.copy_(masks_N.bool())
        if self.settle is None:
            return
        if isinstance(self.settled, MaskedGains):
            self.settled.gates = split(masks_N, self.sites)
            self._notes |= {"refit": "not made: the base model is packed or sharded"}
            return
        plan, narrow = self.plan(), None
        news: Any = None
        if self.trainer.is_global_zero:
            text = self._settling_text(self.settle)
            narrow, notes = cut_and_refitted(self.model, plan, self.settle, *text)
            news = notes, narrow.state_dict() if self.trainer.world_size > 1 else None
        notes, weights = self.trainer.strategy.broadcast(news)
        self._notes |= notes
        rank_zero_info(f"The masks have settled: {_shown(notes)}.")
        if narrow is None:
            narrow = cut(self.model, plan)
            narrow.load_state_dict(weights)
        train_instead(self.trainer.strategy, self, self._take(narrow, self.settle).trained())

    def _better_masks(self) -> tuple[Tensor, dict[str, Any]]:
        """The learned masks, or those of the initial ranking if they have the lower perplexity on
        windows held back; and the comparison for the report. Of several sizes the mean decides,
        so that all are cut from the same ranking.
        """
        if self._ranked_N is None:
            return self._masks(), {}
        cuts = {"learned": self._cut(self._cpu_logits()), "ranking": self._cut(self._ranked_N)}
        if all(map(torch.equal, cuts["learned"].values(), cuts["ranking"].values())):
            return cuts["learned"][self.budget.keep], {}
        found: dict[str, float] = {}
        if self.trainer.is_global_zero:
            held_WT, _ = self._settling_text(self.settle or Settle())
            for name, masks in cuts.items():
                each = list(masks.values())
                found[name] = perplexity_of_masks(self.model, self.hooks, each, held_WT)
        found = self.trainer.strategy.broadcast(found)
        best = min(found, key=lambda name: found[name])
        notes: dict[str, Any] = {f"perplexity_masks_{name}": value for name, value in found.items()}
        notes |= {"masks": best}
        rank_zero_info(f"Learned masks or their ranking, whichever is better: {_shown(notes)}.")
        return cuts[best][self.budget.keep], notes

    def _settling_text(self, settle: Settle) -> tuple[Tensor, Tensor]:
        """The windows held back and those to refit on, always the same, int64 of shape (W, T)."""
        held = settle.held_back_windows
        text_WT = self._text(held + settle.refit_windows, self.sampler.seed)
        text_WT = text_WT[: len(self._data.train_windows)]  # none twice
        return text_WT[:held], text_WT[held:]

    def _take(self, narrow: PreTrainedModel, settle: Settle) -> Settled:
        """Make the cut model the trained one."""
        freeze(narrow)
        self.settled = settle.train.of(narrow)
        if self.frozen.gradient_checkpointing:
            recompute(narrow)
        self.hypernetwork.requires_grad_(False)
        if self._nothing is not None:
            self._nothing.requires_grad_(False)
        return self.settled

    def _of_second_group(self) -> list[nn.Parameter]:
        """Parameters that train once the masks have settled, or a placeholder for them."""
        if self.settled is not None:
            return self.settled.trained()
        assert self._nothing is not None
        return [self._nothing]

    def whole_parameters(self) -> list[nn.Parameter]:
        """All trained parameters: every rank computes gates and plans."""
        return [*self.hypernetwork.parameters(), *(self.settled.trained() if self.settled else [])]

    @contextmanager
    def _as_settled(self) -> Iterator[Any]:
        """The model once the masks have settled."""
        assert self.settled is not None
        with self.settled.applied():
            yield self.settled.model

    def on_validation_start(self) -> None:
        """Compute the plan that would be exported now: hard and exactly on budget."""
        self._measured = [gate_I.to(self.device) for gate_I in self.plan().gates()]

    def measured(self) -> AbstractContextManager[Any]:
        """The settled model, or, before that, the dense model with the gates of the plan."""
        settled = self._has_settled and self.settled is not None
        return self._as_settled() if settled else self._gated(self._measured)

    @torch.no_grad()
    def _masks(self) -> Tensor:
        """Masks (N,) on the CPU, exactly on budget; deterministic."""
        if self._has_settled:
            return self.settled_N.cpu()
        return self._cut(self._cpu_logits())[self.budget.keep]

    @torch.no_grad()
    def plan(self) -> Plan:
        """The deterministic plan of the present gates, exactly on budget.

        Gains that are not in the weights of a cut model are part of it.
        """
        masks_N, gains = self._masks(), None
        if isinstance(self.settled, MaskedGains):
            with self.whole():
                gains = self.settled.moved()
        facts: dict[str, Any] = {
            "learning": repr(self.learning),
            "settle": repr(self.settle),
            "learned_on": repr(self.frozen.quantisation or self.model.dtype),
        } | self._notes
        if self.shortened:
            facts["shortened"] = self.shortened
        return self._plan_of(masks_N, facts, gains)

    def check_export_folder(self, folder: Path) -> None:
        """Refuse, before training, a folder that the export must not replace."""
        check_folder(folder, self.base_folder)

    def export(self, folder: Path, command: str) -> None:
        """Finalise, cut the base model's files, prove and measure the result; see `deliver`.

        With a width multiple, the widths that the same gates would have without it are also
        measured, see `report_alignment`; not if the model is sharded.
        """
        windows = self._data.validation_set
        windows_NT = torch.stack([windows[place] for place in range(len(windows))])
        device, base = self.trainer.strategy.root_device, self.base_folder
        if not self._has_settled and (self._cuts or (self.settle is None and not self.divided)):
            self._settle()  # no step was left to settle in; all ranks agree on the masks
        if not self.divided and not self.trainer.is_global_zero:
            return
        if self.settle is not None and self._cuts:
            self._judge_training(self.settle)
        plan = self.plan()
        masks = {"masks": dict(plan.provenance)}
        origin = Origin(
            str(self.base_model.name), base, plan.base, command, self.global_step, masks
        )
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
            dtype = self.base_model.dtype_of("auto")
            with self.settled.plain() as model, evaluation(model):
                what = FromModel(model, self._data.tokenizer, dtype, dense, plan)
                deliver(what, origin, folder, windows_NT, one, measured=True)
        if self.budget.width_multiple not in (None, 1):
            free = replace(self.budget, width_multiple=1)
            kept = free.finalise(self._cpu_logits(), self.sites, self.table)
            unaligned = replace(plan, kept=kept, gains=None)
            report_alignment(dense, plan, unaligned, base, folder, windows_NT)

    def _judge_training(self, settle: Settle) -> None:
        """Undo the training of the settled model if it raised the held-back perplexity."""
        assert self.settled is not None
        held_WT, _ = self._settling_text(settle)
        before = self._notes["perplexity_settled"]
        found = undo_if_worse(self.settled, before, held_WT)
        self._notes |= found
        rank_zero_info(
            f"Perplexity of the windows held back {before:.2f} before the settled model was "
            f"trained, {found['perplexity_trained']:.2f} after: its training is "
            f"{found['training']}."
        )


def _shown(notes: dict[str, Any]) -> str:
    return ", ".join(
        f"{name.replace('_', ' ')} {value if isinstance(value, str) else format(value, '.2f')}"
        for name, value in notes.items()
    )
