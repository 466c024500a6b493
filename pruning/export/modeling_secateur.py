"""Language models whose blocks have widths of their own, as written by Secateur.

This file lies in the folder of the model and needs only torch and transformers. It builds on
transformers' own classes, so that attention, rotary embedding, caches and generation are theirs,
and replaces what differs in a block:

- the norms take their statistics over the full residual stream and give only the selected entries;
- the linear layers are narrow;
- their outputs are added to the selected entries of the residual stream, which stays full;
- a block may have no attention, or no MLP.

The widths are in `config.json` (`block_widths`), the selected entries in the weights, as integer
buffers. A site that kept its full width has no buffer and runs the stock code.

To add a family: a config class, a decoder layer, a model and a causal language model as for those
at the end of the file. A block whose modules have other names or another order brings its tables,
its `attend` and its `feed`, as `SandwichBlock` does.

Legend: B = batch, T = tokens, D = width of the residual stream, W = kept entries.
"""

# mypy: allow-untyped-calls
# (transformers is annotated in part)

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.gemma2.configuration_gemma2 import Gemma2Config
from transformers.models.gemma2.modeling_gemma2 import (
    Gemma2DecoderLayer,
    Gemma2ForCausalLM,
    Gemma2Model,
)
from transformers.models.gemma3.configuration_gemma3 import Gemma3TextConfig
from transformers.models.gemma3.modeling_gemma3 import (
    Gemma3DecoderLayer,
    Gemma3ForCausalLM,
    Gemma3TextModel,
)
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.llama.modeling_llama import (
    LlamaDecoderLayer,
    LlamaForCausalLM,
    LlamaModel,
)
from transformers.models.mistral.configuration_mistral import MistralConfig
from transformers.models.mistral.modeling_mistral import (
    MistralDecoderLayer,
    MistralForCausalLM,
    MistralModel,
)
from transformers.models.opt.configuration_opt import OPTConfig
from transformers.models.opt.modeling_opt import OPTDecoderLayer, OPTForCausalLM, OPTModel
from transformers.models.phi.configuration_phi import PhiConfig
from transformers.models.phi.modeling_phi import PhiDecoderLayer, PhiForCausalLM, PhiModel
from transformers.models.qwen2.configuration_qwen2 import Qwen2Config
from transformers.models.qwen2.modeling_qwen2 import (
    Qwen2DecoderLayer,
    Qwen2ForCausalLM,
    Qwen2Model,
)
from transformers.models.qwen3.configuration_qwen3 import Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import (
    Qwen3DecoderLayer,
    Qwen3ForCausalLM,
    Qwen3Model,
)


def _gather(hidden_BTD: Tensor, index_W: Tensor) -> Tensor:
    """The selected entries, shape (B, T, W)."""
    # On a CPU, `gather` with an expanded index is several times as fast as `index_select` along
    # the last axis.
    return hidden_BTD.gather(-1, index_W.expand(hidden_BTD.shape[:-1] + index_W.shape))


def _inverse_rms(hidden_BTW: Tensor, size: int, eps: float) -> Tensor:
    """One over the root mean square of `size` entries, shape (B, T, 1), float32.

    The norm of the vector reads its entries once and writes one number per token; neither a float32
    copy nor a normalised stream of full width is ever made.
    """
    norm_BT1 = torch.linalg.vector_norm(hidden_BTW, dim=-1, keepdim=True, dtype=torch.float32)
    return torch.rsqrt(norm_BT1.square() / size + eps)


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
        # The gathered entries are a copy of our own: scaling it in place makes no further one. The
        # products are computed in float32 and rounded one by one, as in the stock norm.
        scale_BT1 = _inverse_rms(hidden_BTD, self.size, self.eps)
        return _gather(hidden_BTD, self.index).mul_(scale_BT1).mul_(self.weight)


