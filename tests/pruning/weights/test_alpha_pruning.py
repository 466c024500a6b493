from __future__ import annotations

import pytest
import torch
from torch import Tensor

from secateur.pruning.weights.alpha_pruning import (
    AlphaPruning,
    ClosestToPowerLaw,
    Median,
    Peak,
    TailStart,
    scaled_spread,
    spread_sparsity,
    tail_exponent,
)
from secateur.pruning.weights.pattern import NM, Unstructured
from tests.pruning.weights.matrices import noise

# Exponents of the blocks of LLaMA 7B, and the published sparsities at 0.7 with spread 0.2.
ALPHAS = [
    2.622, 2.89, 2.969, 2.964, 3.09, 3.064, 2.961, 2.746, 2.775, 2.609, 2.717, 2.73, 2.784, 2.852,
    2.897, 3.177, 3.123, 3.446, 3.872, 3.606, 3.894, 4.066, 3.755, 3.715, 3.994, 4.22, 4.102, 4.16,
    3.851, 4.093, 4.16, 3.537,
]  # fmt: skip
SPARSITIES = [
    0.5704, 0.6176, 0.6315, 0.6307, 0.6529, 0.6482, 0.6301, 0.5922, 0.5974, 0.5680, 0.5871, 0.5894,
    0.5990, 0.6109, 0.6188, 0.6681, 0.6587, 0.7156, 0.7906, 0.7438, 0.7946, 0.8248, 0.7701, 0.7629,
    0.8122, 0.8521, 0.8313, 0.8415, 0.7869, 0.8297, 0.8414, 0.7317,
]  # fmt: skip


def test_the_published_allocation_of_llama_7b() -> None:
    found = spread_sparsity(ALPHAS, [1] * 32, sparsity=0.7, spread=0.2)
    torch.testing.assert_close(torch.tensor(found), torch.tensor(SPARSITIES), atol=1.5e-4, rtol=0)


def test_two_blocks_by_hand() -> None:
    assert spread_sparsity([2.0, 4.0], [1, 1], 0.5, 0.2) == pytest.approx([0.4, 0.6])
    # the second block three times as large: the mean of 0.8 and 1.2 is 1.1
    assert spread_sparsity([2.0, 4.0], [1, 3], 0.55, 0.2) == pytest.approx([0.4, 0.6])


def test_blocks_at_the_limit_pass_sparsity_to_others() -> None:
    found = spread_sparsity([2.0, 3.0, 4.0], [1, 1, 1], sparsity=0.9, spread=0.2)
    assert found[2] == 0.99
    assert sum(found) / 3 == pytest.approx(0.9)
    assert found[0] < found[1] < 0.99


@pytest.mark.parametrize("spread", [0.2, 1.0])
def test_blocks_that_are_alike_have_one_sparsity(spread: float) -> None:
    assert spread_sparsity([3.0, 3.0], [1, 2], 0.4, spread) == pytest.approx([0.4, 0.4])


@pytest.mark.parametrize(("sparsity", "spread"), [(0.7, 1.0), (0.99, 0.2), (0.99, 1.0), (0.0, 1.0)])
def test_the_mean_is_kept_up_to_the_limits(sparsity: float, spread: float) -> None:
    """By hand, spread 1 at 0.7: factors 0 and 2, the second block is full, and 0.41 is left."""
    found = spread_sparsity([2.0, 4.0], [1, 1], sparsity, spread)
    assert sum(found) / 2 == pytest.approx(sparsity)
    assert max(found) <= 0.99
    if (sparsity, spread) == (0.7, 1.0):
        assert found == pytest.approx([0.41, 0.99])


TAILS = [Peak(), Median(), ClosestToPowerLaw()]


def with_spectrum(lambda_E: Tensor) -> Tensor:
    rotation = torch.linalg.qr(noise(len(lambda_E), len(lambda_E))).Q
    return rotation * lambda_E.sqrt()


@pytest.mark.parametrize("tail", TAILS, ids=str)
def test_the_exponent_of_a_power_law_is_found(tail: TailStart) -> None:
    # eigenvalues at the quantiles of a power law with exponent 3: P(lambda > x) = x^-2
    weight_OI = with_spectrum(((torch.arange(400) + 0.5) / 400).pow(-1 / 2))
    assert tail_exponent(weight_OI, tail) == pytest.approx(3.0, rel=0.05)
    assert tail_exponent(10 * weight_OI, tail) == pytest.approx(3.0, rel=0.05)


@pytest.mark.parametrize("tail", TAILS, ids=str)
def test_eigenvalues_that_are_rounding_do_not_count(tail: TailStart) -> None:
    weight_OI = noise(60, 40) * torch.linspace(0, 3, 40).exp()
    found = tail_exponent(weight_OI, tail)
    singular = torch.cat([weight_OI, weight_OI[:, :5]], 1)
    assert tail_exponent(torch.cat([weight_OI, torch.zeros(60, 3)], 1), tail) == pytest.approx(
        found, rel=1e-4
    )
    assert tail_exponent(singular, tail) != pytest.approx(found, rel=1e-4)


def test_exponents_that_are_nearly_equal_spread_less() -> None:
    assert scaled_spread([2.0, 4.0], 0.2) == 0.2
    assert scaled_spread([1.66, 1.81], 0.2) == pytest.approx(0.03)
    assert scaled_spread([3.0, 3.0], 0.2) == 0


def test_a_lighter_tail_has_a_larger_exponent() -> None:
    weight_OI = noise(600, 400)
    heavy_OI = weight_OI * torch.linspace(0, 3, 400).exp()
    heavy, light = tail_exponent(heavy_OI), tail_exponent(weight_OI)
    assert heavy is not None
    assert light is not None
    assert heavy < light


def test_it_gives_every_block_its_own_sparsity() -> None:
    blocks = [
        {"0.up": noise(600, 400)},
        {"1.up": noise(600, 400, seed=1) * torch.linspace(0, 3, 400).exp()},
    ]
    light, heavy = AlphaPruning().sparsities(lambda: iter(blocks), 0.5) or []
    assert heavy < light
    assert (light + heavy) / 2 == pytest.approx(0.5)


def test_nm_has_only_one_sparsity() -> None:
    assert AlphaPruning().refuse(Unstructured(0.5)) is None
    assert AlphaPruning().refuse(Unstructured(0.99)) is None
    assert "`sparsity` is 0.995; set 0.99" in str(AlphaPruning().refuse(Unstructured(0.995)))
    with pytest.raises(ValueError, match=r"`sparsity` must be in \[0, 0.99\], got 0.995"):
        spread_sparsity([2.0, 4.0], [1, 1], 0.995, 0.2)
    assert "NM has only one; use Unstructured" in str(AlphaPruning().refuse(NM(2, 4)))


@pytest.mark.parametrize("spread", [-0.1, 1.1])
def test_a_spread_out_of_range_is_refused(spread: float) -> None:
    with pytest.raises(ValueError, match=r"`spread` must be in \[0, 1\]"):
        AlphaPruning(spread)


def test_a_matrix_without_a_tail_is_refused() -> None:
    blocks = [{"0.up": noise(4, 4), "0.down": torch.ones(4, 4)}]
    with pytest.raises(
        ValueError, match="no tail in 0.down: fewer than two different eigen.*Use Uniform"
    ):
        AlphaPruning().sparsities(lambda: iter(blocks), 0.5)
