"""Which blocks of a base model are left while they are removed in training."""

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
    """Block and part of what a model does not have; of one of an unknown family, nothing."""
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
    """The blocks of a base model that are left, by their numbers in it.

    Args:
        num_blocks: Blocks of the base model, 0 or more.
        lacking: Block and part, `attn` or `mlp`, of what the base model does not have.
    """

    def __init__(self, num_blocks: int = 0, lacking: Collection[tuple[int, str]] = ()) -> None:
        self.num_blocks, self.lacking = num_blocks, frozenset(lacking)
        self.removals: list[dict[str, Any]] = []
        """What went, in order: names of units, and why; JSON values only."""

    @property
    def removed(self) -> list[Unit]:
        """Units that are gone, in order."""
        return [Unit.of_key(key) for removal in self.removals for key in removal["units"]]

    @property
    def kept_blocks(self) -> list[int]:
        """Blocks of which anything is left, in order."""
        return [b for b in range(self.num_blocks) if not {(b, p) for p in PARTS} <= self._gone]

    @property
    def leaves_halves(self) -> bool:
        """Whether half of a block that stays is gone, so that the model is no stock one."""
        return any(block in self.kept_blocks for block, _ in self._gone - self.lacking)

    def places(self, units: Sequence[Unit]) -> list[Unit]:
        """Where units are in the model as it is now.

        Raises:
            ValueError: One is not in it (any more).
        """
        kept = self.kept_blocks
        if strange := [
            unit.key for unit in units if unit.block not in kept or unit in self.removed
        ]:
            raise ValueError(f"Blocks {strange} are not among what is left: blocks {kept}.")
        return [Unit(kept.index(unit.block), unit.part) for unit in units]

    def note(self, units: Sequence[Unit], provenance: Mapping[str, Any]) -> None:
        """Remember that units went."""
        keys = [unit.key for unit in units]
        self.removals.append({"units": keys, "provenance": dict(provenance)})

    def plan(self, base: BaseModel) -> Plan:
        """Make the plan of what is left of the base model."""
        why = {"method": "depth", "removals": self.removals}
        gone = sorted(self._gone - self.lacking)
        return plan_without(base.skeleton(), base.fingerprint, gone, why)

    @property
    def _gone(self) -> AbstractSet[tuple[int, str]]:
        """Block and part of everything that is gone or was never there."""
        return self.lacking | {
            (unit.block, part)
            for unit in self.removed
            for part in (PARTS if unit.part == "block" else [unit.part])
        }
