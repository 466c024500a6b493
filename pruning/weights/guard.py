"""Try the optional parts of a recipe on held-back text, and drop those that harm.

Published allocations and refinements do not help every model. A trial prunes a copy of the model
with some of the calibration windows, block by block, and measures the perplexity of windows that
no statistic has seen. Parts are added one by one to score and pattern, compensation first, and a
part that raises it is left out.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from jaxtyping import Int
from torch import Tensor

from pruning.weights.block import allocate, prune_block
from pruning.weights.parts import Uniform
from pruning.weights.recipe import WeightRecipe
from pruning.weights.source import BlockSource, CalibrationStates

TRIAL_SHARE = 4  # one in so many of the calibration windows is used in a trial
_OFF: dict[str, Any] = {"compensation": None, "allocation": Uniform(), "refinement": None}


def drop_what_harms(
    source: BlockSource,
    recipe: WeightRecipe,
    windows_NT: Int[Tensor, "N T"],
    held_back_NT: Int[Tensor, "M T"],
    batch_size: int = 8,
) -> tuple[WeightRecipe, list[str]]:
    """The recipe without the parts that raise the perplexity of held-back windows, and why.

    Costs one trial, on a quarter of the calibration windows, for the score alone and one for every
    part beside it; nothing where there is none. The model is left as it is.

    Args:
        source: The model.
        recipe: What is asked for.
        windows_NT: Calibration windows.
        held_back_NT: Windows to measure on.
        batch_size: Windows that a block sees at once, 1 or more.

    Raises:
        ValueError: As for `prune_weights`.
    """
    optional = [name for name, off in _OFF.items() if getattr(recipe, name) != off]
    if not optional:
        return recipe, []
    some_NT = windows_NT[: -(-len(windows_NT) // TRIAL_SHARE)]
    measure = partial(
        trial, source, windows_NT=some_NT, held_back_NT=held_back_NT, batch_size=batch_size
    )
    kept, notes = replace(recipe, **_OFF), []
    best = measure(kept)
    for name in optional:
        candidate = replace(kept, **{name: getattr(recipe, name)})
        found = measure(candidate)
        if found < best:
            kept, best = candidate, found
        else:
            notes.append(
                f"`{name}` {getattr(recipe, name)} was dropped: with it the perplexity of the "
                f"windows held back is {found:.2f} in a trial, without it {best:.2f}."
            )
    return kept, notes


def trial(
    source: BlockSource,
    recipe: WeightRecipe,
    windows_NT: Int[Tensor, "N T"],
    held_back_NT: Int[Tensor, "M T"],
    batch_size: int = 8,
) -> float:
    """Perplexity of held-back windows after pruning a copy of the model, one block at a time."""
    sparsities: Sequence[float] = allocate(source, recipe)
    states = CalibrationStates(source, windows_NT, batch_size)
    held = CalibrationStates(source, held_back_NT, batch_size)
    for index, sparsity in enumerate(sparsities):
        block = copy.deepcopy(source.block(index))
        own = recipe.pruned(source.linears[index])
        prune_block(block, own, recipe, sparsity, partial(states.calls, index))
        states.advance(index, block)
        held.advance(index, block)
    return held.perplexity().value
