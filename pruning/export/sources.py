"""Sources of an export: files cut by a plan, or a live model, sharded or not."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from secateur.pruning.export.exact import prove_cut, prove_saved
from secateur.pruning.export.gathered_weights import Whole, num_parameters, write_gathered
from secateur.pruning.export.rewrite import own_code, write_pruned
from secateur.pruning.export.stages import Origin
from secateur.pruning.export.streamed import verify_recorded, verify_streamed
from secateur.pruning.export.verify import record, verify_export, verify_saved
from secateur.pruning.files.base_model import BaseModel
from secateur.pruning.files.finish import finish
from secateur.pruning.files.model_folder import CONFIG, SHARD_BYTES, read_json, write_json
from secateur.pruning.plan import IN_MODEL, Plan

Proof = Callable[[Path], object]
"""A function that raises ExportError unless the model in a folder equals the source."""


class Source(ABC):
    """The model that `deliver` writes and verifies."""

    plan: Plan | None
    """The kept indices of the base model; None if no width was cut."""
    dense: PreTrainedModel | None
    """The live base model, to measure beside; None if it is sharded."""

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


@dataclass(frozen=True)
class FromFiles(Source):
    """The files of the base model, cut by a plan; they are streamed and keep their type.

    Args:
        plan: The kept indices.
        dense: The live base model, with no gates applied, to compare with; None streams it from its
            files, layer by layer.
    """

    plan: Plan
    dense: PreTrainedModel | None = None

    def proof(self, origin: Origin, windows_BT: Tensor, device: torch.device) -> Proof:
        base, dense, plan = BaseModel(origin.folder), self.dense, self.plan

        def prove(folder: Path) -> None:
            prove_cut(base, plan, folder)
            if dense is None:
                verify_streamed(base.folder, plan, folder, windows_BT, device)
            else:
                verify_export(dense, plan, folder, windows_BT)

        return prove

    def write(self, folder: Path | None, origin: Origin) -> None:
        if folder is not None:
            write_pruned(origin.folder, self.plan, folder)


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
        tokenizer: The tokenizer of the text.
        dtype: Type of the weights that are saved.
    """

    model: PreTrainedModel
    whole: Whole
    tokenizer: PreTrainedTokenizerBase
    dtype: torch.dtype
    plan = dense = None

    @contextmanager
    def ready(self) -> Iterator[None]:
        training = self.model.training
        self.model.eval()
        try:
            yield
        finally:
            self.model.train(training)

    def proof(self, origin: Origin, windows_BT: Tensor, device: torch.device) -> Proof:
        # Recorded now, while all ranks compute together: if a rank finds a difference later, no
        # other rank waits for it.
        recorded = record(self.model, windows_BT.to(device))
        parameters, dtype = num_parameters(self.model), self.model.dtype
        return lambda folder: verify_recorded(recorded, parameters, dtype, folder, device)

    def write(self, folder: Path | None, origin: Origin) -> None:
        write_gathered(self.model, folder, self.dtype, self.whole)
        if folder is not None:
            _complete(folder, origin, self.tokenizer, None)


def _complete(
    folder: Path, origin: Origin, tokenizer: PreTrainedTokenizerBase, plan: Plan | None
) -> None:
    """Add the other files of a model folder to weights and configuration."""
    tokenizer.save_pretrained(folder)
    if plan is not None:
        if plan.stock_mlp_width() is None:
            write_json(folder / CONFIG, read_json(folder / CONFIG) | own_code(plan))
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
