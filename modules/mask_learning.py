"""Learn which dimensions of a frozen language model to keep.

Source: "DISP-LLM: Dimension-Independent Structural Pruning for Large Language Models"
(arXiv 2410.11988): a hypernetwork makes the logits of all gates, gates multiply into the frozen
model, and the loss is the language-model loss plus a log-ratio penalty on the cost (eqs. 5 to 8).

Differs from the paper: logistic instead of Gumbel noise, one sample for loss and budget, a budget
that may be annealed, optional distillation from the same model with open gates, a deterministic,
budget-exact selection, and a last part of training in which the selected masks are kept and gains
are learned. docs/disp.md has the measured effect of each.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LambdaLR

from secateur.modules.device_memory import check_memory, optimizer_bytes
from secateur.modules.language_modelling import LanguageModelling, describe_optimizer
from secateur.modules.loading import (
    Quantisation,
    check_base,
    check_optimizer,
    check_quantised_run,
    load_config,
    load_original,
    load_quantised,
    refuse_quantised,
    resolve,
)
from secateur.pruning.export.deliver import check_folder, deliver, report_alignment
from secateur.pruning.export.ranks import AllRanks, OneRank
from secateur.pruning.export.sources import FromFiles
from secateur.pruning.export.stages import Origin
from secateur.pruning.families import family_of, skeleton
from secateur.pruning.files.fingerprint import fingerprint
from secateur.pruning.files.shares import dtype_of
from secateur.pruning.losses import LossWeights, head_of, token_losses
from secateur.pruning.plan import Plan, plan_from_indices
from secateur.pruning.sites import Site, gain_sizes, split
from secateur.pruning.widths.budget import Budget, log_ratio_penalty
from secateur.pruning.widths.gate_hooks import GateHooks
from secateur.pruning.widths.gates import GateSampler
from secateur.pruning.widths.hypernetwork import GRUHypernetwork, Hypernetwork
from secateur.pruning.widths.memory import ORIGINAL, Run


def _adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.05, fused=True)


class MaskLearning(LanguageModelling):
    """Learn DISP masks: a frozen language model, gates on its widths, a hypernetwork that trains.

    Args:
        base: The model to prune: a folder, or the id of a model on the hub.
        budget: How much of the model stays, and in which shapes.
        sampler: How logits become gates.
        hypernetwork: Makes the logits; called with the list of site sizes.
        optimizer: Trains the hypernetwork and the gains; called with a group of parameters for
            each.
        penalty: Strength of the pull to the budget (the paper's lambda), above 0; 6 in the paper.
        loss: What is trained while masks are learned.
        settled_loss: What is trained while the gains are learned.
        settle: Fraction of the training steps, at the end, in which the masks stay as they will be
            exported and gains are learned instead, in [0, 1): factors on the features at both sides
            of every projection, which fold into its weights at export and cost nothing. 0 leaves
            the weights as they are, as the paper.
        gain_lr: Learning rate of the gains at the start of settling, above 0; it falls to 0 along
            a cosine.
        dtype: Type of the frozen weights: "auto" keeps that of the file, else a torch name such
            as "bfloat16".
        quantisation: Packs the frozen weights while masks are learned, `FourBit` or
            `EightBit`; the export cuts the original ones. None leaves them as they are.
        gradient_checkpointing: Recompute activations in the backward pass: less memory, a third
            more time. On by default in the recipes from 7B.
        loss_chunk_tokens: Tokens whose logits are alive at once, 1 or more.

    Raises:
        ValueError: A setting is out of its range.
    """

    divisible = frozen = True

    def __init__(
        self,
        base: str,
        budget: Budget = Budget(),  # noqa: B008 (frozen)
        sampler: GateSampler | None = None,
        hypernetwork: Callable[[Sequence[int]], Hypernetwork] = GRUHypernetwork,
        optimizer: OptimizerCallable = _adamw,
        penalty: float = 6.0,
        loss: LossWeights = LossWeights(),  # noqa: B008 (frozen)
        settled_loss: LossWeights = LossWeights(0.0, 1.0),  # noqa: B008 (frozen)
        settle: float = 0.3,
        gain_lr: float = 0.03,
        dtype: str = "auto",
        quantisation: Quantisation | None = None,
        gradient_checkpointing: bool = False,
        loss_chunk_tokens: int = 512,
    ) -> None:
        super().__init__()
        if penalty <= 0:
            raise ValueError(f"`penalty` must be above 0, got {penalty}.")
        if not 0 <= settle < 1:
            raise ValueError(f"`settle` must be in [0, 1), got {settle}.")
        if gain_lr <= 0:
            raise ValueError(f"`gain_lr` must be above 0, got {gain_lr}.")
        if loss_chunk_tokens < 1:
            raise ValueError(f"`loss_chunk_tokens` must be 1 or more, got {loss_chunk_tokens}.")
        check_base(base)
        self.base, self.budget = base, budget
        self.sampler = sampler or GateSampler()
        self.penalty = penalty
        self.loss, self.settled_loss = loss, settled_loss
        self.settle, self.gain_lr = settle, gain_lr
        self.dtype_name, self.gradient_checkpointing = dtype, gradient_checkpointing
        self.loss_chunk_tokens, self.quantisation = loss_chunk_tokens, quantisation
        self.keep_target = budget.keep
        self.strict_loading = False  # checkpoints hold what trains, not the frozen model
        self._make_hypernetwork, self._make_optimizer = hypernetwork, optimizer
        self._trained = False
        self.sites: list[Site]
        self.gains: nn.Parameter
        self.settled_N: Tensor

    # Everything that a strategy may shard is made here; it is called once, on every rank.
    def configure_model(self) -> None:
        """Read the frozen model, hang the gates in, make the hypernetwork."""
        if self.model is not None:
            fitting = self.trainer.state.fn == TrainerFn.FITTING
            if fitting and self.trainer.ckpt_path is None:  # a second fit starts afresh
                self.hypernetwork = self._make_hypernetwork([s.size for s in self.sites])
                torch.nn.init.ones_(self.gains)
                torch.nn.init.zeros_(self.settled_N)
            return
        family_of(load_config(self.base_folder))  # an unknown family is told before the weights
        if self.quantisation is None:
            self.model = self.read_model(self.base_folder, self.dtype_name)
        else:
            device = self.trainer.strategy.root_device
            self.model = load_quantised(
                self.base_folder, self.quantisation, self.dtype_name, device
            )
        freeze(self.model)
        if self.gradient_checkpointing:
            # Renamed in transformers 5.23, which deprecates the old name.
            old, new = "gradient_checkpointing_enable", "activation_checkpointing_enable"
            enable = getattr(self.model, new if hasattr(self.model, new) else old)
            enable({"use_reentrant": False, "context_fn": self._contexts})
        family = self.budget.family(self.model.config)
        self.hooks = GateHooks(self.model, family)
        self.sites = self.hooks.sites
        self.table = self.budget.cost.table(skeleton(self.model.config), family)
        self.budget.check(self.sites, self.table)
        sizes = [site.size for site in self.sites]
        self.hypernetwork = self._make_hypernetwork(sizes)
        self.gain_sizes = gain_sizes(skeleton(self.model.config), family)
        self.gains = nn.Parameter(torch.ones(sum(self.gain_sizes.values())))
        self.register_buffer("settled_N", torch.zeros(sum(sizes), dtype=torch.bool))

    def setup(self, stage: str) -> None:
        """Check that text, strategy and memory suit the model before the model is read.

        Raises:
            ValueError: They do not.
        """
        self.check_strategy()
        config = load_config(self.base_folder)
        refuse_quantised(config)
        if self.quantisation is not None:
            check_quantised_run(self.quantisation, self.trainer.strategy)
        self.check_data(config)
        if stage == TrainerFn.FITTING and getattr(self.trainer, "datamodule", None) is not None:
            check_memory(self.trainer, config, self._run())
        self.temperature = self.sampler.start_temperature

    def configure_optimizers(self) -> Any:
        """One optimiser: the hypernetwork trains until the masks settle, the gains from then on."""
        optimizer = self._optimizer()
        check_optimizer(optimizer, self.device)
        begin, end = self.mask_steps, int(self.trainer.estimated_stepping_batches)

        def of_gains(step: int) -> float:
            progress = (step - begin) / max(1, end - begin)
            return 0.0 if step < begin else (1 + math.cos(math.pi * progress)) / 2

        schedule = LambdaLR(optimizer, [lambda step: float(step < begin), of_gains])
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }

    @property
    def mask_steps(self) -> int:
        """Optimiser steps in which masks are learned; in the steps after, they have settled.

        Raises:
            ValueError: Training has no end, or there is no such step.
        """
        total = self.trainer.estimated_stepping_batches
        if not math.isfinite(total):
            raise ValueError("`trainer.max_steps` must be set: masks settle near the last step.")
        steps = round(total * (1 - self.settle))
        if steps < 1:
            raise ValueError(
                f"`settle` {self.settle} of {total} steps leaves none to learn masks in; lower it "
                "or raise `trainer.max_steps`."
            )
        return steps

    @cached_property
    def base_folder(self) -> Path:
        """Local folder of the base model."""
        return resolve(self.base)

    @cached_property
    def base_fingerprint(self) -> str:
        """Content hash of the base model."""
        return fingerprint(self.base_folder)

    @property
    def temperature(self) -> float:
        """Softness of the gates now."""
        return self.sampler.temperature

    @temperature.setter
    def temperature(self, value: float) -> None:
        self.sampler.temperature = value

    def whole_parameters(self) -> list[nn.Parameter]:
        """All that trains: gates are made, and plans are drawn up, on every rank."""
        return [*self.hypernetwork.parameters(), self.gains]

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Loss of one sample of masks on one batch of windows, `input_ids` (B, T)."""
        input_BT = batch["input_ids"]
        gates = self._gates()
        settled = self.global_step >= self.mask_steps
        weights = self.settled_loss if settled else self.loss
        teacher_ND = None
        if weights.distillation:
            with torch.no_grad():
                teacher_ND = self._hidden(input_BT)
        with self.hooks.applied(gates, self._named_gains() if settled else None):
            hidden_ND = self._hidden(input_BT)
        losses = token_losses(
            hidden_ND,
            input_BT[:, 1:].flatten(),
            head_of(self.model),
            teacher_ND=teacher_ND,
            weights=weights,
            chunk_tokens=self.loss_chunk_tokens,
        )
        fraction = self.table.fraction(torch.stack([gate.sum() for gate in gates]))
        penalty = log_ratio_penalty(fraction, self.keep_target, self.penalty)
        if settled:  # on budget, as near as whole entries come
            penalty = torch.zeros_like(penalty)
        self._log_step(losses.cross_entropy, losses.distillation, fraction, penalty)
        loss = losses.total + penalty
        if isinstance(self.trainer.model, DistributedDataParallel):  # waits for all that trains
            resting = self.hypernetwork.parameters() if settled else [self.gains]
            loss = loss + 0.0 * torch.stack([parameter.sum() for parameter in resting]).sum()
        if not bool(loss.isfinite()):
            cause = "the budget penalty" if losses.total.isfinite() else "the language-model loss"
            self.stop_diverged(cause, loss)
        return loss

    def on_train_start(self) -> None:
        """From here on there is something to measure."""
        self._trained = True

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """What rests has a gradient under DDP, of zero, and takes no part in the step."""
        if isinstance(self.trainer.model, DistributedDataParallel):
            for group in optimizer.param_groups:
                for parameter in group["params"] if group["lr"] == 0 else ():
                    parameter.grad = None

    def on_validation_start(self) -> None:
        """Measure what would be exported now: the hard, budget-exact plan."""
        if not self._trained and self.trainer.ckpt_path is None and not self.trainer.training:
            rank_zero_info(
                "No `ckpt_path` is given: measured are gates that have not been trained; "
                "`--ckpt_path last` measures those of the run."
            )
        plan = self.plan()
        self._measured = [gate_I.to(self.device) for gate_I in plan.gates()], plan.gains

    def measured(self) -> AbstractContextManager[None]:
        """With the gates and gains of the plan."""
        return self.hooks.applied(*self._measured)

    @torch.no_grad()
    def keep_probability(self) -> Tensor:
        """P(keep) of every gate, shape (N,), float32 on the CPU; deterministic."""
        with self.whole():
            probability_N = self.sampler.keep_probability(self.hypernetwork().float()).cpu()
        return torch.cat(self._open(split(probability_N, self.sites)))

    @torch.no_grad()
    def plan(self) -> Plan:
        """The deterministic plan of the gates as they are now, exactly on budget.

        Gains are part of it once they have been learned, which is after the masks have settled.
        """
        with self.whole():
            kept, gains = self._kept(), None
            if bool((self.gains != 1).any()):  # they are trained only once the masks have settled
                gains = {name: g.float().cpu().clone() for name, g in self._named_gains().items()}
        widths_S = torch.tensor([float(len(index)) for index in kept])
        provenance = {
            "method": "DISP-LLM (arXiv 2410.11988)",
            "step": self.global_step,
            "keep": self.budget.keep,
            "kept": float(self.table.fraction(widths_S)),
            "counted": self.budget.cost.label,
            "cost": repr(self.budget.cost),
            "min_width": self.budget.min_width,
            "width_multiple": self.budget.width_multiple,
            "uniform": self.budget.uniform,
            "parts": self.budget.parts,
            "sites": None if self.budget.sites is None else list(self.budget.sites),
            "gains": gains is not None,
            "settle": self.settle,
            "learned_on": repr(self.quantisation or self.model.dtype),
        }
        family = self.budget.family(self.model.config)
        return plan_from_indices(self.model, self.base_fingerprint, kept, provenance, gains, family)

    def check_export_folder(self, folder: Path) -> None:
        """Refuse, before training, a folder that the export could not replace."""
        check_folder(folder, self.base_folder)

    def export(self, folder: Path, command: str) -> None:
        """Finalise, cut the base model's files, prove and measure the result; see `deliver`.

        With a width multiple, the widths that the same gates would have without it are measured
        beside them, see `report_alignment`; not where ranks divide the model.
        """
        windows = self.trainer.datamodule.validation_set  # type: ignore[attr-defined]
        windows_NT = torch.stack([windows[place] for place in range(len(windows))])
        device, base = self.trainer.strategy.root_device, self.base_folder
        if not self.divided and not self.trainer.is_global_zero:
            return
        plan = self.plan()
        masks = {"masks": dict(plan.provenance)}
        origin = Origin(self.base, base, plan.base, command, self.global_step, masks)
        if self.divided:  # every rank does a part
            deliver(FromFiles(plan), origin, folder, windows_NT, AllRanks(device), measured=True)
            return
        dense = self.model
        if self.quantisation is not None:  # packed weights are neither cut nor compared with
            dense = load_original(base, self.device, copies=2)
        one = OneRank(base, device)
        deliver(FromFiles(plan, dense), origin, folder, windows_NT, one, measured=True)
        if self.budget.width_multiple > 1:
            free = dataclasses.replace(self.budget, width_multiple=1)
            with torch.no_grad():
                logits_N = self.hypernetwork().float().cpu()
            kept = free.finalise(logits_N, self.sites, self.table)
            unaligned = dataclasses.replace(plan, kept=kept, gains=None)
            report_alignment(dense, plan, unaligned, base, folder, windows_NT)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Store what trains and the settings that decide the run; the base model is only named."""
        checkpoint["state_dict"] = {
            key: value
            for key, value in checkpoint["state_dict"].items()
            if not key.startswith("model.")
        }
        super().on_save_checkpoint(checkpoint)

    def recipe(self) -> dict[str, Any]:
        """Base model and how it is held, budget, gates, losses and optimiser."""
        return {
            "quantisation": repr(self.quantisation),
            "base": self.base_fingerprint,
            "budget": repr(self.budget),
            "hypernetwork": repr(self.hypernetwork),
            "sampler": json.dumps(self.sampler.recipe(), sort_keys=True),
            "penalty": self.penalty,
            "loss": repr(self.loss),
            "settled_loss": repr(self.settled_loss),
            "settle": self.settle,
            "gain_lr": self.gain_lr,
            "dtype": self.dtype_name,
            "optimizer": describe_optimizer(self._optimizer()),
        }

    def _optimizer(self) -> torch.optim.Optimizer:
        gains = {"params": [self.gains], "lr": self.gain_lr, "weight_decay": 0.0}
        optimizer = self._make_optimizer([{"params": self.hypernetwork.parameters()}, gains])
        _let_rest(optimizer)
        return optimizer

    def _run(self) -> Run:
        """What decides the memory of a step."""
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        return Run(
            dtype=dtype_of(self.base_folder, self.dtype_name),
            storage=self.quantisation.storage if self.quantisation else ORIGINAL,
            batch_size=data.batch_size,
            window_tokens=data.window_tokens,
            checkpointing=self.gradient_checkpointing,
            loss_chunk_tokens=self.loss_chunk_tokens,
            distillation=bool(self.loss.distillation or self.settled_loss.distillation),
            hypernetwork=self._make_hypernetwork,
            optimizer_bytes=optimizer_bytes(self._make_optimizer([nn.Parameter(torch.ones(1))])),
        )

    @torch.no_grad()
    def _kept(self) -> tuple[Tensor, ...]:
        """Indices (int64) of what stays, per site, exactly on budget; deterministic."""
        if bool(self.settled_N.any()):
            masks = split(self.settled_N.cpu(), self.sites)
            return tuple(mask.nonzero().squeeze(1) for mask in masks)
        logits_N = self.hypernetwork().float().cpu()
        return self.budget.finalise(logits_N, self.sites, self.table)

    def _gates(self) -> tuple[Tensor, ...]:
        """The gates of this step: a sample while masks are learned, then the settled masks."""
        if self.global_step < self.mask_steps:
            gates_N = self.sampler(self.hypernetwork(), self.global_step, self.global_rank)
            return self._open(split(gates_N, self.sites))
        if self.global_step == self.mask_steps:
            kept = zip(self.sites, self._kept(), strict=True)
            masks = [torch.zeros(s.size, dtype=torch.bool).index_fill(0, i, True) for s, i in kept]
            self.settled_N.copy_(torch.cat(masks))
        return self._open(split(self.settled_N.to(self.gains.dtype), self.sites))

    def _named_gains(self) -> dict[str, Tensor]:
        """The gains by name, as `GateHooks` and plans want them."""
        # Where nothing was removed there is nothing to make good: the gains get no gradient.
        gains = self.gains if self.budget.keep < 1 else 1 + 0 * self.gains
        return dict(zip(self.gain_sizes, gains.split([*self.gain_sizes.values()]), strict=True))

    def _open(self, gates: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Ones at the sites that the budget does not prune."""
        return tuple(
            gate if self.budget.prunes(site) else torch.ones_like(gate)
            for gate, site in zip(gates, self.sites, strict=True)
        )

    def _contexts(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """For a checkpointed block: of its forward pass, and of its recomputation in the backward
        pass, where the gates of the forward pass have to multiply again.
        """
        return nullcontext(), self.hooks.applied(self.hooks.gates, self.hooks.gains)

    def _hidden(self, input_BT: Tensor) -> Tensor:
        """Last hidden states that predict the next tokens, shape (B * (T - 1), D)."""
        output = self.model.get_decoder()(input_ids=input_BT, use_cache=False)
        hidden_ND: Tensor = output.last_hidden_state[:, :-1].flatten(0, 1)
        return hidden_ND

    def _log_step(self, nll: Tensor, kl: Tensor, fraction: Tensor, penalty: Tensor) -> None:
        self.log("train_loss", nll, prog_bar=True)
        self.log("kept", fraction.float(), prog_bar=True)
        self.log("target", self.keep_target, prog_bar=True)
        self.log("penalty", penalty.float())
        self.log("train_kl", kl)


def _let_rest(optimizer: torch.optim.Optimizer) -> None:
    """A group at learning rate 0 takes no part in a step, even if a strategy has given it gradients
    of zero: they would age the averages with which the group begins when its turn comes.
    """
    hidden: list[tuple[Any, Any]] = []

    def hide(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for group in optimizer.param_groups:
            for parameter in group["params"] if group["lr"] == 0 else ():
                hidden.append((parameter, parameter.grad))
                parameter.grad = None

    def give_back(*_: Any) -> None:
        while hidden:
            parameter, gradient = hidden.pop()
            parameter.grad = gradient

    optimizer.register_step_pre_hook(hide)
    optimizer.register_step_post_hook(give_back)


def freeze(model: nn.Module) -> None:
    """No gradients to the weights and no dropout: the gates are the only noise."""
    model.requires_grad_(False)
    model.train()  # gradient checkpointing works in training mode only
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("attention_dropout", "dropout", "layerdrop"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
