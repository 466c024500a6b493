"""Weighted least squares, regularised towards given weights: sums, solution, error.

    W' = (Y + m W0) (G + m I)^-1,    G = sum w^2 x x^T,    Y = sum w^2 y x^T

is the W that minimises sum w^2 |y - W x|^2 + m |W - W0|^2, so its error on the summed data is never
larger than that of W0. A bias is the weight of a constant input and is not damped.

Worked by hand: one input x = 1, 1, 2 at three tokens of weight 1, y = 2, 2, 5, W0 = 1, damping 0.5:
G = 6, Y = 14, m = 3, so W' = (14 + 3) / (6 + 3) = 17/9; the squared error falls from 11 to 1.52.

Legend: B = windows of a batch, T = tokens of a window, I = inputs of a layer, K = I and the
constant, O = outputs, Y = entries of a target; of a masked matrix: K = most kept inputs of a row, R
= rows of a chunk.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from secateur.pruning.blocks.statistics import Gram, next_damping

_CHUNK_ENTRIES = 2**24  # entries of the batched K x K matrices: 64 MiB


class Sums:
    """Sums over tokens of inputs x and targets y for least squares, float32.

    A constant 1 is appended to x, for biases.
    """

    def __init__(self) -> None:
        self._gram: Gram | None = None
        self.cross_YK = torch.zeros(())
        self.squares = 0.0

    def update(
        self,
        x_BTI: Float[Tensor, "B T I"],
        y_BTY: Float[Tensor, "B T Y"],
        weight_BT1: Float[Tensor, "B T 1"],
    ) -> None:
        """Add a batch, every token with its weight."""
        x_BTK, y_BTY = with_one(x_BTI.float()) * weight_BT1, y_BTY * weight_BT1
        if self._gram is None:
            self._gram = Gram(x_BTK.shape[-1], x_BTI.device)
            self.cross_YK = x_BTK.new_zeros(y_BTY.shape[-1], x_BTK.shape[-1])
        self._gram.update(x_BTK)
        self.cross_YK.addmm_(y_BTY.flatten(0, 1).T, x_BTK.flatten(0, 1))
        self.squares += float(y_BTY.square().sum())

    @property
    def gram_KK(self) -> Float[Tensor, "K K"]:
        """Sum of w^2 x x^T."""
        assert self._gram is not None, "there are windows"
        return self._gram.total_II


def solve(
    gram_KK: Float[Tensor, "K K"],
    cross_OK: Float[Tensor, "O K"],
    start_OK: Float[Tensor, "O K"],
    damping: float,
    has_bias: bool = False,
) -> tuple[Float[Tensor, "O K"], float]:
    """(Y + m W0) (G + m I)^-1 in float64, and the damping used.

    Args:
        gram_KK: G.
        cross_OK: Y.
        start_OK: W0.
        damping: m as a fraction of the mean diagonal of G, above 0; multiplied by ten if the
            factorisation fails.
        has_bias: The last input is a constant, which is not damped.
    """
    while True:
        damped_KK = damped(gram_KK, damping, has_bias)
        m_K = damped_KK.diagonal() - gram_KK.double().diagonal()
        lower_KK, failed = torch.linalg.cholesky_ex(damped_KK)
        target_OK = cross_OK.double() + m_K * start_OK.double()
        solved_OK = torch.cholesky_solve(target_OK.T, lower_KK).T
        if not int(failed) and bool(solved_OK.isfinite().all()):
            return solved_OK, damping
        damping = next_damping(damping)


def damped(
    gram_KK: Float[Tensor, "K K"], damping: float, has_bias: bool = False
) -> Float[Tensor, "K K"]:
    """G + m I in float64; arguments as for `solve`."""
    damped_K = torch.ones_like(gram_KK[0], dtype=torch.float64)
    if has_bias:
        damped_K[-1] = 0.0
    mean = float((gram_KK.diagonal() * damped_K).sum() / damped_K.sum()) or 1.0
    return gram_KK.double() + (damping * mean * damped_K).diag()


def under_mask(
    weight_OI: Float[Tensor, "O I"], mask_OI: Bool[Tensor, "O I"], hessian_II: Float[Tensor, "I I"]
) -> Float[Tensor, "O I"]:
    """The weights under a mask whose outputs are closest to those of the dense weights.

    Args:
        weight_OI: Weights.
        mask_OI: True for kept weights; rows may keep different numbers.
        hessian_II: Positive definite.

    Raises:
        torch.linalg.LinAlgError: The Hessian is not positive definite.
    """
    most = int(mask_OI.sum(1).max())
    target_OI = weight_OI @ hessian_II
    result_OI = torch.zeros_like(weight_OI)
    if most == 0:
        return result_OI
    # Kept positions first, in order; rows that keep fewer than `most` are padded with other
    # positions, whose equations are replaced by x = 0.
    place_OK = mask_OI.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :most]
    real_OK = mask_OI.gather(1, place_OK)
    rows = max(1, _CHUNK_ENTRIES // most**2)
    for own in torch.arange(len(weight_OI), device=weight_OI.device).split(rows):
        place_RK, real_RK = place_OK[own], real_OK[own]
        matrix_RKK = hessian_II[place_RK[:, :, None], place_RK[:, None, :]]
        matrix_RKK *= real_RK[:, :, None] & real_RK[:, None, :]
        matrix_RKK.diagonal(dim1=1, dim2=2).add_(~real_RK)
        target_RK = target_OI[own].gather(1, place_RK) * real_RK
        solved_RK = torch.cholesky_solve(target_RK[:, :, None], torch.linalg.cholesky(matrix_RKK))
        result_OI[own] = torch.zeros_like(result_OI[own]).scatter(1, place_RK, solved_RK[:, :, 0])
    return result_OI


def squared_error(layer: nn.Module, sums: Sums) -> float:
    """Squared error of a layer on the summed data, as a fraction of the squared targets."""
    weight_OK = with_bias(layer).double()
    fitted = (weight_OK @ sums.gram_KK.double() - 2 * sums.cross_YK.double()) * weight_OK
    return 1 + float(fitted.sum()) / sums.squares if sums.squares else 0.0


def with_bias(linear: Any) -> Tensor:
    """Weight (O, I + 1) of a layer whose last input is 1; float32."""
    weight_OI = linear.weight.detach().float()
    bias_O = weight_OI.new_zeros(len(weight_OI)) if linear.bias is None else linear.bias.detach()
    return torch.cat([weight_OI, bias_O.float()[:, None]], 1)


def with_one(x: Tensor) -> Tensor:
    """Inputs with a constant 1 as the last one."""
    return torch.cat([x, torch.ones_like(x[..., :1])], -1)
