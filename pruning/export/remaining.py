"""What is left of a base model whose blocks are removed while it trains, and how it is written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from secateur.pruning.depth import Unit, prune_blocks
from secateur.pruning.export.rewrite import own_code, write_pruned
from secateur.pruning.families import PARTS, skeleton
from secateur.pruning.files.model_folder import CONFIG, MODELLING_FILE, write_json
from secateur.pruning.plan import IN_MODEL, Plan, plan_without


class Depth:
    """The blocks of a base model that are left, by their numbers in it.

    Args:
        num_blocks: Blocks of the base model, 0 or more.
    """

    def __init__(self, num_blocks: int = 0) -> None:
        self.num_blocks = num_blocks
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
        return len(self._gone) > len(PARTS) * (self.num_blocks - len(self.kept_blocks))

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

    def stream(self, base_folder: Path, folder: Path, base: str) -> None:
        """Write what is left of the files of the base model, whose fingerprint is `base`."""
        if self.leaves_halves:
            write_pruned(base_folder, self._plan(base_folder, base), folder)
        else:
            why = self.removals[-1]["provenance"]
            prune_blocks(base_folder, folder, keep=self.kept_blocks, provenance=why)

    def complete(self, base_folder: Path, folder: Path, base: str) -> None:
        """Add to a model that transformers has saved what it needs to be loaded, if it is not
        stock: the modelling file, its entries of the configuration, and the plan.
        """
        if not self.leaves_halves:
            return
        plan = self._plan(base_folder, base)
        saved = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        write_json(folder / CONFIG, saved | own_code(plan))
        shutil.copyfile(MODELLING_FILE, folder / MODELLING_FILE.name)
        plan.save(folder / IN_MODEL)

    @property
    def _gone(self) -> set[tuple[int, str]]:
        """Block and part of everything that is gone."""
        return {
            (unit.block, part)
            for unit in self.removed
            for part in (PARTS if unit.part == "block" else [unit.part])
        }

    def _plan(self, base_folder: Path, base: str) -> Plan:
        model = skeleton(AutoConfig.from_pretrained(base_folder))
        why = {"method": "depth", "removals": self.removals}
        return plan_without(model, base, sorted(self._gone), why)
