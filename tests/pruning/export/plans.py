"""Plans for the models of `tests.tiny`, with the widths where exports go wrong."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

import torch

from secateur.pruning.costs import Parameters
from secateur.pruning.families import family_of
from secateur.pruning.files.base_model import BaseModel
from secateur.pruning.files.fingerprint import fingerprint
from secateur.pruning.heads import HEADS
from secateur.pruning.plan import Plan, plan_from_indices
from secateur.pruning.sites import find_sites, gain_sizes
from secateur.pruning.widths.budget import Budget


def uneven_plan(
    folder: Path,
    seed: int = 0,
    with_gains: bool = True,
    removed: Collection[tuple[int, str]] | None = None,
    also: Collection[str] = (),
) -> Plan:
    """Sites of block 0 keep one entry, of block 1 all, of block 2 odd numbers, of block 3 eights.

    Which entries stay, and with which gains, is drawn at random. With `removed`, blocks and parts,
    attention and MLP have gates as a whole, and those of these are closed. `also` names additional
    sites.
    """
    model = BaseModel(folder).skeleton()
    family = family_of(model.config).having(also)
    if removed is not None:
        family = family.with_parts()
    sites = find_sites(model, family)
    generator = torch.Generator().manual_seed(seed)
    kept = []
    for site in sites:
        if site.is_part or (removed and (site.block, site.part) in removed):
            kept.append(torch.arange(0 if (site.block, site.part) in (removed or ()) else 1))
            continue
        odd = 1 + 2 * int(torch.randint(max(1, (site.size - 1) // 2), (), generator=generator))
        eights = 8 * (1 + odd // 16)
        width = min(site.size, {0: 1, 1: site.size, 3: eights}.get(site.block, odd))
        order = torch.randperm(site.size, generator=generator)
        kept.append(order[:width].sort().values)
    gains = {
        name: torch.empty(size).uniform_(0.8, 1.2, generator=generator)
        for name, size in gain_sizes(model, family).items()
    }
    return plan_from_indices(
        model, fingerprint(folder), kept, {"seed": seed}, gains if with_gains else None, family
    )


def uniform_plan(folder: Path, keep: float = 0.7, seed: int = 0) -> Plan:
    """What `Budget(uniform=True)` makes of random scores."""
    return random_plan(folder, Budget(keep, Parameters(), uniform=True), seed)


def random_plan(folder: Path, budget: Budget, seed: int = 0) -> Plan:
    """What a budget makes of random scores."""
    model = BaseModel(folder).skeleton()
    family = budget.family(model.config)
    sites = find_sites(model, family)
    count = sum(site.size for site in sites)
    scores_N = torch.rand(count, generator=torch.Generator().manual_seed(seed))
    kept = budget.finalise(scores_N, sites, budget.cost.table(model, family))
    return plan_from_indices(model, fingerprint(folder), kept, {"seed": seed}, family=family)


def native_plan(
    folder: Path,
    removed: Collection[tuple[int, str]] = (),
    seed: int = 0,
    widths: tuple[int, int, int] = (1, 17, 32),
) -> Plan:
    """A plan that servers know without the modelling file: only MLPs are cut, or parts go.

    The MLP of block 0 keeps everything; `widths` are those of block 1, block 2 and all later ones.
    """
    model = BaseModel(folder).skeleton()
    family = family_of(model.config).with_parts()
    generator = torch.Generator().manual_seed(seed)
    kept = []
    for site in find_sites(model, family):
        width = site.size
        if (site.block, site.part) in removed:
            width = 0
        elif site.name == "mlp_mid":
            width = (site.size, *widths)[min(site.block, 3)]
        kept.append(torch.randperm(site.size, generator=generator)[:width].sort().values)
    return plan_from_indices(model, fingerprint(folder), kept, {"seed": seed}, None, family)


def heads_plan(folder: Path, groups: Sequence[int], seed: int = 0) -> Plan:
    """A plan that keeps so many groups of heads, block by block, and everything else."""
    model = BaseModel(folder).skeleton()
    family = family_of(model.config).with_heads()
    generator = torch.Generator().manual_seed(seed)
    kept = []
    for site in find_sites(model, family):
        width = groups[site.block] if site.name == HEADS else site.size
        kept.append(torch.randperm(site.size, generator=generator)[:width].sort().values)
    return plan_from_indices(model, fingerprint(folder), kept, {"seed": seed}, None, family)
