"""Remove blocks from a live model, temporarily or permanently, and adapt what depends on them.

Permanent removal changes the list of blocks, `layer_idx` of every module, the per-block lists and
`num_hidden_layers` of the configuration. The result is a stock model of its family, and its
configuration records its origin. If only half of a block is removed, a module without weights
replaces it: such a model trains and decodes, but is not a stock model. A narrow model remains a
narrow model.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from secateur.pruning.chains import Step, kinds_of, refuse
from secateur.pruning.depth.units import HalfBlocks, Unit
from secateur.pruning.families import Family, blocks_of, family_of, part_of

PROVENANCE = "secateur"
"""Field of the configuration that records the remaining blocks and their original model."""

# One entry per block, and lists of block indices.
_PER_BLOCK = ("layer_types", "mlp_layer_types", "no_rope_layers", "block_widths")
_INDICES = ("mlp_only_layers",)
# Rules that derive a property of a block from its index, to the per-block list that overrides them
# if present.
_RULES = {
    "max_window_layers": "layer_types",
    "sliding_window_pattern": "layer_types",
    "_sliding_window_pattern": "layer_types",
    "full_attention_interval": "layer_types",
    "global_attn_every_n_layers": "layer_types",
    "no_rope_layer_interval": "no_rope_layers",
    "first_k_dense_replace": "mlp_layer_types",
    "decoder_sparse_step": "mlp_layer_types",
    "num_kv_shared_layers": None,
}
# Lists that can have one entry per block by chance.
_UNRELATED = ("architectures", "bos_token_id", "eos_token_id", "pad_token_id")


def remove_blocks(
    model: PreTrainedModel, units: Iterable[Unit | int], provenance: Mapping[str, Any] | None = None
) -> None:
    """Remove blocks, or halves of them, from a model permanently, in place.

    A block is removed entirely once both of its halves are removed. The model gets a new
    configuration: other models that share the old one are not affected.

    Args:
        model: A causal language model of a known family, not quantised.
        units: Indices of blocks, or units, in any order.
        provenance: Facts to record with them, such as score and data; JSON values.

    Raises:
        ValueError: No unit is named, one is out of range or repeated, no block or no attention
            would remain, the model is quantised, or its configuration has a rule that depends on
            the index of a block.
    """
    refuse(kinds_of(model.config), Step.BLOCKS)
    config, family = model.config, family_of(model.config)
    gone = as_units(units)
    checked_units(gone, config.num_hidden_layers)
    if not gone:
        raise ValueError("`units` is empty: nothing would be removed.")
    left = [u for u in HalfBlocks().of(model) if u not in gone and Unit(u.block) not in gone]
    keep = sorted({unit.block for unit in left})
    if keep and not any(unit.part == "attn" for unit in left):
        raise ValueError("No attention would remain in the model; keep that of at least one block.")
    halves = sorted(unit for unit in gone if unit.block in keep)
    if halves:
        provenance = {"halves": _first_names(config, halves)} | dict(provenance or {})
    shorter: Any = shortened_config(config, keep, provenance)
    for unit in halves:
        _replace(unit, model, family)
    owner, _, name = family.blocks.rpartition(".")
    layers = list(model.get_submodule(family.blocks).children())
    setattr(model.get_submodule(owner), name, nn.ModuleList(layers[block] for block in keep))
    if family.narrow:
        for unit in halves:
            widths = shorter.block_widths[keep.index(unit.block)]
            inside = {site: width for site, width in widths.items() if part_of(site) != unit.part}
            shorter.block_widths[keep.index(unit.block)] = inside | {unit.part: 0}
        shorter.check_blocks()
    for index, block in enumerate(keep):
        layer: Any = layers[block]
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = index
        if family.narrow:
            layer.take_place(shorter, index)
    for module in model.modules():
        if getattr(module, "config", None) is config:
            module.config = shorter


@contextmanager
def bypassed(model: PreTrainedModel, units: Iterable[Unit | int]) -> Iterator[None]:
    """The model without some units for the duration of a `with` block.

    Blocks keep their positions, so a cache of keys and values counts wrongly without block 0: call
    the model with `use_cache=False`. Meanwhile the parameters of the units are not among the
    model's.

    Args:
        model: A causal language model of a known family; quantised ones too.
        units: Units, or indices of whole blocks, to bypass.

    Raises:
        ValueError: A block is out of range or a unit repeated.
    """
    family = family_of(model.config)
    gone = as_units(units)
    checked_units(gone, len(blocks_of(model, family)))
    before: list[tuple[nn.Module, str, nn.Module]] = []
    try:
        for unit in gone:
            before += _replace(unit, model, family)
        yield
    finally:
        for parent, name, module in reversed(before):
            setattr(parent, name, module)


def _replace(
    unit: Unit, model: PreTrainedModel, family: Family
) -> list[tuple[nn.Module, str, nn.Module]]:
    """Bypass a unit of a live model; return the replaced modules: parent, name and child."""
    before = []
    for parent, name, stand_in in unit.replacements(model.get_submodule(family.blocks), family):
        before.append((parent, name, getattr(parent, name)))
        setattr(parent, name, stand_in and stand_in.train(model.training))
    return before


def shortened_config(
    config: PreTrainedConfig, keep: Sequence[int], provenance: Mapping[str, Any] | None = None
) -> PreTrainedConfig:
    """A copy of a configuration for a model with some of its blocks.

    Args:
        config: The configuration; it is not changed.
        keep: Indices of the blocks to keep, in order.
        provenance: Facts to record with the blocks; JSON values.

    Raises:
        ValueError: An index is out of range or repeated, none is given, or a rule that depends on
            the index of a block cannot be carried over.
    """
    shorter = copy.deepcopy(config)
    for name, value in shortened_fields(config, keep, provenance).items():
        setattr(shorter, name, value)
    return shorter


def shortened_fields(
    config: PreTrainedConfig, keep: Sequence[int], provenance: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The fields of a configuration that change with its blocks; see `shortened_config`."""
    family_of(config)
    num_blocks = config.num_hidden_layers
    checked_blocks(keep, num_blocks)
    if not keep:
        raise ValueError(f"No block would remain of {num_blocks}; remove at most {num_blocks - 1}.")
    if list(keep) != sorted(keep):
        raise ValueError(f"`keep` must be in order, got {list(keep)}.")
    fields = {name: value for name, value in vars(config).items() if value is not None}
    _refuse_rules(fields, num_blocks)
    changed: dict[str, Any] = {"num_hidden_layers": len(keep)}
    for name in _PER_BLOCK:
        if name in fields:
            changed[name] = [fields[name][block] for block in keep]
    for name in _INDICES:
        if name in fields:
            changed[name] = [keep.index(block) for block in fields[name] if block in keep]
    before = fields.get(PROVENANCE) or {
        "num_blocks": num_blocks,
        "kept_blocks": list(range(num_blocks)),
        "removals": [],
    }
    origin = before["kept_blocks"]
    removed = [origin[block] for block in range(num_blocks) if block not in keep]
    changed[PROVENANCE] = {
        "num_blocks": before["num_blocks"],
        "kept_blocks": [origin[block] for block in keep],
        "removals": [*before["removals"], {"blocks": removed} | dict(provenance or {})],
    }
    return changed


