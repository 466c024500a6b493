"""The prunable dimensions of a model, in one fixed order.

Block 0 comes first, and within a block the sites come in the order of the family's row. A vector
over all gates of a model is the concatenation of its sites in this order.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from secateur.pruning.families import PARTS, Family, blocks_of, part_of
from secateur.pruning.heads import HEADS, head_dim

KEYS = "self_attn.k_proj"
"""The projection of keys, in the blocks of every family."""

SMALLEST_FAST = 512
"""Entries of the residual stream from which on shapes determine speed."""


def fast_multiple(stream: int) -> int:
    """The multiple of widths that suits matrix hardware, by the size of the residual stream."""
    if stream < SMALLEST_FAST:
        return 1
    return 64 if stream >= 1024 else 32


@dataclass(frozen=True, order=True)
class Site:
    """One prunable dimension of one block.

    Args:
        block: Index of the block in the original model.
        name: Name of the site in the family's row, such as `mlp_mid`.
        size: Number of entries before pruning. An entry is one feature; of `attn_heads`, the
            features of a group of heads.
    """

    block: int
    name: str
    size: int

    @property
    def part(self) -> str:
        """The part of the block that the site belongs to, `attn` or `mlp`."""
        return part_of(self.name)

    @property
    def is_part(self) -> bool:
        """Whether it is the gate of an entire part, and not one of its widths."""
        return self.name in PARTS

    @property
    def is_of_features(self) -> bool:
        """Whether an entry is a single feature, and not a group of heads or an entire part."""
        return not self.is_part and self.name != HEADS

    @property
    def is_of_stream(self) -> bool:
        """Whether its entries belong to the residual stream, read or written."""
        return self.name.endswith(("_in", "_out"))

    @property
    def key(self) -> str:
        """Name used in files: `<block>.<name>`."""
        return f"{self.block}.{self.name}"


def find_sites(model: PreTrainedModel, family: Family) -> list[Site]:
    """All sites of a model, in order; the model may live on the meta device.

    Args:
        model: A causal language model of the family.
        family: Its row of the table, with additional sites or without.

    Raises:
        ValueError: A projection or norm of the family's row is missing in the model.
    """
    sites = []
    for index, block in enumerate(blocks_of(model, family)):
        sizes = dict.fromkeys(PARTS, 1)
        projections = family.projections_of(block)
        norms = [norm for norm in family.norms if family.has(block, part_of(norm.output))]
        paths = [*(p.path for p in projections), *(norm.path for norm in norms)]
        for path in paths:
            try:
                block.get_submodule(path)
            except AttributeError as error:
                raise ValueError(
                    f"Block {index} has no {path!r}, which the family "
                    f"{family.model_type!r} names; is this an already pruned or patched model?"
                ) from error
        for projection in projections:
            linear = block.get_submodule(projection.path)
            for site, size in (
                (projection.input, linear.in_features),
                (projection.output, linear.out_features),
            ):
                if site is not None and site != HEADS:
                    sizes[site] = int(size)  # type: ignore[arg-type]
        if HEADS in family.gates and family.has(block, "attn"):
            keys: Any = block.get_submodule(KEYS)
            sizes[HEADS] = int(keys.out_features) // head_dim(model.config)
        sites += [Site(index, name, sizes[name]) for name in family.gates_of(block)]
    return sites


def features_of(index_W: Tensor, size: int, features: int) -> Tensor:
    """The features (int64) of kept entries of a site, on one side of a projection.

    Args:
        index_W: Kept entries (int64).
        size: Number of entries of the site; each has equally many features, side by side.
        features: Number of features.

    Example: entries 0 and 2 of 3 are features 0, 1, 4 and 5 of 6.
    """
    each = features // size
    if each == 1:
        return index_W
    return (index_W[:, None] * each + torch.arange(each, device=index_W.device)).flatten()


def gain_sizes(model: PreTrainedModel, family: Family) -> dict[str, int]:
    """Number of features on either side of every projection, by the names of their gains.

    A name is `<block>.<path>.input` or `<block>.<path>.output`.

    Args:
        model: A causal language model of the family; it may live on the meta device.
        family: Its row of the table.
    """
    sizes = {}
    for index, block in enumerate(blocks_of(model, family)):
        for projection in family.projections_of(block):
            linear: Any = block.get_submodule(projection.path)
            sizes[f"{index}.{projection.path}.input"] = int(linear.in_features)
            sizes[f"{index}.{projection.path}.output"] = int(linear.out_features)
    return sizes


def names_of(sites: Sequence[Site]) -> list[str]:
    """The distinct names of sites, in the order of the block with the most sites."""
    in_block = Counter(site.block for site in sites)
    fullest_first = sorted(sites, key=lambda site: -in_block[site.block])
    return list(dict.fromkeys(site.name for site in fullest_first))


def widths_table(sites: Sequence[Site], widths: Sequence[int]) -> str:
    """Widths as a text table, one row per block, one column per name of a site.

    Args:
        sites: The sites.
        widths: Number of kept entries per site.
    """
    names = names_of(sites)
    sizes = {name: {site.size for site in sites if site.name == name} for name in names}
    same = {name for name in names if len(sizes[name]) == 1}  # in every block
    rows = [["block", *(f"{name}/{min(sizes[name])}" if name in same else name for name in names)]]
    cells = {
        (site.block, site.name): str(width) if site.name in same else f"{width}/{site.size}"
        for site, width in zip(sites, widths, strict=True)
    }
    for block in sorted({site.block for site in sites}):
        rows.append([str(block), *(cells.get((block, name), "") for name in names)])
    columns = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(row, columns, strict=True))
        for row in rows
    )


def split(vector_N: Tensor, sites: Sequence[Site]) -> tuple[Tensor, ...]:
    """Cut a vector over all N gates of a model into one vector per site."""
    parts: tuple[Tensor, ...] = vector_N.split([site.size for site in sites])
    return parts


def masks_of(kept: Sequence[Tensor], sites: Sequence[Site]) -> Tensor:
    """Return 1 for kept entries and 0 for others, float32: one vector over all N gates.

    Args:
        kept: Indices of the kept entries of every site.
        sites: The sites, in order.
    """
    return torch.cat(
        [
            torch.zeros(site.size).index_fill(0, index_W, 1.0)
            for site, index_W in zip(sites, kept, strict=True)
        ]
    )
