from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor, nn

from secateur.pruning.blocks.linears import BlockCall
from secateur.pruning.weights.barber import Barber, exchange
from secateur.pruning.weights.dsnot import DSnoT, regrow
from secateur.pruning.weights.magnitude import Magnitude
from secateur.pruning.weights.parts import BlockTask
from secateur.pruning.weights.pattern import NM, Pattern, PerColumn, PerRow, Unstructured
from tests.pruning.weights.matrices import LINEAR, matrix_of, noise

ONES = torch.ones(4)


def test_dsnot_by_hand() -> None:
    mask_OI = torch.tensor([[False, False, True, True]])
    weight_OI = torch.tensor([[1.0, 2.0, -1.0, 3.0]])
    settings = {"cycles": 50, "threshold": 0.1, "group_size": 4}
    found = regrow(mask_OI, weight_OI, ONES, weight_OI.abs(), **settings)  # type: ignore[arg-type]
    assert found.tolist() == [[False, True, False, True]]
    within_two = regrow(mask_OI, weight_OI, ONES, weight_OI.abs(), **settings | {"group_size": 2})  # type: ignore[arg-type]
    assert within_two.tolist() == mask_OI.tolist()  # 0 and 1 are both removed: no pair within
    variance_I = torch.tensor([0.1, 10.0, 1.0, 1.0])  # now 0 cancels most relative to its variance
    found = regrow(mask_OI, weight_OI, variance_I, weight_OI.abs(), **settings | {"cycles": 1})  # type: ignore[arg-type]
    assert found.tolist() == [[True, False, False, True]]


@pytest.mark.parametrize("pattern", [Unstructured(0.5), NM(2, 4), NM(1, 4)])
def test_dsnot_brings_the_mean_of_the_outputs_back(pattern: Pattern) -> None:
    x_BTI = noise(3, 20, 24) + noise(24, seed=5)
    weight_OI = noise(8, 24, seed=1)
    matrix = matrix_of(weight_OI, x_BTI, pattern)
    matrix.mask_OI = Magnitude().mask(matrix)
    (found_OI,) = DSnoT().refine(BlockTask(nn.Identity(), [matrix], lambda: iter(())))
    assert torch.equal(
        pattern.split(found_OI, PerRow()).sum(1), pattern.split(matrix.mask_OI, PerRow()).sum(1)
    )
    sums_I = x_BTI.sum(1).mean(0)
    before_O, after_O = (
        ((weight_OI * sums_I) * ~mask_OI).sum(1).abs() for mask_OI in (matrix.mask_OI, found_OI)
    )
    assert bool((after_O <= before_O).all())
    share = 0.7 if isinstance(pattern, Unstructured) else 0.95  # groups of four have few pairs
    assert float(after_O.sum()) < share * float(before_O.sum())


def test_dsnot_exchanges_within_rows_only() -> None:
    assert DSnoT().refuse(LINEAR, Unstructured(0.5), PerRow()) is None
    assert "columns have a fixed number" in str(
        DSnoT().refuse(LINEAR, Unstructured(0.5), PerColumn())
    )


def test_barber_exchanges_the_pairs_with_the_largest_difference() -> None:
    keep = torch.tensor([[False, True, True, False], [True, True, False, False]])
    score = torch.tensor([[5.0, 1.0, 2.0, 4.0], [9.0, 3.0, 4.5, 1.0]])
    one = [[True, False, True, False], [True, True, False, False]]
    two = [[True, False, False, True], [True, True, False, False]]
    three = [[True, False, False, True], [True, False, True, False]]
    for pairs, expected in ((0, keep.tolist()), (1, one), (2, two), (3, three), (8, three)):
        assert exchange(keep, score, pairs).tolist() == expected


class _Block(nn.Module):
    def __init__(self, weight_OI: Tensor) -> None:
        super().__init__()
        self.up = nn.Linear(weight_OI.shape[1], weight_OI.shape[0], bias=False)
        self.up.weight = nn.Parameter(weight_OI, requires_grad=False)
        self.scale_O = torch.arange(1.0, len(weight_OI) + 1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.up(x)) * self.scale_O


@pytest.mark.parametrize("pattern", [Unstructured(0.5), NM(2, 4)])
def test_barber_exchanges_by_the_gradients_of_the_block(pattern: Pattern) -> None:
    weight_OI, x_BTI = noise(6, 8) * 0.5, noise(4, 30, 8, seed=1) * torch.linspace(0.1, 3, 8)
    block = _Block(weight_OI)
    matrix = matrix_of(weight_OI, x_BTI, pattern)
    matrix.linear = partial(type(LINEAR), 0, "up", (6, 8), True, None)(False)
    matrix.mask_OI = Magnitude().mask(matrix)
    calls = [BlockCall(x, (), {}) for x in x_BTI.split(2)]
    (found_OI,) = Barber(share=0.1).refine(BlockTask(block, [matrix], lambda: iter(calls)))
    changed = int((found_OI != matrix.mask_OI).sum())
    assert 0 < changed <= 2 * int(0.1 * 48)
    assert torch.equal(
        pattern.split(found_OI, PerRow()).sum(1), pattern.split(matrix.mask_OI, PerRow()).sum(1)
    )
    assert torch.equal(block.up.weight, weight_OI)  # the block is left as it was

    # The gradient by hand: two batches of 2 x 30 x 6 outputs, tanh' = 1 - tanh^2.
    square_OI = torch.zeros_like(weight_OI)
    for x in x_BTI.split(2):
        output = torch.tanh(x @ (weight_OI * matrix.mask_OI).T)
        error = (output - torch.tanh(x @ weight_OI.T)) * block.scale_O
        slope = 2 * error * block.scale_O * (1 - output.square()) / error.numel()
        square_OI += torch.einsum("bto,bti->oi", slope, x).square()
    score_OI = weight_OI.abs() * square_OI.sqrt()
    expected_GE = exchange(
        pattern.split(matrix.mask_OI, PerRow()), pattern.split(score_OI, PerRow()), 4
    )
    assert torch.equal(pattern.split(found_OI, PerRow()), expected_GE)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DSnoT(cycles=0), "`cycles` must be 1 or more"),
        (lambda: DSnoT(threshold=-1.0), "`threshold` must be 0 or more"),
        (lambda: Barber(share=0.0), r"`share` must be in \(0, 0.5\]"),
    ],
)
def test_settings_out_of_range_are_refused(make: partial[object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
