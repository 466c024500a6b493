"""Sources of an export: files of the base model, changed and streamed, or a live model.

Files are changed tensor by tensor, see `secateur.pruning.files.tensors`: cut by a plan, without
some blocks, or with new weights.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from secateur.pruning.depth.removal import PROVENANCE
from secateur.pruning.export.configuration import exported_config, own_code, stock_fields
from secateur.pruning.export.exact import prove_cut, prove_files, prove_saved, prove_shares
from secateur.pruning.export.gathered_weights import (
    Whole,
    num_parameters,
    updated_sums,
    write_gathered,
)
from secateur.pruning.export.slices import cut_tensors
from secateur.pruning.export.stages import Origin
from secateur.pruning.export.streamed import verify_recorded, verify_streamed
from secateur.pruning.export.verify import record, verify_export, verify_saved
from secateur.pruning.files.base_model import BaseModel
from secateur.pruning.files.finish import finish
from secateur.pruning.files.headers import read_tensor
from secateur.pruning.files.model_folder import (
    BLOCKS,
    CONFIG,
    MASKS,
    SHARD_BYTES,
    in_block,
    read_json,
    write_json,
)
from secateur.pruning.files.shares import Share
from secateur.pruning.files.tensors import Made, by_file, packed, write_tensors
from secateur.pruning.modelling import is_narrow
from secateur.pruning.modes import evaluation
from secateur.pruning.plan import IN_MODEL, Plan
from secateur.pruning.weights.masks import WeightMasks
from secateur.pruning.weights.store import BlockStore

Proof = Callable[[Path], object]
"""A function that raises ExportError unless the model in a folder equals the source."""


class Source(ABC):
    """The model that `deliver` writes and verifies."""

    plan: Plan | None
    """The kept indices of the base model; None if no width was cut."""
    dense: PreTrainedModel | None = None
    """The live base model, to measure beside; None if it is sharded, or nothing is measured."""
    proven = """\
Before this folder was published, its logits were compared with those of the model that it was
made from, on complete windows and in a cached decode."""
    """What was verified, a sentence for the model card."""

    def ready(self) -> AbstractContextManager[None]:
        """Prepare the live model for export, and restore it at the end."""
        return nullcontext()

    @abstractmethod
    def proof(self, origin: Origin, windows_BT: Tensor, device: torch.device) -> Proof:
        """Prepare the verification of the export; called on every rank before anything is written.

        Args:
            origin: Where the model came from.
            windows_BT: Token ids that this rank compares models on, at least 2 per window.
            device: Device of this rank.
        """

    @abstractmethod
    def write(self, folder: Path | None, origin: Origin) -> None:
        """Write weights, configuration and tokenizer.

        Args:
            folder: An empty folder; None on a rank that writes nothing.
            origin: Where the model came from.
        """


_TO_THE_BIT = """\
Before this folder was published, its weights and its configuration were compared, bit by bit, with
those that should come of the files of the base model. No model was run."""


@dataclass(frozen=True)
class Cut(Source):
    """The files of the base model, cut by a plan; the export is proven from the files alone.

    Args:
        plan: The kept indices.
        max_shard_bytes: Largest weight file in bytes, 1 or more.
    """

    plan: Plan
    max_shard_bytes: int = field(default=SHARD_BYTES, kw_only=True)
    proven = _TO_THE_BIT

    def proof(self, origin: Origin, windows_BT: Tensor, device: torch.device) -> Proof:
        return lambda folder: prove_cut(origin.base_model, self.plan, folder)

    def write(self, folder: Path | None, origin: Origin) -> None:
        if folder is None:
            return
        base, plan = origin.base_model, self.plan
        if base.fingerprint != plan.base:
            raise ValueError(
                f"The plan was made for the base model with fingerprint {plan.base[:16]}..., and "
                f"{base.folder} has {base.fingerprint[:16]}...; give the base model that the plan "
                "was made for."
            )
        plan.verify(base.config)
        tensors = (made for _, made in cut_tensors(base, plan))
        files = packed(tensors, self.max_shard_bytes)
        _write_changed(base, files, exported_config(base, plan), folder)
        plan.save(folder / IN_MODEL)


@dataclass(frozen=True)
class FromFiles(Cut):
    """The files of the base model, cut by a plan; the export also computes what the plan says.

    Args:
        plan: The kept indices.
        dense: The live base model, with no gates applied, to compare with; None streams it from its
            files, layer by layer.
    """

    dense: PreTrainedModel | None = None
    proven = Source.proven

    def proof(self, origin: Origin, windows_BT: Tensor, device: torch.device) -> Proof:
        to_the_bit, dense, plan = super().proof(origin, windows_BT, device), self.dense, self.plan

        def prove(folder: Path) -> None:
            to_the_bit(folder)
            if dense is None:
                verify_streamed(origin.folder, plan, folder, windows_BT, device)
            else:
                verify_export(dense, plan, folder, windows_BT)

        return prove


@dataclass(frozen=True)
class WithoutBlocks(Cut):
    """The files of the base model without some blocks; they are as many, and keep their order.

    Args:
        plan: The kept indices: all, except of the removed blocks.
        record: Remaining blocks and removals, for config.json and `blocks.json`; JSON values.
    """

    record: Mapping[str, Any]

    def write(self, folder: Path | None, origin: Origin) -> None:
        assert folder is not None
        base = origin.base_model
        settings = exported_config(base, self.plan) | {PROVENANCE: self.record}
        _write_changed(base, by_file(cut_tensors(base, self.plan)), settings, folder)
        self.plan.save(folder / IN_MODEL)
        write_json(folder / BLOCKS, self.record)


@dataclass(frozen=True)
class NewWeights(Source):
    """The files of the base model with the weights of finished blocks; their masks lie beside them.

    Args:
        store: The finished blocks.
        masks: The kept weights, by the names of the changed tensors.
        progress: Called with the numbers of files written and of all files.
    """

    store: BlockStore
    masks: WeightMasks
    progress: Callable[[int, int], None] | None = None
    plan = None
    proven = _TO_THE_BIT

    def proof(self, origin: Origin, windows_BT: Tensor, device: torch.device) -> Proof:
        base = origin.base_model
        expected = {made.name: made.make for _, made in self._tensors(base)}
        return lambda folder: prove_files(expected, base.settings, folder)

    def write(self, folder: Path | None, origin: Origin) -> None:
        assert folder is not None
        base = origin.base_model
        _write_changed(base, by_file(self._tensors(base)), base.settings, folder, self.progress)
        self.masks.save(folder / MASKS)

    def _tensors(self, base: BaseModel) -> Iterator[tuple[Path, Made]]:
        def make(path: Path, name: str) -> Callable[[], Tensor]:
            if name not in self.masks:
                return lambda: read_tensor(path, name)
            block, relative = in_block(base.family, name)
            dtype = read_tensor(path, name).dtype
            return lambda: self.store.weight(block, relative).to(dtype)

        for name, path in base.tensors.items():
            header = base.headers[name]
            yield path, Made(name, header.dtype, header.shape, make(path, name))


@dataclass(frozen=True)
class FromModel(Source):
    """A live model that is not sharded.

    Args:
        model: The model, without low-rank updates.
        tokenizer: The tokenizer of the text.
        dtype: Type of the saved weights.
        dense: The live base model.
        plan: The kept indices of the base model; None if the live model is a stock one.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    dtype: torch.dtype
    dense: PreTrainedModel | None = None
    plan: Plan | None = None

    def ready(self) -> AbstractContextManager[None]:
        return rounded(self.model, self.dtype)

    def proof(self, origin: Origin, windows_BT: Tensor, device: torch.device) -> Proof:
        def prove(folder: Path) -> None:
            prove_saved(self.model, folder)
            verify_saved(self.model, folder, windows_BT)

        return prove

    def write(self, folder: Path | None, origin: Origin) -> None:
        assert folder is not None
        self.model.save_pretrained(folder, max_shard_size=SHARD_BYTES)
        _complete(folder, origin, self.tokenizer, self.plan)


