"""A frozen linear layer with trained gains on its inputs and outputs.

    y = g_out * (W (g_in * x) + b)

Plain autograd would multiply activations twice in the forward pass and keep three tensors per
layer. Here g_in is multiplied into W, which is smaller than the activations of a batch, and

    dL/dg_out = sum over tokens of dL/dy * (W (g_in * x) + b)
    dz        = (g_out * W)^T dL/dy
    dL/dg_in  = sum over tokens of x * dz,    dL/dx = g_in * dz,

so that layers with the same input x keep it once, and no gradient of W is computed.

Legend: I = input features, O = output features, N = tokens, in one or more axes.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F


class _GainedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_NI: Tensor,
        weight_OI: Tensor,
        bias_O: Tensor | None,
        input_gain_I: Tensor,
        output_gain_O: Tensor,
    ) -> Tensor:
        plain_NO = F.linear(x_NI, weight_OI * input_gain_I.to(weight_OI.dtype), bias_O)
        ctx.save_for_backward(x_NI, plain_NO, weight_OI, input_gain_I, output_gain_O)
        return plain_NO * output_gain_O.to(plain_NO.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient_NO,) = gradients
        x_NI, plain_NO, weight_OI, input_gain_I, output_gain_O = ctx.saved_tensors
        scaled_OI = weight_OI * output_gain_O.to(weight_OI.dtype).unsqueeze(1)
        scaled_gradient_NI = gradient_NO @ scaled_OI.to(gradient_NO.dtype)
        of_x_NI = None
        if ctx.needs_input_grad[0]:
            of_x_NI = scaled_gradient_NI * input_gain_I.to(scaled_gradient_NI.dtype)
        of_input_I = _sum_of_products(x_NI, scaled_gradient_NI, input_gain_I.dtype)
        of_output_O = _sum_of_products(plain_NO, gradient_NO, output_gain_O.dtype)
        return of_x_NI, None, None, of_input_I, of_output_O


def _sum_of_products(a_NF: Tensor, b_NF: Tensor, dtype: torch.dtype) -> Tensor:
    return (a_NF * b_NF).flatten(0, -2).sum(0, dtype=dtype)


def gained_linear(
    layer: nn.Linear,
    x_NI: Float[Tensor, "*N I"],
    input_gain_I: Float[Tensor, " I"],
    output_gain_O: Float[Tensor, " O"],
) -> Float[Tensor, "*N O"]:
    """Output of a frozen layer with gains; its weight and bias get no gradient.

    Args:
        layer: The layer.
        x_NI: Its input, with one or more axes of tokens.
        input_gain_I: Factors on its inputs.
        output_gain_O: Factors on its outputs, bias included.
    """
    output_NO: Tensor = _GainedLinear.apply(  # type: ignore[no-untyped-call]
        x_NI, layer.weight, layer.bias, input_gain_I, output_gain_O
    )
    return output_NO
