"""The base class of mask learning and weight training: validation, checks, divergence."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NoReturn, Protocol, runtime_checkable

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.text import Perplexity
from transformers import PreTrainedModel

from secateur.modules.data.token_data import TokenData, check_vocabulary, check_window
from secateur.modules.resuming import refuse_incomplete, refuse_placeless, refuse_unlike
from secateur.modules.shortening import Record, asked_before, end_at
from secateur.pruning.files.base_model import BaseModel
from secateur.pruning.files.settings import refuse_other


@runtime_checkable
class ReadsModels(Protocol):
    """A strategy that reads models in its own way."""

    divides_models: bool
    """Whether a model that was read is sharded."""

    def read_model(self, base: BaseModel, dtype: str) -> PreTrainedModel:
        """Read this rank's shard of a model."""

    def fetching(self, model: nn.Module) -> Any:
        """A callable version of a module with frozen models that were read."""

    def whole(self, parameters: Sequence[nn.Parameter]) -> AbstractContextManager[None]:
        """Gather some parameters on every rank, for the duration of a `with` block."""


class LanguageModelling(LightningModule, ABC):
    """A causal language model, measured by the tokens that it predicts inside each window.

    A subclass makes `model`, trains it, and may override `measured` to change how it is measured.

    Args:
        base: The model that training starts from; None if it starts from random weights.

    Raises:
        ValueError: The base is not there, or it is none that can be read.
    """

    divisible = False
    """Whether the model may be sharded, so that no rank holds it completely."""
    frozen_weights = False
    """Whether the model itself is frozen."""

    def __init__(self, base: BaseModel | None) -> None:
        super().__init__()
        if base is not None:
            base.check()
        self.model: Any = None
        self._base, self.base = base, None if base is None else str(base.name)
        self.perplexity = Perplexity()
        self.shortened: list[Record] = []
        """The steps at which the run was told to end sooner, and what was planned before."""
        self.tokens_seen = 0
        """Tokens of all training batches of all ranks so far, prompts included, padding not."""

    @abstractmethod
    def recipe(self) -> dict[str, Any]:
        """Settings that affect a run; a checkpoint resumes only under the same settings."""

    @property
    def bases(self) -> list[BaseModel]:
        """The models that are read."""
        return [] if self._base is None else [self._base]

    @property
    def base_model(self) -> BaseModel:
        """The base model.

        Raises:
            ValueError: There is none: training starts from an `architecture`.
        """
        if self._base is None:
            raise ValueError(
                "A model that starts from `architecture` has no base to prune; train it first, and "
                "give the exported folder as `base`."
            )
        return self._base

    @property
    def base_folder(self) -> Path:
        """Local folder of the base model; ValueError if there is none."""
        return self.base_model.folder

    @property
    def base_fingerprint(self) -> str:
        """Content hash of the base model; ValueError if there is none."""
        return self.base_model.fingerprint

    def check_bases(self) -> None:
        """Judge the models that are read, by configurations and headers, before anything is spent.

        Raises:
            ValueError: One is not there, is damaged, or is none that can be read here.
        """
        for base in self.bases:
            base.judge()

    def read_model(self, base: BaseModel, dtype: str) -> PreTrainedModel:
        """Read a model as the strategy keeps it: completely, or this rank's shard.

        Args:
            base: The model to read.
            dtype: "auto" or the name of a torch type.

        Raises:
            ValueError: The folder cannot be read as a causal language model.
        """
        reader = self._reader
        return reader.read_model(base, dtype) if reader else base.load(dtype)

    def fetching(self, model: nn.Module) -> Any:
        """A callable version of a module with models that are not submodules of this one; if they
        are sharded, it gathers them layer by layer.
        """
        return self._reader.fetching(model) if self._reader else model

    @property
    def divided(self) -> bool:
        """Whether the model is sharded, so that no rank holds it completely."""
        return self._reader is not None and self._reader.divides_models

    def whole_parameters(self) -> list[nn.Parameter]:
        """Parameters that every rank needs completely between steps, even if others are sharded."""
        return []

    def whole(self) -> AbstractContextManager[None]:
        """Gather `whole_parameters` outside of a step; every rank has to enter."""
        return self._reader.whole(self.whole_parameters()) if self._reader else nullcontext()

    @property
    def _reader(self) -> ReadsModels | None:
        """The strategy, if it may shard the models that it reads; None without a trainer."""
        strategy = None if self._trainer is None else self.trainer.strategy
        return strategy if isinstance(strategy, ReadsModels) else None

    def measured(self) -> AbstractContextManager[Any]:
        """The model in the state in which it is measured; by default unchanged."""
        return nullcontext(self.model)

    def on_train_batch_start(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Count the tokens of a batch.

        Here and not at its end, where a checkpoint of this step may be written before.
        """
        tokens = batch["input_ids"].numel() * self.trainer.world_size
        if "lengths" in batch:
            tokens = int(self.trainer.strategy.reduce(batch["lengths"].sum(), reduce_op="sum"))
        self.tokens_seen += tokens
        self.log("tokens_seen", float(self.tokens_seen))

    def share_of_counted(self, batch: dict[str, Tensor]) -> Tensor | float:
        """Factor of the mean loss of a batch, so that the mean over ranks counts all tokens alike.

        It is 1 if all tokens count, as every rank then has as many. Batches that are accumulated
        into a step count alike, however many tokens they count.
        """
        if "loss_mask" not in batch or self._trainer is None or self.trainer.world_size == 1:
            return 1.0
        counted = batch["loss_mask"][:, 1:].sum()
        total: Any = self.trainer.strategy.reduce(counted.clone(), reduce_op="sum")
        share: Tensor = counted * self.trainer.world_size / total.clamp_min(1)
        return share

    def on_validation_epoch_start(self) -> None:
        """Reset the perplexity here and not at the end: tensors of a `validate` are in inference
        mode, and a later fit cannot use them.
        """
        self.perplexity.reset()

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Count one batch of windows, `input_ids` (B, T), into the perplexity."""
        for logits_TV, label_T in self._predictions(batch):
            if len(label_T):
                self.perplexity.update(logits_TV[None], label_T[None])

    def on_validation_epoch_end(self) -> None:
        """Log the perplexity over all validation windows."""
        self._log_perplexity("val_perplexity")

    def on_test_start(self) -> None:
        """Prepare as for validation: testing measures the same model."""
        self.on_validation_start()

    def on_test_epoch_start(self) -> None:
        """Start from nothing."""
        self.perplexity.reset()

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Count one batch of windows, `input_ids` (B, T), into the perplexity."""
        self.validation_step(batch, batch_idx)

    def on_test_epoch_end(self) -> None:
        """Log the perplexity over all test windows."""
        self._log_perplexity("test_perplexity")

    def on_predict_start(self) -> None:
        """Prepare as for validation: prediction measures the same model."""
        self.on_validation_start()

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> list[float]:
        """Mean negative log-likelihood of each window of a batch, nats; NaN where none counts."""
        return [float(F.cross_entropy(*pair)) for pair in self._predictions(batch)]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Store the settings that affect the run."""
        with self.whole():  # the recipe holds the shapes of the trained parameters
            checkpoint["secateur"] = self.recipe() | self._length()
        checkpoint["batches_per_step"] = self.trainer.accumulate_grad_batches
        checkpoint["shortened"] = self.shortened
        checkpoint["tokens_seen"] = self.tokens_seen

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another base model or configuration, or an incomplete one.

        Fewer steps than it was written under are noted instead: whoever wants to see the result
        sooner may have it. A run that was told to settle now goes on so under its old settings.

        Raises:
            ValueError: The settings differ, or part of the checkpoint is missing.
        """
        fitting = self.trainer.state.fn == TrainerFn.FITTING
        needed = ["secateur", "state_dict", *(["loops", "optimizer_states"] if fitting else [])]
        if missing := [key for key in needed if not checkpoint.get(key)]:
            raise ValueError(
                f"The checkpoint lacks {', '.join(missing)}; give another `ckpt_path`."
            )
        saved, current = dict(checkpoint["secateur"]), self.recipe()
        self.shortened = [*checkpoint.get("shortened", [])]
        self.tokens_seen = checkpoint.get("tokens_seen", 0)
        if fitting:
            current |= self._length()
            self._accept(saved, current, checkpoint)
            if saved.get("ranks") != current["ranks"]:  # compare per rank or in total
                for key in ("ranks", "windows_per_step"):
                    saved.pop(key, None)
                    current.pop(key)
        else:  # measuring takes no optimiser steps
            for key in self._length():
                saved.pop(key, None)
        refuse_other(saved, current, type(self).__name__)
        if fitting:
            loops = checkpoint["loops"]
            refuse_unlike(loops, {"fit_loop": self.trainer.fit_loop.state_dict()}, "loops")
            data = getattr(self.trainer, "datamodule", None)
            if checkpoint["global_step"] and isinstance(data, TokenData):
                refuse_placeless(loops)
        if fitting and checkpoint["global_step"] and not checkpoint["optimizer_states"][0]["state"]:
            raise ValueError(
                "The checkpoint lacks the state of the optimiser; give another `ckpt_path`."
            )
        if self.frozen_weights:  # else the model may have to be cut first
            self.refuse_incomplete(checkpoint["state_dict"])
        batches = self.trainer.accumulate_grad_batches
        _count_batches(checkpoint, checkpoint.get("batches_per_step", batches), batches)

    def on_train_start(self) -> None:
        """Check what optimisers go on from.

        Raises:
            ValueError: A checkpoint has left them without something.
        """
        for optimizer in self.trainer.optimizers:
            refuse_incomplete(optimizer)

    def _accept(
        self, saved: dict[str, Any], current: dict[str, Any], checkpoint: Mapping[str, Any]
    ) -> None:
        """Accept that a run ends sooner, though not before the step that it has reached.

        Args:
            saved: Settings in the checkpoint; those whose change is accepted are set to the new.
            current: Settings of this run.
            checkpoint: The checkpoint.
        """
        step, before = checkpoint["global_step"], saved.get("max_steps", -1)
        if asked := asked_before(self.shortened, current["max_steps"]):
            end_at(self.trainer, asked["max_steps"])
            current["max_steps"] = asked["max_steps"]
            rank_zero_info(
                f"This run was told to settle at step {asked['settled_at']}: it ends at step "
                f"{asked['max_steps']}."
            )
        if not step <= (now := current["max_steps"]) < before:
            return
        saved["max_steps"] = now
        self.shortened.append({"at_step": step, "max_steps_before": before, "max_steps": now})
        rank_zero_warn(
            f"`trainer.max_steps` was {before} and is {now} from step {step} on: schedules end "
            "sooner, masks settle sooner. The model card says so."
        )

    def refuse_incomplete(self, state: Mapping[str, Tensor]) -> None:
        """Refuse a checkpoint that lacks weights that are, or were, trained: loading is not strict,
        since frozen weights may be missing.

        Args:
            state: Weights by name.

        Raises:
            ValueError: One is missing or has another shape.
        """
        own: dict[str, Tensor] = dict(self.named_buffers(recurse=False))
        own |= {name: p for name, p in self.named_parameters() if p.requires_grad}
        for name, tensor in own.items():
            shape = tuple(getattr(tensor, "ds_shape", tensor.shape))  # DeepSpeed: full shape
            if name not in state:
                raise ValueError(
                    f"The checkpoint lacks the weights {name}; give another `ckpt_path`."
                )
            if tuple(state[name].shape) != shape:
                raise ValueError(
                    f"The checkpoint has {name} in shape {tuple(state[name].shape)} instead of "
                    f"{shape}; give another `ckpt_path`."
                )

    def check_strategy(self) -> None:
        """Refuse, before anything is read, a strategy that is not supported.

        Raises:
            ValueError: It is Lightning's own, for several devices, and not DDP.
        """
        strategy = self.trainer.strategy  # by exact class: many others are subclasses of DDP
        known = isinstance(strategy, SingleDeviceStrategy | ReadsModels)
        if not known and type(strategy) is not DDPStrategy:
            raise ValueError(
                f"`trainer.strategy` {type(strategy).__name__} would wrap and save models in ways "
                "that masks, checkpoints and exports here do not support. Use ddp if a model fits "
                "on every device; otherwise Zero instead of deepspeed, or ShardedDDP instead of "
                "FSDP (docs/sharding.md)."
            )

    def check_data(self, config: Any) -> None:
        """Check that the text suits a model before the model is made.

        Raises:
            ValueError: Its windows are too long, or its tokenizer has tokens that the model lacks.
        """
        data = getattr(self.trainer, "datamodule", None)
        if data is not None:
            check_window(data.window_tokens, config)
            check_vocabulary(data, config)

    def stop_diverged(self, what: str, value: Tensor) -> NoReturn:
        """End a run whose loss is infinite or NaN, before the optimiser takes the step.

        Raises:
            FloatingPointError: Always; names the step, the cause and the last good checkpoint.
        """
        saved = getattr(self.trainer.checkpoint_callback, "last_model_path", "") or "none was saved"
        raise FloatingPointError(
            f"At step {self.global_step} {what} became {float(value.detach())}. Training stopped "
            f"before the step was taken; last good checkpoint: {saved}. Start again with a lower "
            "learning rate, or with `--model.dtype float32` if the weights are half precision."
        )

    def _length(self) -> dict[str, Any]:
        """Length of training, on which schedules depend, and the size of a step."""
        trainer = self.trainer
        data = getattr(trainer, "datamodule", None)
        windows = getattr(data, "batch_size", 1) * trainer.accumulate_grad_batches
        algorithm = trainer.gradient_clip_algorithm
        return {
            "max_steps": trainer.max_steps,
            "max_epochs": trainer.max_epochs,
            "gradient_clip": [trainer.gradient_clip_val, algorithm and str(algorithm.value)],
            "ranks": trainer.world_size,
            "windows_per_step": windows * trainer.world_size,
        }

    def _predictions(self, batch: dict[str, Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """Logits in fp32 and the tokens that they predict, of those that count, window by window:
        shapes (N, V) and (N,).
        """
        input_BT = batch["input_ids"]
        mask_BT = batch.get("loss_mask", torch.ones_like(input_BT, dtype=torch.bool))
        with self.measured() as model:
            logits_BTV = model(input_ids=input_BT, use_cache=False).logits
        for logits_TV, input_T, mask_T in zip(logits_BTV, input_BT, mask_BT, strict=True):
            yield logits_TV[:-1][mask_T[1:]].float(), input_T[1:][mask_T[1:]]

    def _log_perplexity(self, name: str) -> None:
        self.log(name, self.perplexity.compute(), prog_bar=True, sync_dist=True)


def _count_batches(checkpoint: dict[str, Any], before: int, now: int) -> None:
    """Correct Lightning's count of batches in the epoch: the checkpoint counts batches of steps of
    `before` batches each, and steps now have `now` batches.
    """
    progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]["current"]
    more = progress["ready"] * now // before - progress["ready"]
    for key in progress:  # the last batch may not be finished yet
        progress[key] += more
