"""Language models whose blocks differ in width, as written by Secateur.

This file is in the folder of the model, beside that of its family, and needs only torch and
transformers. It extends transformers' own classes, which provide attention, rotary embedding,
caches and generation, and changes a block as follows:

- norms take their statistics over the full residual stream and return only the selected entries;
- the linear layers are narrow, and attention may have fewer heads: a key-value head goes with all
  query heads that read it, so that all blocks have equally many queries per key;
- their outputs are added to the selected entries of the residual stream, which has its full width;
- a block may have no attention, or no MLP.

The widths are in `config.json` (`block_widths`), the selected entries in the weights, as integer
buffers. A site of full width has no buffer, and its layers are those of the stock model.

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


def gather(hidden_BTD: Tensor, index_W: Tensor) -> Tensor:
    """The selected entries, shape (B, T, W)."""
    # On a CPU, `gather` with an expanded index is several times as fast as `index_select` along
    # the last axis.
    return hidden_BTD.gather(-1, index_W.expand(hidden_BTD.shape[:-1] + index_W.shape))


def inverse_rms(hidden_BTW: Tensor, size: int, eps: float) -> Tensor:
    """One over the root mean square of `size` entries, shape (B, T, 1), float32.

    The vector norm reads its entries once and writes one number per token, without a float32 copy
    or a normalised stream of full width.
    """
    norm_BT1 = torch.linalg.vector_norm(hidden_BTW, dim=-1, keepdim=True, dtype=torch.float32)
    return torch.rsqrt(norm_BT1.square() / size + eps)


class LeanRMSNorm(nn.Module):
    """RMSNorm of a stream of full width in fewer passes than the stock one, and with its results.

    The name ends in `RMSNorm`, so that servers replace it by their kernel, as the stock one.

    Args:
        size: Entries of the input.
        eps: Added to the mean square.
    """

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.variance_epsilon = eps

    def forward(self, hidden_BTD: Tensor) -> Tensor:
        wide_BTD = hidden_BTD.to(torch.float32, copy=True)
        scale_BT1 = inverse_rms(wide_BTD, wide_BTD.shape[-1], self.variance_epsilon)
        if torch.is_grad_enabled():  # the gradient of the scale needs the copy as it is
            return (wide_BTD * scale_BT1).to(hidden_BTD.dtype) * self.weight
        return wide_BTD.mul_(scale_BT1).to(hidden_BTD.dtype).mul_(self.weight)


class SelectiveRMSNormGather(nn.Module):
    """RMSNorm over the full width that scales and returns only the selected entries.

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
        # The gathered entries are a private copy, so they can be scaled in place. The products are
        # computed in float32 and rounded one by one, as in the stock norm.
        scale_BT1 = inverse_rms(hidden_BTD, self.size, self.eps)
        return gather(hidden_BTD, self.index).mul_(scale_BT1).mul_(self.weight)


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
        """Add the output to the stream.

        Args:
            stream_BTD: The residual stream.
            narrow_BTW: Output of attention or MLP.
            in_place: Whether the stream may be overwritten.
        """
        if self.index is None:
            return stream_BTD.add_(narrow_BTW) if in_place else stream_BTD + narrow_BTW
        # The sum has the type of the stream, which is wider than that of linear layers under
        # autocast.
        narrow_BTW = narrow_BTW.to(stream_BTD.dtype)
        index_BTW = self.index.expand(narrow_BTW.shape)
        if in_place:
            return stream_BTD.scatter_add_(-1, index_BTW, narrow_BTW)
        return stream_BTD.scatter_add(-1, index_BTW, narrow_BTW)


ATTENTION: Mapping[str, tuple[str, str]] = {
    "self_attn.q_proj": ("attn_in", "attn_heads"),
    "self_attn.k_proj": ("attn_in", "attn_heads"),
    "self_attn.v_proj": ("attn_in", "attn_heads"),
    "self_attn.o_proj": ("attn_heads", "attn_out"),
}
GATED_MLP: Mapping[str, tuple[str, str]] = {
    "mlp.gate_proj": ("mlp_in", "mlp_mid"),
    "mlp.up_proj": ("mlp_in", "mlp_mid"),
    "mlp.down_proj": ("mlp_mid", "mlp_out"),
}


