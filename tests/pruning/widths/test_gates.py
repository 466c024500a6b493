from __future__ import annotations

import math

import pytest
import torch

from secateur.pruning.widths.gates import (
    GateSampler,
    Logistic,
    Noise,
    ReferenceGumbel,
    ReinMax,
    Relaxation,
    Soft,
    StraightThrough,
    Stream,
)

LOGITS = (-3.0, -0.7, 0.0, 0.4, 2.5)
DRAWS = 200_000
STANDARD_ERRORS = 5 * 0.5 / math.sqrt(DRAWS)  # five of the largest possible


@pytest.mark.parametrize("noise", [Logistic(), ReferenceGumbel()])
@pytest.mark.parametrize("logit", LOGITS)
def test_keep_probability_is_the_share_of_kept_samples(noise: Noise, logit: float) -> None:
    uniform = torch.rand(DRAWS, generator=torch.Generator().manual_seed(1))
    kept = (logit + noise.from_uniform(uniform) > 0).double().mean()
    expected = noise.keep_probability(torch.tensor([logit]))
    assert float(kept) == pytest.approx(float(expected), abs=STANDARD_ERRORS)


def test_keep_probabilities_by_hand() -> None:
    zero = torch.zeros(1)
    assert float(Logistic().keep_probability(zero)) == 0.5
    assert float(Logistic().keep_probability(zero + math.log(3))) == pytest.approx(0.75)
    assert float(ReferenceGumbel().keep_probability(zero)) == pytest.approx(1 - 1 / math.e)


def test_logistic_noise_is_the_difference_of_two_gumbels() -> None:
    generator = torch.Generator().manual_seed(2)
    first, second, third = torch.rand(3, DRAWS, generator=generator)
    gumbel, levels = ReferenceGumbel(), torch.linspace(0.05, 0.95, 10)
    difference = gumbel.from_uniform(first) - gumbel.from_uniform(second)
    torch.testing.assert_close(
        difference.quantile(levels),
        Logistic().from_uniform(third).quantile(levels),
        rtol=0,
        atol=0.04,
    )


@pytest.mark.parametrize("noise", [Logistic(), ReferenceGumbel()])
def test_noise_is_finite_at_the_ends_of_the_uniform_numbers(noise: Noise) -> None:
    ends = torch.tensor([0.0, 1 - 2.0**-24])
    assert bool(noise.from_uniform(ends).isfinite().all())


def _grad(relaxation: Relaxation, logits: torch.Tensor, noise: torch.Tensor, tau: float) -> tuple:
    logits = logits.clone().requires_grad_()
    gates = relaxation(logits, noise, tau)
    (gradient,) = torch.autograd.grad(gates.sum(), logits)
    return gates.detach(), gradient


def test_soft_gates_by_hand() -> None:
    # (0.2 + 0.2) / 0.4 = 1: sigmoid(1) = 0.7311, its slope 0.1966 / 0.4 = 0.4915.
    gates, gradient = _grad(Soft(), torch.tensor([0.2]), torch.tensor([0.2]), 0.4)
    assert float(gates) == pytest.approx(0.731059, abs=1e-5)
    assert float(gradient) == pytest.approx(0.491530, abs=1e-5)


def test_straight_through_is_hard_forward_and_soft_backward() -> None:
    generator = torch.Generator().manual_seed(3)
    logits, noise = torch.randn(2, 1000, generator=generator)
    hard, hard_gradient = _grad(StraightThrough(), logits, noise, 0.4)
    soft, soft_gradient = _grad(Soft(), logits, noise, 0.4)
    assert torch.equal(hard, (soft > 0.5).float())
    assert 0 < hard.mean() < 1
    assert torch.equal(hard_gradient, soft_gradient)


@pytest.mark.parametrize("logit", LOGITS)
def test_reinmax_has_the_exact_mean_gradient_at_temperature_1(logit: float) -> None:
    logits = torch.full((2,), logit, dtype=torch.float64)
    gates, gradient = _grad(ReinMax(), logits, torch.tensor([50.0, -50.0]).double(), 1.0)
    assert gates.tolist() == [1.0, 0.0]
    p = 1 / (1 + math.exp(-logit))
    mean = p * float(gradient[0]) + (1 - p) * float(gradient[1])
    assert mean == pytest.approx(p * (1 - p), abs=1e-12)


