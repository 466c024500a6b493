"""The loop of weight pruning over blocks: statistics, masks, compensation, next block.

Calibration windows start as outputs of the embeddings. They run through every block once to collect
statistics, with the block not pruned yet (its inputs come from pruned blocks); the parts of the
recipe choose masks and weights; then they run through the pruned block, to give the inputs of the
next.

Memory: one block; the calibration states, windows x T x D numbers; the statistics of one block (a
Hessian is I x I, float32, one per tensor that is read); and working copies of one matrix. With
`StreamedBlocks` that is all, besides embeddings and head: the model may be larger than memory.

Legend: B = windows of a batch, T = tokens of a window, N = windows, D = width of the residual
stream, O = output features, I = input features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from jaxtyping import Int
from torch import Tensor

from secateur.pruning.blocks.refit import refuse_short_text
from secateur.pruning.blocks.source import BlockSource, check_windows
from secateur.pruning.files.fingerprint import data_fingerprint
from secateur.pruning.modes import evaluation
from secateur.pruning.progress import tracked
from secateur.pruning.weights.block import Streams
from secateur.pruning.weights.guard import Decision, decide
from secateur.pruning.weights.masks import WeightMasks
from secateur.pruning.weights.parts import PrunedBlock
from secateur.pruning.weights.recipe import WeightRecipe
from secateur.pruning.weights.store import BlockStore

Progress = Callable[[int, int], None]
"""A function called with the numbers of finished blocks and of all blocks."""


@dataclass(frozen=True)
class WeightPruning:
    """The result of a run.

    Args:
        masks: The masks.
        recipe: The recipe that was applied, without dropped parts.
        sparsities: Sparsity of every block.
        notes: Sentences about deviations from the recipe: dropped parts, repairs.
    """

    masks: WeightMasks
    recipe: WeightRecipe
    sparsities: list[float]
    notes: list[str]


def prune_weights(
    source: BlockSource,
    recipe: WeightRecipe,
    windows_NT: Int[Tensor, "N T"] | None = None,
    *,
    held_back_NT: Int[Tensor, "M T"] | None = None,
    decision: Decision | None = None,
    batch_size: int = 8,
    store: BlockStore | None = None,
    progress: Progress | None = None,
) -> WeightPruning:
    """Prune the weights of a model.

    Args:
        source: Its blocks. Those of a live model are changed; streamed ones go to the store.
        recipe: The recipe.
        windows_NT: Calibration windows, token ids; usually 128 or more. None is for recipes that
            read no data, such as `Magnitude` alone.
        held_back_NT: Windows that no statistic uses. With them, allocation, refinement and
            compensation are first tried on some of the calibration windows, and parts that raise
            the perplexity of the held-back windows are dropped and noted. None applies all parts.
        decision: Parts to leave out and sparsities of the blocks, from `decide`; None decides now.
        batch_size: Windows per forward pass of a block, 1 or more.
        store: Keeps every finished block, so that a run that was killed resumes at the next one.
        progress: Called after every block.

    Raises:
        ValueError: The parts are incompatible with each other or the model, the calibration windows
            do not fit, weights or activations are not finite, streamed blocks have no store, or the
            store holds the blocks of another run: of another model, recipe, text or batch size.
    """
    recipe.check(source.linears)
    if windows_NT is not None:
        check_windows(source.model.config, windows_NT, batch_size)
        if recipe.reads_dense:
            refuse_short_text(
                source.model.get_submodule(source.prefix.rstrip(".")), windows_NT.numel()
            )
    if store is None and not source.keeps_changes:
        raise ValueError("`store` is needed for blocks that are streamed: they are kept there.")
    recipe.check_windows(windows_NT)
    if store is not None:
        store.claim(run_settings(source, recipe, windows_NT, held_back_NT, batch_size))
    if decision is None:
        decision = decide(source, recipe, windows_NT, held_back_NT, batch_size)
    if store is not None:
        store.claim({"decision": decision.settings()})
    applied, masks, notes = decision.applied(recipe), WeightMasks(), [*decision.notes]
    with evaluation(source.model):
        streams = Streams(source, applied, windows_NT, batch_size)
        finished = _prune(source, decision.sparsities, streams, store, progress)
        for index, block in enumerate(finished):
            for path, mask_OI in block.masks.items():
                masks.add(f"{source.prefix}{index}.{path}.weight", mask_OI)
            notes += block.notes
    return WeightPruning(masks, applied, decision.sparsities, notes)


def run_settings(
    source: BlockSource,
    recipe: WeightRecipe,
    windows_NT: Int[Tensor, "N T"] | None,
    held_back_NT: Int[Tensor, "M T"] | None,
    batch_size: int,
) -> dict[str, Any]:
    """All that the result of `prune_weights` depends on, as JSON values; same arguments."""
    return recipe.settings() | {
        "model": source.fingerprint(),
        "windows": None if windows_NT is None else data_fingerprint(windows_NT),
        "held back": None if held_back_NT is None else data_fingerprint(held_back_NT),
        "batch_size": batch_size,
    }


def _prune(
    source: BlockSource,
    sparsities: Sequence[float],
    streams: Streams,
    store: BlockStore | None,
    progress: Progress | None,
) -> Iterator[PrunedBlock]:
    for index, sparsity in enumerate(tracked(sparsities, "Pruning weights of blocks")):
        block = source.block(index)
        dense = streams.dense_copy(block)
        done = store.load(index, block) if store is not None else None
        if done is None:
            done = streams.prune(index, block, dense, sparsity)
            if store is not None:
                store.save(index, block, done)
        streams.advance(index, block, dense)
        yield done
        if progress is not None:
            progress(index + 1, len(sparsities))
