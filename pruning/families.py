"""The one table of model families: where each keeps its blocks, norms and projections.

Everything that differs between architectures is a row here. Sites, costs, gates, surgery and export
are derived from the rows, so that adding a family is adding a row (and its row in the tests).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel


@dataclass(frozen=True)
class GatePoint:
    """Where the gate of a site multiplies in a live model.

    Args:
        path: Module, relative to its block.
        side: Whether the gate multiplies what goes into the module or what comes out of it.
    """

    path: str
    side: Literal["input", "output"]


@dataclass(frozen=True)
class Projection:
    """A linear layer of a block and the sites that its two axes belong to.

    Args:
        path: Module, relative to its block. Its weight has shape (output features, input features).
        input: Site that selects its input features; None if they always stay.
        output: Site that selects its output features, bias included; None if they always stay.
    """

    path: str
    input: str | None = None
    output: str | None = None


@dataclass(frozen=True)
class Norm:
    """A norm of a block whose normalised output is selected by a site.

    The statistics are taken over the full width; only the selected entries are scaled.

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
        exported_as: Prefix of the classes in the modelling file of models with per-block widths.
        refuse: Returns why a configuration of this family cannot be pruned, or None if it can.
    """

    model_type: str
    blocks: str
    gates: Mapping[str, GatePoint]
    projections: tuple[Projection, ...]
    norms: tuple[Norm, ...]
    exported_as: str
    refuse: Callable[[PreTrainedConfig], str | None] = lambda config: None

    def axes(self, path: str) -> tuple[str | None, ...]:
        """The site of each axis of a tensor of a block, all None where nothing is ever sliced.

        Args:
            path: Tensor name relative to the block, such as `mlp.up_proj.weight`.
        """
        module, _, kind = path.rpartition(".")
        for projection in self.projections:
            if projection.path == module:
                axes = (projection.output, projection.input)
                return axes if kind == "weight" else axes[:1]
        return tuple(norm.output for norm in self.norms if norm.path == module)


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
    projections=(
        Projection("self_attn.q_proj", input="attn_in"),
        Projection("self_attn.k_proj", input="attn_in"),
        Projection("self_attn.v_proj", input="attn_in"),
        Projection("self_attn.o_proj", output="attn_out"),
        Projection("mlp.gate_proj", input="mlp_in", output="mlp_mid"),
        Projection("mlp.up_proj", input="mlp_in", output="mlp_mid"),
        Projection("mlp.down_proj", input="mlp_mid", output="mlp_out"),
    ),
    norms=(
        Norm("input_layernorm", output="attn_in"),
        Norm("post_attention_layernorm", output="mlp_in"),
    ),
    exported_as="SecateurLlama",
)

FAMILIES: Mapping[str, Family] = {family.model_type: family for family in (_LLAMA,)}


def family_of(config: PreTrainedConfig) -> Family:
    """The row of the table for a configuration.

    Raises:
        ValueError: The family is unknown, or this member of it cannot be pruned.
    """
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise ValueError(
            f"`model_type` {config.model_type!r} is not a known family; known are "
            f"{', '.join(sorted(FAMILIES))}. To add one, add its row to pruning/families.py "
            "and its test row (CONTRIBUTING.md shows how)."
        )
    if reason := family.refuse(config):
        raise ValueError(f"This {family.model_type} model cannot be pruned: {reason}")
    return family


def blocks_of(model: PreTrainedModel, family: Family) -> list[nn.Module]:
    """The blocks of a live model, first to last."""
    return list(model.get_submodule(family.blocks).children())


def skeleton(config: PreTrainedConfig) -> PreTrainedModel:
    """The model of a configuration on the meta device: shapes without memory."""
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config)
    assert isinstance(model, PreTrainedModel)
    return model
