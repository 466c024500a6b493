from __future__ import annotations

import pytest
import torch

from secateur.pruning.weights.dass import DaSS, dass_score
from secateur.pruning.weights.magnitude import Magnitude
from secateur.pruning.weights.pattern import NM, Pattern, PerColumn, PerMatrix, PerRow, Unstructured
from secateur.pruning.weights.wanda import Wanda, wanda_score
from tests.pruning.weights.matrices import inputs_of, matrix_of, noise


def test_wanda_by_hand() -> None:
    # |W| a with a = (2, 1, 1, 2): 2 3 1 4 / 10 4 3 4; the two smallest of every row go
    weight_OI = torch.tensor([[1.0, -3.0, 1.0, 2.0], [5.0, 4.0, -3.0, 2.0]])
    x_BTI = torch.tensor([[[2.0, 1.0, 0.0, 2.0], [0.0, 0.0, 1.0, 0.0]]])
    mask_OI = Wanda().mask(matrix_of(weight_OI, x_BTI, NM(2, 4)))
    assert mask_OI.tolist() == [[False, True, False, True], [True, False, False, True]]
    # in the second row 4 and 4 are equal: the first of them goes


def test_wanda_norms_are_means_over_windows() -> None:
    x_BTI = noise(3, 5, 8)
    norms_I = inputs_of(x_BTI).norms_I()
    torch.testing.assert_close(norms_I, (x_BTI.square().sum(1).mean(0)).sqrt())


def test_dass_by_hand() -> None:
    # n^0.5 = (1, 2): scores 3 1 / 4 4, compared within columns
    weight_OI = torch.tensor([[3.0, 1.0], [2.0, 2.0]])
    middle_BTO = torch.tensor([[[1.0, 4.0]]])
    matrix = matrix_of(
        weight_OI, noise(1, 4, 2), Unstructured(0.5), PerColumn(), middle=inputs_of(middle_BTO)
    )
    assert DaSS().mask(matrix).tolist() == [[False, False], [True, True]]
    assert Magnitude().mask(matrix).tolist() == [[True, False], [False, True]]


@pytest.mark.parametrize("pattern", [Unstructured(0.4), NM(2, 3)])
def test_dass_is_unchanged_by_the_norm_of_the_input(pattern: Pattern) -> None:
    weight_OI, middle_O = noise(12, 8), noise(12, seed=1).abs()
    plain = dass_score(weight_OI, middle_O, 0.5)
    with_inputs = plain * noise(8, seed=2).abs()
    assert torch.equal(pattern.mask(plain, PerColumn()), pattern.mask(with_inputs, PerColumn()))
    assert not torch.equal(
        pattern.mask(plain, PerColumn()), pattern.mask(weight_OI.abs(), PerColumn())
    )


@pytest.mark.parametrize("pattern", [Unstructured(0.4), NM(2, 4)])
def test_dass_along_the_inputs_is_magnitude(pattern: Pattern) -> None:
    weight_OI, middle_O = noise(12, 8), noise(12, seed=1).abs()
    score_OI = dass_score(weight_OI, middle_O, 0.5)
    assert torch.equal(pattern.mask(score_OI, PerRow()), pattern.mask(weight_OI.abs(), PerRow()))


def test_dass_scores_other_matrices_by_wanda() -> None:
    matrix = matrix_of(noise(6, 8), noise(2, 5, 8, seed=1), Unstructured(0.5))
    assert torch.equal(DaSS().mask(matrix), Wanda().mask(matrix))


def test_magnitude_compares_a_matrix_or_the_inputs_of_a_group() -> None:
    matrix = matrix_of(noise(6, 8), noise(1, 2, 8), Unstructured(0.5), PerMatrix())
    assert int(Magnitude().mask(matrix).sum()) == 24
    assert Magnitude().group(matrix.linear, Unstructured(0.5)) == PerMatrix()
    assert Magnitude().group(matrix.linear, NM(2, 4)) == PerRow()


def test_wanda_scores_scale_with_the_norms() -> None:
    weight_OI, norms_I = noise(6, 8), noise(8, seed=1).abs()
    torch.testing.assert_close(wanda_score(weight_OI, norms_I), (weight_OI * norms_I).abs())


@pytest.mark.parametrize("alpha", [0.0, -1.0, float("nan"), float("inf")])
def test_dass_without_a_weight_of_the_norms_is_refused(alpha: float) -> None:
    with pytest.raises(ValueError, match="`alpha` must be finite and above 0"):
        DaSS(alpha)
