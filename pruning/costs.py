"""Cost of a model of given widths: parameters or operations, as one sum over products.

The size of a parameter tensor of a block is the product of the widths of its axes, and of the gate
of its part if attention and MLP have gates of their own. So the cost of a model is one sum over
products, exact for hard masks and differentiable for soft ones.

Legend: S = sites, K = products, F = fixed axis lengths.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Real
from torch import Tensor
from transformers import PreTrainedModel

from secateur.pruning.families import PARTS, Family, blocks_of, family_of
from secateur.pruning.sites import Site, find_sites

Product = tuple[int, *tuple[int | float, ...]]
"""Unit cost, then up to three axes: a site by its index, a fixed length as a float."""


class CostTable:
    """The cost of a model as a function of the widths of its sites: sum of products + constant.

    Args:
        sites: The sites, in order.
        products: All products; a site appears at most once in each.
        constant: Cost that does not depend on any site.
    """

    def __init__(
        self,
        sites: Sequence[Site],
        products: Sequence[Product],
        constant: int = 0,
    ) -> None:
        fixed = sorted({1.0, *(a for _, *axes in products for a in axes if isinstance(a, float))})
        place = {length: len(sites) + i for i, length in enumerate(fixed)}

        def index(axis: int | float) -> int:
            return place[axis] if isinstance(axis, float) else axis

        self.unit_K = torch.tensor([unit for unit, *_ in products], dtype=torch.float64)
        self.axes_3K = torch.tensor(
            [[index(axis) for axis in (*axes, 1.0, 1.0)[:3]] for _, *axes in products]
        ).T
        self.fixed_F = torch.tensor(fixed, dtype=torch.float64)
        self.constant = constant
        self.full_S = torch.tensor([float(site.size) for site in sites], dtype=torch.float64)
        self.dense = float(self(self.full_S))

    def __call__(self, widths_S: Real[Tensor, " S"]) -> Float[Tensor, ""]:
        """Cost at the given widths, float64; exact for integer widths, differentiable."""
        device = widths_S.device
        axes = torch.cat([widths_S.double(), self.fixed_F.to(device)])
        a_K, b_K, c_K = axes[self.axes_3K.to(device)]
        cost: Tensor = (self.unit_K.to(device) * a_K * b_K * c_K).sum() + self.constant
        return cost

    def fraction(self, widths_S: Real[Tensor, " S"]) -> Float[Tensor, ""]:
        """Cost at the given widths divided by the dense cost, in (0, 1]."""
        return self(widths_S) / self.dense

    def marginal(self, widths_S: Real[Tensor, " S"]) -> Float[Tensor, " S"]:
        """Cost of one more entry at every site; exact, since no product has a site twice."""
        axes = torch.cat([widths_S.double(), self.fixed_F])
        marginal = torch.zeros_like(axes)
        a_K, b_K, c_K = axes[self.axes_3K]
        for axis_K, others_K in zip(self.axes_3K, (b_K * c_K, a_K * c_K, a_K * b_K), strict=True):
            marginal.index_add_(0, axis_K, self.unit_K * others_K)
        return marginal[: len(widths_S)]


class Cost(ABC):
    """What is counted."""

    whole_model: bool
    per_weight: ClassVar[int]
    """Cost of one weight of a projection."""

    @property
    def label(self) -> str:
        """Name of the cost, such as `block parameters`, or `flops` of the whole model."""
        name = type(self).__name__.lower()
        return name if self.whole_model else f"block {name}"

    @abstractmethod
    def table(self, model: PreTrainedModel, family: Family | None = None) -> CostTable:
        """The cost table of a model, which may live on the meta device.

        Args:
            model: The dense model.
            family: The row of its family, `with_parts` or without; None means without.
        """


@dataclass(frozen=True)
class Parameters(Cost):
    """Number of parameters.

    Args:
        whole_model: Count embeddings, norms and the output head too (tied tensors once);
            False counts the projections of the blocks.
    """

    whole_model: bool = False
    per_weight: ClassVar[int] = 1

    def table(self, model: PreTrainedModel, family: Family | None = None) -> CostTable:
        family = family or family_of(model.config)
        sites = find_sites(model, family)
        products = _projection_products(model, family, sites, self.per_weight)
        if not self.whole_model:
            return CostTable(sites, products)
        products += _norm_products(model, family, sites)
        products += _other_products(model, family, sites)
        inside = CostTable(sites, products).dense
        return CostTable(sites, products, constant=model.num_parameters() - int(inside))


@dataclass(frozen=True)
class Flops(Cost):
    """Forward floating-point operations per token: 2 per weight, 1 per bias.

    Args:
        whole_model: Count the attention scores and the output head too; False counts the
            projections of the blocks.
        context_tokens: Tokens that a query attends to, 1 or more; counts only in `whole_model`.

    Raises:
        ValueError: `context_tokens` is below 1.
    """

    whole_model: bool = False
    context_tokens: int = 2048
    per_weight: ClassVar[int] = 2

    def __post_init__(self) -> None:
        if self.context_tokens < 1:
            raise ValueError(f"`context_tokens` must be 1 or more, got {self.context_tokens}.")

    def table(self, model: PreTrainedModel, family: Family | None = None) -> CostTable:
        family = family or family_of(model.config)
        sites = find_sites(model, family)
        products = _projection_products(model, family, sites, self.per_weight)
        if not self.whole_model:
            return CostTable(sites, products)
        head = model.get_output_embeddings()
        assert head is not None
        attention_output = next(p.path for p in family.projections if p.output == "attn_out")
        part = _parts(sites)
        for number, block in enumerate(blocks_of(model, family)):
            if not family.has(block, "attn"):
                continue
            # q k^T and the weighted sum of v: 2 products of context_tokens x query width.
            query_width = block.get_submodule(attention_output).in_features
            products.append((4 * self.context_tokens * int(query_width), part(number, "attn")))  # type: ignore[arg-type]
        return CostTable(sites, products, constant=2 * head.in_features * head.out_features)


def _parts(sites: Sequence[Site]) -> Callable[[int, str], int | float]:
    """Map block and part to an axis of a product: the site of its gate, 1 without a gate, or 0 if
    the block lacks the part.
    """
    index = {(site.block, site.name): i for i, site in enumerate(sites) if site.is_part}
    there = {(site.block, site.part) for site in sites}
    return lambda block, part: index.get((block, part), float((block, part) in there))


def _projection_products(
    model: PreTrainedModel, family: Family, sites: list[Site], weight_unit: int
) -> list[Product]:
    index = {(site.block, site.name): i for i, site in enumerate(sites)}
    part = _parts(sites)
    products: list[Product] = []
    for number, block in enumerate(blocks_of(model, family)):
        for projection in family.projections_of(block):
            linear = block.get_submodule(projection.path)
            rows: int | float = float(linear.out_features)  # type: ignore[arg-type]
            columns: int | float = float(linear.in_features)  # type: ignore[arg-type]
            if projection.output is not None:
                rows = index[number, projection.output]
            if projection.input is not None:
                columns = index[number, projection.input]
            gate = part(number, projection.part)
            products.append((weight_unit, rows, columns, gate))
            if linear.bias is not None:
                products.append((1, rows, gate))
    return products


def _norm_products(model: PreTrainedModel, family: Family, sites: list[Site]) -> list[Product]:
    """The weights of the norms that a site selects, and their biases if they have any."""
    blocks, part = blocks_of(model, family), _parts(sites)
    return [
        (
            len(list(blocks[site.block].get_submodule(norm.path).parameters())),
            i,
            part(site.block, site.part),
        )
        for i, site in enumerate(sites)
        for norm in family.norms
        if norm.output == site.name
    ]


def _other_products(model: PreTrainedModel, family: Family, sites: list[Site]) -> list[Product]:
    """Parameters that depend on no width but are removed with a part, such as norms of queries and
    keys.

    A module that both parts need, such as the one norm of a parallel block, is removed only with
    both: its factor is a + m - a m.
    """
    products: list[Product] = []
    part = _parts(sites)
    counted = {p.path for p in family.projections} | {norm.path for norm in family.norms}
    for number, block in enumerate(blocks_of(model, family)):
        attn, mlp = (part(number, name) for name in PARTS)
        for path, tensor in block.named_parameters():
            if path.rpartition(".")[0] in counted:
                continue
            size, owner = tensor.numel(), family.part_of_tensor(path)
            if owner is not None:
                products.append((size, part(number, owner)))
            else:
                products += [(size, attn), (size, mlp), (-size, attn, mlp)]
    return products
