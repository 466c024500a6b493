"""Two cuts in turn as one: kept entries and gains.

Legend: W = kept entries of a site, F = features on one side of a projection.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from secateur.pruning.families import Family, part_of
from secateur.pruning.heads import HEADS
from secateur.pruning.sites import Site, features_of

Kept = Mapping[Site, Tensor]
"""Site to the indices (int64) that a cut keeps of it."""


def compose_kept(first: Kept, second: Kept, blocks: Sequence[int], family: Family) -> Kept:
    """What two cuts leave of the first model.

    Args:
        first: What the first cut keeps of it.
        second: What the second cut keeps of the model that the first one leaves.
        blocks: Blocks of the first model that the second one has, in order.
        family: The row of the family of the first model, with all sites of both cuts.

    Raises:
        ValueError: The sites of the second cut are not those of the model that the first one
            leaves.
    """
    block_of = dict(enumerate(blocks))
    widths = {(s.block, s.name): len(i) for s, i in first.items() if len(i) and not s.is_part}
    found = {(block_of.get(s.block, -1), s.name): s.size for s in second if not s.is_part}
    # Heads that one of the cuts does not name are uncut in it.
    if _shared(widths, found) != _shared(found, widths):
        raise ValueError(
            "The next plan does not fit: its sites differ from those of the model that this "
            "one leaves; give a plan that was made for that model."
        )
    before = {(site.block, site.name): (site, index_W) for site, index_W in first.items()}
    after = {(block_of[site.block], site.name): index_W for site, index_W in second.items()}
    base = {(block, part_of(name)) for block, name in before}
    left = {(block, part_of(name)) for (block, name), index_W in after.items() if len(index_W)}
    heads = max((site.size for site in second if site.name == HEADS), default=1)
    kept: dict[Site, Tensor] = {}
    for block in sorted({site.block for site in first}):
        for name in family.gates:
            if (block, part_of(name)) not in base:
                continue
            whole = Site(block, name, heads if name == HEADS else 1)
            site, index_W = before.get((block, name), (whole, torch.arange(whole.size)))
            if (block, site.part) not in left:
                index_W = index_W[:0]
            kept[site] = index_W[after.get((block, name), torch.arange(len(index_W)))]
    return kept


def _shared(
    sizes: Mapping[tuple[int, str], int], other: Mapping[tuple[int, str], int]
) -> dict[tuple[int, str], int]:
    return {key: size for key, size in sizes.items() if key in other or key[1] != HEADS}


def compose_gains(
    family: Family,
    gains: Mapping[str, Tensor] | None,
    next_gains: Mapping[str, Tensor] | None,
    kept: Kept,
    kept_blocks: Sequence[int],
) -> dict[str, Tensor] | None:
    """Compose the gains of two cuts: the second gains multiply those of the same features.

    Args:
        family: The row of the family of the first model.
        gains: Gains of the first cut, by the names of `gain_sizes`; missing names mean 1.
        next_gains: Gains of the second cut, by the names of the model that the first one leaves.
        kept: Indices that the first cut keeps, by site.
        kept_blocks: Blocks of the first model that the second one has, in order.
    """
    composed = {name: gain_F.clone() for name, gain_F in (gains or {}).items()}
    of_site = {(site.block, site.name): (site.size, index_W) for site, index_W in kept.items()}
    sides = {f"{p.path}.input": p.input for p in family.projections}
    sides |= {f"{p.path}.output": p.output for p in family.projections}
    for place, block in enumerate(kept_blocks):
        for side, site in sides.items():
            if (next_F := (next_gains or {}).get(f"{place}.{side}")) is None:
                continue
            size, index_W = len(next_F), torch.arange(len(next_F))
            if site is not None:
                size, index_W = of_site[block, site]
            features = size * len(next_F) // len(index_W)
            gain_F = composed.setdefault(f"{block}.{side}", torch.ones(features))
            gain_F[features_of(index_W, size, features)] *= next_F
    return composed or None