class SelectiveCentredRMSNormGather(SelectiveRMSNormGather):
    """The same with Gemma's weights, which are centred at 0 and applied in float32."""

    def forward(self, hidden_BTD: Tensor) -> Tensor:
        scale_BT1 = _inverse_rms(hidden_BTD, self.size, self.eps)
        normed_BTW = _gather(hidden_BTD, self.index) * scale_BT1  # float32, as the scale
        return normed_BTW.mul_(1 + self.weight.float()).to(hidden_BTD.dtype)


class NarrowCentredRMSNormOutput(nn.Module):
    """Gemma's RMSNorm of a vector of which only some entries were computed; the others are zero.

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
        normed_BTW = narrow_BTW.float() * _inverse_rms(narrow_BTW, self.size, self.eps)
        return (normed_BTW * (1 + self.weight.float())).to(narrow_BTW.dtype)


class SelectiveLayerNormGather(nn.Module):
    """LayerNorm over the full width, of which only the selected entries are scaled and given out.

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
        # One fused pass over the stream; mean and variance in passes of their own take longer.
        normed_BTD = F.layer_norm(hidden_BTD, (self.size,), eps=self.eps)
        return torch.addcmul(self.bias, _gather(normed_BTD, self.index), self.weight)


class SelectedEntries(nn.Module):
    """Gives out the selected entries of a vector.

    Args:
        width: Entries that are selected, in [1, size].
        size: Entries of the input.
    """

    index: Tensor | None

    def __init__(self, width: int, size: int) -> None:
        super().__init__()
        self.register_buffer("index", torch.arange(width) if width < size else None)

    def forward(self, hidden_BTD: Tensor) -> Tensor:
        return hidden_BTD if self.index is None else _gather(hidden_BTD, self.index)


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


_ATTENTION: Mapping[str, tuple[str | None, str | None]] = {
    "self_attn.q_proj": ("attn_in", None),
    "self_attn.k_proj": ("attn_in", None),
    "self_attn.v_proj": ("attn_in", None),
    "self_attn.o_proj": (None, "attn_out"),
}
_GATED_MLP: Mapping[str, tuple[str | None, str | None]] = {
    "mlp.gate_proj": ("mlp_in", "mlp_mid"),
    "mlp.up_proj": ("mlp_in", "mlp_mid"),
    "mlp.down_proj": ("mlp_mid", "mlp_out"),
}


def _part(site: str | None) -> str:
    """The part of a block that a site belongs to: `attn` or `mlp`."""
    return (site or "").partition("_")[0]


def _cache_slot(config: PreTrainedConfig, layer_idx: int) -> int:
    """The place of the attention of a block in a cache, which has one place per block.

    Attentions of one type move up into the places of those that are gone, so that the first place
    of every type, by which caches tell how many tokens they hold, is taken.
    """
    types = getattr(config, "layer_types", None) or [""] * config.num_hidden_layers
    places = [place for place, kind in enumerate(types) if kind == types[layer_idx]]
    before = [place for place in places if place < layer_idx]
    return int(places[sum(config.block_widths[place].get("attn") != 0 for place in before)])


