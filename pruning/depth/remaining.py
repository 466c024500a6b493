"""The remaining blocks of a base model while blocks are removed in training."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any

from transformers import PreTrainedModel

from secateur.pruning.depth import Unit
from secateur.pruning.families import PARTS, blocks_of, family_of
from secateur.pruning.files.base_model import BaseModel
from secateur.pruning.modelling import is_narrow
from secateur.pruning.plan import Plan, plan_without


def lacking_parts(model: PreTrainedModel) -> set[tuple[int, str]]:
    """Block and part that a model lacks; empty for a model of an unknown family."""
    if not is_narrow(model.config.model_type):
        return set()
    family = family_of(model.config)
    return {
        (number, part)
        for number, block in enumerate(blocks_of(model, family))
        for part in PARTS
        if not family.has(block, part)
    }


class Depth:
    """The remaining blocks of a base model, by their numbers in it.

    Args:
        num_blocks: Blocks of the base model, 0 or more.
        lacking: Block and part, `attn` or `mlp`, that the base model lacks.
    """

    def __init__(self, num_blocks: int = 0, lacking: Collection[tuple[int, str]] = ()) -> None:
        self.num_blocks, self.lacking = num_blocks, frozenset(lacking)
        self.removals: list[dict[str, Any]] = []
        """Removals in order: names of units, and how they were chosen; JSON values only."""

    @property
    def removed(self) -> list[Unit]:
        """Removed units, in order."""
        return [Unit.of_key(key) for removal in self.removals for key in removal["units"]]

    @property
    def kept_blocks(self) -> list[int]:
        """Blocks that are not entirely removed, in order."""
        return [b for b in range(self.num_blocks) if not {(b, p) for p in PARTS} <= self._gone]

    @property
    def leaves_halves(self) -> bool:
        """Whether half of a remaining block is removed, so that the model is not a stock one."""
        return any(block in self.kept_blocks for block, _ in self._gone - self.lacking)

    def places(self, units: Sequence[Unit]) -> list[Unit]:
        """The positions of units in the present model.

        Raises:
            ValueError: A unit does not exist or is already removed.
        """
        kept = self.kept_blocks
        if strange := [
            unit.key for unit in units if unit.block not in kept or unit in self.removed
        ]:
            raise ValueError(f"Blocks {strange} are not among the remaining blocks {kept}.")
        return [Unit(kept.index(unit.block), unit.part) for unit in units]

    def note(self, units: Sequence[Unit], provenance: Mapping[str, Any]) -> None:
        """Record removed units."""
        keys = [unit.key for unit in units]
        self.removals.append({"units": keys, "provenance": dict(provenance)})

    def plan(self, base: BaseModel) -> Plan:
        """Make the plan of the remaining parts of the base model."""
        why = {"method": "depth", "removals": self.removals}
        gone = sorted(self._gone - self.lacking)
        return plan_without(base.skeleton(), base.fingerprint, gone, why)

    @property
    def _gone(self) -> AbstractSet[tuple[int, str]]:
        """Block and part of all parts that are removed or that the base model lacks."""
        return self.lacking | {
            (unit.block, part)
            for unit in self.removed
            for part in (PARTS if unit.part == "block" else [unit.part])
        }
