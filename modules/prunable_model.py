"""A language model that callbacks prune while its weights train.

Removed blocks and cut widths are kept in checkpoints, from which a resumed run repeats them, and
make up the plan of the export.
"""

from __future__ import annotations

import os
import random
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.utilities import rank_zero_info
from transformers import PreTrainedModel

from secateur.modules.language_modelling import LanguageModelling
from secateur.modules.recompute import recompute
from secateur.modules.removal import check_undivided, let_go
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
from secateur.pruning.modes import evaluation
from secateur.pruning.plan import Plan


class PrunableModel(LanguageModelling):
    """A language model whose weights train, and that callbacks may prune meanwhile.

    Args:
        base: The model that training starts from; None if it starts from random weights.
        lora: Low-rank updates that train instead of all weights.
        dtype: Type of the weights of `base`: "auto" or a torch name.
        export_dtype: Type of the exported weights; "auto" is the type of the files of `base`.
        gradient_checkpointing: Recompute activations in the backward pass.
    """

    def __init__(
        self,
        base: BaseModel | None,
        lora: LoRA | None,
        dtype: str,
        export_dtype: str,
        gradient_checkpointing: bool,
    ) -> None:
        super().__init__(base)
        self.lora, self.dtype_name, self.export_dtype = lora, dtype, export_dtype
        self.gradient_checkpointing = gradient_checkpointing
        self.divisible = base is not None  # only a model read from files can be sharded
        self.strict_loading = lora is None  # the frozen weights are not in the checkpoint
        self._depth = Depth()
        self._cuts: list[Plan] = []
        self.provenance: dict[str, Any] = {}

    @abstractmethod
    def training_facts(self) -> dict[str, Any]:
        """How weights were trained, for the model card: JSON values only."""

    def _begin(self, model: PreTrainedModel) -> None:
        """Train a model of which nothing is removed yet."""
        self.model = model
        self._depth = Depth(model.config.num_hidden_layers, lacking_parts(model))
        self._cuts, self.provenance = [], {}
        self._prepare()

    def _prepare(self) -> None:
        """Prepare the model for training: low-rank updates, recomputation, training mode."""
        if self.lora is not None:
            self.lora.inject(self.model)
        if self.gradient_checkpointing:
            recompute(self.model)
        self.model.train()

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
        provenance = dict(self.provenance)
        if removals := self._depth.removals:
            depth = {"kept_blocks": self.kept_blocks, "removals": removals}
            provenance = {"depth": depth} | provenance
        training: dict[str, Any] = {}
        if self.global_step:
            training = self.training_facts() | {"tokens": self.tokens_seen}
        if self.shortened:
            training["shortened"] = self.shortened
        return Origin(
            str(self.base_model.name),
            self.base_folder,
            self.base_fingerprint,
            command,
            self.global_step,
            provenance,
            training,
        )

    def _dense(self) -> PreTrainedModel:
        """The original base model, on the device of this rank."""
        dense = self._read_base()
        dense.to(self.trainer.strategy.root_device)  # type: ignore[arg-type]
        dense.eval()
        return dense

    def _read_base(self) -> PreTrainedModel:
        """The original base model, read from its files."""
        return self.base_model.load(self.dtype_name)

    @contextmanager
    def _seeded(self, batch_idx: int) -> Iterator[None]:
        """Dropout as a pure function of seed, step, batch and rank: a resumed run repeats it."""
        seed = os.environ.get("PL_GLOBAL_SEED", "0")  # set by `seed_everything`
        place = f"{seed} {self.global_step} {batch_idx} {self.global_rank}"
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(random.Random(place).getrandbits(63))
            yield