@dataclass(frozen=True)
class FromShares(Source):
    """A sharded live model; tensors are gathered one by one.

    Args:
        model: The model, low-rank updates included.
        whole: Gathers parameters.
        share: Finds this rank's share of a parameter.
        tokenizer: The tokenizer of the text.
        dtype: Type of the weights that are saved.
    """

    model: PreTrainedModel
    whole: Whole
    share: Share
    tokenizer: PreTrainedTokenizerBase
    dtype: torch.dtype
    plan = None

    def ready(self) -> AbstractContextManager[None]:
        return evaluation(self.model)

    def proof(self, origin: Origin, windows_BT: Tensor, device: torch.device) -> Proof:
        # Recorded now, while all ranks compute together: if a rank finds a difference later, no
        # other rank waits for it.
        recorded = record(self.model, windows_BT.to(device))
        sums = updated_sums(self.model, self.whole, self.dtype)

        def prove(folder: Path) -> None:
            prove_shares(self.model, self.share, sums, self.dtype, folder)
            parameters = num_parameters(self.model)
            verify_recorded(recorded, parameters, self.model.dtype, folder, device)

        return prove

    def write(self, folder: Path | None, origin: Origin) -> None:
        write_gathered(self.model, folder, self.dtype, self.whole)
        if folder is not None:
            _complete(folder, origin, self.tokenizer, None)


def _write_changed(
    base: BaseModel,
    files: Sequence[Sequence[Made]],
    settings: Mapping[str, Any],
    folder: Path,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write a model folder whose tensors are made of those of the base model."""
    write_tensors(files, folder, progress)
    write_json(folder / CONFIG, settings)
    finish(folder, base.folder)


def _complete(
    folder: Path, origin: Origin, tokenizer: PreTrainedTokenizerBase, plan: Plan | None
) -> None:
    """Add the other files of a model folder to weights and configuration."""
    tokenizer.save_pretrained(folder)
    if plan is not None:
        config, written = origin.base_model.config, read_json(folder / CONFIG)
        if stock_fields(config, plan) is None:
            # A stock model with halves of blocks removed does not tell so itself.
            telling = written if is_narrow(written["model_type"]) else {}
            write_json(folder / CONFIG, written | own_code(config, plan) | telling)
        plan.save(folder / IN_MODEL)
    finish(folder, origin.folder)


@contextmanager
def rounded(model: PreTrainedModel, dtype: torch.dtype) -> Iterator[None]:
    """Convert all weights of a model to a type; restore them at the end."""
    before = {p: p.data for p in model.parameters() if p.dtype != dtype}
    try:
        for parameter in before:
            parameter.grad, parameter.data = None, parameter.data.to(dtype)
        yield
    finally:
        for parameter, data in before.items():
            parameter.data = data