def test_reinmax_by_hand() -> None:
    # p = 0.5: m = 0.75 or 0.25, 2 * 0.75 * 0.25 - 0.125 = 0.25 for either sample.
    _, gradient = _grad(ReinMax(), torch.zeros(2), torch.tensor([1.0, -1.0]), 1.0)
    assert gradient.tolist() == pytest.approx([0.25, 0.25])
    # p = 0.75, temperature 0.5: p_t = 9 / 10; D = 1: m = 0.95, 2 * 0.95 * 0.05 - 0.09375 = 0.00125;
    # D = 0: m = 0.45, 2 * 0.45 * 0.55 - 0.09375 = 0.40125.
    logits = torch.full((2,), math.log(3))
    _, gradient = _grad(ReinMax(), logits, torch.tensor([9.0, -9.0]), 0.5)
    assert gradient.tolist() == pytest.approx([0.00125, 0.40125], abs=1e-6)


@pytest.mark.parametrize(
    ("noise", "relaxation"),
    [
        (Logistic(), Soft()),
        (Logistic(), StraightThrough()),
        (Logistic(), ReinMax()),
        (ReferenceGumbel(), Soft()),
        (ReferenceGumbel(), StraightThrough()),
    ],
)
def test_gates_lie_between_0_and_1(relaxation: Relaxation, noise: Noise) -> None:
    temperature = 1.0 if isinstance(relaxation, ReinMax) else 0.1
    sampler = GateSampler(noise, relaxation, offset=0.0, temperature=temperature)
    gates = sampler(torch.linspace(-20, 20, 1001), Stream(0))
    assert float(gates.min()) >= 0
    assert float(gates.max()) <= 1
    if not isinstance(relaxation, Soft):
        assert set(gates.tolist()) == {0.0, 1.0}


def test_a_draw_depends_on_seed_and_step_and_on_nothing_else() -> None:
    logits = torch.zeros(500)
    sampler = GateSampler(seed=4)
    first = sampler(logits, Stream(7))
    torch.rand(3)
    sampler(logits, Stream(8))
    assert torch.equal(first, sampler(logits, Stream(7)))
    assert torch.equal(first, GateSampler(seed=4)(logits, Stream(7)))
    assert not torch.equal(first, sampler(logits, Stream(8)))
    assert not torch.equal(first, GateSampler(seed=5)(logits, Stream(7)))


def test_drawing_leaves_the_global_random_state_alone() -> None:
    before = torch.get_rng_state()
    GateSampler()(torch.zeros(10), Stream(3))
    assert torch.equal(before, torch.get_rng_state())


def test_ranks_share_their_masks_unless_asked_not_to() -> None:
    logits = torch.zeros(500)
    shared, own = GateSampler(per_rank=False), GateSampler(per_rank=True)
    assert torch.equal(shared(logits, Stream(1, 0)), shared(logits, Stream(1, 3)))
    draws = [own(logits, Stream(step, rank)) for step in range(3) for rank in range(4)]
    assert len({tuple(draw.tolist()) for draw in draws}) == 12
    assert torch.equal(draws[0], shared(logits, Stream(0)))


def test_the_offset_starts_training_almost_dense() -> None:
    sampler = GateSampler(Logistic(), StraightThrough(), offset=3.0)
    gates = sampler(torch.zeros(100_000), Stream(0))
    assert float(gates.mean()) == pytest.approx(1 / (1 + math.exp(-3)), abs=0.004)
    assert float(sampler.keep_probability(torch.zeros(1))) == pytest.approx(0.952574, abs=1e-6)


def test_recipe_tells_configurations_apart() -> None:
    assert GateSampler().recipe() == GateSampler().recipe()
    assert GateSampler().recipe() != GateSampler(ReferenceGumbel()).recipe()
    assert GateSampler().recipe() != GateSampler(relaxation=ReinMax(), temperature=1.0).recipe()


def test_settings_out_of_range() -> None:
    with pytest.raises(ValueError, match=r"`temperature` must be above 0, got 0\.0"):
        GateSampler(temperature=0.0)
    with pytest.raises(ValueError, match="`seed` must be 0 or more, got -1"):
        GateSampler(seed=-1)


def test_reinmax_is_refused_with_the_noise_that_it_is_not_derived_for() -> None:
    with pytest.raises(ValueError, match="`relaxation` ReinMax is derived for `noise` Logistic"):
        GateSampler(ReferenceGumbel(), ReinMax())
    with pytest.raises(ValueError, match=r"`temperature` 0.4 is too low for `relaxation` ReinMax"):
        GateSampler(relaxation=ReinMax())
