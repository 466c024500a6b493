"""The configuration of the model that a plan leaves."""

from __future__ import annotations

from typing import Any

from secateur.pruning.depth.removal import shortened_fields
from secateur.pruning.families import PARTS, part_of
from secateur.pruning.files.base_model import BaseModel
from secateur.pruning.modelling import config_class, narrow_type
from secateur.pruning.modelling.secateur_narrow import auto_map
from secateur.pruning.plan import Plan


def exported_config(base: BaseModel, plan: Plan) -> dict[str, Any]:
    """The configuration of the smaller model: that of the base model and its new widths.

    They are one field if the plan leaves a stock model, else `block_widths`, one entry per
    remaining block; a removed part has width 0.
    """
    config = dict(base.settings)
    by_block, keep = plan.widths_by_block(), plan.kept_blocks()
    if len(keep) < len(by_block):
        method = {"method": plan.provenance.get("method", "a plan")}
        config |= shortened_fields(base.config, keep, method)
    if (width := plan.stock_mlp_width()) is not None:
        return config | {plan.family.mlp_width: width}
    return config | own_code(plan)


def own_code(plan: Plan) -> dict[str, Any]:
    """Configuration entries of a model with custom code."""
    model_type, by_block = narrow_type(plan.model_type), plan.widths_by_block()
    classes = config_class(model_type).auto_classes
    return {
        "model_type": model_type,
        "architectures": [classes["AutoModelForCausalLM"].__name__],
        "auto_map": auto_map(classes),
        "block_widths": [_shown(by_block[block]) for block in plan.kept_blocks()],
    }


def _shown(widths: dict[str, int]) -> dict[str, int]:
    """Widths of a block in the form of `block_widths`: a missing part is only a width of 0."""
    inside = {name: width for name, width in widths.items() if width and name not in PARTS}
    there = {part_of(name) for name in inside}
    return {part: 0 for part in PARTS if part not in there} | inside