class NarrowBlock(nn.Module):
    """Mixin for the decoder layer of a family; it comes before the family's own class.

    The constructor lets the family build its block, puts narrow layers in the place of those that
    the tables name, and takes out the parts that are gone. `attend` and `feed` compute what
    attention and MLP add to the residual stream.
    """

    self_attn: Any
    mlp: Any

    # Linear layer: the sites of its inputs and of its outputs; None where they always stay.
    linears: ClassVar[Mapping[str, tuple[str | None, str | None]]]
    # Norm: the site of its output, and the class that does its work where the site is narrow.
    norms: ClassVar[Mapping[str, tuple[str, type[nn.Module]]]]

    def __init__(self, config: PreTrainedConfig, layer_idx: int) -> None:
        # transformers loads models on the meta device, where the stock layers that are built here
        # and replaced at once need no memory; elsewhere it is one block at a time.
        super().__init__(config, layer_idx)
        size = config.hidden_size
        widths: Any = self._checked(config.block_widths[layer_idx], layer_idx)
        self.has = {part: widths.get(part) != 0 for part in ("attn", "mlp")}
        for path, (inputs, outputs) in self.linears.items():
            if not self.has[_part(inputs or outputs)]:
                setattr(self, path.split(".")[0], None)
                continue
            stock: Any = self.get_submodule(path)
            narrow = nn.Linear(
                widths.get(inputs, stock.in_features),
                widths.get(outputs, stock.out_features),
                bias=stock.bias is not None,
            )
            self.set_submodule(path, narrow)
        for path, (site, narrow_class) in self.norms.items():
            if not self.has[_part(site)]:
                setattr(self, path, None)
            elif widths.get(site, size) < size:
                stock = self.get_submodule(path)
                eps = stock.variance_epsilon if hasattr(stock, "variance_epsilon") else stock.eps
                self.set_submodule(path, narrow_class(widths[site], size, eps))
        self.attn_out = IndexedAdd(widths.get("attn_out", size), size)
        self.mlp_out = IndexedAdd(widths.get("mlp_out", size), size)
        if self.has["attn"]:
            self.self_attn.layer_idx = _cache_slot(config, layer_idx)

    def _checked(self, widths: Mapping[str, int], layer_idx: int) -> Mapping[str, int]:
        """The widths of this block, if they are widths of its sites."""
        full = {"attn": 1, "mlp": 1}
        for path, sites in self.linears.items():
            stock: Any = self.get_submodule(path)
            shape = (stock.in_features, stock.out_features)
            full |= {site: of for site, of in zip(sites, shape, strict=True) if site is not None}
        for site, width in widths.items():
            least = 0 if site in ("attn", "mlp") else 1
            if not least <= width <= full.get(site, -1):
                raise ValueError(
                    f"`block_widths` of block {layer_idx} has {site!r}: {width}; sites and their "
                    f"full widths are {full}."
                )
        return widths

    def attend(self, hidden_BTD: Tensor, **kwargs: Any) -> Tensor:
        """What the attention adds to its entries of the residual stream, shape (B, T, W)."""
        raise NotImplementedError

    def feed(self, hidden_BTD: Tensor) -> Tensor:
        """What the MLP adds to its entries of the residual stream, shape (B, T, W)."""
        raise NotImplementedError

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        stream_BTD: Tensor = hidden_states
        # The stream that comes in is not ours to overwrite: it may be the embeddings of the caller,
        # a recorded hidden state or the input of a checkpointed block. The first addition therefore
        # makes the only copy of a block. That copy is known to nobody else, so the second addition
        # overwrites it, unless autograd has kept it to differentiate the norm.
        alone = self.has["attn"] and not torch.is_grad_enabled()
        if self.has["attn"]:
            stream_BTD = self.attn_out(stream_BTD, self.attend(stream_BTD, **kwargs))
        if self.has["mlp"]:
            stream_BTD = self.mlp_out(stream_BTD, self.feed(stream_BTD), in_place=alone)
        return stream_BTD


class PreNormBlock(NarrowBlock):
    """A sequential block: x + attention(norm(x)), and then x + mlp(norm(x))."""

    input_layernorm: Any
    post_attention_layernorm: Any

    linears = {**_ATTENTION, **_GATED_MLP}  # noqa: RUF012 -- declared above
    norms = {  # noqa: RUF012
        "input_layernorm": ("attn_in", SelectiveRMSNormGather),
        "post_attention_layernorm": ("mlp_in", SelectiveRMSNormGather),
    }

    def attend(self, hidden_BTD: Tensor, **kwargs: Any) -> Tensor:
        attended_BTW: Tensor
        attended_BTW, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_BTD), **kwargs)
        return attended_BTW

    def feed(self, hidden_BTD: Tensor) -> Tensor:
        fed_BTW: Tensor = self.mlp(self.post_attention_layernorm(hidden_BTD))
        return fed_BTW


