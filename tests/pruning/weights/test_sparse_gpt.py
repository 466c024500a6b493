from __future__ import annotations

from itertools import combinations

import pytest
import torch
from torch import Tensor, tensor

from secateur.pruning.blocks.ridge import under_mask
from secateur.pruning.blocks.statistics import Gram
from secateur.pruning.weights.hessian import damped, inverse_factors
from secateur.pruning.weights.joint_saliency import JointSaliency, joint_losses
from secateur.pruning.weights.least_squares import LeastSquares
from secateur.pruning.weights.magnitude import Magnitude
from secateur.pruning.weights.pattern import NM, Pattern, PerColumn, PerMatrix, PerRow, Unstructured
from secateur.pruning.weights.sparse_gpt import ObsSaliency, SparseGPTSweep, sweep
from tests.pruning.weights.matrices import inputs_of, matrix_of, noise, output_error


def correlated(*shape: int, seed: int = 0) -> Tensor:
    """Inputs that predict each other, as those of language models do."""
    width = shape[-1]
    return noise(*shape, seed=seed) @ (torch.eye(width) + 0.5 * noise(width, width, seed=seed + 9))


def test_a_sweep_by_hand() -> None:
    hessian_II = torch.tensor([[2.0, 1.0], [1.0, 2.0]])
    factor_II = torch.linalg.cholesky(torch.linalg.inv(hessian_II), upper=True)
    keep = torch.tensor([[False, True]])
    weight_OI, _ = sweep(torch.tensor([[1.0, 2.0]]), factor_II, lambda w, d, own: keep[:, own])
    torch.testing.assert_close(weight_OI, torch.tensor([[0.0, 2.5]]))
    refitted_OI = under_mask(torch.tensor([[1.0, 2.0]]), keep, hessian_II)
    torch.testing.assert_close(refitted_OI, torch.tensor([[0.0, 2.5]]))


@pytest.mark.parametrize(
    ("pattern", "group"),
    [
        (Unstructured(0.5), PerMatrix()),
        (NM(2, 4), PerRow()),
        (NM(1, 3), PerRow()),
        (NM(2, 3), PerColumn()),
    ],
)
def test_score_and_sweep_together_are_the_algorithm_of_the_paper(
    pattern: Pattern, group: PerRow | PerMatrix | PerColumn
) -> None:
    weight_OI, x_BTI = noise(6, 300), correlated(2, 400, 300, seed=1)
    matrix = matrix_of(weight_OI, x_BTI, pattern, group)
    mask_OI = ObsSaliency().mask(matrix)
    ours_OI = SparseGPTSweep().weight(matrix, mask_OI)
    width = 128 if isinstance(pattern, Unstructured) else 128 // pattern.m * pattern.m
    expected_OI = plainly(weight_OI, matrix.inputs.hessian_II(), pattern, group, width)
    torch.testing.assert_close(ours_OI, expected_OI, atol=2e-4, rtol=1e-3)
    assert torch.equal(mask_OI, expected_OI != 0)


