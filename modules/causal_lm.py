"""Train a language model the ordinary way: from scratch, or further from a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, get_cosine_schedule_with_warmup

from modules.language_modelling import LanguageModelling, describe_optimizer
from modules.loading import check_base, load_config, load_model, resolve
from modules.losses import head_of, token_losses
from pruning.fingerprint import fingerprint
from pruning.surgery import refuse_foreign, replaced_folder

_MARK = "secateur.json"
"""Tells a folder of ours from others; says how the model was trained."""


def _adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)


class CausalLM(LanguageModelling):
    """Next-token training of a causal language model.

    Args:
        architecture: Configuration of a model to start from scratch: `model_type` and whatever the
            family's configuration takes, such as `hidden_size`. Exclusive with `base`.
        base: A model to train further: a folder or a hub id. Exclusive with `architecture`.
        optimizer: Called with the parameters.
        warmup_steps: Steps over which the learning rate rises from 0, 0 or more; it then falls to
            0 along a cosine until the last step.
        dtype: Type of the weights of `base`: "auto" or a torch name such as "bfloat16".
        loss_chunk_tokens: Tokens whose logits are alive at once, 1 or more.

    Raises:
        ValueError: Both or neither of `architecture` and `base` are given, or a setting is out of
            range.
    """

    def __init__(
        self,
        architecture: dict[str, Any] | None = None,
        base: str | None = None,
        optimizer: OptimizerCallable = _adamw,
        warmup_steps: int = 100,
        dtype: str = "auto",
        loss_chunk_tokens: int = 1024,
    ) -> None:
        super().__init__()
        if (architecture is None) == (base is None):
            raise ValueError("Give exactly one of `architecture` and `base`.")
        if warmup_steps < 0:
            raise ValueError(f"`warmup_steps` must be 0 or more, got {warmup_steps}.")
        if loss_chunk_tokens < 1:
            raise ValueError(f"`loss_chunk_tokens` must be 1 or more, got {loss_chunk_tokens}.")
        if base is not None:
            check_base(base)
        self.architecture, self.base, self.dtype_name = architecture, base, dtype
        self.warmup_steps, self.loss_chunk_tokens = warmup_steps, loss_chunk_tokens
        self._make_optimizer = optimizer

    def configure_model(self) -> None:
        """Make or read the model; called once, on every rank."""
        if self.model is not None:
            return
        if self.base is not None:
            self.model = load_model(resolve(self.base), dtype=self.dtype_name)
        else:
            self.model = AutoModelForCausalLM.from_config(self._config())
        self.model.train()

    def setup(self, stage: str) -> None:
        """Check that the text suits the model before the model is made."""
        self.check_data(self._config())

    def configure_optimizers(self) -> Any:
        """The optimiser, with warm-up and cosine decay over the whole of training."""
        optimizer = self._make_optimizer(self.parameters())
        schedule = get_cosine_schedule_with_warmup(
            optimizer,
            num_warmup_steps=self.warmup_steps,
            num_training_steps=int(self.trainer.estimated_stepping_batches),
        )
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Mean cross-entropy on one batch of windows, `input_ids` (B, T)."""
        input_BT = batch["input_ids"]
        output = self.model.get_decoder()(input_ids=input_BT, use_cache=False)
        losses = token_losses(
            output.last_hidden_state[:, :-1].flatten(0, 1),
            input_BT[:, 1:].flatten(),
            head_of(self.model),
            chunk_tokens=self.loss_chunk_tokens,
            parameters=list(self.model.get_output_embeddings().parameters()),
        )
        self.log("train_loss", losses.cross_entropy, prog_bar=True)
        if not bool(losses.total.isfinite()):
            self.stop_diverged("the loss", losses.total)
        return losses.total

    def recipe(self) -> dict[str, Any]:
        """Where the model came from, its warm-up and its optimiser."""
        return {
            "architecture": self.architecture,
            "base": self.base and fingerprint(resolve(self.base)),
            "dtype": self.dtype_name,
            "warmup_steps": self.warmup_steps,
            "optimizer": describe_optimizer(self._make_optimizer(self.parameters())),
        }

    def check_export_folder(self, folder: Path) -> None:
        """Refuse, before training, a folder that the export could not replace."""
        refuse_foreign(folder, _is_ours)

    def export(self, folder: Path, command: str) -> None:
        """Save model and tokenizer in the form of transformers."""
        if not self.trainer.is_global_zero:
            return
        with replaced_folder(folder, _is_ours) as partial:
            self.model.save_pretrained(partial)
            self.trainer.datamodule.tokenizer.save_pretrained(partial)  # type: ignore[attr-defined]
            mark = {"command": command, "steps": self.global_step}
            (partial / _MARK).write_text(json.dumps(mark, indent=1) + "\n", encoding="utf-8")

    def _config(self) -> Any:
        """The configuration of the model.

        Raises:
            ValueError: It names no model, or none that transformers knows.
        """
        if self.base is not None:
            return load_config(resolve(self.base))
        settings = dict(self.architecture or {})
        model_type = settings.pop("model_type", None)
        if model_type is None:
            raise ValueError("`architecture` needs a `model_type`, such as llama.")
        try:
            return AutoConfig.for_model(model_type, **settings)
        except ValueError as error:
            raise ValueError(
                f"`architecture` is not one that transformers knows: {error}"
            ) from error


def _is_ours(folder: Path) -> bool:
    return (folder / _MARK).is_file()
