"""The table of model families: paths of blocks, norms and projections.

All differences between architectures are in the rows of this table. Sites, costs, gates, surgery
and export are derived from the rows, so that adding a family is adding a row (and its row in the
tests).

The row of a narrow model, whose blocks differ in width, is derived from that of its family: the
same modules, some of which a block may lack, and index buffers that list which entries of the
residual stream a block reads and writes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from secateur.pruning import heads
from secateur.pruning.heads import HEADS
from secateur.pruning.modelling import is_narrow, narrow_type, stock_type

PARTS = ("attn", "mlp")
"""The two parts of a block, each of which adds to the residual stream; sites begin with these."""


def part_of(site: str) -> str:
    """The part of a block that a site belongs to: `mlp` of `mlp_mid` and of `mlp` itself."""
    return site.partition("_")[0]


@dataclass(frozen=True)
class GatePoint:
    """Where the gate of a site multiplies in a live model.

    Args:
        path: Module, relative to its block.
        side: Whether the gate multiplies the input or the output of the module.
    """

    path: str
    side: Literal["input", "output"]


@dataclass(frozen=True)
class Projection:
    """A linear layer of a block and the sites that its two axes belong to.

    Args:
        path: Module, relative to its block. Its weight has shape (output features, input features).
        input: Site that selects its input features; None if they belong to heads, and these are
            never cut.
        output: The same of its output features, bias included.
    """

    path: str
    input: str | None = None
    output: str | None = None

    @property
    def part(self) -> str:
        """The part of the block that the projection belongs to, `attn` or `mlp`."""
        return part_of(self.input or self.output or "")


@dataclass(frozen=True)
class Norm:
    """A norm of a block that acts only on the entries of a site.

    The statistics are taken over the full width, with removed entries of a narrow input counted as
    zeros, as under their gates; only the entries of the site are scaled.

    Args:
        path: Module, relative to its block.
        output: Site that selects its output.
    """

    path: str
    output: str


@dataclass(frozen=True)
class Family:
    """One model family.

    Args:
        model_type: The value of `model_type` in config.json.
        blocks: Path of the list of blocks in the causal language model.
        gates: Site name to the place where its gate multiplies, in the order of the sites.
        projections: Every prunable linear layer of a block.
        norms: Every norm whose output a site selects.
        mlp_width: Field of the configuration with the size of the site `mlp_mid`, the only width
            beside the number of heads that a stock model of the family can change.
        stock_heads: Function that tells whether a stock model may have other heads than fill its
            residual stream, given the width of the stream and the number of query heads.
        refuse: Function that returns why a configuration of this family cannot be pruned, or None
            if it can.
        narrow: Whether blocks may differ in width, and lack attention or MLP.
    """

    model_type: str
    blocks: str
    gates: Mapping[str, GatePoint]
    projections: tuple[Projection, ...]
    norms: tuple[Norm, ...]
    mlp_width: str = "intermediate_size"
    stock_heads: Callable[[int, int], bool] = heads.never
    refuse: Callable[[PreTrainedConfig], str | None] = lambda config: None
    narrow: bool = False

    @cached_property
    def parts(self) -> Mapping[str, GatePoint]:
        """Part of a block to the place where one gate multiplies its whole output."""
        behind = {norm.output: norm.path for norm in self.norms}
        return {
            part: GatePoint(behind.get(f"{part}_out", self.gates[f"{part}_out"].path), "output")
            for part in PARTS
        }

    @cached_property
    def index_buffers(self) -> Mapping[str, str]:
        """Name of every index buffer of a narrow block, relative to it, to its site.

        A site whose gate is at the output of a norm is selected by that norm; another site of the
        residual stream by a selection or an addition named after it. A site between
        two projections needs no index.
        """
        norms = {norm.path for norm in self.norms}
        written = {projection.output for projection in self.projections}
        read = {projection.input for projection in self.projections}
        return {
            f"{point.path if point.path in norms else site}.index": site
            for site, point in self.gates.items()
            if site not in PARTS and site not in written & read
        }

    def narrowed(self) -> Family:
        """The family of the narrow models of this one."""
        return replace(self, model_type=narrow_type(self.model_type), narrow=True)

    def has(self, block: nn.Module, part: str) -> bool:
        """Test whether a block has attention (`attn`) or an MLP (`mlp`); stock blocks have both."""
        return not self.narrow or getattr(block, f"{part}_out") is not None

    def projections_of(self, block: nn.Module) -> list[Projection]:
        """The projections that a block has."""
        return [projection for projection in self.projections if self.has(block, projection.part)]

    def gates_of(self, block: nn.Module) -> dict[str, GatePoint]:
        """The gates that a block has, by the names of their sites, in order."""
        return {n: point for n, point in self.gates.items() if self.has(block, part_of(n))}

    def with_parts(self) -> Family:
        """The family with two additional sites of size 1 per block: attention and MLP."""
        return replace(self, gates={**self.gates, **self.parts})

    def with_heads(self) -> Family:
        """The family with an additional site in every attention: its groups of heads.

        The gate of a group multiplies the output of its heads, before the projection that reads it.
        """
        (reader,) = (p.path for p in self.projections if p.output == "attn_out")
        gates: dict[str, GatePoint] = {}
        for name, point in self.gates.items():
            if name == "attn_out":
                gates[HEADS] = GatePoint(reader, "input")
            gates[name] = point
        projections = (
            replace(p, input=p.input or HEADS, output=p.output or HEADS) for p in self.projections
        )
        return replace(self, gates=gates, projections=tuple(projections))

    def having(self, names: Collection[str]) -> Family:
        """The family with those additional sites that are named: `attn_heads`, `attn`, `mlp`."""
        family = self.with_heads() if HEADS in names else self
        return family.with_parts() if {*PARTS} & {*names} else family

    def part_of_tensor(self, path: str) -> str | None:
        """The part that a tensor of a block belongs to; None if both parts need it.

        Args:
            path: Tensor name relative to the block, such as `self_attn.q_norm.weight`.
        """
        for projection in self.projections:
            # Attention and most MLPs are one child of the block; OPT has two layers instead.
            if projection.path.split(".")[0] == path.split(".")[0]:
                return projection.part
        if self.narrow and path in self.index_buffers:
            return part_of(self.index_buffers[path])
        module = path.rpartition(".")[0]
        return next((part_of(norm.output) for norm in self.norms if norm.path == module), None)

    def gain_axes(self, path: str) -> tuple[str, ...]:
        """Name, within its block, of the gains folded into each axis of a tensor of a block.

        Args:
            path: Tensor name relative to the block, such as `mlp.up_proj.weight`.
        """
        module, _, kind = path.rpartition(".")
        if all(projection.path != module for projection in self.projections):
            return ()
        axes = (f"{module}.output", f"{module}.input")
        return axes if kind == "weight" else axes[:1]

    def axes(self, path: str) -> tuple[str | None, ...]:
        """The site of each axis of a tensor of a block; all None if it is never sliced.

        Args:
            path: Tensor name relative to the block, such as `mlp.up_proj.weight`.
        """
        if self.narrow and path in self.index_buffers:
            return (self.index_buffers[path],)
        module, _, kind = path.rpartition(".")
        for projection in self.projections:
            if projection.path == module:
                axes = (projection.output, projection.input)
                return axes if kind == "weight" else axes[:1]
        return tuple(norm.output for norm in self.norms if norm.path == module)


def _refuse_bidirectional(config: PreTrainedConfig) -> str | None:
    if getattr(config, "use_bidirectional_attention", None):
        return "its tokens attend in both directions, so it predicts no next token."
    return None


def _refuse_opt(config: PreTrainedConfig) -> str | None:
    if not config.do_layer_norm_before:
        return (
            "`do_layer_norm_before` is false: its norms come after the residual additions, so that "
            "no norm reads the whole stream for a narrow layer (OPT-350m). Choose another size."
        )
    if config.word_embed_proj_dim != config.hidden_size:
        return (
            f"`word_embed_proj_dim` {config.word_embed_proj_dim} is not `hidden_size` "
            f"{config.hidden_size}: its embeddings are projected (OPT-350m). Choose another size."
        )
    if not config.layer_norm_elementwise_affine:
        return "`layer_norm_elementwise_affine` is false: its norms have no weights to select."
    return None


_ATTENTION = (
    Projection("self_attn.q_proj", input="attn_in"),
    Projection("self_attn.k_proj", input="attn_in"),
    Projection("self_attn.v_proj", input="attn_in"),
    Projection("self_attn.o_proj", output="attn_out"),
)
_GATED_MLP = (
    Projection("mlp.gate_proj", input="mlp_in", output="mlp_mid"),
    Projection("mlp.up_proj", input="mlp_in", output="mlp_mid"),
    Projection("mlp.down_proj", input="mlp_mid", output="mlp_out"),
)

_LLAMA = Family(
    model_type="llama",
    blocks="model.layers",
    gates={
        "attn_in": GatePoint("input_layernorm", "output"),
        "attn_out": GatePoint("self_attn.o_proj", "output"),
        "mlp_in": GatePoint("post_attention_layernorm", "output"),
        "mlp_mid": GatePoint("mlp.down_proj", "input"),
        "mlp_out": GatePoint("mlp.down_proj", "output"),
    },
    projections=_ATTENTION + _GATED_MLP,
    norms=(
        Norm("input_layernorm", output="attn_in"),
        Norm("post_attention_layernorm", output="mlp_in"),
    ),
    stock_heads=heads.if_they_divide,
)
# Sliding windows and norms of queries and keys are the same for all heads. Configurations of Qwen2,
# OPT and Phi have no `head_dim`: their heads fill the residual stream.
_MISTRAL = replace(_LLAMA, model_type="mistral", stock_heads=heads.always)
_QWEN2 = replace(_LLAMA, model_type="qwen2", stock_heads=heads.never)
_QWEN3 = replace(_LLAMA, model_type="qwen3", stock_heads=heads.always)

# Sandwich norms: attention and MLP are also normalised before they are added to the residual
# stream. Their gates multiply before that norm, so that the projection in front of it can shrink;
# the norm then divides by the root mean square of the kept entries, over the full width.
_GEMMA2 = Family(
    model_type="gemma2",
    blocks="model.layers",
    gates={
        "attn_in": GatePoint("input_layernorm", "output"),
        "attn_out": GatePoint("self_attn.o_proj", "output"),
        "mlp_in": GatePoint("pre_feedforward_layernorm", "output"),
        "mlp_mid": GatePoint("mlp.down_proj", "input"),
        "mlp_out": GatePoint("mlp.down_proj", "output"),
    },
    projections=_ATTENTION + _GATED_MLP,
    norms=(
        Norm("input_layernorm", output="attn_in"),
        Norm("post_attention_layernorm", output="attn_out"),
        Norm("pre_feedforward_layernorm", output="mlp_in"),
        Norm("post_feedforward_layernorm", output="mlp_out"),
    ),
    stock_heads=heads.if_they_divide,
    refuse=_refuse_bidirectional,
)
_GEMMA3 = replace(_GEMMA2, model_type="gemma3_text")

_OPT = Family(
    model_type="opt",
    blocks="model.decoder.layers",
    gates={
        "attn_in": GatePoint("self_attn_layer_norm", "output"),
        "attn_out": GatePoint("self_attn.out_proj", "output"),
        "mlp_in": GatePoint("final_layer_norm", "output"),
        "mlp_mid": GatePoint("fc2", "input"),
        "mlp_out": GatePoint("fc2", "output"),
    },
    projections=(
        *_ATTENTION[:3],
        Projection("self_attn.out_proj", output="attn_out"),
        Projection("fc1", input="mlp_in", output="mlp_mid"),
        Projection("fc2", input="mlp_mid", output="mlp_out"),
    ),
    norms=(
        Norm("self_attn_layer_norm", output="attn_in"),
        Norm("final_layer_norm", output="mlp_in"),
    ),
    mlp_width="ffn_dim",
    refuse=_refuse_opt,
)

# Attention and MLP read the same normalised vector, each with its own selection: the gates are
# after the norm, at the inputs of the two, and the norm is not cut.
_PHI = Family(
    model_type="phi",
    blocks="model.layers",
    gates={
        "attn_in": GatePoint("self_attn", "input"),
        "attn_out": GatePoint("self_attn.dense", "output"),
        "mlp_in": GatePoint("mlp", "input"),
        "mlp_mid": GatePoint("mlp.fc2", "input"),
        "mlp_out": GatePoint("mlp.fc2", "output"),
    },
    projections=(
        *_ATTENTION[:3],
        Projection("self_attn.dense", output="attn_out"),
        Projection("mlp.fc1", input="mlp_in", output="mlp_mid"),
        Projection("mlp.fc2", input="mlp_mid", output="mlp_out"),
    ),
    norms=(),
)

FAMILIES: Mapping[str, Family] = {
    family.model_type: family
    for family in (_LLAMA, _MISTRAL, _QWEN2, _QWEN3, _GEMMA2, _GEMMA3, _OPT, _PHI)
}


def family_of(config: PreTrainedConfig) -> Family:
    """The row of the table for a configuration, with heads if its blocks differ in these.

    Raises:
        ValueError: The family is unknown, or this member of it cannot be pruned.
    """
    family = family_named(config.model_type)
    if reason := family.refuse(config):
        raise ValueError(f"This {family.model_type} model cannot be pruned: {reason}")
    blocks = getattr(config, "block_widths", None) or ()
    return family.having({name for widths in blocks for name in widths} - {*PARTS})


def family_named(model_type: str) -> Family:
    """The row of the table for a `model_type`, that of a narrow model included.

    Raises:
        ValueError: The family is unknown.
    """
    family = FAMILIES.get(stock_type(model_type))
    if family is None:
        raise ValueError(
            f"`model_type` {model_type!r} is not a known family; known are "
            f"{', '.join(sorted(FAMILIES))}. To add one, add its row to pruning/families.py "
            "and its test row (see CONTRIBUTING.md)."
        )
    return family.narrowed() if is_narrow(model_type) else family


def blocks_of(model: PreTrainedModel, family: Family) -> list[nn.Module]:
    """The blocks of a live model, first to last."""
    return list(model.get_submodule(family.blocks).children())


def skeleton(config: PreTrainedConfig) -> PreTrainedModel:
    """The model of a configuration on the meta device: shapes without memory."""
    config = copy.deepcopy(config)  # transformers writes the data type into it
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config)
    assert isinstance(model, PreTrainedModel)
    return model