def as_units(units: Iterable[Unit | int]) -> list[Unit]:
    """Units, where indices stand for whole blocks."""
    return [unit if isinstance(unit, Unit) else Unit(operator.index(unit)) for unit in units]


def _first_names(config: PreTrainedConfig, units: Iterable[Unit]) -> list[str]:
    """Names of units in the original model, before any block was removed."""
    origin = (getattr(config, PROVENANCE, None) or {}).get("kept_blocks")
    return [Unit(origin[unit.block] if origin else unit.block, unit.part).key for unit in units]


def _refuse_rules(fields: Mapping[str, Any], num_blocks: int) -> None:
    """Refuse unknown rules of a configuration that depend on the index of a block.

    Raises:
        ValueError: There is such a rule; names it.
    """
    for rule, decided_by in _RULES.items():
        if rule in fields and (decided_by is None or decided_by not in fields):
            cure = f"write out `{decided_by}`" if decided_by else "no per-block list can replace it"
            raise ValueError(
                f"`{rule}` {fields[rule]} of the configuration is a function of the index of a "
                f"block, which changes when blocks are removed; {cure}."
            )
    for name in _PER_BLOCK:
        if name in fields and len(fields[name]) != num_blocks:
            raise ValueError(
                f"`{name}` of the configuration has {len(fields[name])} entries for {num_blocks} "
                "blocks; correct the configuration."
            )
    known = {*_PER_BLOCK, *_INDICES, *_UNRELATED}
    for name, value in fields.items():
        if isinstance(value, list | tuple) and len(value) == num_blocks and name not in known:
            raise ValueError(
                f"`{name}` of the configuration is a list of {num_blocks} entries, apparently one "
                "per block, but it is not known as such a list; add it to pruning/depth/removal.py."
            )


def checked_blocks(blocks: Iterable[int], num_blocks: int) -> list[int]:
    """Block indices, if all are in range and none is repeated.

    Raises:
        ValueError: A block is out of range or repeated.
    """
    found = list(blocks)
    checked_units([Unit(block) for block in found], num_blocks)
    return found


def checked_units(units: Sequence[Unit], num_blocks: int) -> None:
    """Check that units exist, once each.

    Raises:
        ValueError: A block is out of range, or a unit is repeated, even as the half of a block.
    """
    if strange := [unit.key for unit in units if not 0 <= unit.block < num_blocks]:
        raise ValueError(
            f"Block {', '.join(strange)} is out of range: the model has {num_blocks} blocks, "
            f"0 to {num_blocks - 1}."
        )
    whole = {unit.block for unit in units if unit.part == "block"}
    halves = {unit.key for unit in units if unit.part != "block" and unit.block in whole}
    repeated = {unit.key for unit in units if units.count(unit) > 1} | halves
    if repeated:
        raise ValueError(f"Block {', '.join(sorted(repeated))} is named more than once.")
