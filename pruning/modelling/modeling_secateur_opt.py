"""An OPT whose blocks differ in width, as written by Secateur.

This file is in the folder of the model, beside `secateur_narrow.py`, and needs only torch and
transformers.

Legend: B = batch, T = tokens, D = width of the residual stream, W = kept entries.
"""

# mypy: allow-untyped-calls
# (transformers is annotated in part)

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedConfig
from transformers.models.opt.configuration_opt import OPTConfig
from transformers.models.opt.modeling_opt import OPTDecoderLayer, OPTForCausalLM, OPTModel

from .secateur_narrow import (
    ATTENTION,
    BlockWidths,
    NarrowBlock,
    NarrowConfig,
    NarrowForCausalLM,
    NarrowModel,
    gather,
)


class SelectiveLayerNormGather(nn.Module):
    """LayerNorm over the full width that scales and returns only the selected entries.

    Args:
        width: Entries that are selected, in [1, size].
        size: Entries of the input.
        eps: Added to the variance.
    """

    index: Tensor

    def __init__(self, width: int, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))
        self.register_buffer("index", torch.arange(width))
        self.size, self.eps = size, eps

    def forward(self, hidden_BTD: Tensor) -> Tensor:
        # One fused pass over the stream; separate passes for mean and variance take longer.
        normed_BTD = F.layer_norm(hidden_BTD, (self.size,), eps=self.eps)
        return torch.addcmul(self.bias, gather(normed_BTD, self.index), self.weight)


class OPTBlock(NarrowBlock):
    """OPT's pre-norm block: its MLP is not a separate module, and there is dropout."""

    self_attn_layer_norm: Any
    final_layer_norm: Any
    fc1: Any
    fc2: Any
    activation_fn: Any
    dropout: float

    linears = {  # noqa: RUF012
        **dict(list(ATTENTION.items())[:3]),
        "self_attn.out_proj": ("attn_heads", "attn_out"),
        "fc1": ("mlp_in", "mlp_mid"),
        "fc2": ("mlp_mid", "mlp_out"),
    }
    norms = {  # noqa: RUF012
        "self_attn_layer_norm": ("attn_in", SelectiveLayerNormGather),
        "final_layer_norm": ("mlp_in", SelectiveLayerNormGather),
    }

    def __init__(self, config: PreTrainedConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        if self.attn_out is not None:  # the attention of OPT counts its heads
            self.self_attn.num_heads = self.self_attn.k_proj.out_features // self.self_attn.head_dim

    def attend(self, hidden_BTD: Tensor, **kwargs: Any) -> Tensor:
        normed_BTW = self.self_attn_layer_norm(hidden_BTD)
        attended_BTW, _ = self.self_attn(hidden_states=normed_BTW, **kwargs)
        return F.dropout(attended_BTW, self.dropout, self.training)

    def feed(self, hidden_BTD: Tensor) -> Tensor:
        fed_BTW = self.fc2(self.activation_fn(self.fc1(self.final_layer_norm(hidden_BTD))))
        return F.dropout(fed_BTW, self.dropout, self.training)


class SecateurOPTConfig(NarrowConfig, OPTConfig):
    """Configuration of an OPT whose blocks differ in width; see `NarrowConfig`."""

    model_type = "secateur_opt"
    block_widths: BlockWidths = None


class SecateurOPTDecoderLayer(OPTBlock, OPTDecoderLayer):  # type: ignore[misc]
    """A narrow block of an OPT."""


class SecateurOPTModel(NarrowModel, OPTModel):
    """An OPT with narrow blocks, without its output head."""

    config_class = SecateurOPTConfig
    block_class = SecateurOPTDecoderLayer
    blocks = "decoder.layers"


class SecateurOPTForCausalLM(NarrowForCausalLM, OPTForCausalLM):
    """An OPT with narrow blocks."""

    config_class = SecateurOPTConfig
    model_class = SecateurOPTModel