class SandwichBlock(NarrowBlock):
    """A sequential block with norms on both sides: x + norm(attention(norm(x))), and so the MLP."""

    input_layernorm: Any
    post_attention_layernorm: Any
    pre_feedforward_layernorm: Any
    post_feedforward_layernorm: Any

    linears = {**_ATTENTION, **_GATED_MLP}  # noqa: RUF012
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


class OPTBlock(NarrowBlock):
    """OPT's pre-norm block: its MLP is not a module of its own, and there is dropout."""

    self_attn_layer_norm: Any
    final_layer_norm: Any
    fc1: Any
    fc2: Any
    activation_fn: Any
    dropout: float

    linears = {  # noqa: RUF012
        **dict(list(_ATTENTION.items())[:3]),
        "self_attn.out_proj": (None, "attn_out"),
        "fc1": ("mlp_in", "mlp_mid"),
        "fc2": ("mlp_mid", "mlp_out"),
    }
    norms = {  # noqa: RUF012
        "self_attn_layer_norm": ("attn_in", SelectiveLayerNormGather),
        "final_layer_norm": ("mlp_in", SelectiveLayerNormGather),
    }

    def attend(self, hidden_BTD: Tensor, **kwargs: Any) -> Tensor:
        normed_BTW = self.self_attn_layer_norm(hidden_BTD)
        attended_BTW, _ = self.self_attn(hidden_states=normed_BTW, **kwargs)
        return F.dropout(attended_BTW, self.dropout, self.training)

    def feed(self, hidden_BTD: Tensor) -> Tensor:
        fed_BTW = self.fc2(self.activation_fn(self.fc1(self.final_layer_norm(hidden_BTD))))
        return F.dropout(fed_BTW, self.dropout, self.training)


class ParallelBlock(NarrowBlock):
    """A parallel block: x + attention(norm(x)) + mlp(norm(x)), with one norm.

    The norm stays whole; attention and MLP take their own selections of its output.
    """

    input_layernorm: Any
    resid_dropout: Any

    linears = {  # noqa: RUF012
        **dict(list(_ATTENTION.items())[:3]),
        "self_attn.dense": (None, "attn_out"),
        "mlp.fc1": ("mlp_in", "mlp_mid"),
        "mlp.fc2": ("mlp_mid", "mlp_out"),
    }
    norms = {}  # noqa: RUF012

    def __init__(self, config: PreTrainedConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        size, widths = config.hidden_size, config.block_widths[layer_idx]
        self.attn_in = SelectedEntries(widths.get("attn_in", size), size)
        self.mlp_in = SelectedEntries(widths.get("mlp_in", size), size)

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        normed_BTD, stream_BTD = self.input_layernorm(hidden_states), hidden_states
        if self.has["attn"]:
            attended_BTW, _ = self.self_attn(hidden_states=self.attn_in(normed_BTD), **kwargs)
            stream_BTD = self.attn_out(stream_BTD, self.resid_dropout(attended_BTW))
        if self.has["mlp"]:
            fed_BTW = self.resid_dropout(self.mlp(self.mlp_in(normed_BTD)))
            # The sum with the attention is known to nobody else, and nothing but this addition
            # reads it, so autograd has not kept it.
            stream_BTD = self.mlp_out(stream_BTD, fed_BTW, in_place=self.has["attn"])
        return stream_BTD


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
    blocks: ClassVar[str] = "layers"

    def __init__(self, config: PreTrainedConfig) -> None:
        with _without_blocks(config):
            super().__init__(config)
        blocks = [self.block_class(config, index) for index in range(config.num_hidden_layers)]
        self.set_submodule(self.blocks, nn.ModuleList(blocks))
        self._no_split_modules = {self.block_class.__name__}
        self.post_init()


class NarrowForCausalLM(PreTrainedModel):
    """Mixin for the language model of a family; it comes before the family's own class."""

    model_class: ClassVar[type[PreTrainedModel]]

    def __init__(self, config: PreTrainedConfig) -> None:
        with _without_blocks(config):
            super().__init__(config)
        self.model = self.model_class(config)
        self._no_split_modules = self.model._no_split_modules
        self.post_init()


BlockWidths = list[dict[str, int]] | None


class NarrowConfig:
    """Mixin for the configuration of a family; it comes before the family's own class.

    Args:
        block_widths: One mapping per block, from the name of a site to its width, in [1, full
            width]; a site that is not named has its full width. `attn: 0` and `mlp: 0` stand for
            a block without attention or MLP. None stands for full blocks.

    Raises:
        ValueError: The number of mappings is not the number of blocks, or no block has attention.
    """

    block_widths: BlockWidths
    num_hidden_layers: int

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)  # type: ignore[misc]
        if self.block_widths is None:
            self.block_widths = [{} for _ in range(self.num_hidden_layers)]
        if len(self.block_widths) != self.num_hidden_layers:
            raise ValueError(
                f"`block_widths` has {len(self.block_widths)} entries and `num_hidden_layers` is "
                f"{self.num_hidden_layers}; give one entry per block."
            )
        attending = [place for place, w in enumerate(self.block_widths) if w.get("attn") != 0]
        if not attending:
            raise ValueError("`block_widths` leaves no block with attention; leave one.")
        config: Any = self
        if types := getattr(config, "layer_types", None):
            # A block without attention has no type; it counts as the first, see `_cache_slot`.
            first = types[attending[0]]
            config.layer_types = [
                kind if place in attending else first for place, kind in enumerate(types)
            ]


