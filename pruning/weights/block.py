"""Prune one block (statistics, masks, refinement, compensation); allocate sparsity to blocks.

Legend: N = windows, T = tokens of a window.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import torch
from jaxtyping import Int
from torch import Tensor, nn

from secateur.pruning.blocks.linears import BlockCall, PrunableLinear, weight_of
from secateur.pruning.blocks.source import BlockSource, CalibrationStates, NoStates
from secateur.pruning.weights.collect import collect
from secateur.pruning.weights.parts import BlockTask, Matrix, PrunedBlock
from secateur.pruning.weights.recipe import WeightRecipe


@torch.no_grad()
def prune_block(
    block: nn.Module,
    linears: Sequence[PrunableLinear],
    recipe: WeightRecipe,
    sparsity: float,
    calls: Callable[[], Iterator[BlockCall]],
) -> PrunedBlock:
    """Prune the matrices of one block, in place.

    Args:
        block: The block, with its weights.
        linears: Its layers to prune.
        recipe: The recipe.
        sparsity: Fraction to remove, in [0, 1).
        calls: Returns the arguments of the block, batch by batch, from the start each time.

    Raises:
        ValueError: Weights or activations are not finite.
    """
    if not linears:  # for example a block without an MLP if only MLPs are pruned
        return PrunedBlock({}, [])
    notes: list[str] = []
    read = {linear.path for linear in linears}
    middles = {linear.middle for linear in linears if linear.middle is not None}
    inputs = collect(block, linears[0].block, sorted(read | middles), recipe.needs, calls())
    read_once = list({id(each): each for each in inputs.values()}.values())
    matrices = []
    for linear in linears:
        weight = weight_of(block, linear.path)
        if not bool(weight.isfinite().all()):
            raise ValueError(f"{linear.name} has weights that are not finite; repair the model.")
        matrices.append(
            Matrix(
                linear=linear,
                weight_OI=weight.detach().float(),
                inputs=inputs[linear.path],
                middle=inputs[linear.middle] if linear.middle else None,
                pattern=recipe.pattern.with_sparsity(sparsity),
                group=recipe.group(linear),
                note=partial(_note, notes, linear.name),
                alike=[each for each in read_once if each.width == inputs[linear.path].width],
            )
        )
    for matrix in matrices:
        matrix.mask_OI = recipe.score.mask(matrix)
    if recipe.refinement is not None:
        masks = recipe.refinement.refine(BlockTask(block, matrices, calls))
        for matrix, mask_OI in zip(matrices, masks, strict=True):
            matrix.mask_OI = mask_OI
    for matrix in matrices:
        weight_OI = matrix.weight_OI
        if recipe.compensation is not None:
            weight_OI = recipe.compensation.weight(matrix, matrix.mask_OI)
        weight_of(block, matrix.linear.path).copy_(weight_OI.masked_fill(~matrix.mask_OI, 0))
    return PrunedBlock({m.linear.path: m.mask_OI.cpu() for m in matrices}, notes)


def _note(notes: list[str], name: str, text: str) -> None:
    notes.append(f"{name}: {text}")


def states_for(
    source: BlockSource,
    recipe: WeightRecipe,
    windows_NT: Int[Tensor, "N T"] | None,
    batch_size: int,
) -> CalibrationStates | NoStates:
    """Calibration windows at the first block, if the recipe reads any."""
    if recipe.data_free:
        return NoStates()
    assert windows_NT is not None
    return CalibrationStates(source, windows_NT, batch_size)


def allocate(source: BlockSource, recipe: WeightRecipe) -> list[float]:
    """Sparsity of every block."""

    def weights() -> Iterator[Mapping[str, Tensor]]:
        for index, linears in enumerate(source.linears):
            block = source.block(index)
            yield {each.name: weight_of(block, each.path) for each in recipe.pruned(linears)}

    sparsity = recipe.pattern.sparsity
    return recipe.allocation.sparsities(weights, sparsity) or [sparsity] * len(source.linears)
