"""What is exported: files that a plan cuts, or a live model, whole or in shares."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from secateur.pruning.export.gathered_weights import Whole, num_parameters, write_gathered
from secateur.pruning.export.rewrite import own_code, write_pruned
from secateur.pruning.export.stages import Origin
from secateur.pruning.export.streamed import verify_recorded, verify_streamed
from secateur.pruning.export.verify import record, verify_export, verify_saved
from secateur.pruning.files.model_folder import (
    CONFIG,
    SHARD_BYTES,
    copy_companions,
    read_json,
    write_code,
    write_json,
)
from secateur.pruning.plan import IN_MODEL, Plan

Proof = Callable[[Path], object]
"""Raises ExportError unless the model in a folder is the one that was to be exported."""


class Source(ABC):
    """What `deliver` writes and proves."""

    plan: Plan | None
    """What stays of the base model; None where the blocks are as they were, or a stock model."""
    dense: PreTrainedModel | None
    """The live base model, to measure beside; None where ranks divide it."""

    def ready(self) -> AbstractContextManager[None]:
        """Hold the live model as it is to be exported, and put it back at the end."""
        return nullcontext()

    @abstractmethod
    def proof(self, origin: Origin, windows_BT: Tensor, device: torch.device) -> Proof:
        """Prepare the proof of the export; called before anything is written, on every rank.

        Args:
            origin: Where the model came from.
            windows_BT: Token ids that this rank compares models on, at least 2 per window.
            device: Where this rank computes.
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
    """The files of the base model, cut by a plan: they are streamed and keep their type.

    Args:
        plan: What stays.
        dense: The live base model, with no gates applied, to compare with; None streams it from its
            files, layer by layer.
    """

    plan: Plan
    dense: PreTrainedModel | None = None

    def proof(self, origin: Origin, windows_BT: Tensor, device: torch.device) -> Proof:
        if self.dense is not None:
            dense = self.dense
            return lambda folder: verify_export(dense, self.plan, folder, windows_BT)
        base, plan = origin.folder, self.plan
        return lambda folder: verify_streamed(base, plan, folder, windows_BT, device)

    def write(self, folder: Path | None, origin: Origin) -> None:
        if folder is not None:
            write_pruned(origin.folder, self.plan, folder)


@dataclass(frozen=True)
class FromModel(Source):
    """A live model that this process holds whole.

    Args:
        model: The model, without low-rank updates.
        tokenizer: The tokenizer of the text.
        dtype: Type of the weights that are saved.
        dense: The live base model.
        plan: What stays of each block of the base model; None if the live model is a stock one.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    dtype: torch.dtype
    dense: PreTrainedModel | None = None
    plan: Plan | None = None

    def ready(self) -> AbstractContextManager[None]:
        return rounded(self.model, self.dtype)

    def proof(self, origin: Origin, windows_BT: Tensor, device: torch.device) -> Proof:
        return lambda folder: verify_saved(self.model, folder, windows_BT)

    def write(self, folder: Path | None, origin: Origin) -> None:
        assert folder is not None
        self.model.save_pretrained(folder, max_shard_size=SHARD_BYTES)
        _complete(folder, origin, self.tokenizer, self.plan)


@dataclass(frozen=True)
class FromShares(Source):
    """A live model that lies in shares on the ranks; tensors are gathered one by one.

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
        # Recorded now, as the ranks compute together: a rank that finds a difference later leaves
        # no other waiting.
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
    """Add to weights and configuration what else belongs into a model folder."""
    tokenizer.save_pretrained(folder)
    if plan is not None:
        if plan.stock_mlp_width() is None:
            write_json(folder / CONFIG, read_json(folder / CONFIG) | own_code(plan))
        plan.save(folder / IN_MODEL)
    write_code(folder)
    copy_companions(origin.folder, folder)  # those of the base, if it has any


@contextmanager
def rounded(model: PreTrainedModel, dtype: torch.dtype) -> Iterator[None]:
    """Hold all weights of a model in a type; they are what they were at the end."""
    before = {p: p.data for p in model.parameters() if p.dtype != dtype}
    try:
        for parameter in before:
            parameter.grad, parameter.data = None, parameter.data.to(dtype)
        yield
    finally:
        for parameter, data in before.items():
            parameter.data = data