class SecateurLlamaConfig(NarrowConfig, LlamaConfig):
    """Configuration of a Llama whose blocks have widths of their own; see `NarrowConfig`."""

    model_type = "secateur_llama"
    block_widths: BlockWidths = None


class SecateurLlamaDecoderLayer(PreNormBlock, LlamaDecoderLayer):  # type: ignore[misc]
    """A narrow block of a Llama."""


class SecateurLlamaModel(NarrowModel, LlamaModel):
    """A Llama with narrow blocks, without its output head."""

    config_class = SecateurLlamaConfig
    block_class = SecateurLlamaDecoderLayer


class SecateurLlamaForCausalLM(NarrowForCausalLM, LlamaForCausalLM):
    """A Llama with narrow blocks."""

    config_class = SecateurLlamaConfig
    model_class = SecateurLlamaModel


class SecateurMistralConfig(NarrowConfig, MistralConfig):
    """Configuration of a Mistral whose blocks have widths of their own; see `NarrowConfig`."""

    model_type = "secateur_mistral"
    block_widths: BlockWidths = None


class SecateurMistralDecoderLayer(PreNormBlock, MistralDecoderLayer):  # type: ignore[misc]
    """A narrow block of a Mistral."""


class SecateurMistralModel(NarrowModel, MistralModel):
    """A Mistral with narrow blocks, without its output head."""

    config_class = SecateurMistralConfig
    block_class = SecateurMistralDecoderLayer


class SecateurMistralForCausalLM(NarrowForCausalLM, MistralForCausalLM):
    """A Mistral with narrow blocks."""

    config_class = SecateurMistralConfig
    model_class = SecateurMistralModel


class SecateurQwen2Config(NarrowConfig, Qwen2Config):
    """Configuration of a Qwen2 whose blocks have widths of their own; see `NarrowConfig`."""

    model_type = "secateur_qwen2"
    block_widths: BlockWidths = None


class SecateurQwen2DecoderLayer(PreNormBlock, Qwen2DecoderLayer):  # type: ignore[misc]
    """A narrow block of a Qwen2."""


