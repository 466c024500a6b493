"""Language models whose blocks have widths of their own, as written by Secateur.

This file lies in the folder of the model and needs only torch and transformers. It builds on
transformers' own classes, so that attention, rotary embedding, caches and generation are theirs,
and replaces what differs in a block:

- the norms take their statistics over the full residual stream and give only the selected entries;
- the linear layers are narrow;
- their outputs are added to the selected entries of the residual stream, which stays full.

The widths are in `config.json` (`block_widths`), the selected entries in the weights, as integer
buffers. A site that kept its full width has no buffer and runs the stock code.

To add a family whose blocks are pre-norm and sequential (Mistral, Qwen2, Qwen3): a config class, a
decoder layer, a model and a causal language model as for Llama at the end of the file. Other blocks
bring their own `forward` beside `PreNormBlock`.

Legend: B = batch, T = tokens, D = width of the residual stream, W = kept entries.
"""

# mypy: allow-untyped-calls
# (transformers is annotated in part)

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.llama.modeling_llama import (
    LlamaDecoderLayer,
    LlamaForCausalLM,
    LlamaModel,
)


class SelectiveRMSNormGather(nn.Module):
    """RMSNorm over the full width, of which only the selected entries are scaled and given out.

    The name contains `RMSNorm`, by which transformers knows how to initialise it, and does not end
    in it, by which servers know which modules to replace by a kernel for a plain norm.

    Args:
        width: Entries that are selected, in [1, size].
        size: Entries of the input.
        eps: Added to the mean square.
    """

    index: Tensor

    def __init__(self, width: int, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.register_buffer("index", torch.arange(width))
        self.size, self.eps = size, eps

    def forward(self, hidden_BTD: Tensor) -> Tensor:
        # The norm of the vector reads the stream once and writes one number per token; neither a
        # float32 copy nor a normalised stream of full width is ever made. On a CPU, `gather` with
        # an expanded index is several times as fast as `index_select` along the last axis.
        norm_BT1 = torch.linalg.vector_norm(hidden_BTD, dim=-1, keepdim=True, dtype=torch.float32)
        scale_BT1 = torch.rsqrt(norm_BT1.square() / self.size + self.eps)
        index_BTW = self.index.expand(hidden_BTD.shape[:-1] + self.index.shape)
        selected_BTW = hidden_BTD.gather(-1, index_BTW)
        return self.weight * (selected_BTW.float() * scale_BT1).to(hidden_BTD.dtype)


class IndexedAdd(nn.Module):
    """Adds a narrow output to the selected entries of the residual stream.

    Args:
        width: Entries that are selected, in [1, size].
        size: Entries of the residual stream.
    """

    index: Tensor | None

    def __init__(self, width: int, size: int) -> None:
        super().__init__()
        self.register_buffer("index", torch.arange(width) if width < size else None)

    def forward(self, stream_BTD: Tensor, narrow_BTW: Tensor, in_place: bool = False) -> Tensor:
        """The stream with the output added.

        Args:
            stream_BTD: The residual stream.
            narrow_BTW: Output of attention or MLP.
            in_place: The stream may be overwritten.
        """
        if self.index is None:
            return stream_BTD + narrow_BTW
        # The sum has the type of the stream, which autocast keeps wider than the linear layers.
        narrow_BTW = narrow_BTW.to(stream_BTD.dtype)
        index_BTW = self.index.expand(narrow_BTW.shape)
        if in_place:
            return stream_BTD.scatter_add_(-1, index_BTW, narrow_BTW)
        return stream_BTD.scatter_add(-1, index_BTW, narrow_BTW)


class PreNormBlock(nn.Module):
    """Mixin for a sequential block: x + attention(norm(x)), and then x + mlp(norm(x)).

    It comes before the family's own decoder layer in the list of bases.
    """

    input_layernorm: Any
    post_attention_layernorm: Any
    self_attn: Any
    mlp: Any

    # Linear layer: the sites of its inputs and of its outputs; None where they always stay.
    linears: ClassVar[Mapping[str, tuple[str | None, str | None]]] = {
        "self_attn.q_proj": ("attn_in", None),
        "self_attn.k_proj": ("attn_in", None),
        "self_attn.v_proj": ("attn_in", None),
        "self_attn.o_proj": (None, "attn_out"),
        "mlp.gate_proj": ("mlp_in", "mlp_mid"),
        "mlp.up_proj": ("mlp_in", "mlp_mid"),
        "mlp.down_proj": ("mlp_mid", "mlp_out"),
    }
    norms: ClassVar[Mapping[str, str]] = {
        "input_layernorm": "attn_in",
        "post_attention_layernorm": "mlp_in",
    }

    def __init__(self, config: PreTrainedConfig, layer_idx: int) -> None:
        # transformers loads models on the meta device, where the stock layers that are built here
        # and replaced at once need no memory; elsewhere it is one block at a time.
        super().__init__(config, layer_idx)
        size, widths = config.hidden_size, config.block_widths[layer_idx]
        for path, (inputs, outputs) in self.linears.items():
            stock: Any = self.get_submodule(path)
            narrow = nn.Linear(
                widths.get(inputs, stock.in_features),
                widths.get(outputs, stock.out_features),
                bias=stock.bias is not None,
            )
            self.set_submodule(path, narrow)
        for path, site in self.norms.items():
            if widths.get(site, size) < size:
                stock = self.get_submodule(path)
                norm = SelectiveRMSNormGather(widths[site], size, stock.variance_epsilon)
                self.set_submodule(path, norm)
        self.attn_out = IndexedAdd(widths.get("attn_out", size), size)
        self.mlp_out = IndexedAdd(widths.get("mlp_out", size), size)

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        normed_BTW = self.input_layernorm(hidden_states)
        attended_BTW, _ = self.self_attn(hidden_states=normed_BTW, **kwargs)
        # The stream that comes in is not ours to overwrite: it may be the embeddings of the caller,
        # a recorded hidden state or the input of a checkpointed block. The first addition therefore
        # makes the only copy of a block. That copy is known to nobody else, so the second addition
        # overwrites it, unless autograd has kept it to differentiate the norm.
        stream_BTD = self.attn_out(hidden_states, attended_BTW)
        narrow_BTW = self.mlp(self.post_attention_layernorm(stream_BTD))
        alone = not torch.is_grad_enabled()
        hidden_BTD: Tensor = self.mlp_out(stream_BTD, narrow_BTW, in_place=alone)
        return hidden_BTD


@contextmanager
def _without_blocks(config: PreTrainedConfig) -> Iterator[None]:
    """Let the stock constructors build everything but blocks of full width."""
    num_layers, config.num_hidden_layers = config.num_hidden_layers, 0
    try:
        yield
    finally:
        config.num_hidden_layers = num_layers


class NarrowModel(PreTrainedModel):
    """Mixin for the base model of a family; it comes before the family's own model class."""

    block_class: ClassVar[type[nn.Module]]

    def __init__(self, config: PreTrainedConfig) -> None:
        with _without_blocks(config):
            super().__init__(config)
        self.layers = nn.ModuleList(
            self.block_class(config, layer_idx) for layer_idx in range(config.num_hidden_layers)
        )
        self.post_init()


class NarrowForCausalLM(PreTrainedModel):
    """Mixin for the language model of a family; it comes before the family's own class."""

    model_class: ClassVar[type[PreTrainedModel]]

    def __init__(self, config: PreTrainedConfig) -> None:
        with _without_blocks(config):
            super().__init__(config)
        self.model = self.model_class(config)
        self.post_init()


def _check_widths(config: PreTrainedConfig) -> None:
    """Check that there are widths for every block.

    Raises:
        ValueError: Their number is not the number of blocks.
    """
    if len(config.block_widths) != config.num_hidden_layers:
        raise ValueError(
            f"`block_widths` has {len(config.block_widths)} entries and `num_hidden_layers` is "
            f"{config.num_hidden_layers}; give one entry per block."
        )


class SecateurLlamaConfig(LlamaConfig):
    """Configuration of a Llama whose blocks have widths of their own.

    Args:
        block_widths: One mapping per block, from the name of a site to its width, in [1, full
            width]; a site that is not named has its full width. None stands for full blocks.
    """

    model_type = "secateur_llama"
    block_widths: list[dict[str, int]] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if self.block_widths is None:
            self.block_widths = [{} for _ in range(self.num_hidden_layers)]
        _check_widths(self)


class SecateurLlamaDecoderLayer(PreNormBlock, LlamaDecoderLayer):  # type: ignore[misc]
    """A narrow block of a Llama."""


class SecateurLlamaModel(NarrowModel, LlamaModel):
    """A Llama with narrow blocks, without its output head."""

    config_class = SecateurLlamaConfig
    block_class = SecateurLlamaDecoderLayer
    _no_split_modules = ["SecateurLlamaDecoderLayer"]  # noqa: RUF012 -- declared by transformers


class SecateurLlamaForCausalLM(NarrowForCausalLM, LlamaForCausalLM):
    """A Llama with narrow blocks."""

    config_class = SecateurLlamaConfig
    model_class = SecateurLlamaModel
    _no_split_modules = ["SecateurLlamaDecoderLayer"]  # noqa: RUF012 -- declared by transformers


# So that `save_pretrained` writes this file and the way to it into the folder.
SecateurLlamaConfig.register_for_auto_class()
SecateurLlamaModel.register_for_auto_class("AutoModel")
SecateurLlamaForCausalLM.register_for_auto_class("AutoModelForCausalLM")