def plainly(
    weight_OI: Tensor, hessian_II: Tensor, pattern: Pattern, group: object, width: int
) -> Tensor:
    """Removes column by column and solves for all columns to the right anew, in float64."""
    weight_OI, hessian_II = weight_OI.double(), damped(hessian_II, 0.01).double()
    columns = weight_OI.shape[1]
    mask_OI = torch.ones_like(weight_OI, dtype=torch.bool)
    for j in range(columns):
        rest_II = torch.linalg.inv(hessian_II[j:, j:])
        step = pattern.m if isinstance(pattern, NM) and isinstance(group, PerRow) else width
        if (j % width) % step == 0:
            own = slice(j, min(j + step, (j // width + 1) * width, columns))
            # 1 / U_kk^2 is the diagonal of the Schur complements that follow one another
            diagonal = torch.stack(
                [torch.linalg.inv(hessian_II[k:, k:])[0, 0] for k in range(own.start, own.stop)]
            )
            score = weight_OI[:, own].square() / diagonal
            mask_OI[:, own] = pattern.mask(score, group)  # type: ignore[arg-type]
        lost_O = weight_OI[:, j] * ~mask_OI[:, j]
        weight_OI[:, j:] -= lost_O[:, None] * rest_II[0] / rest_II[0, 0]
    return (weight_OI * mask_OI).float()


def test_a_sweep_for_a_given_mask_equals_the_one_that_chose_it() -> None:
    matrix = matrix_of(noise(6, 200), correlated(2, 300, 200), Unstructured(0.5), PerMatrix())
    mask_OI = ObsSaliency().mask(matrix)
    first_OI = SparseGPTSweep().weight(matrix, mask_OI)
    matrix.swept = None
    assert torch.equal(SparseGPTSweep().weight(matrix, mask_OI), first_OI)


@pytest.mark.parametrize("pattern", [Unstructured(0.5), NM(2, 4)])
def test_the_refit_is_never_worse_than_the_mask_alone_or_a_sweep(pattern: Pattern) -> None:
    for seed in range(5):
        weight_OI, x_BTI = noise(6, 40, seed=seed), correlated(2, 60, 40, seed=seed)
        matrix = matrix_of(weight_OI, x_BTI, pattern, PerRow())
        mask_OI = Magnitude().mask(matrix)
        swept_OI = SparseGPTSweep(1e-6).weight(matrix, mask_OI)
        refitted_OI = LeastSquares(1e-6).weight(matrix, mask_OI)
        assert torch.equal(refitted_OI != 0, mask_OI)
        alone, swept, refitted = (
            output_error(weight_OI, other_OI, x_BTI)
            for other_OI in (weight_OI * mask_OI, swept_OI, refitted_OI)
        )
        assert refitted <= min(alone, swept) * (1 + 1e-4)


def test_the_refit_equals_the_formula_of_the_paper() -> None:
    weight_OI, x_BTI = noise(5, 12).double(), correlated(2, 40, 12).double()
    hessian_II = damped(2 * torch.einsum("bti,btj->ij", x_BTI, x_BTI), 0.01)
    mask_OI = noise(5, 12, seed=3) > 0.2  # rows keep different numbers
    mask_OI[0] = False
    mask_OI[1] = True
    inverse_II = torch.linalg.inv(hessian_II)
    expected_OI = weight_OI.clone()
    for row, keep_I in zip(expected_OI, mask_OI, strict=True):
        gone = (~keep_I).nonzero()[:, 0]
        if len(gone):
            row -= row[gone] @ torch.linalg.inv(inverse_II[gone][:, gone]) @ inverse_II[gone]
    torch.testing.assert_close(under_mask(weight_OI, mask_OI, hessian_II), expected_OI)


def test_inputs_that_are_never_read_do_no_harm() -> None:
    """Their weights are the first to go, however large, so that the others cost nothing more."""
    x_BTI = correlated(2, 40, 12) / 10  # whose own diagonals are below 1
    x_BTI[..., 5:9] = 0
    matrix = matrix_of(noise(4, 12), x_BTI, Unstructured(0.5), PerMatrix())
    mask_OI = ObsSaliency().mask(matrix)
    assert not mask_OI[:, 5:9].any()
    kept_OI = SparseGPTSweep().weight(matrix, torch.ones_like(mask_OI))
    assert not kept_OI[:, 5:9].any()
    assert output_error(matrix.weight_OI, kept_OI, x_BTI) == 0
    for part in (SparseGPTSweep(), LeastSquares()):
        weight_OI = part.weight(matrix, mask_OI)
        assert bool(weight_OI.isfinite().all())
        assert not weight_OI[~mask_OI].any()


def test_initial_zeros_are_removed_first() -> None:
    """Also if losses of the first 128 columns have given it a value by then."""
    early_OI = noise(8, 300, seed=7) > -0.52
    weight_OI, x_BTI = noise(8, 300) * early_OI, correlated(2, 400, 300)
    mask_OI = ObsSaliency().mask(matrix_of(weight_OI, x_BTI, Unstructured(0.5), PerMatrix()))
    assert not (mask_OI & ~early_OI).any()


def test_a_failing_cholesky_is_repaired_and_noted() -> None:
    x_BTI = noise(1, 3, 1).expand(1, 3, 40) * 1e3  # rank one
    notes: list[str] = []
    matrix = matrix_of(noise(4, 40), x_BTI, Unstructured(0.5), PerMatrix(), note=notes.append)
    mask_OI = ObsSaliency(1e-12).mask(matrix)
    weight_OI = SparseGPTSweep(1e-12).weight(matrix, mask_OI)
    assert bool(weight_OI.isfinite().all())
    assert notes[0].startswith("Cholesky failed at damping 1e-12; repaired with 1e-")
    notes.clear()
    assert bool(LeastSquares(1e-12).weight(matrix, mask_OI).isfinite().all())
    assert any("Cholesky failed at damping 1e-12" in note for note in notes)


def test_the_factors_are_those_of_the_inverses_and_only_a_failure_is_damped_more() -> None:
    singular = torch.ones(12, 12)
    hessian_SII = torch.stack(
        [inputs_of(correlated(2, 40, 12, seed=seed)).hessian_II() for seed in (0, 1)]
    )
    factor_SII, used = inverse_factors(
        torch.stack([hessian_SII[0], singular, hessian_SII[1]]), 1e-9
    )
    assert used[0] == used[2] == 1e-9
    assert used[1] > 1e-9
    for factor_II, hessian_II in zip(factor_SII[[0, 2]], hessian_SII, strict=True):
        assert torch.equal(factor_II, inverse_factors(hessian_II[None], 1e-9)[0][0])
        product_II = factor_II.T @ factor_II @ damped(hessian_II, 1e-9)
        torch.testing.assert_close(product_II, torch.eye(12), atol=1e-3, rtol=0)
    assert bool(factor_SII[1].isfinite().all())


def test_joint_losses_by_hand() -> None:
    inverse_CC = torch.eye(4)
    inverse_CC[0, 1] = inverse_CC[1, 0] = 0.9
    sets, loss_OS = joint_losses(torch.ones(1, 4), inverse_CC, 2)
    assert sets == [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]
    torch.testing.assert_close(loss_OS, torch.tensor([[2 / 1.9, 2, 2, 2, 2, 2]]))
    inverse_CC[0, 1] = inverse_CC[1, 0] = -0.9
    torch.testing.assert_close(joint_losses(torch.ones(1, 4), inverse_CC, 2)[1][0, 0], tensor(20.0))


@pytest.mark.parametrize("pattern", [NM(2, 4), NM(3, 4), NM(4, 8)])
def test_a_joint_choice_loses_less_than_single_ones(pattern: NM) -> None:
    """In one group, which is all there is, the set of the least squared error is found."""
    for seed in range(10):
        weight_OI, x_BTI = noise(1, pattern.m, seed=seed), correlated(2, 60, pattern.m, seed=seed)
        matrix = matrix_of(weight_OI, x_BTI, pattern)
        mask_OI = JointSaliency(1e-6).mask(matrix)
        errors = {}
        for gone in combinations(range(pattern.m), pattern.n):
            keep_OI = torch.ones_like(mask_OI)
            keep_OI[0, list(gone)] = False
            refitted_OI = LeastSquares(1e-6).weight(matrix, keep_OI)
            errors[gone] = output_error(weight_OI, refitted_OI, x_BTI)
        assert (~mask_OI[0]).nonzero()[:, 0].tolist() == [*min(errors, key=lambda g: errors[g])]


def test_a_joint_choice_loses_less_over_many_groups() -> None:
    ratios = []
    for seed in range(8):
        weight_OI, x_BTI = noise(16, 64, seed=seed), correlated(2, 100, 64, seed=seed)
        lost = []
        for score in (JointSaliency(), ObsSaliency()):
            matrix = matrix_of(weight_OI, x_BTI, NM(2, 4), PerRow())
            swept_OI = SparseGPTSweep().weight(matrix, score.mask(matrix))
            lost.append(output_error(weight_OI, swept_OI, x_BTI))
        ratios.append(lost[0] / lost[1])
    assert max(ratios) < 1.1
    assert sum(ratios) / len(ratios) < 1


def test_a_joint_choice_removes_zeros_first() -> None:
    weight_OI = noise(8, 40)
    weight_OI[:, 1::4] = 0
    weight_OI[0] = 0
    matrix = matrix_of(weight_OI, correlated(2, 60, 40), NM(2, 4), PerRow())
    mask_OI = JointSaliency().mask(matrix)
    assert not mask_OI[:, 1::4].any()
    assert mask_OI[0].view(-1, 4).tolist() == [[False, False, True, True]] * 10


def test_a_joint_choice_is_for_small_groups_along_the_inputs() -> None:
    score, linear = JointSaliency(), matrix_of(noise(4, 32), noise(1, 9, 32), NM(2, 4)).linear
    assert score.refuse(linear, NM(2, 4), PerRow()) is None
    assert "`pattern` NM with `group` PerRow" in str(
        score.refuse(linear, Unstructured(0.5), PerRow())
    )
    assert "`pattern` NM with `group` PerRow" in str(score.refuse(linear, NM(2, 4), PerColumn()))
    assert "12870 for `m` 16; use `m` up to 8" in str(score.refuse(linear, NM(8, 16), PerRow()))


def test_layers_that_read_inputs_as_wide_are_factorised_together() -> None:
    first, second = (
        matrix_of(noise(4, 12), correlated(2, 40, 12, seed=seed), NM(2, 4)) for seed in (0, 1)
    )
    ObsSaliency().mask(second)
    alone_II, _ = second.inputs[Gram].memo.pop(0.01)
    first.alike = second.alike = [first.inputs, second.inputs]
    ObsSaliency().mask(first)
    assert torch.equal(second.inputs[Gram].memo[0.01][0], alone_II)


def test_the_gram_matrix_is_whole_and_symmetric() -> None:
    x_BTI = noise(2, 30, 300)  # wider than one chunk
    hessian_II = inputs_of(x_BTI).hessian_II()
    flat = x_BTI.flatten(0, 1)
    torch.testing.assert_close(hessian_II, flat.T @ flat, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("part", [ObsSaliency, SparseGPTSweep, LeastSquares])
@pytest.mark.parametrize("damping", [0.0, float("inf")])
def test_a_damping_that_cannot_be_is_refused(part: type, damping: float) -> None:
    with pytest.raises(ValueError, match="`damping` must be finite and above 0"):
        part(damping=damping)