class SecateurQwen2Model(NarrowModel, Qwen2Model):
    """A Qwen2 with narrow blocks, without its output head."""

    config_class = SecateurQwen2Config
    block_class = SecateurQwen2DecoderLayer


class SecateurQwen2ForCausalLM(NarrowForCausalLM, Qwen2ForCausalLM):
    """A Qwen2 with narrow blocks."""

    config_class = SecateurQwen2Config
    model_class = SecateurQwen2Model


class SecateurQwen3Config(NarrowConfig, Qwen3Config):
    """Configuration of a Qwen3 whose blocks have widths of their own; see `NarrowConfig`."""

    model_type = "secateur_qwen3"
    block_widths: BlockWidths = None


class SecateurQwen3DecoderLayer(PreNormBlock, Qwen3DecoderLayer):  # type: ignore[misc]
    """A narrow block of a Qwen3."""


class SecateurQwen3Model(NarrowModel, Qwen3Model):
    """A Qwen3 with narrow blocks, without its output head."""

    config_class = SecateurQwen3Config
    block_class = SecateurQwen3DecoderLayer


class SecateurQwen3ForCausalLM(NarrowForCausalLM, Qwen3ForCausalLM):
    """A Qwen3 with narrow blocks."""

    config_class = SecateurQwen3Config
    model_class = SecateurQwen3Model


class SecateurGemma2Config(NarrowConfig, Gemma2Config):
    """Configuration of a Gemma 2 whose blocks have widths of their own; see `NarrowConfig`."""

    model_type = "secateur_gemma2"
    block_widths: BlockWidths = None


class SecateurGemma2DecoderLayer(SandwichBlock, Gemma2DecoderLayer):  # type: ignore[misc]
    """A narrow block of a Gemma 2."""


class SecateurGemma2Model(NarrowModel, Gemma2Model):
    """A Gemma 2 with narrow blocks, without its output head."""

    config_class = SecateurGemma2Config
    block_class = SecateurGemma2DecoderLayer


class SecateurGemma2ForCausalLM(NarrowForCausalLM, Gemma2ForCausalLM):
    """A Gemma 2 with narrow blocks."""

    config_class = SecateurGemma2Config
    model_class = SecateurGemma2Model


class SecateurGemma3Config(NarrowConfig, Gemma3TextConfig):
    """Configuration of a Gemma 3 whose blocks have widths of their own; see `NarrowConfig`."""

    model_type = "secateur_gemma3_text"
    block_widths: BlockWidths = None


class SecateurGemma3DecoderLayer(SandwichBlock, Gemma3DecoderLayer):  # type: ignore[misc]
    """A narrow block of a Gemma 3."""


class SecateurGemma3Model(NarrowModel, Gemma3TextModel):
    """A Gemma 3 with narrow blocks, without its output head."""

    config_class = SecateurGemma3Config
    block_class = SecateurGemma3DecoderLayer


class SecateurGemma3ForCausalLM(NarrowForCausalLM, Gemma3ForCausalLM):
    """A Gemma 3 with narrow blocks."""

    config_class = SecateurGemma3Config
    model_class = SecateurGemma3Model


class SecateurOPTConfig(NarrowConfig, OPTConfig):
    """Configuration of an OPT whose blocks have widths of their own; see `NarrowConfig`."""

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


class SecateurPhiConfig(NarrowConfig, PhiConfig):
    """Configuration of a Phi whose blocks have widths of their own; see `NarrowConfig`."""

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


# So that `save_pretrained` writes this file and the way to it into the folder.
for _causal_lm in NarrowForCausalLM.__subclasses__():
    _config_class: Any = _causal_lm.config_class
    _config_class.register_for_auto_class()
    _causal_lm.model_class.register_for_auto_class("AutoModel")
    _causal_lm.register_for_auto_class("AutoModelForCausalLM")
