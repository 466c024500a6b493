"""Learn which dimensions of a frozen language model to keep, and train what is left.

Source: "DISP-LLM: Dimension-Independent Structural Pruning for Large Language Models"
(arXiv 2410.11988). First a hypernetwork trains, which computes the logits of the gates of a frozen
model (`GatedModel`). Then masks settle: the model is cut and refitted in closed form
(`SettlingModel`), and trained by distillation from the dense one.

Differs from the paper: see these two; one sample of gates gives loss and budget. docs/disp.md has
the measured effect of each difference.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LambdaLR

from secateur.modules.device_memory import check_memory, optimizer_bytes
from secateur.modules.frozen_base import FrozenBase
from secateur.modules.optimizers import describe_optimizer, made_optimizer
from secateur.modules.quantisation import check_optimizer
from secateur.modules.rate_schedule import rate_of_masks, rate_of_settled
from secateur.modules.removal import let_rest
from secateur.modules.settling import MaskedGains, Settle
from secateur.modules.settling_model import SettlingModel
from secateur.pruning.export.cut import cut
from secateur.pruning.files.base_model import BaseModel
from secateur.pruning.losses import TokenLosses
from secateur.pruning.plan import Plan
from secateur.pruning.sites import split
from secateur.pruning.widths.budget import Budget
from secateur.pruning.widths.gates import GateSampler
from secateur.pruning.widths.hypernetwork import GRUHypernetwork, Hypernetwork
from secateur.pruning.widths.learning import GateLearning
from secateur.pruning.widths.memory import ORIGINAL, Run


def _adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.05, fused=True)


class MaskLearning(SettlingModel):
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
        model = BaseModel(base, "base", trust_remote_code)
        super().__init__(model, budget, sampler, hypernetwork, learning, settle, frozen)
        self._make_optimizer = optimizer
        self._trained = False
        self._average = torch.tensor(math.nan)  # the state of the baseline of a policy gradient

    def _begin(self) -> None:
        """Reset everything to its state before the first step."""
        super()._begin()
        self._average = torch.tensor(math.nan)

    def setup(self, stage: str) -> None:
        """Check settings, text, strategy and memory before the model is read.

        Raises:
            ValueError: One of them does not suit the model.
        """
        super().setup(stage)
        config = self.base_model.config
        self.check_data(config)
        if stage == TrainerFn.FITTING and getattr(self.trainer, "datamodule", None) is not None:
            check_memory(self.trainer, config, self._run())

    def configure_optimizers(self) -> Any:
        """One optimiser: the hypernetwork trains until the masks settle, then the settled model.

        Both learning rates fall to 0 along a cosine; that of the settled model rises first.
        """
        optimizer = self._optimizer()
        check_optimizer(optimizer, self.device)

        def of_masks(step: int) -> float:
            return rate_of_masks(step, self.mask_steps)

        def of_settled(step: int) -> float:  # both ends may change while the run goes on
            steps = int(self.trainer.estimated_stepping_batches)
            return rate_of_settled(step, self.mask_steps, steps)

        schedule = LambdaLR(optimizer, [of_masks, of_settled])
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }

    def _optimizer(self) -> torch.optim.Optimizer:
        lr = self.settle.train.highest_lr if self.settle else 0.0
        group = {"params": self._of_second_group(), "lr": lr, "weight_decay": 0.0}
        groups = [{"params": self.hypernetwork.parameters()}, group]
        optimizer = made_optimizer(self._make_optimizer, groups)
        let_rest(optimizer)
        return optimizer

    def on_fit_start(self) -> None:
        """Rank the gates to start from, unless a checkpoint has the ranking: that of a run without
        steps is written before this.
        """
        super().on_fit_start()
        later = self.trainer.ckpt_path and self.trainer.strategy.restore_checkpoint_after_setup
        if self.learning.start is not None and not later and not bool(self.start_N.any()):
            self._rank(self.learning.start)

    def on_train_start(self) -> None:
        """Record that gates have been trained."""
        super().on_train_start()
        self._trained = True

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Loss of one sample of masks on one batch of windows, `input_ids` (B, T)."""
        if self._has_settled:
            assert self.settle is not None
            losses = self._losses(self._as_settled(), batch, self.settle.loss)
            fraction = losses.total.new_tensor(self.budget.keep)
            loss, penalty = losses.total, torch.zeros_like(fraction)
        else:

            def evaluate(gates_N: Tensor) -> TokenLosses:
                gated = self._gated(self._by_site(gates_N))
                return self._losses(gated, batch, self.learning.loss)

            found = self.learning.gradient.estimate(self._draws(), evaluate, self._average)
            self._average, losses = found.average, found.losses
            widths = [gate.sum() for gate in self._by_site(found.gates_N)]
            fraction = self.table.fraction(torch.stack(widths))
            penalty = self.learning.pressure.penalty(fraction, self.keep_target)
            loss = found.surrogate + penalty
        self.log("train_loss", losses.cross_entropy, prog_bar=True)
        self.log("kept", fraction.float(), prog_bar=True)
        self.log("target", self.keep_target, prog_bar=True)
        self.log("penalty", penalty.float())
        self.log("train_kl", losses.distillation)
        if isinstance(self.trainer.model, DistributedDataParallel):  # waits for all gradients
            loss = loss + 0.0 * torch.stack([p.sum() for p in self._resting()]).sum()
        if not bool(loss.isfinite()):
            cause = "the budget penalty" if losses.total.isfinite() else "the language-model loss"
            self.stop_diverged(cause, loss)
        return loss * self.share_of_counted(batch)

    def _resting(self) -> list[nn.Parameter]:
        """Parameters that are not trained in this part of training."""
        return [*self.hypernetwork.parameters()] if self._has_settled else self._of_second_group()

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Drop the zero gradients that DDP gives to the group that is not being trained."""
        if isinstance(self.trainer.model, DistributedDataParallel):
            for group in optimizer.param_groups:
                for parameter in group["params"] if group["lr"] == 0 else ():
                    parameter.grad = None

    def on_validation_start(self) -> None:
        """Compute the plan that would be exported now."""
        if not self._trained and self.trainer.ckpt_path is None and not self.trainer.training:
            rank_zero_info(
                "No `ckpt_path` is given: untrained gates are measured; `--ckpt_path last` "
                "measures those of the run."
            )
        super().on_validation_start()

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
            sizes = [repr(replace(self.budget, keep=keep)) for keep in self._keeps]
            saved["budget"] = current["budget"] if saved["budget"] in sizes else saved["budget"]
            return
        super()._accept(saved, current, checkpoint)
        if settled or self.settle is None or before in (None, now := self.settle.fraction):
            return
        same = repr(replace(self.settle, fraction=before)) == saved["settle"]
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

    def _run(self) -> Run:
        """The settings that affect the memory of a step."""
        one = [nn.Parameter(torch.ones(1))]
        return Run(
            dtype=self.base_model.dtype_of(self.frozen.dtype),
            storage=self.frozen.quantisation.storage if self.frozen.quantisation else ORIGINAL,
            batch_size=self._data.batch_size,
            window_tokens=self._data.window_tokens,
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
            or (start is not None and start.back_propagates)
            or (self.settle is not None and self.settle.fraction > 0)
        )
