from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from secateur.pruning.losses import TokenLosses
from secateur.pruning.widths.gates import GateSampler, Stream
from secateur.pruning.widths.learning import ExactBudget, Penalty, Pressure
from secateur.pruning.widths.policy_gradient import (
    Draw,
    LeaveOneOut,
    MovingAverage,
    PolicyGradient,
)

NAN = torch.tensor(torch.nan)
LOGITS_N = torch.tensor([-0.8, 0.1, 0.5, 1.2])


def loss_of(mask_N: Tensor) -> Tensor:
    """Depends on every gate and on pairs of gates."""
    weight_N = torch.tensor([1.0, -2.0, 0.5, 1.5])
    return (mask_N * weight_N).sum() + mask_N[0] * mask_N[3] - 2 * mask_N[1] * mask_N[2]


def evaluate(mask_N: Tensor) -> TokenLosses:
    value = loss_of(mask_N.detach().round())
    return TokenLosses(value, value, value)


def two_best(scores_N: Tensor) -> Tensor:
    return torch.zeros_like(scores_N).index_fill(0, scores_N.topk(2).indices, 1.0)


def test_a_gradient_by_hand() -> None:
    logit = torch.tensor([math.log(0.25 / 0.75)], requires_grad=True)
    masks, losses = (torch.ones(1), torch.zeros(1)), {1.0: 2.0, 0.0: 3.0}

    def draw(number: int) -> Draw:
        log_p = torch.distributions.Bernoulli(logits=logit).log_prob(masks[number])
        return Draw(masks[number], log_p.sum)

    def found(mask_N: Tensor) -> TokenLosses:
        value = torch.tensor(losses[float(mask_N)])
        return TokenLosses(value, value, value)

    estimate = PolicyGradient(2).estimate(draw, found, NAN)
    estimate.surrogate.backward()
    assert logit.grad is not None
    assert float(logit.grad) == pytest.approx(-0.5)
    assert float(estimate.losses.total) == 2.5


def mean_gradient(pressure: Pressure, draws: int) -> tuple[Tensor, Tensor]:
    """Mean of the estimates, and its standard error."""
    sampler = GateSampler(offset=0.0, temperature=1e-3)
    gradients = []
    for step in range(draws):
        logits_N = LOGITS_N.clone().requires_grad_()

        def draw(number: int, logits_N: Tensor = logits_N, step: int = step) -> Draw:
            return pressure.draw(sampler, logits_N, Stream(step, 0, number), two_best)

        surrogate = PolicyGradient(2).estimate(draw, evaluate, NAN).surrogate
        gradients.append(torch.autograd.grad(surrogate, logits_N)[0])
    all_DN = torch.stack(gradients)
    return all_DN.mean(0), all_DN.std(0) / math.sqrt(draws)


def test_the_mean_gradient_is_exact_for_independent_gates() -> None:
    logits_N = LOGITS_N.clone().requires_grad_()
    expected = torch.zeros(())
    for bits in itertools.product((0.0, 1.0), repeat=4):
        mask_N = torch.tensor(bits)
        p = torch.distributions.Bernoulli(logits=logits_N).log_prob(mask_N).sum().exp()
        expected = expected + p * loss_of(mask_N)
    (exact_N,) = torch.autograd.grad(expected, logits_N)
    found_N, error_N = mean_gradient(Penalty(), 1500)
    assert bool(((found_N - exact_N).abs() < 4 * error_N).all())


def test_the_mean_gradient_is_exact_on_budget() -> None:
    """Against a numerical derivative of the mean loss over many draws of the same noise."""
    sampler, draws, step = GateSampler(offset=0.0), 400_000, 0.2
    uniform_N = torch.rand(draws * 4, generator=torch.Generator().manual_seed(3))
    noise_DN = sampler.noise.from_uniform(uniform_N).view(draws, 4)
    weight_N = torch.tensor([1.0, -2.0, 0.5, 1.5])

    def mean_loss(logits_N: Tensor) -> float:
        best = (logits_N + noise_DN).topk(2, dim=1).indices
        mask_DN = torch.zeros(draws, 4).scatter(1, best, 1.0)
        pairs = mask_DN[:, 0] * mask_DN[:, 3] - 2 * mask_DN[:, 1] * mask_DN[:, 2]
        return float((mask_DN @ weight_N + pairs).double().mean())

    numeric = [
        (mean_loss(LOGITS_N + step * unit_N) - mean_loss(LOGITS_N - step * unit_N)) / (2 * step)
        for unit_N in torch.eye(4)
    ]
    found_N, error_N = mean_gradient(ExactBudget(), 1500)
    assert bool(((found_N - torch.tensor(numeric)).abs() < 4 * error_N + 0.02).all())


def test_baselines_by_hand() -> None:
    losses_K = torch.tensor([1.0, 2.0, 6.0])
    baseline_K, state = LeaveOneOut().of(losses_K, NAN)
    assert baseline_K.tolist() == [4.0, 3.5, 1.5]
    assert bool(state.isnan())
    first, state = MovingAverage(5).of(losses_K, NAN)
    assert float(first) == float(state) == 3.0
    second, state = MovingAverage(5).of(losses_K + 5, state)
    assert float(second) == float(state) == pytest.approx(0.8 * 3 + 0.2 * 8)


def test_draws_of_a_step_differ_and_repeat() -> None:
    sampler = GateSampler()
    places = [Stream(step, 0, sample) for step in range(3) for sample in range(4)]
    noise = [tuple(sampler.noise_of(torch.zeros(8), place).tolist()) for place in places]
    assert len(set(noise)) == len(noise)
    assert noise == [tuple(sampler.noise_of(torch.zeros(8), place).tolist()) for place in places]


@pytest.mark.parametrize("samples", [1, 17])
def test_numbers_out_of_range_are_refused(samples: int) -> None:
    with pytest.raises(ValueError, match=f"`samples` must be 2 to 16, got {samples}"):
        PolicyGradient(samples)
    with pytest.raises(ValueError, match="`window` must be 1 or more, got 0"):
        MovingAverage(0)
