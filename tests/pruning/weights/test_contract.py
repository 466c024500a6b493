"""What every part keeps: one row per part, and no part without a row."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from inspect import isabstract
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import secateur.pruning.weights
from secateur.pruning.blocks.linears import linears_of
from secateur.pruning.blocks.source import LiveBlocks, StreamedBlocks
from secateur.pruning.export.rewrite import write_pruned_checkpoint
from secateur.pruning.weights.alpha_pruning import AlphaPruning
from secateur.pruning.weights.barber import Barber
from secateur.pruning.weights.dass import DaSS
from secateur.pruning.weights.dsnot import DSnoT
from secateur.pruning.weights.gradually import Gradually
from secateur.pruning.weights.guard import decide
from secateur.pruning.weights.joint_saliency import JointSaliency
from secateur.pruning.weights.layers import AllLinears, AttentionOnly, LayerSelection, MlpOnly
from secateur.pruning.weights.least_squares import LeastSquares, ResidualLeastSquares
from secateur.pruning.weights.loop import prune_weights
from secateur.pruning.weights.magnitude import Magnitude
from secateur.pruning.weights.masks import WeightMasks
from secateur.pruning.weights.parts import Allocation, Compensation, Refinement, Score, Uniform
from secateur.pruning.weights.pattern import (
    NM,
    Group,
    Pattern,
    PerColumn,
    PerMatrix,
    PerRow,
    Unstructured,
)
from secateur.pruning.weights.recipe import WeightRecipe
from secateur.pruning.weights.sparse_gpt import ObsSaliency, SparseGPTSweep
from secateur.pruning.weights.store import BlockStore
from secateur.pruning.weights.wanda import Wanda
from tests.tiny import tiny_llama

HALF = Unstructured(0.5)
ROWS: dict[type, WeightRecipe] = {
    Uniform: WeightRecipe(HALF, Magnitude(), Uniform()),
    AlphaPruning: WeightRecipe(HALF, Wanda(), AlphaPruning()),
    Magnitude: WeightRecipe(HALF, Magnitude()),
    Wanda: WeightRecipe(HALF, Wanda()),
    DaSS: WeightRecipe(NM(4, 8), DaSS()),
    ObsSaliency: WeightRecipe(NM(2, 4), ObsSaliency()),
    JointSaliency: WeightRecipe(NM(2, 4), JointSaliency(), compensation=SparseGPTSweep()),
    Unstructured: WeightRecipe(Unstructured(0.7), Wanda()),
    NM: WeightRecipe(NM(3, 8), Wanda()),
    PerRow: WeightRecipe(Unstructured(0.5, PerRow()), Magnitude()),
    PerColumn: WeightRecipe(NM(2, 4, PerColumn()), Magnitude()),
    PerMatrix: WeightRecipe(Unstructured(0.5, PerMatrix()), Wanda()),
    DSnoT: WeightRecipe(NM(2, 4), Wanda(), refinement=DSnoT()),
    Barber: WeightRecipe(NM(2, 4), DaSS(), refinement=Barber(0.1)),
    SparseGPTSweep: WeightRecipe(HALF, Wanda(), compensation=SparseGPTSweep()),
    LeastSquares: WeightRecipe(HALF, DaSS(), compensation=LeastSquares()),
    ResidualLeastSquares: WeightRecipe(
        NM(2, 4), Wanda(), compensation=ResidualLeastSquares(), matrices=MlpOnly()
    ),
    AllLinears: WeightRecipe(HALF, Magnitude(), matrices=AllLinears()),
    MlpOnly: WeightRecipe(HALF, DaSS(), matrices=MlpOnly()),
    AttentionOnly: WeightRecipe(HALF, Wanda(), matrices=AttentionOnly()),
    Gradually: WeightRecipe(HALF, ObsSaliency(), AlphaPruning(), compensation=LeastSquares()),
}


def parts() -> Iterator[type]:
    for module in pkgutil.iter_modules(secateur.pruning.weights.__path__):
        names = vars(importlib.import_module(f"secateur.pruning.weights.{module.name}"))
        for value in names.values():
            if (
                isinstance(value, type)
                and value.__module__ == f"secateur.pruning.weights.{module.name}"
            ):
                axes = (Allocation, Score, Refinement, Compensation, Pattern, Group, LayerSelection)
                if value is Gradually or (issubclass(value, axes) and not isabstract(value)):
                    yield value


def test_every_part_has_a_row() -> None:
    assert set(parts()) == set(ROWS)


def make() -> Any:
    return tiny_llama(num_hidden_layers=2, intermediate_size=40)


def windows() -> Tensor:
    return torch.randint(320, (9, 16), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("part", ROWS, ids=lambda part: part.__name__)
def test_the_part_keeps_the_contract(part: type, tmp_path: Path) -> None:
    recipe, model = ROWS[part], make()
    used = [*vars(recipe).values(), recipe.pattern.group, Gradually(1)]
    used += [recipe.group(linear) for linear in linears_of(model)[0]]
    assert any(isinstance(each, part) for each in used)
    decision = decide(LiveBlocks(model), recipe, windows())
    early = WeightMasks()
    if part is Gradually:
        half_way = replace(recipe, pattern=recipe.pattern.with_sparsity(0.25))
        rise = decision.scaled(0.5)
        early = prune_weights(LiveBlocks(model), half_way, windows(), decision=rise).masks
    start = {name: weight.clone() for name, weight in model.state_dict().items()}
    found = prune_weights(LiveBlocks(model), recipe, windows(), decision=decision)

    # Every group loses exactly its number, and what is lost is zero.
    for linear in (linear for block in linears_of(model) for linear in block):
        name = f"model.layers.{linear.name}.weight"
        assert (name in found.masks) == recipe.matrices.takes(linear)
        if name in found.masks:
            pattern = recipe.pattern.with_sparsity(found.sparsities[linear.block])
            keep_GE = pattern.split(found.masks[name], recipe.group(linear))
            removed = pattern.num_removed(keep_GE.shape[1])
            assert removed > 0
            assert set((~keep_GE).sum(1).tolist()) == {removed}
    assert not found.masks.lost(model)

    # What an earlier rise has removed does not come back.
    assert not any((found.masks[name] & ~early[name]).any() for name in early)

    # A run that is killed after a block, goes on, and whose model is written and read again gives
    # the same, bit by bit.
    dense = make()
    dense.load_state_dict(start)
    dense.save_pretrained(tmp_path / "base")
    run = partial(prune_weights, recipe=recipe, windows_NT=windows(), decision=decision)
    store = BlockStore(tmp_path / "blocks")
    with pytest.raises(KeyboardInterrupt):
        run(StreamedBlocks(tmp_path / "base"), store=store, progress=stop)
    assert [store.path(block).is_file() for block in (0, 1)] == [True, False]
    store = BlockStore(tmp_path / "blocks")
    again = run(StreamedBlocks(tmp_path / "base"), store=store)
    write_pruned_checkpoint(tmp_path / "base", store, again.masks, tmp_path / "model")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    for ours, theirs in zip(model.parameters(), loaded.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    with torch.no_grad():
        logits_BTV = model(windows()).logits
        assert bool(logits_BTV.isfinite().all())
        assert torch.equal(loaded(windows()).logits, logits_BTV)

    # A second run leaves everything as it is.
    run(LiveBlocks(loaded))
    for ours, theirs in zip(model.parameters(), loaded.parameters(), strict=True):
        torch.testing.assert_close(theirs, ours, atol=1e-4, rtol=1e-3)
    assert not found.masks.lost(loaded)


def stop(done: int, total: int) -> None:
    raise KeyboardInterrupt
