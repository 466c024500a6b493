"""Narrow blocks with norms on both sides of attention and MLP, as those of Gemma.

This file is in the folder of the model, beside `secateur_narrow.py`.

Legend: B = batch, T = tokens, D = width of the residual stream, W = kept entries.
"""

from typing import Any

import torch
from torch import Tensor, nn

from .secateur_narrow import (
    ATTENTION,
    GATED_MLP,
    NarrowBlock,
    SelectiveRMSNormGather,
    gather,
    inverse_rms,
)


class SelectiveCentredRMSNormGather(SelectiveRMSNormGather):
    """The same for Gemma's weights, which are centred at 0 and applied in float32."""

    def forward(self, hidden_BTD: Tensor) -> Tensor:
        scale_BT1 = inverse_rms(hidden_BTD, self.size, self.eps)
        normed_BTW = gather(hidden_BTD, self.index) * scale_BT1  # float32, as the scale
        return normed_BTW.mul_(1 + self.weight.float()).to(hidden_BTD.dtype)


class NarrowCentredRMSNormOutput(nn.Module):
    """Gemma's RMSNorm of a vector with only some entries computed; the others are zero.

    Args:
        width: Entries of the input, in [1, size].
        size: Entries that the mean is taken over.
        eps: Added to the mean square.
    """

    def __init__(self, width: int, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width))
        self.size, self.eps = size, eps

    def forward(self, narrow_BTW: Tensor) -> Tensor:
        normed_BTW = narrow_BTW.float() * inverse_rms(narrow_BTW, self.size, self.eps)
        return (normed_BTW * (1 + self.weight.float())).to(narrow_BTW.dtype)


class SandwichBlock(NarrowBlock):
    """A sequential block with norms on both sides: x + norm(f(norm(x))) for attention, then MLP."""

    input_layernorm: Any
    post_attention_layernorm: Any
    pre_feedforward_layernorm: Any
    post_feedforward_layernorm: Any

    linears = {**ATTENTION, **GATED_MLP}  # noqa: RUF012
    norms = {  # noqa: RUF012
        "input_layernorm": ("attn_in", SelectiveCentredRMSNormGather),
        "post_attention_layernorm": ("attn_out", NarrowCentredRMSNormOutput),
        "pre_feedforward_layernorm": ("mlp_in", SelectiveCentredRMSNormGather),
        "post_feedforward_layernorm": ("mlp_out", NarrowCentredRMSNormOutput),
    }

    def attend(self, hidden_BTD: Tensor, **kwargs: Any) -> Tensor:
        attended_BTW: Tensor
        attended_BTW, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_BTD), **kwargs)
        attended_BTW = self.post_attention_layernorm(attended_BTW)
        return attended_BTW

    def feed(self, hidden_BTD: Tensor) -> Tensor:
        fed_BTW: Tensor = self.mlp(self.pre_feedforward_layernorm(hidden_BTD))
        fed_BTW = self.post_feedforward_layernorm(fed_BTW)
        return fed_BTW
