"""Leave a model behind whose own weights were trained or pruned, wherever they lie."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from secateur.pruning.export.delivery import Origin, deliver_weights, rounded
from secateur.pruning.export.gathered_weights import Whole, write_gathered
from secateur.pruning.export.remaining import Depth
from secateur.pruning.export.sharded_delivery import deliver_weights_together
from secateur.pruning.files.model_folder import SHARD_BYTES, copy_companions


@dataclass(frozen=True)
class WeightsExport:
    """The export of a model that is trained further, from a live model or from files.

    Whatever the weights come from, the folder is the same: files of weights as transformers writes
    them, the tokenizer, and what else lay beside the base model.

    Args:
        origin: Where the model came from.
        depth: What is left of the base model.
        tokenizer: That of the text.
        dtype: Type of the weights that are saved.
    """

    origin: Origin
    depth: Depth
    tokenizer: PreTrainedTokenizerBase
    dtype: torch.dtype

    def from_model(
        self, model: PreTrainedModel, dense: PreTrainedModel, folder: Path, windows_NT: Tensor
    ) -> None:
        """Save a model that this rank holds whole; see `deliver_weights`.

        Args:
            model: The live model, as it is to be saved but for its type.
            dense: The base model.
            folder: Where it goes.
            windows_NT: Token windows (int64) to verify and measure on.
        """

        def write(partial: Path) -> None:
            model.save_pretrained(partial, max_shard_size=SHARD_BYTES)
            self._complete(partial)

        with rounded(model, self.dtype):
            deliver_weights(model, dense, self.origin, write, folder, windows_NT)

    def from_files(
        self, model: PreTrainedModel, dense: PreTrainedModel, folder: Path, windows_NT: Tensor
    ) -> None:
        """Cut the files of the base model, for one that was shortened and not trained.

        They keep their type; arguments and checks are those of `from_model`.
        """

        def write(partial: Path) -> None:
            self.depth.stream(self.origin.folder, partial, self.origin.fingerprint)

        with rounded(model, model.dtype):
            deliver_weights(model, dense, self.origin, write, folder, windows_NT)

    def from_shares(
        self,
        model: PreTrainedModel,
        whole: Whole,
        folder: Path,
        windows_NT: Tensor,
        device: torch.device,
    ) -> None:
        """Save a model that lies in shares on the ranks, of which each has to call this; see
        `deliver_weights_together`.

        Args:
            model: The live model, low-rank updates included.
            whole: Gathers parameters.
            folder: Where it goes.
            windows_NT: Token windows (int64) to verify and measure on.
            device: Where this rank computes.
        """

        def write(partial: Path | None) -> None:
            write_gathered(model, partial, self.dtype, whole)
            if partial is not None:
                self._complete(partial)

        training = model.training
        model.eval()
        try:
            deliver_weights_together(model, self.origin, write, folder, windows_NT, device)
        finally:
            model.train(training)

    def _complete(self, folder: Path) -> None:
        """Add to weights and configuration what else belongs into a model folder."""
        self.tokenizer.save_pretrained(folder)
        self.depth.complete(self.origin.folder, folder, self.origin.fingerprint)
        copy_companions(self.origin.folder, folder)  # those of the base, if it has any
