from __future__ import annotations

import pytest
import torch

from secateur.pruning.weights.pattern import (
    NM,
    Group,
    Pattern,
    PerColumn,
    PerMatrix,
    PerRow,
    Unstructured,
    keep_highest,
)
from tests.pruning.weights.matrices import noise

GROUPS = [PerRow(), PerColumn(), PerMatrix()]


def test_a_4_by_4_case_by_hand() -> None:
    score_OI = torch.tensor(
        [[1.0, 2, 3, 4], [8, 7, 6, 5], [9, 1, 9, 1], [5, 5, 5, 5]],
    )
    rows = torch.tensor([[0, 0, 1, 1], [1, 1, 0, 0], [1, 0, 1, 0], [0, 0, 1, 1]]).bool()
    assert torch.equal(Unstructured(0.5).mask(score_OI, PerRow()), rows)
    assert torch.equal(NM(2, 4).mask(score_OI, PerRow()), rows)
    # columns 1 8 9 5 / 2 7 1 5 / 3 6 9 5 / 4 5 1 5: of the equal fives the first goes
    columns = torch.tensor([[0, 0, 0, 0], [1, 1, 1, 1], [1, 0, 1, 0], [0, 1, 0, 1]]).bool()
    assert torch.equal(Unstructured(0.5).mask(score_OI, PerColumn()), columns)
    # eight of sixteen stay: 9 9 8 7 6 and three of the five fives, the last ones in reading order
    matrix = torch.tensor([[0, 0, 0, 0], [1, 1, 1, 0], [1, 0, 1, 0], [0, 1, 1, 1]]).bool()
    assert torch.equal(Unstructured(0.5).mask(score_OI, PerMatrix()), matrix)


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("pattern", [Unstructured(0.3), Unstructured(0.0), NM(1, 4), NM(5, 6)])
def test_every_group_loses_exactly_its_number(pattern: Pattern, group: Group) -> None:
    score_OI = noise(12, 24)
    if isinstance(pattern, NM) and isinstance(group, PerMatrix):
        return
    mask_OI = pattern.mask(score_OI, group)
    keep_GE = pattern.split(mask_OI, group)
    assert set((~keep_GE).sum(1).tolist()) == {pattern.num_removed(keep_GE.shape[1])}
    score_GE = pattern.split(score_OI, group)
    worst_kept = score_GE.masked_fill(~keep_GE, float("inf")).min(1).values
    best_removed = score_GE.masked_fill(keep_GE, float("-inf")).max(1).values
    assert bool((worst_kept >= best_removed).all())


@pytest.mark.parametrize("group", GROUPS)
def test_join_is_the_inverse_of_split(group: Group) -> None:
    x_OI = noise(6, 8)
    assert torch.equal(Unstructured(0.5).join(group.split(x_OI), x_OI.shape, group), x_OI)
    if not isinstance(group, PerMatrix):
        pattern = NM(1, 2)
        assert torch.equal(pattern.join(pattern.split(x_OI, group), x_OI.shape, group), x_OI)


@pytest.mark.parametrize("num_removed", [0, 1, 4, 9])
def test_of_equal_scores_the_first_go(num_removed: int) -> None:
    score_GE = torch.randint(4, (50, 9), generator=torch.Generator().manual_seed(0)).float()
    for each_GE in (score_GE, score_GE.T.contiguous().T):
        order_GE = each_GE.argsort(dim=1, stable=True)
        expected_GE = torch.ones_like(each_GE, dtype=torch.bool)
        expected_GE.scatter_(1, order_GE[:, :num_removed], False)
        assert torch.equal(keep_highest(each_GE, num_removed), expected_GE)


def test_nm_of_columns_groups_consecutive_outputs() -> None:
    mask_OI = NM(1, 2).mask(
        torch.tensor([[1.0, 2.0], [3.0, 1.0], [5.0, 5.0], [4.0, 6.0]]), PerColumn()
    )
    assert mask_OI.tolist() == [[False, True], [True, False], [True, False], [False, True]]


def test_a_fraction_of_a_group_is_not_lost_to_rounding() -> None:
    assert Unstructured(0.29).num_removed(100) == 29  # 100 * 0.29 is 28.999999999999996
    assert Unstructured(0.7).num_removed(256) == 179


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, 1.5, float("nan")])
def test_a_sparsity_out_of_range_is_refused(sparsity: float) -> None:
    with pytest.raises(ValueError, match=r"`sparsity` must be in \[0, 1\)"):
        Unstructured(sparsity)


@pytest.mark.parametrize(("n", "m"), [(0, 4), (4, 4), (5, 4), (-1, 2)])
def test_nm_out_of_range_is_refused(n: int, m: int) -> None:
    with pytest.raises(ValueError, match="`n` must be 1 or more and less than `m`"):
        NM(n, m)


def test_nm_over_a_whole_matrix_is_refused() -> None:
    with pytest.raises(ValueError, match="PerMatrix cannot be used with NM"):
        NM(2, 4, PerMatrix())


def test_an_axis_that_m_does_not_divide_is_refused_with_the_cure() -> None:
    assert NM(2, 4).refuse((37, 24), PerRow()) is None
    reason = NM(2, 4).refuse((37, 24), PerColumn())
    assert reason is not None
    assert "`m` 4 does not divide its output features, 37" in reason
    assert "choose `m` among 2, 3, 5, 6" in str(NM(2, 4).refuse((8, 30), PerRow()))


def test_only_unstructured_has_another_sparsity() -> None:
    assert Unstructured(0.5, PerRow()).with_sparsity(0.2) == Unstructured(0.2, PerRow())
    assert NM(2, 4).with_sparsity(0.5) == NM(2, 4)
    with pytest.raises(ValueError, match="cannot remove 0.4"):
        NM(2, 4).with_sparsity(0.4)
