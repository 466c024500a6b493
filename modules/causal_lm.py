"""Train a language model the ordinary way: from scratch, or further from a checkpoint.

Further training is fine-tuning, or recovery after pruning: callbacks remove blocks, widths or
weights, and the pruned model is trained on text, on the predictions of the dense model
(distillation, arXiv 1503.02531, at temperature 1), or on both; all weights train, or low-rank
updates.

The file is long because one LightningModule has all hooks of a run, and callbacks call it.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from secateur.modules.architecture import make_config
from secateur.modules.language_modelling import LanguageModelling
from secateur.modules.optimizers import decay_groups, describe_optimizer, made_optimizer
from secateur.modules.rate_schedule import RateSchedule
from secateur.modules.recompute import recompute
from secateur.modules.removal import check_undivided, let_go
from secateur.modules.teacher import Teacher, predicted_tokens, predicting_states
from secateur.pruning.chains import Step
from secateur.pruning.depth import Unit, remove_blocks
from secateur.pruning.depth.compensation import Compensation, untie
from secateur.pruning.depth.remaining import Depth, lacking_parts
from secateur.pruning.export.cut import cut
from secateur.pruning.export.deliver import check_folder, deliver
from secateur.pruning.export.ranks import AllRanks, OneRank
from secateur.pruning.export.sources import FromFiles, FromModel, FromShares, Source
from secateur.pruning.export.stages import Origin, write_mark
from secateur.pruning.files.base_model import BaseModel
from secateur.pruning.files.finish import finish
from secateur.pruning.files.model_folder import replaced_folder
from secateur.pruning.lora import LoRA, merged
from secateur.pruning.losses import LossWeights, head_of, token_losses
from secateur.pruning.modes import evaluation
from secateur.pruning.plan import Plan


def _adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)


class CausalLM(LanguageModelling):
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
        super().__init__()
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
        self._base = None if base is None else BaseModel(base, "base", trust_remote_code)
        other = None if teacher is None else BaseModel(teacher, "teacher")
        for model in (self._base, other):
            if model is not None:
                model.check()
        self.architecture, self.base, self.dtype_name = architecture, base, dtype
        self.warmup_steps, self.loss_chunk_tokens = warmup_steps, loss_chunk_tokens
        self.loss, self.lora, self.schedule = loss, lora, schedule
        self.export_dtype, self.gradient_checkpointing = export_dtype, gradient_checkpointing
        self.divisible = base is not None  # only a model read from files can be sharded
        self.strict_loading = lora is None  # the frozen weights are not in the checkpoint
        self._depth = Depth()
        self._cuts: list[Plan] = []
        self.provenance: dict[str, Any] = {}
        self._make_optimizer = optimizer
        taught_by = other or self._base
        self._teacher = Teacher(taught_by) if loss.distillation and taught_by else None

    def configure_model(self) -> None:
        """Make or read the model, and the teacher; called once, on every rank."""
        if self.model is not None:
            return
        if self.base is not None:
            self.model = self.read_model(self.base_model, self.dtype_name)
        else:
            self.model = AutoModelForCausalLM.from_config(self._config)
        self._depth = Depth(self.model.config.num_hidden_layers, lacking_parts(self.model))
        self._cuts, self.provenance = [], {}
        self._prepare()
        if self._teacher is not None and self._teacher.model is None:
            self._teacher.load(self)

    def _prepare(self) -> None:
        """Prepare the model for training: low-rank updates, recomputation, training mode."""
        if self.lora is not None:
            self.lora.inject(self.model)
        if self.gradient_checkpointing:
            recompute(self.model)
        self.model.train()

    @property
    def bases(self) -> list[BaseModel]:
        """The base model and the teacher, those that there are."""
        teacher = self._teacher.base if self._teacher else None
        return [base for base in (self._base, teacher) if base is not None]

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

    @contextmanager
    def plain(self) -> Iterator[PreTrainedModel]:
        """The model as it would be exported now: in evaluation mode, low-rank updates merged.

        At the end the model is restored exactly.
        """
        with evaluation(self.model), merged(self.model):
            yield self.model

    @property
    def kept_blocks(self) -> list[int]:
        """Numbers, in the base model, of the blocks that are not entirely removed."""
        return self._depth.kept_blocks

    @property
    def removed_units(self) -> list[Unit]:
        """Removed units of the base model, in order."""
        return self._depth.removed

    def check_removals(self, strategy: Strategy) -> None:
        """Check before training that blocks can be removed under a strategy.

        Raises:
            ValueError: It shards weights or optimiser states.
        """
        check_undivided(strategy)

    def check_compensation(self) -> None:
        """Refuse to change weights that low-rank updates keep frozen.

        Raises:
            ValueError: `lora` is given.
        """
        if self.lora is not None:
            raise ValueError(
                "`compensation` changes weights that `lora` keeps frozen; leave out one of the "
                "two, or prune with `--trainer.max_steps 0` first, and train the result."
            )

    def remove_units(
        self,
        units: Sequence[Unit],
        provenance: Mapping[str, Any],
        compensation: Compensation | None = None,
    ) -> None:
        """Remove blocks from the model, the optimiser and its state; the teacher keeps them.

        Args:
            units: Blocks or halves of blocks, by their numbers in the base model.
            provenance: How they were chosen, for the model card: JSON values only.
            compensation: Changes the remaining weights to make up for the units, if that helps.

        Raises:
            ValueError: A unit does not exist or is already removed, no block or attention would
                remain, the model is sharded, or the compensation does not suit it.
        """
        if self._cuts:
            raise ValueError(
                "Blocks are removed after widths were cut in the same run. Put PruneBlocks, with "
                "`removals` AtOnce, before PruneWidths, or prune the exported model in a run of "
                "its own."
            )
        places, strategy = self._depth.places(units), self.trainer.strategy
        check_undivided(strategy)
        if compensation is None:
            remove_blocks(self.model, places, provenance)
        else:
            provenance = self._remove_compensated(places, provenance, compensation)
        self._depth.note(units, provenance)
        let_go(strategy, self)

    def _remove_compensated(
        self, places: Sequence[Unit], provenance: Mapping[str, Any], compensation: Compensation
    ) -> Mapping[str, Any]:
        """Remove and compensate blocks; return the provenance, with what was applied."""
        found = compensation.remove(self.model, places, provenance)
        rank_zero_info(
            f"Perplexity of the windows held back without the blocks {found.without:.2f}, "
            f"compensated {found.compensated:.2f}: {'kept' if found.kept else 'left out'}."
        )
        if found.kept:
            self.record("compensation", self.provenance.get("compensation", {}) | found.facts)
        return dict(provenance) | found.provenance

    def adopt(self, narrow: PreTrainedModel, plan: Plan) -> None:
        """Train a narrow model instead of the present one; low-rank updates start at zero.

        Args:
            narrow: The live model with its updates merged (`plain`), cut by the plan.
            plan: The kept indices of the live model.

        Raises:
            ValueError: Halves of blocks were removed, or the model is sharded.
        """
        check_undivided(self.trainer.strategy)
        if self._depth.leaves_halves:
            raise ValueError(
                "Widths are cut after halves of blocks were removed in the same run. Export first, "
                "and prune the exported model in a separate run."
            )
        self._cuts.append(plan)
        self.model = narrow.to(self.device)  # type: ignore[arg-type]
        self.model.requires_grad_(True)
        with self._seeded(-1):  # the updates are drawn; ranks take those of rank 0
            self._prepare()
        let_go(self.trainer.strategy, self)

    def record(self, method: str, provenance: Mapping[str, Any]) -> None:
        """Record that a callback has changed weights, for the model card.

        Args:
            method: Its name there, such as `weights`.
            provenance: How they were changed: JSON values only.
        """
        self.provenance[method] = dict(provenance)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Store which blocks remain; with low-rank updates, store only the updates.

        Frozen weights that a callback has changed are stored as well.
        """
        super().on_save_checkpoint(checkpoint)
        removals = self._depth.removals
        checkpoint["pruning"] = {
            "removals": removals,
            "cuts": [plan.state() for plan in self._cuts],
            "provenance": self.provenance,
        }
        if self.lora is not None and not self.provenance:
            trained = {name for name, p in self.named_parameters() if p.requires_grad}
            state = checkpoint["state_dict"]
            checkpoint["state_dict"] = {name: state[name] for name in sorted(trained)}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of other settings, and repeat its removals and cuts.

        The weights are loaded and the optimiser is made after this.

        Raises:
            ValueError: The settings differ, or this checkpoint or the following ones would lack
                weights.
        """
        super().on_load_checkpoint(checkpoint)
        saved = checkpoint["pruning"]["removals"]
        if self._cuts or (done := self._depth.removals) != saved[: len(done)]:  # of an earlier fit
            self.model = None
            self.configure_model()
        for removal in saved[len(self._depth.removals) :]:
            units = [Unit.of_key(key) for key in removal["units"]]
            self.remove_units(units, removal["provenance"])
        for state in checkpoint["pruning"]["cuts"]:
            plan = Plan.from_state(state)
            with self.plain() as model:
                narrow = cut(model, plan)
            self.adopt(narrow, plan)
        self.provenance = checkpoint["pruning"]["provenance"]
        if self.lora is not None and self.provenance and self._reader is not None:
            raise ValueError(
                "The checkpoint has frozen weights that a callback has changed, and checkpoints "
                f"under `trainer.strategy` {type(self.trainer.strategy).__name__} leave out frozen "
                "weights. Resume under ddp; or export under ddp, and give that folder as `base`."
            )
        if "factors" in self.provenance.get("compensation", {}):  # embeddings scaled, head not
            untie(self.model)
        self.refuse_incomplete(checkpoint["state_dict"])

    def check_export_folder(self, folder: Path) -> None:
        """Refuse, before training, a folder that the export must not replace."""
        check_folder(folder, None if self.base is None else self.base_folder)

    def export(self, folder: Path, command: str) -> None:
        """Save model and tokenizer, compare and measure the result, see `deliver`.

        A model trained from scratch is only saved: there is no dense model to compare it with.
        """
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        if self.base is None:
            if self.trainer.is_global_zero:
                with replaced_folder(folder) as partial:
                    self.model.save_pretrained(partial)
                    data.tokenizer.save_pretrained(partial)
                    finish(partial)
                    write_mark(partial, Origin("", partial, "", command, self.global_step), None)
            return
        windows_NT = torch.stack([data.validation_set[n] for n in range(len(data.validation_set))])
        dtype, origin = self.base_model.dtype_of(self.export_dtype), self._origin(command)
        strategy: Any = self.trainer.strategy
        if self.divided:
            whole, share = strategy.whole, strategy.share
            what: Source = FromShares(self.model, whole, share, data.tokenizer, dtype)
            every = AllRanks(strategy.root_device)
            deliver(what, origin, folder, windows_NT, every, measured=True)
        elif self.trainer.is_global_zero:
            dense, plan = self._dense(), self._plan()
            one = OneRank(self.base_folder, strategy.root_device)
            with self.plain() as model:
                if plan is not None and self._only_shortened():
                    what = FromFiles(plan, dense)
                else:
                    what = FromModel(model, data.tokenizer, dtype, dense, plan)
                deliver(what, origin, folder, windows_NT, one, measured=True)

    def _plan(self) -> Plan | None:
        """The kept indices of the base model; None if nothing was removed."""
        plans = list(self._cuts)
        if self._depth.removals:
            plans.insert(0, self._depth.plan(self.base_model))
        return reduce(Plan.then, plans) if plans else None

    def _only_shortened(self) -> bool:
        """Test whether the export equals the base model's files without some blocks."""
        trained = self.global_step or self.provenance or self.export_dtype != "auto"
        return bool(self._depth.removals) and not trained

    def _origin(self, command: str) -> Origin:
        assert self.base is not None
        provenance = dict(self.provenance)
        if removals := self._depth.removals:
            depth = {"kept_blocks": self.kept_blocks, "removals": removals}
            provenance = {"depth": depth} | provenance
        training: dict[str, Any] = {}
        if self.global_step:
            given = ("loss", "lora", "warmup_steps", "schedule", "optimizer")
            recipe = self.recipe()
            training = {name: recipe[name] for name in given}
            training["teacher"] = self._teacher and str(self._teacher.name)
            training["tokens"] = self.tokens_seen
        if self.shortened:
            training["shortened"] = self.shortened
        steps = self.global_step
        return Origin(
            self.base, self.base_folder, self.base_fingerprint, command, steps, provenance, training
        )

    def _dense(self) -> PreTrainedModel:
        """The original base model, on the device of this rank."""
        dense = self._teacher.model if self._teacher and self._teacher.name == self.base else None
        if dense is None:
            dense = self.base_model.load(self.dtype_name)
        dense.to(self.trainer.strategy.root_device)  # type: ignore[arg-type]
        dense.eval()
        return dense

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

    @contextmanager
    def _seeded(self, batch_idx: int) -> Iterator[None]:
        """Dropout as a pure function of seed, step, batch and rank: a resumed run repeats it."""
        seed = os.environ.get("PL_GLOBAL_SEED", "0")  # set by `seed_everything`
        place = f"{seed} {self.global_step} {batch_idx} {self.global_rank}"
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(random.Random(place).getrandbits(63))
            yield
