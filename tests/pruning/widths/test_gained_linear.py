from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from secateur.pruning.widths.gained_linear import gained_linear


def _case(bias: bool, *tokens: int) -> tuple[nn.Linear, Tensor, Tensor, Tensor]:
    """A frozen layer of 3 inputs and 2 outputs, what it reads, and gains; all float64."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    layer = nn.Linear(3, 2, bias=bias, dtype=torch.float64).requires_grad_(False)
    for parameter in layer.parameters():
        parameter.copy_(draw(*parameter.shape))
    return layer, *(t.requires_grad_() for t in (draw(*tokens, 3), draw(3), draw(2)))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("tokens", [(5,), (2, 4)])
def test_value_and_gradients_are_those_of_the_formula(bias: bool, tokens: tuple[int, ...]) -> None:
    layer, *inputs = _case(bias, *tokens)
    x, input_gain, output_gain = inputs
    found = gained_linear(layer, x, input_gain, output_gain)
    expected = output_gain * layer(input_gain * x)
    torch.testing.assert_close(found, expected)
    weights = torch.arange(found.numel(), dtype=torch.float64).view(found.shape)
    for own, of in zip(
        torch.autograd.grad((weights * found).sum(), inputs),
        torch.autograd.grad((weights * expected).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(own, of)


def test_gains_of_zero_have_gradients() -> None:
    layer, x, input_gain, output_gain = _case(True, 4)
    zeros = torch.zeros_like(input_gain, requires_grad=True)
    gained_linear(layer, x.detach(), zeros, output_gain).sum().backward()
    assert zeros.grad is not None
    assert bool((zeros.grad != 0).all())


def test_gradients_of_gains_are_as_wide_as_the_gains() -> None:
    layer, x, input_gain, output_gain = _case(False, 4)
    gains = [gain.detach().float().requires_grad_() for gain in (input_gain, output_gain)]
    found = gained_linear(layer.bfloat16(), x.detach().bfloat16(), *gains)
    assert found.dtype == torch.bfloat16
    found.sum().backward()
    assert [gain.grad is not None and gain.grad.dtype for gain in gains] == [torch.float32] * 2