def _part(site: str) -> str:
    """The part of a block that a site belongs to: `attn` or `mlp`."""
    return site.partition("_")[0]


def _num_groups(config: PreTrainedConfig) -> int:
    """Key-value heads of a full block."""
    return int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)


def _cache_slot(config: PreTrainedConfig, layer_idx: int) -> int:
    """The index of the attention of a block in a cache, which has one entry per block.

    Attentions of one type take the earliest free entries of their type: caches count their tokens
    in the first entry of every type, so that it must be in use.
    """
    types = getattr(config, "layer_types", None) or [""] * config.num_hidden_layers
    places = [place for place, kind in enumerate(types) if kind == types[layer_idx]]
    before = [place for place in places if place < layer_idx]
    return int(places[sum(config.block_widths[place].get("attn") != 0 for place in before)])


class NarrowBlock(nn.Module):
    """Mixin for the decoder layer of a family; it comes before the family's own class.

    The constructor builds the block of the family, replaces the layers named in the tables by
    narrow ones, and sets all modules of removed parts to None. `attend` and `feed` compute the
    outputs of attention and MLP that are added to the residual stream.
    """

    self_attn: Any
    mlp: Any
    attn_out: IndexedAdd | None
    mlp_out: IndexedAdd | None

    # Linear layer: the sites of its inputs and of its outputs.
    linears: ClassVar[Mapping[str, tuple[str, str]]]
    # Norm: the site of its output, and the class that replaces it if the site is narrow.
    norms: ClassVar[Mapping[str, tuple[str, type[nn.Module]]]]
    # The class that replaces a norm of full width; None keeps the stock one.
    whole_norm: ClassVar[type[nn.Module] | None] = None

    def __init__(self, config: PreTrainedConfig, layer_idx: int) -> None:
        # transformers loads models on the meta device, where the stock layers that are built and
        # replaced here need no memory; on other devices they need the memory of one block at a
        # time.
        super().__init__(config, layer_idx)
        size = config.hidden_size
        widths: Any = self._checked(config, layer_idx)
        has = {part: widths.get(part) != 0 for part in ("attn", "mlp")}
        groups = _num_groups(config)

        def features(site: str, full: int) -> int:  # of this block, and of a full one
            each = full // groups if site == "attn_heads" else 1
            return each * int(widths.get(site, full // each))

        for path, (inputs, outputs) in self.linears.items():
            if not has[_part(inputs)]:
                setattr(self, path.split(".")[0], None)
                continue
            stock: Any = self.get_submodule(path)
            narrow = nn.Linear(
                features(inputs, stock.in_features),
                features(outputs, stock.out_features),
                bias=stock.bias is not None,
            )
            self.set_submodule(path, narrow)
        for path, (site, narrow_class) in self.norms.items():
            if not has[_part(site)]:
                setattr(self, path, None)
                continue
            stock = self.get_submodule(path)
            eps = stock.variance_epsilon if hasattr(stock, "variance_epsilon") else stock.eps
            if widths.get(site, size) < size:
                self.set_submodule(path, narrow_class(widths[site], size, eps))
            elif self.whole_norm is not None:
                self.set_submodule(path, self.whole_norm(size, eps))
        self.attn_out, self.mlp_out = (
            IndexedAdd(widths.get(f"{part}_out", size), size) if has[part] else None
            for part in ("attn", "mlp")
        )
        self.take_place(config, layer_idx)

    def take_place(self, config: PreTrainedConfig, layer_idx: int) -> None:
        """Use the cache entry of the block with this index."""
        if self.attn_out is not None:
            self.self_attn.layer_idx = _cache_slot(config, layer_idx)

    def _checked(self, config: PreTrainedConfig, layer_idx: int) -> Mapping[str, int]:
        """Check and return the widths of this block."""
        widths: Mapping[str, int] = config.block_widths[layer_idx]
        full = {"attn": 1, "mlp": 1}
        for path, sites in self.linears.items():
            stock: Any = self.get_submodule(path)
            shape = (stock.in_features, stock.out_features)
            full |= dict(zip(sites, shape, strict=True))
        full["attn_heads"] = _num_groups(config)
        for site, width in widths.items():
            least = 0 if site in ("attn", "mlp") else 1
            if not least <= width <= full.get(site, -1):
                raise ValueError(
                    f"`block_widths` of block {layer_idx} has {site!r}: {width}; sites and their "
                    f"full widths are {full}."
                )
        return widths

    def attend(self, hidden_BTD: Tensor, **kwargs: Any) -> Tensor:
        """Output of the attention for its entries of the residual stream, shape (B, T, W)."""
        raise NotImplementedError

    def feed(self, hidden_BTD: Tensor) -> Tensor:
        """Output of the MLP for its entries of the residual stream, shape (B, T, W)."""
        raise NotImplementedError

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        stream_BTD: Tensor = hidden_states
        # The input stream must not be overwritten: it may be the embeddings of the caller, a
        # recorded hidden state or the input of a checkpointed block. The first addition therefore
        # makes a copy, the only one in a block. No other code holds that copy, so the second
        # addition overwrites it, unless autograd has saved it to differentiate the norm.
        alone = self.attn_out is not None and not torch.is_grad_enabled()
        if self.attn_out is not None:
            stream_BTD = self.attn_out(stream_BTD, self.attend(stream_BTD, **kwargs))
        if self.mlp_out is not None:
            stream_BTD = self.mlp_out(stream_BTD, self.feed(stream_BTD), in_place=alone)
        return stream_BTD


class PreNormBlock(NarrowBlock):
    """A sequential block: x + attention(norm(x)), and then x + mlp(norm(x))."""

    input_layernorm: Any
    post_attention_layernorm: Any

    linears = {**ATTENTION, **GATED_MLP}  # noqa: RUF012 -- declared above
    norms = {  # noqa: RUF012
        "input_layernorm": ("attn_in", SelectiveRMSNormGather),
        "post_attention_layernorm": ("mlp_in", SelectiveRMSNormGather),
    }
    whole_norm = LeanRMSNorm

    def attend(self, hidden_BTD: Tensor, **kwargs: Any) -> Tensor:
        attended_BTW: Tensor
        attended_BTW, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_BTD), **kwargs)
        return attended_BTW

    def feed(self, hidden_BTD: Tensor) -> Tensor:
        fed_BTW: Tensor = self.mlp(self.post_attention_layernorm(hidden_BTD))
        return fed_BTW


