"""Masks and weights of the reference programs, on the 7 M LLaMA of the large data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from secateur.pruning.blocks.source import LiveBlocks
from secateur.pruning.blocks.statistics import Gram
from secateur.pruning.measure.perplexity import cut_windows, perplexity
from secateur.pruning.weights.dass import DaSS
from secateur.pruning.weights.hessian import inverse_factors
from secateur.pruning.weights.layers import MlpOnly
from secateur.pruning.weights.loop import prune_weights
from secateur.pruning.weights.magnitude import Magnitude
from secateur.pruning.weights.pattern import NM, PerMatrix, PerRow, Unstructured
from secateur.pruning.weights.recipe import WeightRecipe
from secateur.pruning.weights.sparse_gpt import ObsSaliency, SparseGPTSweep, sweep
from secateur.pruning.weights.wanda import wanda_score
from tests.pruning.weights.matrices import matrix_of


def oracle(data: Path, name: str) -> dict[str, Tensor]:
    with np.load(data / "reference" / "oracles" / f"{name}.npz") as arrays:
        return {key: torch.from_numpy(arrays[key]) for key in arrays.files}


def weights_of(data: Path) -> dict[str, Tensor]:
    tensors = load_file(data / "models" / "llama7m" / "model.safetensors")
    return {
        name.removeprefix("model.layers.").removesuffix(".weight"): tensor.float()
        for name, tensor in tensors.items()
    }


def differing(masks: dict[str, Tensor], removed: dict[str, Tensor]) -> float:
    """Share of the bits in which masks, True for kept, differ from an oracle, True for removed."""
    wrong = sum(int((masks[key] == removed[key].bool()).sum()) for key in masks)
    return wrong / sum(mask.numel() for mask in masks.values())


def test_wanda_from_the_statistics_of_the_reference(data: Path) -> None:
    weights, squares = weights_of(data), oracle(data, "stats_wanda_2of4_0.5")
    masks = {
        key: NM(2, 4).mask(wanda_score(weights[key], square_I.flatten().sqrt()), PerRow())
        for key, square_I in squares.items()
    }
    assert len(masks) == 56
    assert differing(masks, oracle(data, "mask_wanda_2of4_0.5")) <= 1e-5


def test_magnitude(data: Path) -> None:
    weights, removed = weights_of(data), oracle(data, "mask_magnitude_2of4_0.5")
    masks = {
        key: Magnitude().mask(matrix_of(weights[key], torch.zeros(1, 1, 1), NM(2, 4)))
        for key in removed
    }
    assert differing(masks, removed) <= 1e-5


def prune(data: Path, recipe: WeightRecipe) -> tuple[Any, dict[str, Tensor]]:
    """The pruned model and its masks, calibrated as the reference programs were."""
    model: Any = AutoModelForCausalLM.from_pretrained(
        data / "models" / "llama7m", dtype=torch.float32
    )
    windows = torch.from_numpy(np.load(data / "reference" / "calib_128x256.npy").astype(np.int64))
    masks = prune_weights(LiveBlocks(model), recipe, windows).masks
    named = {name: name.removeprefix("model.layers.").removesuffix(".weight") for name in masks}
    return model, {short: masks[name] for name, short in named.items()}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "recipe"),
    [
        ("mask_wanda_unstructured_0.5", WeightRecipe(Unstructured(0.5))),
        ("mask_wanda_2of4_0.5", WeightRecipe(NM(2, 4))),
        ("mask_dass_unstructured_0.5", WeightRecipe(Unstructured(0.5), DaSS(), matrices=MlpOnly())),
        ("mask_dass_2of4_0.5", WeightRecipe(NM(2, 4), DaSS(), matrices=MlpOnly())),
    ],
)
def test_whole_runs(data: Path, name: str, recipe: WeightRecipe) -> None:
    _, masks = prune(data, recipe)
    assert differing(masks, oracle(data, name)) <= 1e-5


@pytest.mark.slow
def test_sparsegpt_from_end_to_end(data: Path) -> None:
    """Its bits flip with the order of a sum: what can be compared is the perplexity."""
    recipe = WeightRecipe(NM(2, 4), ObsSaliency(), compensation=SparseGPTSweep())
    model, _ = prune(data, recipe)
    tokenizer: Any = AutoTokenizer.from_pretrained(data / "models" / "llama7m")
    text = (data / "text" / "tinystories_val.txt").read_text(encoding="utf-8")
    windows = cut_windows(tokenizer(text)["input_ids"], 256)[:212]
    assert perplexity(model, windows, 4).value == pytest.approx(43.96, rel=0.02)


@pytest.mark.parametrize(
    ("name", "pattern", "flips"),
    [
        # groups of four: only ties that are broken by rounding flip, a pair of bits each
        ("weights_sparsegpt_2of4_0.5_layer0", NM(2, 4), 40),
        # the reference removes one weight more in every 128 columns: 7 layers, 20 groups in all
        ("weights_sparsegpt_unstructured_0.5_layer0", Unstructured(0.5), 60),
    ],
)
def test_sparsegpt_from_the_hessians_of_the_reference(
    data: Path, name: str, pattern: NM | Unstructured, flips: int
) -> None:
    weights = weights_of(data)
    hessians = oracle(data, "hessian_sparsegpt_2of4_0.5_layers0and7")
    for key, expected_OI in oracle(data, name).items():
        (factor_II,), used = inverse_factors(hessians[key][None], 0.01)
        assert used == [0.01]
        keep_OI = expected_OI != 0
        ours_OI, _ = sweep(weights[key], factor_II, lambda w, d, own, keep=keep_OI: keep[:, own])
        error = float((ours_OI - expected_OI).norm() / expected_OI.norm())
        assert error < 1e-3, (key, error)

        matrix = matrix_of(weights[key], torch.zeros(1, 1, 1), pattern)
        matrix.group = ObsSaliency().group(matrix.linear, pattern)
        assert isinstance(matrix.group, PerMatrix if pattern == Unstructured(0.5) else PerRow)
        matrix.inputs[Gram]._upper_II = hessians[key] / 2  # of one window
        found_OI = ObsSaliency().mask(matrix)
        assert int((found_OI != keep_OI).sum()) <= flips, key
