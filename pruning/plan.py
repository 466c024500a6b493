"""The plan: which entries of every site are kept. Small, exact, reproducible.

On disk a plan is two files of one folder: `plan.safetensors` holds the kept indices, one int32
vector per site named `<block>.<site>`, and the gains, if there are any, as
`<block>.<projection>.<input|output>`; `plan.json` describes them and has a checksum of both files.
Neither can run code. Equal plans give equal files, byte for byte.

In a model folder they are in `plan/`: servers load every safetensors file at its top level as
weights.

A plan may have, per block, the site `attn_heads`: groups of heads, each a key-value head with its
query heads. It may also have the sites `attn` and `mlp` of size 1: one gate each for the entire
attention and the entire MLP. If such a site keeps nothing, the sites of that part keep nothing
either.

Legend: S = sites, I = entries of a site, W = kept entries of a site.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from secateur.pruning import plan_files
from secateur.pruning.composition import compose_gains, compose_kept
from secateur.pruning.families import Family, family_named, family_of, skeleton
from secateur.pruning.heads import HEADS
from secateur.pruning.modelling import is_narrow, narrow_type
from secateur.pruning.plan_files import read_plan, write_plan
from secateur.pruning.sites import Site, features_of, find_sites, gain_sizes, widths_table

TENSORS, DESCRIPTION = plan_files.TENSORS, plan_files.DESCRIPTION
IN_MODEL = "plan"
"""Subfolder of a model folder with the plan."""


@dataclass(frozen=True, eq=False)
class Plan:
    """The kept entries of every site of a model, with gains.

    Args:
        model_type: Family of the base model.
        base: Fingerprint of the base model, see `secateur.pruning.files.fingerprint`.
        sites: The sites of the base model, in order.
        kept: Sorted indices (int64) of the kept entries, one vector of shape (W,) per site.
        gains: Factors (float32) on the features on both sides of every projection, by the names of
            `gain_sizes`; missing names, and None, mean ones. Surgery folds them into the weights.
            Gains of removed entries have no effect.
        provenance: How the plan was made: JSON values only, shown in the model card.

    Raises:
        ValueError: Indices are unsorted, repeated, out of range or empty, or no attention is left.
    """

    model_type: str
    base: str
    sites: tuple[Site, ...]
    kept: tuple[Tensor, ...]
    provenance: Mapping[str, Any] = field(default_factory=dict)
    gains: Mapping[str, Tensor] | None = None

    def __post_init__(self) -> None:
        if len(self.sites) != len(self.kept):
            raise ValueError(f"{len(self.kept)} index sets were given for {len(self.sites)} sites.")
        gone = self.removed_parts
        for site, index_W in zip(self.sites, self.kept, strict=True):
            if (site.block, site.part) in gone:
                if len(index_W) > 0:
                    raise ValueError(
                        f"Site {site.key} keeps entries of a part that is removed entirely; keep "
                        "none."
                    )
                continue
            if len(index_W) == 0:
                raise ValueError(f"Site {site.key} keeps nothing; every site keeps at least one.")
            if bool((index_W[1:] <= index_W[:-1]).any()):
                raise ValueError(f"Kept indices of site {site.key} must be sorted and unique.")
            if int(index_W[0]) < 0 or int(index_W[-1]) >= site.size:
                raise ValueError(f"Kept indices of site {site.key} must be in [0, {site.size}).")
        attentions = {site.block for site in self.sites if site.part == "attn"}
        if attentions and not attentions - {block for block, part in gone if part == "attn"}:
            raise ValueError("The plan keeps no attention: no token would see another. Keep one.")
        for name, gain_F in (self.gains or {}).items():
            if not bool(gain_F.isfinite().all()):
                raise ValueError(f"The gains {name} must be finite.")

    @property
    def family(self) -> Family:
        """The row of the family whose sites these are."""
        return family_named(self.model_type).having({site.name for site in self.sites})

    def keeps(self, block: int, part: str) -> bool:
        """Test whether the attention (`attn`) or the MLP (`mlp`) of a block is kept, at any width;
        False for a part that the base model lacks.
        """
        return (block, part) in self._parts and (block, part) not in self.removed_parts

    def kept_blocks(self) -> list[int]:
        """Blocks of the base model that are not entirely removed, in order."""
        return sorted({block for block, _ in self._parts - self.removed_parts})

    @cached_property
    def removed_parts(self) -> frozenset[tuple[int, str]]:
        """Block and part of every part that is removed entirely."""
        sites = zip(self.sites, self.kept, strict=True)
        gone = {(site.block, site.name) for site, i in sites if site.is_part and len(i) == 0}
        return frozenset(gone)

    @cached_property
    def _parts(self) -> frozenset[tuple[int, str]]:
        """Block and part of every part of the base model."""
        return frozenset((site.block, site.part) for site in self.sites)

    @property
    def widths(self) -> list[int]:
        """Number of kept entries of every site."""
        return [len(index_W) for index_W in self.kept]

    def widths_by_block(self) -> list[dict[str, int]]:
        """Site name to kept width, one entry per block."""
        by_block: dict[int, dict[str, int]] = {}
        for site, width in self._widths_of_sites():
            by_block.setdefault(site.block, {})[site.name] = width
        return [by_block[block] for block in sorted(by_block)]

    def stock_widths(self) -> dict[str, int] | None:
        """The common width of all MLPs (`mlp_mid`) and, if they are cut, the common number of
        groups of heads (`attn_heads`), if nothing else is cut in the remaining blocks.

        A model of these widths needs no code of its own, where its configuration can tell the
        number of heads. None otherwise, and always for a narrow base model.
        """
        if is_narrow(self.model_type):
            return None
        stay = set(self.kept_blocks())
        sites = [(site, width) for site, width in self._widths_of_sites() if site.block in stay]
        cut = {site.name for site, width in sites if width < site.size}
        found = {name: {w for s, w in sites if s.name == name} for name in {"mlp_mid"} | cut}
        uniform = all(len(widths) == 1 for widths in found.values())
        if not uniform or not cut <= {"mlp_mid", HEADS}:
            return None
        return {name: widths.pop() for name, widths in found.items()}

    def _widths_of_sites(self) -> zip[tuple[Site, int]]:
        return zip(self.sites, self.widths, strict=True)

    @cached_property
    def _places(self) -> dict[str, int]:
        return {site.key: place for place, site in enumerate(self.sites)}

    def size(self, block: int, name: str) -> int:
        """Number of entries of one site of the base model; KeyError if there is none."""
        return self.sites[self._places[f"{block}.{name}"]].size

    def index(self, block: int, name: str) -> Tensor:
        """Kept indices (int64) of one site; KeyError if there is none."""
        return self.kept[self._places[f"{block}.{name}"]]

    def features(self, block: int, name: str, count: int) -> Tensor:
        """The same for a tensor that has `count` features, one or several of every entry."""
        return features_of(self.index(block, name), self.size(block, name), count)

    def gates(self) -> tuple[Tensor, ...]:
        """The gates (float32), one vector of shape (I,) per site: 1 for kept entries, else 0."""
        return tuple(
            torch.zeros(site.size).index_fill(0, index_W, 1.0)
            for site, index_W in zip(self.sites, self.kept, strict=True)
        )

    def verify(self, config: PreTrainedConfig) -> None:
        """Check that the plan fits a model.

        Raises:
            ValueError: The plan was made for another family or other sizes.
        """
        family_of(config)  # reports an unknown family first
        if config.model_type != self.model_type:
            raise ValueError(
                f"The plan was made for a {self.model_type!r} model and cannot prune a "
                f"{config.model_type!r} model."
            )
        model = skeleton(config)
        expected = find_sites(model, self.family)
        for ours, theirs in zip(self.sites, expected, strict=False):
            if ours != theirs:
                raise ValueError(
                    f"The plan does not fit: site {ours.key} has {ours.size} entries in the plan, "
                    f"the model has {theirs.key} with {theirs.size}."
                )
        if len(self.sites) != len(expected):
            raise ValueError(
                f"The plan does not fit: it has {len(self.sites)} sites, the model {len(expected)}."
            )
        found, sizes = self.gains or {}, gain_sizes(model, self.family)
        if wrong := [name for name, gain_F in found.items() if len(gain_F) != sizes.get(name)]:
            raise ValueError(
                f"The plan does not fit: of {wrong[0]} it has {len(found[wrong[0]])} gains, the "
                f"model has {sizes.get(wrong[0], 0)} features."
            )

    def then(self, other: Plan) -> Plan:
        """Compose this plan with a plan of the model that it leaves.

        Cutting by the result gives the same tensors as cutting by both in turn, up to the rounding
        of gains. The provenance lists that of every stage under `stages`, in order.

        Args:
            other: A plan of the model that this one leaves.

        Raises:
            ValueError: The other plan was made for another family or other sizes.
        """
        left, stock = other.model_type, self.stock_widths()
        leaves = {narrow_type(self.model_type)} if stock is None else {self.model_type}
        if HEADS in (stock or {}):  # the configuration decides, see `secateur.pruning.heads`
            leaves.add(narrow_type(self.model_type))
        if left not in leaves:
            raise ValueError(f"The plan leaves no {left!r} model, for which the next one was made.")
        first = dict(zip(self.sites, self.kept, strict=True))
        second = dict(zip(other.sites, other.kept, strict=True))
        blocks, names = self.kept_blocks(), {site.name for site in other.sites}
        kept = compose_kept(first, second, blocks, self.family.having(names))
        stages = [
            stage
            for plan in (self, other)
            for stage in plan.provenance.get("stages", [{"base": plan.base, **plan.provenance}])
        ]
        return Plan(
            model_type=self.model_type,
            base=self.base,
            sites=tuple(kept),
            kept=tuple(kept.values()),
            provenance={"method": "one plan after another", "stages": stages},
            gains=compose_gains(self.family, self.gains, other.gains, first, blocks),
        )

    def describe(self) -> str:
        """The kept widths as a text table, one row per block."""
        return widths_table(self.sites, self.widths)

    def save(self, folder: str | Path) -> None:
        """Write `plan.safetensors` and `plan.json` into a folder, which is created if needed."""
        content = {
            "model_type": self.model_type,
            "base": self.base,
            "sites": [[site.block, site.name, site.size] for site in self.sites],
            "widths": self.widths_by_block(),
            "provenance": dict(self.provenance),
        }
        tensors = {
            site.key: index_W.to(torch.int32)
            for site, index_W in zip(self.sites, self.kept, strict=True)
        }
        tensors |= {name: gain_F.float() for name, gain_F in (self.gains or {}).items()}
        write_plan(Path(folder), content, tensors)

    @classmethod
    def load(cls, folder: str | Path) -> Plan:
        """Read a plan.

        Args:
            folder: Folder of the plan, or of the pruned model that has it in its subfolder.

        Raises:
            ValueError: The folder holds no plan, or a damaged one.
        """
        folder = Path(folder)
        if (folder / IN_MODEL / DESCRIPTION).is_file():
            folder = folder / IN_MODEL
        content, sites, tensors = read_plan(folder)
        return cls(
            model_type=content["model_type"],
            base=content["base"],
            sites=sites,
            kept=tuple(tensors.pop(site.key).long() for site in sites),
            provenance=content["provenance"],
            gains=tensors or None,
        )

    def state(self) -> dict[str, Any]:
        """Pack the plan, without gains, into tensors and JSON values, for a checkpoint."""
        return {
            "model_type": self.model_type,
            "base": self.base,
            "sites": [[site.block, site.name, site.size] for site in self.sites],
            "kept": [index_W.to(torch.int32) for index_W in self.kept],
            "provenance": dict(self.provenance),
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Plan:
        """Make a plan from the result of `state`."""
        return cls(
            model_type=state["model_type"],
            base=state["base"],
            sites=tuple(Site(*site) for site in state["sites"]),
            kept=tuple(index_W.long() for index_W in state["kept"]),
            provenance=state["provenance"],
        )


def full_plan(model: PreTrainedModel, base: str) -> Plan:
    """The plan that keeps everything."""
    sites = find_sites(model, family_of(model.config))
    return Plan(
        model.config.model_type, base, tuple(sites), tuple(torch.arange(s.size) for s in sites)
    )


def plan_from_indices(
    model: PreTrainedModel,
    base: str,
    kept: Sequence[Tensor],
    provenance: Mapping[str, Any],
    gains: Mapping[str, Tensor] | None = None,
    family: Family | None = None,
) -> Plan:
    """The plan of a live model.

    Args:
        model: The dense model.
        base: Its fingerprint.
        kept: One vector of kept indices (int64, sorted) per site, in order.
        provenance: How they were chosen.
        gains: Factors by name, see `Plan`; None means ones.
        family: The row of the family whose sites these are, with additional sites or without; None
            means without.
    """
    return Plan(
        model_type=model.config.model_type,
        base=base,
        sites=tuple(find_sites(model, family or family_of(model.config))),
        kept=tuple(index_W.cpu() for index_W in kept),
        provenance=provenance,
        gains=gains and {name: gain_F.cpu() for name, gain_F in gains.items()},
    )


def plan_without(
    model: PreTrainedModel,
    base: str,
    removed: Collection[tuple[int, str]],
    provenance: Mapping[str, Any],
) -> Plan:
    """The plan that removes entire attentions and MLPs and keeps everything else.

    Args:
        model: The dense model.
        base: Its fingerprint.
        removed: Block and part, `attn` or `mlp`, to remove.
        provenance: How they were chosen.

    Raises:
        ValueError: The model lacks a part, or no attention would be left.
    """
    family = family_of(model.config).with_parts()
    sites = find_sites(model, family)
    if strange := set(removed) - {(site.block, site.part) for site in sites}:
        raise ValueError(f"`removed` names {sorted(strange)}, which the model does not have.")
    kept = [torch.arange(0 if (s.block, s.part) in removed else s.size) for s in sites]
    return plan_from_indices(model, base, kept, provenance, family=family)
