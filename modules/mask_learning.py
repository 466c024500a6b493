"""Learn which dimensions of a frozen language model to keep.

Source: "DISP-LLM: Dimension-Independent Structural Pruning for Large Language Models"
(arXiv 2410.11988): a hypernetwork makes the logits of all gates, gates multiply into the frozen
model, and the loss is the language-model loss plus a log-ratio penalty on the cost (eqs. 5 to 8).

Differs from the paper: logistic instead of Gumbel noise, one sample for loss and budget, a budget
that may be annealed, optional distillation from the same model with open gates, and a
deterministic, budget-exact selection at the end. docs/disp.md has the measured effect of each.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn

from modules.delivery import deliver, is_plan
from modules.language_modelling import LanguageModelling, describe_optimizer
from modules.loading import check_base, load_config, load_model, resolve
from modules.losses import head_of, token_losses
from pruning.budget import Budget, log_ratio_penalty
from pruning.families import family_of
from pruning.fingerprint import fingerprint
from pruning.gates import GateSampler
from pruning.hypernetwork import GRUHypernetwork, Hypernetwork
from pruning.masking import GateHooks
from pruning.plan import PruningPlan, plan_from_indices
from pruning.sites import split
from pruning.surgery import refuse_foreign


def _adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.05)


class MaskLearning(LanguageModelling):
    """Learn DISP masks: a frozen language model, gates on its widths, a hypernetwork that trains.

    Args:
        base: The model to prune: a folder, or the id of a model on the hub.
        budget: How much of the model stays, and in which shapes.
        sampler: How logits become gates.
        hypernetwork: Makes the logits; called with the list of site sizes.
        optimizer: Trains the hypernetwork; called with its parameters.
        penalty: Strength of the pull to the budget (the paper's lambda), above 0; 6 in the paper.
        cross_entropy: Weight of the next-token loss, 0 or more.
        distillation: Weight of the KL divergence to the same model with open gates, 0 or more;
            costs one more forward pass per step where it is not 0.
        dtype: Type of the frozen weights: "auto" keeps that of the file, else a torch name such
            as "bfloat16".
        gradient_checkpointing: Recompute activations in the backward pass: less memory, a third
            more time. On by default in the recipes from 7B.
        loss_chunk_tokens: Tokens whose logits are alive at once, 1 or more.

    Raises:
        ValueError: A weight is out of its range, or both loss weights are 0.
    """

    def __init__(
        self,
        base: str,
        budget: Budget = Budget(),  # noqa: B008 (frozen)
        sampler: GateSampler | None = None,
        hypernetwork: Callable[[Sequence[int]], Hypernetwork] = GRUHypernetwork,
        optimizer: OptimizerCallable = _adamw,
        penalty: float = 6.0,
        cross_entropy: float = 1.0,
        distillation: float = 0.0,
        dtype: str = "auto",
        gradient_checkpointing: bool = False,
        loss_chunk_tokens: int = 1024,
    ) -> None:
        super().__init__()
        if penalty <= 0:
            raise ValueError(f"`penalty` must be above 0, got {penalty}.")
        if min(cross_entropy, distillation) < 0 or max(cross_entropy, distillation) == 0:
            raise ValueError(
                "`cross_entropy` and `distillation` must be 0 or more and not both 0, "
                f"got {cross_entropy} and {distillation}."
            )
        if loss_chunk_tokens < 1:
            raise ValueError(f"`loss_chunk_tokens` must be 1 or more, got {loss_chunk_tokens}.")
        check_base(base)
        self.base, self.budget = base, budget
        self.sampler = sampler or GateSampler()
        self.penalty = penalty
        self.cross_entropy, self.distillation = cross_entropy, distillation
        self.dtype_name, self.gradient_checkpointing = dtype, gradient_checkpointing
        self.loss_chunk_tokens = loss_chunk_tokens
        self.keep_target = budget.keep
        self.strict_loading = False  # checkpoints hold what trains, not the frozen model
        self._make_hypernetwork, self._make_optimizer = hypernetwork, optimizer

    # Everything that a strategy may shard is made here; it is called once, on every rank.
    def configure_model(self) -> None:
        """Read the frozen model, hang the gates in, make the hypernetwork."""
        if self.model is not None:
            return
        family_of(load_config(self.base_folder))  # an unknown family is told before the weights
        self.model = load_model(self.base_folder, dtype=self.dtype_name)
        freeze(self.model)
        if self.gradient_checkpointing:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        self.hooks = GateHooks(self.model)
        self.sites = self.hooks.sites
        self.table = self.budget.cost.table(self.model)
        self.budget.check(self.sites, self.table)
        self.hypernetwork = self._make_hypernetwork([site.size for site in self.sites])

    def setup(self, stage: str) -> None:
        """Check that the text suits the model before the model is read."""
        self.check_data(load_config(self.base_folder))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The optimiser of the hypernetwork."""
        return self._make_optimizer(self.hypernetwork.parameters())

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

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Loss of one sample of masks on one batch of windows, `input_ids` (B, T)."""
        input_BT = batch["input_ids"]
        gates_N = self.sampler(self.hypernetwork(), self.global_step, self.global_rank)
        gates = split(gates_N, self.sites)
        teacher_ND = None
        if self.distillation:
            with torch.no_grad():
                teacher_ND = self._hidden(input_BT)
        with self.hooks.applied(gates):
            hidden_ND = self._hidden(input_BT)
        losses = token_losses(
            hidden_ND,
            input_BT[:, 1:].flatten(),
            head_of(self.model),
            teacher_ND=teacher_ND,
            cross_entropy=self.cross_entropy,
            distillation=self.distillation,
            chunk_tokens=self.loss_chunk_tokens,
        )
        fraction = self.table.fraction(torch.stack([gate.sum() for gate in gates]))
        penalty = log_ratio_penalty(fraction, self.keep_target, self.penalty)
        self._log_step(losses.cross_entropy, losses.distillation, fraction, penalty)
        loss = losses.total + penalty
        if not bool(loss.isfinite()):
            cause = "the budget penalty" if losses.total.isfinite() else "the language-model loss"
            self.stop_diverged(cause, loss)
        return loss

    def on_validation_start(self) -> None:
        """Measure what would be exported now: the hard, budget-exact plan."""
        self._measured_gates = [gate.to(self.device) for gate in self.plan().gates()]

    def measured(self) -> AbstractContextManager[None]:
        """With the gates of the plan."""
        return self.hooks.applied(self._measured_gates)

    @torch.no_grad()
    def keep_probability(self) -> Tensor:
        """P(keep) of every gate, shape (N,), float32 on the CPU; deterministic."""
        return self.sampler.keep_probability(self.hypernetwork().float()).cpu()

    @torch.no_grad()
    def plan(self) -> PruningPlan:
        """The deterministic plan of the gates as they are now, exactly on budget."""
        logits_N = self.hypernetwork().float().cpu()
        kept = self.budget.finalise(logits_N, self.sites, self.table)
        widths_S = torch.tensor([float(len(index)) for index in kept])
        provenance = {
            "method": "DISP-LLM (arXiv 2410.11988)",
            "step": self.global_step,
            "keep": self.budget.keep,
            "kept": float(self.table.fraction(widths_S)),
            "cost": repr(self.budget.cost),
            "min_width": self.budget.min_width,
            "width_multiple": self.budget.width_multiple,
        }
        return plan_from_indices(self.model, self.base_fingerprint, kept, provenance)

    def check_export_folder(self, folder: Path) -> None:
        """Refuse, before training, a folder that the export could not replace."""
        refuse_foreign(folder)
        refuse_foreign(folder.parent / "plan", is_plan)

    def export(self, folder: Path, command: str) -> None:
        """Finalise, cut the base model's files, prove and measure the result; see `deliver`."""
        if not self.trainer.is_global_zero:
            return
        loader = self.trainer.datamodule.val_dataloader()  # type: ignore[attr-defined]
        windows_NT = torch.cat([batch["input_ids"] for batch in loader])
        deliver(self.model, self.plan(), self.base, self.base_folder, folder, windows_NT, command)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Store what trains and the settings that decide the run; the base model is only named."""
        checkpoint["state_dict"] = {
            key: value
            for key, value in checkpoint["state_dict"].items()
            if not key.startswith("model.")
        }
        super().on_save_checkpoint(checkpoint)

    def recipe(self) -> dict[str, Any]:
        """Base model, budget, gates, losses and optimiser."""
        return {
            "base": self.base_fingerprint,
            "budget": repr(self.budget),
            "hypernetwork": repr(self.hypernetwork),
            "sampler": json.dumps(self.sampler.recipe(), sort_keys=True),
            "penalty": self.penalty,
            "cross_entropy": self.cross_entropy,
            "distillation": self.distillation,
            "dtype": self.dtype_name,
            "optimizer": describe_optimizer(self.configure_optimizers()),
        }

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
        if self.distillation:
            self.log("train_kl", kl)


def freeze(model: nn.Module) -> None:
    """No gradients to the weights and no dropout: the gates are the only noise."""
    model.requires_grad_(False)
    model.train()  # gradient checkpointing works in training mode only
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("attention_dropout", "dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
