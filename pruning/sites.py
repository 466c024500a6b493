"""The prunable dimensions of a model, in the order that everything else follows.

Block 0 comes first, and within a block the sites come in the order of the family's row. A vector
over all gates of a model is the concatenation of its sites in this order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from secateur.pruning.families import PARTS, Family, blocks_of, part_of


@dataclass(frozen=True, order=True)
class Site:
    """One prunable dimension of one block.

    Args:
        block: Index of the block in the original model.
        name: Name of the site in the family's row, such as `mlp_mid`.
        size: Number of entries before pruning.
    """

    block: int
    name: str
    size: int

    @property
    def part(self) -> str:
        """The part of the block that it belongs to, `attn` or `mlp`."""
        return part_of(self.name)

    @property
    def is_part(self) -> bool:
        """Whether it is the one gate of a part as a whole, and not one of its widths."""
        return self.name in PARTS

    @property
    def key(self) -> str:
        """Name used in files: `<block>.<name>`."""
        return f"{self.block}.{self.name}"


def find_sites(model: PreTrainedModel, family: Family) -> list[Site]:
    """All sites of a model, in order; the model may live on the meta device.

    Args:
        model: A causal language model of the family.
        family: Its row of the table, `with_parts` or without.

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
                if site is not None:
                    sizes[site] = int(size)  # type: ignore[arg-type]
        sites += [Site(index, name, sizes[name]) for name in family.gates_of(block)]
    return sites


def gain_sizes(model: PreTrainedModel, family: Family) -> dict[str, int]:
    """Features on either side of every projection, by the name of the gains that multiply them.

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


def split(vector_N: Tensor, sites: list[Site]) -> tuple[Tensor, ...]:
    """Cut a vector over all N gates of a model into one vector per site."""
    parts: tuple[Tensor, ...] = vector_N.split([site.size for site in sites])
    return parts