@contextmanager
def _without_blocks(config: PreTrainedConfig) -> Iterator[None]:
    """Make the stock constructors build everything except blocks of full width."""
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

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Make `save_pretrained` write the code files into the folder and list them."""
        super().__init_subclass__(**kwargs)
        if not hasattr(cls, "model_class"):
            return  # sent to another process, as vLLM does: its attributes, these too, come after
        config_class: Any = cls.config_class
        classes = {"AutoConfig": config_class, "AutoModel": cls.model_class}
        config_class.auto_classes = classes | {"AutoModelForCausalLM": cls}
        for name, of_name in config_class.auto_classes.items():
            of_name.register_for_auto_class(name)

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
            width]; a site that is not named has its full width. That of `attn_heads` is the number
            of key-value heads, each with its query heads. `attn: 0` and `mlp: 0` mean a block
            without attention or MLP. None means full blocks.

    Raises:
        ValueError: The number of mappings is not the number of blocks, or no block has attention.
    """

    auto_classes: ClassVar[Mapping[str, type]]
    block_widths: BlockWidths
    num_hidden_layers: int

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)  # type: ignore[misc]
        self.auto_map = auto_map(self.auto_classes)
        self.check_blocks()

    def check_blocks(self) -> None:
        """Check the widths, and give every block without attention the type of the first with one.

        Raises:
            ValueError: See the class.
        """
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
            # A block without attention has no type; it gets that of the first one, see
            # `_cache_slot`.
            first = types[attending[0]]
            config.layer_types = [
                kind if place in attending else first for place, kind in enumerate(types)
            ]


def auto_map(classes: Mapping[str, type]) -> dict[str, str]:
    """The `auto_map` of a configuration: Auto class to the class in the files of a folder."""
    return {
        name: f"{of_name.__module__.rpartition('.')[2]}.{of_name.__name__}"
        for name, of_name in classes.items()
    }
