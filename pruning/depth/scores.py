"""Base classes of block scores, and the two scores that need no text: magnitude, reverse order.

Legend: L = blocks, U = units, N = windows, T = tokens of a window.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from secateur.pruning.depth.removal import checked_units
from secateur.pruning.depth.units import Unit, WholeBlocks
from secateur.pruning.families import family_of
from secateur.pruning.modes import evaluation
from secateur.pruning.progress import tracked


@dataclass(frozen=True, eq=False)
class BlockScores:
    """The importance of each unit of a model; units with the lowest value are removed first.

    Args:
        values: Scores (float64), shape (U,), on the CPU.
        errors: Standard errors of the values (float64), shape (U,); None if a score is not an
            average.
        units: The scored units, in order.
        runs: Scores (float64) of runs of consecutive blocks, shape (L, L): row = first block,
            column = length - 1, NaN where a run would exceed the model. None if the score of a run
            is that of its blocks.
    """

    values: Float[Tensor, " U"]
    errors: Float[Tensor, " U"] | None
    units: tuple[Unit, ...]
    runs: Float[Tensor, "L L"] | None = None


class BlockScore(ABC):
    """Scores units of a model; higher means keep."""

    reads_text = True
    """Whether it needs windows of text."""

    def __call__(
        self,
        model: PreTrainedModel,
        windows_NT: Int[Tensor, "N T"] | None = None,
        units: Sequence[Unit] | None = None,
    ) -> BlockScores:
        """Score a model; weights, gradients and mode are restored afterwards.

        Args:
            model: A causal language model of a known family.
            windows_NT: Token ids of calibration text; not needed by scores that read no text.
            units: Units to score; None scores every whole block that is not bypassed.

        Raises:
            ValueError: There is no text or too little, a unit does not exist or cannot be
                scored in this way, or a score is not finite (its block is named).
        """
        num_blocks = model.config.num_hidden_layers
        units = WholeBlocks().of(model) if units is None else tuple(units)
        checked_units(units, num_blocks)
        name = type(self).__name__
        if self.reads_text and (windows_NT is None or len(windows_NT) == 0):
            raise ValueError(f"`{name}` needs calibration text and got none: give windows.")
        if self.reads_text and windows_NT is not None and windows_NT.shape[1] < 2:
            raise ValueError(
                f"`{name}` needs windows of 2 or more tokens, got {windows_NT.shape[1]}: "
                "the calibration text is too short."
            )
        windows_NT = torch.zeros(0, 2, dtype=torch.long) if windows_NT is None else windows_NT
        with evaluation(model):
            scores = self._score(model, windows_NT, units)
        finite_U = scores.values.isfinite()
        if strange := [u.key for u, finite in zip(units, finite_U, strict=True) if not finite]:
            raise ValueError(
                f"`{name}` of block {', '.join(strange)} is not finite: the model computes NaN or "
                "infinity. Check its weights, or load it in a wider type than float16."
            )
        return scores

    @abstractmethod
    def _score(
        self, model: PreTrainedModel, windows_NT: Int[Tensor, "N T"], units: tuple[Unit, ...]
    ) -> BlockScores:
        """Compute the scores of a model in evaluation mode."""

    def _refuse_halves(self, units: Sequence[Unit]) -> None:
        if any(unit.part != "block" for unit in units):
            raise ValueError(
                f"`{type(self).__name__}` scores whole blocks only; for halves use Perplexity, "
                "Taylor or BlockMagnitude."
            )


@dataclass(frozen=True)
class TextScore(BlockScore):
    """A score that runs the model on windows of text, in batches.

    Args:
        batch_size: Windows per forward pass, 1 or more; does not change the result.

    Raises:
        ValueError: A setting is outside its range.
    """

    batch_size: int = 8

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"`batch_size` must be 1 or more, got {self.batch_size}.")

    def batches(
        self, model: PreTrainedModel, windows_NT: Int[Tensor, "N T"]
    ) -> Iterator[Int[Tensor, "_ T"]]:
        """The windows in batches, on the device of the model; shows the progress."""
        batches: tuple[Tensor, ...] = windows_NT.to(model.device).split(self.batch_size)
        return tracked(batches, f"Scoring blocks by {type(self).__name__}")


@dataclass(frozen=True)
class BlockMagnitude(BlockScore):
    """Sum of the absolute weights, norms included and biases not (arXiv 2402.02834, eq. 2).

    Needs no text and costs nothing; the weakest score (it may select the first block).
    """

    reads_text = False

    def _score(
        self, model: PreTrainedModel, windows_NT: Int[Tensor, "N T"], units: tuple[Unit, ...]
    ) -> BlockScores:
        sums = [
            sum(float(w.detach().abs().sum(dtype=torch.float64)) for w in weights(model, unit))
            for unit in units
        ]
        return BlockScores(torch.tensor(sums, dtype=torch.float64), None, units)


@dataclass(frozen=True)
class ReverseOrder(BlockScore):
    """Remove the last blocks first, except the very last ones; needs no text and costs nothing.

    Taylor scores with protected ends choose the same blocks on LLaMA-1 and 2, Vicuna and Mistral.

    Args:
        keep_last: Blocks at the end that are removed only after all others, 0 or more.

    Raises:
        ValueError: A setting is outside its range.

    Example: of 6 blocks, 3 is removed first, then 2, 1, 0, and only then 4 and 5.
    """

    keep_last: int = 2
    reads_text = False

    def __post_init__(self) -> None:
        if self.keep_last < 0:
            raise ValueError(f"`keep_last` must be 0 or more, got {self.keep_last}.")

    def _score(
        self, model: PreTrainedModel, windows_NT: Int[Tensor, "N T"], units: tuple[Unit, ...]
    ) -> BlockScores:
        self._refuse_halves(units)
        last = model.config.num_hidden_layers - self.keep_last
        values = [unit.block if unit.block >= last else -unit.block for unit in units]
        return BlockScores(torch.tensor(values, dtype=torch.float64), None, units)


def weights(model: PreTrainedModel, unit: Unit) -> list[torch.nn.Parameter]:
    """The weights of a unit, norms included and biases not.

    Raises:
        ValueError: They are quantised, so that their values cannot be read.
    """
    family = family_of(model.config)
    found = [
        parameter
        for name, parameter in unit.tensors(model.get_submodule(family.blocks), family)
        if name.endswith(".weight")
    ]
    if not all(parameter.is_floating_point() for parameter in found):
        raise ValueError(
            f"The weights of block {unit.key} are quantised and cannot be summed; score with "
            "Perplexity or BlockInfluence, or load the original model."
        )
    return found
