"""Choose units to remove: by the scores of the dense model, or one by one with new scores.

Sources: Shortened LLaMA (arXiv 2402.02834), one-shot and the "+" rule that protects both ends;
Gromov et al. (arXiv 2403.17887), runs of consecutive blocks; SLEB (arXiv 2402.09025), greedy;
BlockPruner (arXiv 2406.10594), greedy over halves.

Greedy search is not always better: if its set has a higher perplexity on the calibration text than
the one-shot set, the search reports the better one.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from secateur.pruning.depth.removal import PROVENANCE, bypassed
from secateur.pruning.depth.scores import BlockScore, BlockScores
from secateur.pruning.depth.target import Fractions, Target, fractions
from secateur.pruning.depth.units import Unit, Units, WholeBlocks
from secateur.pruning.measure.perplexity import perplexity
from secateur.pruning.progress import part

_log = logging.getLogger(__name__)
_FEW_BLOCKS = 10


@dataclass(frozen=True, eq=False)
class BlockChoice:
    """The units that a search chose to remove.

    Args:
        removed: The units, in the order of their removal.
        scores: Scores of the dense model.
        fractions: Exact fractions of the model that the units make up.
        perplexity: Perplexity of the calibration text without the units; None without text.
        messages: Notes for the user about this choice; also logged.
        better: The selection of one-shot search, if it has a lower perplexity on the calibration
            text than the greedy one; else None.
    """

    removed: tuple[Unit, ...]
    scores: BlockScores
    fractions: Fractions
    perplexity: float | None
    messages: tuple[str, ...] = ()
    better: BlockChoice | None = None

    @property
    def blocks(self) -> list[int]:
        """Indices of the blocks to remove entirely, in order: those with both halves removed."""
        halves = [unit.block for unit in self.removed if unit.part != "block"]
        whole = {unit.block for unit in self.removed if unit.part == "block"}
        return sorted(whole | {block for block in halves if halves.count(block) == 2})

    @property
    def halves(self) -> list[Unit]:
        """Halves to remove while the other half of their block is kept, in order."""
        gone = self.blocks
        return sorted(unit for unit in self.removed if unit.block not in gone)


@dataclass(frozen=True)
class Search(ABC):
    """Chooses units to remove.

    Args:
        score: Score to choose by; see `BlockScore`.
        protect_first: Blocks at the start to keep, 0 or more; 4 is the "+" of Shortened LLaMA.
        protect_last: Blocks at the end to keep, 0 or more; 2 is the "+" of Shortened LLaMA. On
            models of fewer than ten blocks both shrink in proportion, with a message.
        units: Units to remove one by one: whole blocks or halves of them.

    Raises:
        ValueError: A setting is outside its range.
    """

    score: BlockScore
    protect_first: int = 0
    protect_last: int = 0
    units: Units = field(default_factory=WholeBlocks)

    def __post_init__(self) -> None:
        for name in ("protect_first", "protect_last"):
            if getattr(self, name) < 0:
                raise ValueError(f"`{name}` must be 0 or more, got {getattr(self, name)}.")

    def __call__(
        self, model: PreTrainedModel, windows_NT: Int[Tensor, "N T"] | None, target: Target
    ) -> BlockChoice:
        """Score a model and choose; the model is not changed.

        Args:
            model: A causal language model of a known family; quantised ones too, if the score
                supports them.
            windows_NT: Token ids of calibration text; None if the score reads none.
            target: How much to remove.

        Raises:
            ValueError: The target is larger than what can be removed, the protected ends leave
                nothing, or the score cannot be computed.
        """
        chosen = self._search(model, windows_NT, target)
        for message in chosen.messages:
            _log.warning(message)
        return chosen

    @abstractmethod
    def _search(
        self, model: PreTrainedModel, windows_NT: Int[Tensor, "N T"] | None, target: Target
    ) -> BlockChoice:
        """What to remove."""

    def candidates(
        self, config: PreTrainedConfig, units: Sequence[Unit]
    ) -> tuple[list[Unit], list[str]]:
        """The units that may be removed, and messages about the protected ends.

        Args:
            config: Configuration of the model. Whether the model is small is decided by its
                original number of blocks, before any removal.
            units: All its units, first to last.

        Raises:
            ValueError: The protected ends overlap or cover everything.
        """
        num_blocks = config.num_hidden_layers
        had = (getattr(config, PROVENANCE, None) or {"num_blocks": num_blocks})["num_blocks"]
        first, last, messages = self.protect_first, self.protect_last, []
        if had < _FEW_BLOCKS:
            first = min(first, max(1, 4 * had // _FEW_BLOCKS))
            last = min(last, max(1, 2 * had // _FEW_BLOCKS))
        if (first, last) != (self.protect_first, self.protect_last):
            messages.append(
                f"The model has {had} blocks, fewer than {_FEW_BLOCKS}: the first {first} "
                f"and the last {last} are protected instead of {self.protect_first} and "
                f"{self.protect_last}."
            )
        if first + last >= num_blocks:
            raise ValueError(
                f"`protect_first` {first} and `protect_last` {last} leave nothing to remove of "
                f"{num_blocks} blocks; lower them to {num_blocks - 1} in total."
            )
        return [unit for unit in units if first <= unit.block < num_blocks - last], messages

    def check(
        self, config: PreTrainedConfig, units: Sequence[Unit], target: Target
    ) -> tuple[list[Unit], list[str]]:
        """The units that may be removed, see `candidates`; check that they are enough.

        Raises:
            ValueError: They are not enough.
        """
        candidates, messages = self.candidates(config, units)
        most = sparing(candidates, units)
        sizes = target.sizes(config, most)
        if not target.reached(sizes):
            raise ValueError(
                f"{target} cannot be reached: of {config.num_hidden_layers} blocks, "
                f"{len(most)} removable units make up {sum(sizes):.4g}. Lower the target"
                + (" or protect fewer blocks." if len(candidates) < len(units) else ".")
            )
        return candidates, messages


@dataclass(frozen=True)
class OneShot(Search):
    """Remove the units that score lowest in the dense model.

    Args:
        score: Score to choose by; see `BlockScore`.
        protect_first: Blocks at the start to keep, 0 or more; 4 is the "+" of Shortened LLaMA.
        protect_last: Blocks at the end to keep, 0 or more; 2 is the "+" of Shortened LLaMA. On
            models of fewer than ten blocks both shrink in proportion, with a message.
        units: Units to remove: whole blocks or halves of them.

    Raises:
        ValueError: A setting is outside its range.
    """

    def _search(
        self, model: PreTrainedModel, windows_NT: Int[Tensor, "N T"] | None, target: Target
    ) -> BlockChoice:
        units = self.units.of(model)
        self.check(model.config, units, target)
        scores = self.score(model, windows_NT, units)
        return measured(model, windows_NT, self.choose(scores, model.config, target))

    def choose(self, scores: BlockScores, config: PreTrainedConfig, target: Target) -> BlockChoice:
        """Choose by given scores; needs neither model nor text.

        Args:
            scores: Scores of all units of the model.
            config: Its configuration.
            target: How much to remove.

        Raises:
            ValueError: As for the search itself.
        """
        units, messages = self.check(config, scores.units, target)
        if scores.runs is not None:
            removed = _lowest_run(scores, units, config, target)
        else:
            order = sparing(ranking(scores, units), scores.units)
            sizes = target.sizes(config, order)
            needed = next(n for n in range(1, len(order) + 1) if target.reached(sizes[:n]))
            removed = order[:needed]
        return BlockChoice(
            tuple(removed), scores, fractions(config, removed), None, tuple(messages)
        )


@dataclass(frozen=True)
class Greedy(Search):
    """Remove the unit that scores lowest, score again without it, and so on.

    For scores of runs of blocks, runs of one block are used.

    Args:
        score: Score to choose by; see `BlockScore`.
        protect_first: Blocks at the start to keep, 0 or more; 4 is the "+" of Shortened LLaMA.
        protect_last: Blocks at the end to keep, 0 or more; 2 is the "+" of Shortened LLaMA. On
            models of fewer than ten blocks both shrink in proportion, with a message.
        units: Units to remove one by one: whole blocks or halves of them.

    Raises:
        ValueError: A setting is outside its range.
    """

    def _search(
        self, model: PreTrainedModel, windows_NT: Int[Tensor, "N T"] | None, target: Target
    ) -> BlockChoice:
        config = model.config
        units = self.units.of(model)
        candidates, messages = self.check(config, units, target)
        count = self._expected(candidates, units, config, target)
        with part(f"removal 1 of {count}"):
            dense = scores = self.score(model, windows_NT, units)
        removed: list[Unit] = []
        while True:
            left = [unit for unit in candidates if unit not in removed]
            removed.append(sparing(ranking(scores, left), scores.units)[0])
            if target.reached(target.sizes(config, removed)):
                break
            number = len(removed) + 1
            with bypassed(model, removed), part(f"removal {number} of {max(count, number)}"):
                scores = self.score(model, windows_NT, self.units.of(model))
        chosen = BlockChoice(
            tuple(removed), dense, fractions(config, removed), None, tuple(messages)
        )
        return self._compared(model, windows_NT, measured(model, windows_NT, chosen), target)

    @staticmethod
    def _expected(
        candidates: Sequence[Unit], units: Sequence[Unit], config: PreTrainedConfig, target: Target
    ) -> int:
        """How many removals reach the target if the first candidates go; exact for equal units."""
        sizes = target.sizes(config, sparing(candidates, units))
        return next(n for n in range(1, len(sizes) + 1) if target.reached(sizes[:n]))

    def _compared(
        self,
        model: PreTrainedModel,
        windows_NT: Int[Tensor, "N T"] | None,
        chosen: BlockChoice,
        target: Target,
    ) -> BlockChoice:
        """The selection, with that of one-shot search added if that is better."""
        single = OneShot(self.score, self.protect_first, self.protect_last, self.units)
        plain = replace(chosen.scores, runs=None)
        other = measured(model, windows_NT, single.choose(plain, model.config, target))
        if chosen.perplexity is None or other.perplexity is None:
            return chosen
        if other.perplexity >= chosen.perplexity:
            return chosen
        message = (
            f"Greedy search chose {names(chosen.removed)} with a perplexity of "
            f"{chosen.perplexity:.4g} on the calibration text; one-shot search would remove "
            f"{names(other.removed)} with {other.perplexity:.4g}, which is better."
        )
        return replace(chosen, messages=(*chosen.messages, message), better=other)


def ranking(scores: BlockScores, candidates: Sequence[Unit]) -> list[Unit]:
    """Candidates in the order of their removal: lowest score first, ties to the earlier unit."""
    value = dict(zip(scores.units, scores.values.tolist(), strict=True))
    return sorted(candidates, key=lambda unit: value[unit])


def sparing(order: Sequence[Unit], units: Sequence[Unit]) -> list[Unit]:
    """Units in the order of their removal, without the last attention, which is always kept.

    Args:
        order: Units that may be removed.
        units: All units of the model.
    """
    attentions = [unit for unit in order if unit.part != "mlp"]
    if len(attentions) < sum(unit.part != "mlp" for unit in units):
        return list(order)
    return [unit for unit in order if unit is not attentions[-1]]


def names(units: Sequence[Unit]) -> str:
    """Units as text: `4, 6.attn`."""
    return ", ".join(unit.key for unit in units)


def measured(
    model: PreTrainedModel, windows_NT: Int[Tensor, "N T"] | None, chosen: BlockChoice
) -> BlockChoice:
    """A selection with its perplexity, if there is text."""
    if windows_NT is None or len(windows_NT) == 0:
        return chosen
    with bypassed(model, chosen.removed):
        return replace(chosen, perplexity=perplexity(model, windows_NT).value)


def _lowest_run(
    scores: BlockScores, candidates: Sequence[Unit], config: PreTrainedConfig, target: Target
) -> list[Unit]:
    """The shortest run of consecutive blocks that reaches the target; of these, the lowest."""
    assert scores.runs is not None
    first, last = candidates[0].block, candidates[-1].block
    size = dict(zip(candidates, target.sizes(config, candidates), strict=True))
    for length in range(1, len(candidates) + 1):
        runs = [
            [Unit(block) for block in range(start, start + length)]
            for start in range(first, last - length + 2)
        ]
        runs = [run for run in runs if target.reached([size[unit] for unit in run])]
        if runs:
            column = scores.runs[:, length - 1].tolist()
            return min(runs, key=lambda run: column[run[0].block])
    raise AssertionError("the target was found to be reachable")
