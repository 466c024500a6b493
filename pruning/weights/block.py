"""Prune one block (statistics, masks, refinement, compensation); allocate sparsity to blocks.

Legend: N = windows, T = tokens of a window.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import torch
from jaxtyping import Int
from torch import Tensor, nn

from secateur.pruning.blocks.linears import BlockCall, PrunableLinear, weight_of
from secateur.pruning.blocks.refit import Batch, BlockPair
from secateur.pruning.blocks.source import BlockSource, CalibrationStates, NoStates
from secateur.pruning.plan import full_plan
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


class Streams:
    """Calibration windows at the next block of the pruned model, and of the dense one if needed.

    Args:
        source: The model.
        recipe: Decides what is read.
        windows_NT: Token ids, if the recipe reads any.
        batch_size: Windows per forward pass of a block, 1 or more.
    """

    def __init__(
        self,
        source: BlockSource,
        recipe: WeightRecipe,
        windows_NT: Int[Tensor, "N T"] | None,
        batch_size: int,
    ) -> None:
        self._source, self._recipe = source, recipe
        self._states: CalibrationStates | NoStates = NoStates()
        self._dense: CalibrationStates | None = None
        if not recipe.data_free:
            assert windows_NT is not None
            self._states = CalibrationStates(source, windows_NT, batch_size)
            if recipe.reads_dense:
                self._plan = full_plan(source.model, "")
                self._dense = copy.copy(self._states)
                self._dense.hidden = [*self._states.hidden]

    def dense_copy(self, block: nn.Module) -> nn.Module | None:
        """A copy of the next block before it is pruned, if one is needed."""
        return None if self._dense is None else copy.deepcopy(block)

    def prune(
        self, index: int, block: nn.Module, dense: nn.Module | None, sparsity: float
    ) -> PrunedBlock:
        """Prune the next block, in place; see `prune_block`.

        Args:
            index: Its number.
            block: The block, with its weights.
            dense: Its copy from `dense_copy`.
            sparsity: Fraction to remove, in [0, 1).
        """
        own, calls = self._recipe.pruned(self._source.linears[index]), self._states.calls
        done = prune_block(block, own, self._recipe, sparsity, partial(calls, index))
        if self._dense is None or dense is None or self._recipe.compensation is None:
            return done
        pairs = zip(self._dense.calls(index), calls(index), strict=True)
        batches = [Batch(dense_call, call) for dense_call, call in pairs]
        pair = BlockPair(index, dense, block, self._plan)
        notes = self._recipe.compensation.finish(pair, batches, done.masks)
        return PrunedBlock(done.masks, done.notes + notes)

    def advance(self, index: int, block: nn.Module, dense: nn.Module | None) -> None:
        """Run the windows through the next block and its dense copy."""
        self._states.advance(index, block)
        if self._dense is not None and dense is not None:
            self._dense.advance(index, dense)


def allocate(source: BlockSource, recipe: WeightRecipe) -> list[float]:
    """Sparsity of every block."""

    def weights() -> Iterator[Mapping[str, Tensor]]:
        for index, linears in enumerate(source.linears):
            block = source.block(index)
            yield {each.name: weight_of(block, each.path) for each in recipe.pruned(linears)}

    sparsity = recipe.pattern.sparsity
    return recipe.allocation.sparsities(weights, sparsity) or [sparsity] * len(source.linears)
