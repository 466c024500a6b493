"""Decisions before the first block: which parts of a recipe help, and the sparsity of each block.

Published allocations and refinements do not help every model. A trial prunes a copy of the model
with some of the calibration windows, block by block, and measures the perplexity of windows that
no statistic has seen. Parts are added one by one to score and pattern, compensation first, and a
part that raises the perplexity is left out.

Legend: N, M = windows, T = tokens of a window.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

from jaxtyping import Int
from torch import Tensor

from secateur.pruning.blocks.source import BlockSource, CalibrationStates
from secateur.pruning.modes import evaluation
from secateur.pruning.progress import tracked
from secateur.pruning.weights.block import Streams, allocate
from secateur.pruning.weights.parts import Uniform
from secateur.pruning.weights.recipe import WeightRecipe

TRIAL_SHARE = 4  # a trial uses one in this many calibration windows
_OFF: dict[str, Any] = {"compensation": None, "allocation": Uniform(), "refinement": None}


@dataclass(frozen=True)
class Decision:
    """Decisions on a run before its first block.

    Args:
        dropped: Parts that are left out: `compensation`, `allocation`, `refinement`.
        sparsities: Sparsity of every block, in [0, 1).
        notes: Why parts were dropped.
    """

    dropped: list[str]
    sparsities: list[float]
    notes: list[str]

    def applied(self, recipe: WeightRecipe) -> WeightRecipe:
        """The recipe without the dropped parts."""
        return replace(recipe, **{name: _OFF[name] for name in self.dropped})

    def scaled(self, share: float) -> Decision:
        """The same decision with the sparsity of all blocks multiplied by a factor in [0, 1]."""
        return replace(self, sparsities=[share * sparsity for sparsity in self.sparsities])

    def settings(self) -> dict[str, Any]:
        """JSON values, rounded to be equal on machines with another order of summation."""
        return asdict(self) | {"sparsities": [round(each, 6) for each in self.sparsities]}


def decide(
    source: BlockSource,
    recipe: WeightRecipe,
    windows_NT: Int[Tensor, "N T"] | None = None,
    held_back_NT: Int[Tensor, "M T"] | None = None,
    batch_size: int = 8,
) -> Decision:
    """Try the optional parts of a recipe, and allocate sparsity. The model is not changed.

    With windows held back, costs one trial for the score alone, on a quarter of the calibration
    windows, and one for every optional part; without optional parts, no trial is made.

    Args:
        source: The model.
        recipe: The full recipe.
        windows_NT: Calibration windows, if the recipe reads any.
        held_back_NT: Windows to measure on; None applies all parts.
        batch_size: Windows per forward pass of a block, 1 or more.

    Raises:
        ValueError: As for `prune_weights`.
    """
    recipe.check_windows(windows_NT)
    with evaluation(source.model):
        decision = Decision([], [], [])
        if held_back_NT is not None:
            decision = _without_what_harms(source, recipe, windows_NT, held_back_NT, batch_size)
        return replace(decision, sparsities=allocate(source, decision.applied(recipe)))


def _without_what_harms(
    source: BlockSource,
    recipe: WeightRecipe,
    windows_NT: Int[Tensor, "N T"] | None,
    held_back_NT: Int[Tensor, "M T"],
    batch_size: int,
) -> Decision:
    """Decide which parts do not lower the held-back perplexity; no sparsities yet."""
    decision = Decision([], [], [])
    optional = [name for name, off in _OFF.items() if getattr(recipe, name) != off]
    if not optional:
        return decision
    some_NT = None if windows_NT is None else windows_NT[: -(-len(windows_NT) // TRIAL_SHARE)]
    measure = partial(
        trial, source, windows_NT=some_NT, held_back_NT=held_back_NT, batch_size=batch_size
    )
    kept = replace(recipe, **_OFF)
    best = measure(kept)
    for name in optional:
        candidate = replace(kept, **{name: getattr(recipe, name)})
        found = measure(candidate)
        if found < best:
            kept, best = candidate, found
        else:
            decision.dropped.append(name)
            decision.notes.append(
                f"`{name}` {getattr(recipe, name)} was dropped: with it the perplexity of the "
                f"windows held back is {found:.2f} in a trial, without it {best:.2f}."
            )
    return decision


def trial(
    source: BlockSource,
    recipe: WeightRecipe,
    windows_NT: Int[Tensor, "N T"] | None,
    held_back_NT: Int[Tensor, "M T"],
    batch_size: int = 8,
) -> float:
    """Perplexity of held-back windows after pruning a copy of the model, one block at a time."""
    sparsities: Sequence[float] = allocate(source, recipe)
    streams = Streams(source, recipe, windows_NT, batch_size)
    held = CalibrationStates(source, held_back_NT, batch_size)
    for index, sparsity in enumerate(tracked(sparsities, "Trying a recipe on blocks")):
        block = copy.deepcopy(source.block(index))
        dense = streams.dense_copy(block)
        streams.prune(index, block, dense, sparsity)
        streams.advance(index, block, dense)
        held.advance(index, block)
    return held.perplexity().value
