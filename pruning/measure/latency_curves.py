"""Times of attention and MLP as functions of their widths, between the points that were measured.

Legend: G, H = widths of grids, K = kinds of attention, B = blocks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int, Real
from torch import Tensor

from secateur.pruning.heads import HEADS


@dataclass(frozen=True)
class Curves:
    """Times of the parts of a model by their widths, float64, seconds.

    Between two widths of the grid the time is linear; outside it is that of the nearest one.

    Args:
        grid: Site to its widths, shape (G,).
        kinds: Kinds of attention.
        rest: Time of what is in no block.
        attn_in: Per kind, see `Phase`, shape (G,).
        attn_out: Per kind.
        attn_heads: Per kind; none if fewer heads were not measured.
        up: Shape (G of `mlp_in`, G of `mlp_mid`).
        down: Shape (G of `mlp_mid`, G of `mlp_out`).
    """

    grid: Mapping[str, Tensor]
    kinds: Sequence[str]
    rest: float
    attn_in: Sequence[Tensor]
    attn_out: Sequence[Tensor]
    attn_heads: Sequence[Tensor]
    up: Tensor
    down: Tensor

    def attention(
        self,
        kind_B: Int[Tensor, "*B"],
        in_B: Real[Tensor, "*B"],
        out_B: Real[Tensor, "*B"],
        heads_B: Real[Tensor, "*B"] | None = None,
    ) -> Float[Tensor, "*B"]:
        """Time of attentions, differentiable in their widths; None stands for all heads."""
        total = torch.zeros_like(in_B, dtype=torch.float64)
        for kind in range(len(self.kinds)):
            own = _line(self.grid["attn_in"], self.attn_in[kind], in_B)
            own = own + _line(self.grid["attn_out"], self.attn_out[kind], out_B)
            if heads_B is not None:
                times_H = self.attn_heads[kind]
                own = own * _line(self.grid[HEADS], times_H, heads_B) / times_H[-1]
            total = total + own * (kind_B == kind)
        return total

    def mlp(
        self, in_B: Real[Tensor, "*B"], mid_B: Real[Tensor, "*B"], out_B: Real[Tensor, "*B"]
    ) -> Float[Tensor, "*B"]:
        """Time of MLPs, differentiable in their widths."""
        grid = self.grid
        up_B = _plane(grid["mlp_in"], grid["mlp_mid"], self.up, in_B, mid_B)
        return up_B + _plane(grid["mlp_mid"], grid["mlp_out"], self.down, mid_B, out_B)


def _place(
    grid_G: Float[Tensor, " G"], width_B: Real[Tensor, "*B"]
) -> tuple[Int[Tensor, "*B"], Float[Tensor, "*B"]]:
    """Cell of every width, and where it lies inside, in [0, 1]."""
    width_B = width_B.double().clamp(grid_G[0], grid_G[-1])
    cell_B = (torch.searchsorted(grid_G, width_B.detach(), right=True) - 1).clamp(
        max=len(grid_G) - 2
    )
    low_B = grid_G[cell_B]
    return cell_B, (width_B - low_B) / (grid_G[cell_B + 1] - low_B)


def _line(
    grid_G: Float[Tensor, " G"], values_G: Float[Tensor, " G"], width_B: Real[Tensor, "*B"]
) -> Float[Tensor, "*B"]:
    """Interpolate between the points of a line."""
    cell_B, inside_B = _place(grid_G, width_B)
    line: Tensor = values_G[cell_B].lerp(values_G[cell_B + 1], inside_B)
    return line


def _plane(
    rows_G: Tensor,
    columns_G: Tensor,
    values_GG: Float[Tensor, "G H"],
    row_B: Real[Tensor, "*B"],
    column_B: Real[Tensor, "*B"],
) -> Float[Tensor, "*B"]:
    """Interpolate between the points of a plane, first along its columns."""
    (row, down_B), (column, along_B) = _place(rows_G, row_B), _place(columns_G, column_B)
    above, below = (
        values_GG[place, column].lerp(values_GG[place, column + 1], along_B)
        for place in (row, row + 1)
    )
    plane: Tensor = above.lerp(below, down_B)
    return plane
