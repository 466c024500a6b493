"""Train a language model the ordinary way: from scratch, or further from a checkpoint.

Further training is fine-tuning, or recovery after pruning: callbacks remove blocks, widths or
weights, and the pruned model is trained on text, on the predictions of the dense model
(distillation, arXiv 1503.02531, at temperature 1), or on both; all weights train, or low-rank
updates.
"""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from secateur.modules.architecture import make_config
from secateur.modules.optimizers import decay_groups, describe_optimizer, made_optimizer
from secateur.modules.prunable_model import PrunableModel
from secateur.modules.rate_schedule import RateSchedule
from secateur.modules.teacher import Teacher, predicted_tokens, predicting_states
from secateur.pruning.chains import Step
from secateur.pruning.files.base_model import BaseModel
from secateur.pruning.lora import LoRA
from secateur.pruning.losses import LossWeights, head_of, token_losses


def _adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)


class CausalLM(PrunableModel):
    """Next-token training of a causal language model, and recovery of a pruned one.

    Args:
        architecture: Configuration of a model to train from scratch: `model_type` and any settings
            of the family's configuration, such as `hidden_size`. Exclusive with `base`.
        base: A model to train further: a folder or a hub id. Exclusive with `architecture`.
        optimizer: Called with the trained parameters. Its weight decay is for matrices: biases,
            norms and other vectors have none.
        warmup_steps: Steps over which the learning rate rises from 0, 0 or more.
        schedule: How the learning rate moves from then on; it falls to 0 along a cosine until the
            last step if not given.
        loss: The training loss. Distillation needs a teacher, which costs the memory of one more
            model and the time of one more forward pass.
        teacher: The model to distil from: a folder or a hub id with the vocabulary of `base`. If
            not given, `base` itself, as it was before anything was pruned.
        lora: Train low-rank updates instead of all weights; they are merged at export.
        dtype: Type of the weights of `base`: "auto" or a torch name such as "bfloat16". Small
            updates round to zero in bfloat16: train all weights in "float32".
        export_dtype: Type of the exported weights: "auto" is the type of the files of `base`.
        gradient_checkpointing: Recompute activations in the backward pass: less memory, a third
            more time.
        loss_chunk_tokens: Tokens whose logits are in memory at once, 1 or more.
        trust_remote_code: Whether Python files of the tokenizer of `base` may run. Models run by
            the code of transformers, or ours, in any case.

    Raises:
        ValueError: Both or neither of `architecture` and `base` are given, a setting that needs a
            `base` is given without one, or a setting is out of range.
    """

    def __init__(
        self,
        architecture: dict[str, Any] | None = None,
        base: str | None = None,
        optimizer: OptimizerCallable = _adamw,
        warmup_steps: int = 100,
        loss: LossWeights = LossWeights(),  # noqa: B008 (frozen)
        teacher: str | None = None,
        lora: LoRA | None = None,
        dtype: str = "auto",
        export_dtype: str = "auto",
        gradient_checkpointing: bool = False,
        loss_chunk_tokens: int = 1024,
        trust_remote_code: bool = False,
        schedule: RateSchedule = RateSchedule(),  # noqa: B008 (frozen)
    ) -> None:
        if (architecture is None) == (base is None):
            raise ValueError("Give exactly one of `architecture` and `base`.")
        if warmup_steps < 0:
            raise ValueError(f"`warmup_steps` must be 0 or more, got {warmup_steps}.")
        if loss_chunk_tokens < 1:
            raise ValueError(f"`loss_chunk_tokens` must be 1 or more, got {loss_chunk_tokens}.")
        if base is None and (lora or (loss.distillation and teacher is None)):
            what = "`lora`" if lora else "`loss.distillation`"
            raise ValueError(f"{what} needs a `base` to start from; `architecture` has none.")
        if teacher is not None and not loss.distillation:
            raise ValueError(
                "`teacher` is given and `loss.distillation` is 0, so that nothing is learned from "
                "it; raise `loss.distillation` or leave out `teacher`."
            )
        read = None if base is None else BaseModel(base, "base", trust_remote_code)
        super().__init__(read, lora, dtype, export_dtype, gradient_checkpointing)
        other = None if teacher is None else BaseModel(teacher, "teacher")
        if other is not None:
            other.check()
        self.architecture, self.loss, self.loss_chunk_tokens = architecture, loss, loss_chunk_tokens
        self.warmup_steps, self.schedule, self._make_optimizer = warmup_steps, schedule, optimizer
        taught_by = other or read
        self._teacher = Teacher(taught_by) if loss.distillation and taught_by else None

    def configure_model(self) -> None:
        """Make or read the model, and the teacher; called once, on every rank."""
        if self.model is not None:
            return
        if self.base is not None:
            self._begin(self.read_model(self.base_model, self.dtype_name))
        else:
            self._begin(AutoModelForCausalLM.from_config(self._config))
        if self._teacher is not None and self._teacher.model is None:
            self._teacher.load(self)

    @property
    def bases(self) -> list[BaseModel]:
        """The base model and the teacher, those that there are."""
        return super().bases + ([self._teacher.base] if self._teacher else [])

    def check_bases(self) -> None:
        """See `LanguageModelling.check_bases`; a base has to hold weights that can be trained."""
        super().check_bases()
        if self._base is not None:
            self._base.refuse(Step.TRAINING)

    def setup(self, stage: str) -> None:
        """Check that models, strategy and text suit each other before a model is read."""
        self.check_strategy()
        self.check_bases()
        self.check_data(self._config)
        if self.lora is not None:
            self.lora.check(self._config)
        for base in self.bases:
            base.dtype_of(self.dtype_name)
            base.dtype_of(self.export_dtype, "export_dtype")
        if stage == "fit" and self.trainer.max_steps:
            self._check_precision()

    def _check_precision(self) -> None:
        """Refuse to train all weights in float16, in which the squares of gradients are zero.

        Raises:
            ValueError: They would be.
        """
        if self.base is None or self.lora is not None:
            return
        if self.base_model.dtype_of(self.dtype_name) == torch.float16:
            raise ValueError(
                f"`dtype` {self.dtype_name} is float16 here: the squares of gradients, by which "
                "optimisers divide, would round to zero. Set `dtype` to float32, or give `lora`; "
                "`export_dtype` is the type of the exported weights."
            )

    def phases(self, trainer: Any) -> list[tuple[int, str]]:
        """The training."""
        steps = int(trainer.estimated_stepping_batches)
        what = "all weights" if self.lora is None else "low-rank updates"
        return [(0, f"train {what} for {steps} steps")] if steps else []

    def on_fit_start(self) -> None:
        """Load the teacher on the device of the model."""
        if self._teacher is not None and self._teacher.model is not None:
            self._teacher.model.to(self.device)  # type: ignore[arg-type]

    def configure_optimizers(self) -> Any:
        """The optimiser, with warm-up and schedule over all training steps."""
        optimizer = self._optimizer()
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = self.schedule.of(optimizer, self.warmup_steps, steps)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Mean loss per token of one batch of windows, `input_ids` (B, T); of the tokens in
        `loss_mask` if the batch has one.
        """
        counted = batch["input_ids"], batch.get("loss_mask")
        teacher_ND, teacher_head = self._teacher(*counted) if self._teacher else (None, None)
        with self._seeded(batch_idx):
            hidden_ND = predicting_states(self.model, *counted)
        head = [p for p in self.model.get_output_embeddings().parameters() if p.requires_grad]
        losses = token_losses(
            hidden_ND,
            predicted_tokens(*counted),
            head_of(self.model),
            teacher_ND=teacher_ND,
            teacher_head=teacher_head,
            weights=self.loss,
            chunk_tokens=self.loss_chunk_tokens,
            parameters=None if head and self.divided else head,
        )
        self.log("train_loss", losses.cross_entropy, prog_bar=True)
        if self._teacher:
            self.log("train_kl", losses.distillation)
        if not bool(losses.total.isfinite()):
            self.stop_diverged("the loss", losses.total)
        return losses.total * self.share_of_counted(batch)

    def recipe(self) -> dict[str, Any]:
        """Origin of the model, training loss, warm-up and optimiser."""
        return {
            "architecture": self.architecture,
            "base": self.base and self.base_fingerprint,
            "teacher": self._teacher and self._fingerprint_of(self._teacher),
            "loss": repr(self.loss),
            "lora": self.lora and repr(self.lora),
            "dtype": self.dtype_name,
            "warmup_steps": self.warmup_steps,
            "schedule": repr(self.schedule),
            "optimizer": f"{describe_optimizer(self._optimizer())}, vectors without decay",
        }

    def training_facts(self) -> dict[str, Any]:
        """Loss, teacher, low-rank updates, warm-up, schedule and optimiser."""
        given = ("loss", "lora", "warmup_steps", "schedule", "optimizer")
        recipe = self.recipe()
        facts = {name: recipe[name] for name in given}
        return facts | {"teacher": self._teacher and str(self._teacher.name)}

    def _read_base(self) -> PreTrainedModel:
        """The original base model: the teacher in memory, if that is it."""
        teacher = self._teacher.model if self._teacher and self._teacher.name == self.base else None
        return teacher or super()._read_base()

    def _fingerprint_of(self, teacher: Teacher) -> str:
        return self.base_fingerprint if teacher.name == self.base else teacher.base.fingerprint

    @property
    def _config(self) -> Any:
        """The configuration of the model."""
        if self._base is not None:
            return self._base.config
        return make_config(self.architecture or {})

    def _optimizer(self) -> torch.optim.Optimizer:
        trained = [p for p in self.parameters() if p.requires_grad]
        return made_optimizer(self._make_optimizer, decay_groups(trained))
