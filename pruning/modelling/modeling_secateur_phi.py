"""A Phi whose blocks differ in width, as written by Secateur.

This file is in the folder of the model, beside `secateur_narrow.py`, and needs only torch and
transformers.

Legend: B = batch, T = tokens, D = width of the residual stream, W = kept entries.
"""

# mypy: allow-untyped-calls
# (transformers is annotated in part)

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.models.phi.configuration_phi import PhiConfig
from transformers.models.phi.modeling_phi import PhiDecoderLayer, PhiForCausalLM, PhiModel

from .secateur_narrow import (
    ATTENTION,
    BlockWidths,
    NarrowBlock,
    NarrowConfig,
    NarrowForCausalLM,
    NarrowModel,
    gather,
)


class SelectedEntries(nn.Module):
    """Returns the selected entries of a vector.

    Args:
        width: Entries that are selected, in [1, size].
        size: Entries of the input.
    """

    index: Tensor | None

    def __init__(self, width: int, size: int) -> None:
        super().__init__()
        self.register_buffer("index", torch.arange(width) if width < size else None)

    def forward(self, hidden_BTD: Tensor) -> Tensor:
        return hidden_BTD if self.index is None else gather(hidden_BTD, self.index)


class ParallelBlock(NarrowBlock):
    """A parallel block: x + attention(norm(x)) + mlp(norm(x)), with one norm.

    The norm is not cut; attention and MLP each select entries of its output.
    """

    input_layernorm: Any
    resid_dropout: Any
    attn_in: Any  # None if the part is removed
    mlp_in: Any

    linears = {  # noqa: RUF012
        **dict(list(ATTENTION.items())[:3]),
        "self_attn.dense": ("attn_heads", "attn_out"),
        "mlp.fc1": ("mlp_in", "mlp_mid"),
        "mlp.fc2": ("mlp_mid", "mlp_out"),
    }
    norms = {}  # noqa: RUF012

    def __init__(self, config: PreTrainedConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        size, widths = config.hidden_size, config.block_widths[layer_idx]
        self.attn_in, self.mlp_in = (
            None if widths.get(part) == 0 else SelectedEntries(widths.get(f"{part}_in", size), size)
            for part in ("attn", "mlp")
        )

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        normed_BTD, stream_BTD = self.input_layernorm(hidden_states), hidden_states
        if self.attn_out is not None:
            attended_BTW, _ = self.self_attn(hidden_states=self.attn_in(normed_BTD), **kwargs)
            stream_BTD = self.attn_out(stream_BTD, self.resid_dropout(attended_BTW))
        if self.mlp_out is not None:
            fed_BTW = self.resid_dropout(self.mlp(self.mlp_in(normed_BTD)))
            # The sum with the attention is a private tensor that only this addition reads, so
            # autograd has not saved it.
            stream_BTD = self.mlp_out(stream_BTD, fed_BTW, in_place=self.attn_out is not None)
        return stream_BTD


class SecateurPhiConfig(NarrowConfig, PhiConfig):
    """Configuration of a Phi whose blocks differ in width; see `NarrowConfig`."""

    model_type = "secateur_phi"
    block_widths: BlockWidths = None


class SecateurPhiDecoderLayer(ParallelBlock, PhiDecoderLayer):  # type: ignore[misc]
    """A narrow block of a Phi."""


class SecateurPhiModel(NarrowModel, PhiModel):
    """A Phi with narrow blocks, without its output head."""

    config_class = SecateurPhiConfig
    block_class = SecateurPhiDecoderLayer


class SecateurPhiForCausalLM(NarrowForCausalLM, PhiForCausalLM):
    """A Phi with narrow blocks."""

    config_class = SecateurPhiConfig
    model_class = SecateurPhiModel
