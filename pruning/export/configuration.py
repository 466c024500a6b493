"""The configuration of the model that a plan leaves."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from transformers import PreTrainedConfig

from secateur.pruning.depth.removal import shortened_fields
from secateur.pruning.families import PARTS, family_named, part_of
from secateur.pruning.files.base_model import BaseModel
from secateur.pruning.heads import HEADS, fields_of_heads, num_groups
from secateur.pruning.modelling import config_class, narrow_type
from secateur.pruning.modelling.secateur_narrow import auto_map
from secateur.pruning.plan import Plan


def exported_config(base: BaseModel, plan: Plan) -> dict[str, Any]:
    """The configuration of the smaller model: that of the base model and its new widths.

    They are in the usual fields if the plan leaves a stock model, else in `block_widths`, one entry
    per remaining block; a removed part has width 0.
    """
    config = dict(base.settings)
    by_block, keep = plan.widths_by_block(), plan.kept_blocks()
    if len(keep) < len(by_block):
        method = {"method": plan.provenance.get("method", "a plan")}
        config |= shortened_fields(base.config, keep, method)
    fields = stock_fields(base.config, plan)
    return config | (own_code(base.config, plan) if fields is None else fields)


def stock_fields(config: PreTrainedConfig, plan: Plan) -> dict[str, Any] | None:
    """The fields of the configuration that a plan changes if it leaves a stock model, else None.

    Args:
        config: The configuration of the base model.
        plan: The plan.
    """
    widths, heads = plan.stock_widths(), _fields_of_heads(config, plan)
    if widths is None or heads is None:
        return None
    return {plan.family.mlp_width: widths["mlp_mid"]} | heads


def _fields_of_heads(config: PreTrainedConfig, plan: Plan) -> dict[str, int] | None:
    """The fields that a plan changes of the number of heads of all blocks; None if they cannot tell
    it, so that every block has to.
    """
    family, sites = family_named(plan.model_type), zip(plan.sites, plan.widths, strict=True)
    found = {width for site, width in sites if site.name == HEADS and width}
    if found <= {num_groups(config)}:
        return {}
    if family.narrow or len(found) > 1:
        return None
    fields = fields_of_heads(config, found.pop())
    may_be = family.stock_heads(int(config.hidden_size), fields["num_attention_heads"])
    return fields if may_be else None


def own_code(config: PreTrainedConfig, plan: Plan) -> dict[str, Any]:
    """Configuration entries of a model with custom code.

    Args:
        config: The configuration of the base model.
        plan: The plan.
    """
    model_type, by_block = narrow_type(plan.model_type), plan.widths_by_block()
    heads, classes = _fields_of_heads(config, plan), config_class(model_type).auto_classes
    elsewhere = PARTS if heads is None else (*PARTS, HEADS)
    return {
        "model_type": model_type,
        "architectures": [classes["AutoModelForCausalLM"].__name__],
        "auto_map": auto_map(classes),
        "block_widths": [_shown(by_block[block], elsewhere) for block in plan.kept_blocks()],
        **(heads or {}),
    }


def _shown(widths: dict[str, int], elsewhere: Collection[str]) -> dict[str, int]:
    """Widths of a block in the form of `block_widths`: a missing part is only a width of 0."""
    inside = {name: width for name, width in widths.items() if width and name not in elsewhere}
    there = {part_of(name) for name in inside}
    return {part: 0 for part in PARTS if part not in there} | inside
