"""Cost of a model of given widths: parameters, operations or memory, as one sum over products.

The size of a parameter tensor of a block is the product of the widths of its axes, and of the gate
of its part if attention and MLP have gates of their own. So the cost of a model is one sum over
products, exact for hard masks and differentiable for soft ones. The time of a model is no such sum,
see `secateur.pruning.latency`.

Legend: S = sites, K = products, F = fixed axis lengths.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Real
from torch import Tensor
from transformers import PreTrainedModel

from secateur.pruning.families import PARTS, Family, blocks_of, family_of
from secateur.pruning.heads import HEADS
from secateur.pruning.sites import Site, find_sites

Product = tuple[int | float, *tuple[int | float, ...]]
"""Unit cost, then up to three axes: a site by its index, a fixed length as a float."""


class CostModel(ABC):
    """The cost of a model as a function of the widths of its sites, which never falls with them."""

    full_S: Tensor
    """Sizes of all sites, float64."""
    dense: float
    """Cost at these sizes."""

    @abstractmethod
    def __call__(self, widths_S: Real[Tensor, " S"]) -> Float[Tensor, ""]:
        """Cost at the given widths, float64, differentiable."""

    def fraction(self, widths_S: Real[Tensor, " S"]) -> Float[Tensor, ""]:
        """Cost at the given widths divided by the dense cost, in (0, 1]."""
        return self(widths_S) / self.dense

    @abstractmethod
    def marginal(self, widths_S: Real[Tensor, " S"]) -> Float[Tensor, " S"]:
        """Cost of one more entry at every site; a mean where entries differ in cost."""

    @abstractmethod
    def increase(self, widths_S: Real[Tensor, " S"], site: int, entries: int) -> float:
        """Cost of more entries at one site.

        Args:
            widths_S: Present widths.
            site: Index of the site.
            entries: How many entries more, 0 or more.
        """


class CostTable(CostModel):
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
        constant: int | float = 0,
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
        device = widths_S.device
        axes = torch.cat([widths_S.double(), self.fixed_F.to(device)])
        a_K, b_K, c_K = axes[self.axes_3K.to(device)]
        cost: Tensor = (self.unit_K.to(device) * a_K * b_K * c_K).sum() + self.constant
        return cost

    def marginal(self, widths_S: Real[Tensor, " S"]) -> Float[Tensor, " S"]:
        # Exact, since no product has a site twice.
        axes = torch.cat([widths_S.double(), self.fixed_F])
        marginal = torch.zeros_like(axes)
        a_K, b_K, c_K = axes[self.axes_3K]
        for axis_K, others_K in zip(self.axes_3K, (b_K * c_K, a_K * c_K, a_K * b_K), strict=True):
            marginal.index_add_(0, axis_K, self.unit_K * others_K)
        return marginal[: len(widths_S)]

    def increase(self, widths_S: Real[Tensor, " S"], site: int, entries: int) -> float:
        return entries * float(self.marginal(widths_S)[site])


class Cost(ABC):
    """What is counted or measured."""

    cure: ClassVar[str] = "Raise `keep` or lower the widths."
    """What to do if the smallest widths cost too much."""
    times: Any = None
    """A `LatencyTable` whose predictions reports tell beside what they measure, or None."""

    @property
    @abstractmethod
    def label(self) -> str:
        """Name of the cost, such as `block parameters`, or `flops` of the whole model."""

    @property
    @abstractmethod
    def per_weight(self) -> int | float:
        """Cost of one weight of a projection; 0 if the time of selections is in the cost."""

    @abstractmethod
    def table(self, model: PreTrainedModel, family: Family | None = None) -> CostModel:
        """The cost of a model, which may live on the meta device, as a function of its widths.

        Args:
            model: The dense model.
            family: The row of its family, with additional sites or without; None means without.

        Raises:
            ValueError: The cost of such a model is not known.
        """


class Count(Cost):
    """A number of parameters or operations, of the blocks or the whole model."""

    whole_model: bool
    unit: ClassVar[int]
    """Count of one weight of a projection."""

    @property
    def label(self) -> str:
        name = type(self).__name__.lower()
        return name if self.whole_model else f"block {name}"

    @property
    def per_weight(self) -> int | float:
        return self.unit


@dataclass(frozen=True)
class Parameters(Count):
    """Number of parameters.

    Args:
        whole_model: Count embeddings, norms and the output head too (tied tensors once);
            False counts the projections of the blocks.
    """

    whole_model: bool = False
    unit: ClassVar[int] = 1

    def table(self, model: PreTrainedModel, family: Family | None = None) -> CostTable:
        family = family or family_of(model.config)
        sites = find_sites(model, family)
        products = _projection_products(model, family, sites, self.unit)
        if not self.whole_model:
            return CostTable(sites, products)
        products += _norm_products(model, family, sites)
        products += _other_products(model, family, sites)
        inside = CostTable(sites, products).dense
        return CostTable(sites, products, constant=model.num_parameters() - int(inside))


@dataclass(frozen=True)
class Flops(Count):
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
    unit: ClassVar[int] = 2

    def __post_init__(self) -> None:
        if self.context_tokens < 1:
            raise ValueError(f"`context_tokens` must be 1 or more, got {self.context_tokens}.")

    def table(self, model: PreTrainedModel, family: Family | None = None) -> CostTable:
        family = family or family_of(model.config)
        sites = find_sites(model, family)
        products = _projection_products(model, family, sites, self.unit)
        if not self.whole_model:
            return CostTable(sites, products)
        head = model.get_output_embeddings()
        assert head is not None
        attention_output = next(p.path for p in family.projections if p.output == "attn_out")
        part, heads = _parts(sites), _heads(sites)
        for number, block in enumerate(blocks_of(model, family)):
            if not family.has(block, "attn"):
                continue
            # q k^T and the weighted sum of v: 2 products of context_tokens x query width.
            groups, axis = heads(number)
            query_width = int(block.get_submodule(attention_output).in_features) // groups  # type: ignore[arg-type]
            products.append((4 * self.context_tokens * query_width, axis, part(number, "attn")))
        return CostTable(sites, products, constant=2 * head.in_features * head.out_features)


@dataclass(frozen=True)
class Bytes(Cost):
    """Memory of the weights and of the cache of keys and values, as a server needs it.

    Activations are not counted, nor the indices of narrow blocks: 8 bytes per selected entry.

    Args:
        context_tokens: Tokens in the cache of every sequence, 0 or more; layers with a sliding
            window hold at most their window.
        batch_size: Sequences in the cache, 0 or more.
        weight_bits: Bits per weight of the projections of the blocks, above 0; scales of quantised
            weights included, such as 4.5.
        other_bits: Bits per other parameter, above 0: embeddings, norms, biases, output head.
        cache_bits: Bits per key or value, above 0.

    Raises:
        ValueError: A setting is outside its range.
    """

    context_tokens: int = 2048
    batch_size: int = 1
    weight_bits: float = 16.0
    other_bits: float = 16.0
    cache_bits: float = 16.0
    cure: ClassVar[str] = (
        "Raise `keep`, lower the widths, `context_tokens` or `batch_size`, or set `parts` to true."
    )

    def __post_init__(self) -> None:
        for name in ("context_tokens", "batch_size"):
            if (value := getattr(self, name)) < 0:
                raise ValueError(f"`{name}` must be 0 or more, got {value}.")
        for name in ("weight_bits", "other_bits", "cache_bits"):
            if not (value := getattr(self, name)) > 0:
                raise ValueError(f"`{name}` must be above 0, got {value}.")

    @property
    def label(self) -> str:
        return f"bytes with a cache of {self.batch_size} x {self.context_tokens} tokens"

    @property
    def per_weight(self) -> int | float:
        return self.weight_bits / 8

    def table(self, model: PreTrainedModel, family: Family | None = None) -> CostTable:
        family = family or family_of(model.config)
        sites = find_sites(model, family)
        other = self.other_bits / 8
        products = _projection_products(model, family, sites, self.per_weight, other)
        rest = [*_norm_products(model, family, sites), *_other_products(model, family, sites)]
        inside = Parameters(whole_model=True).table(model, family)
        products += [(unit * other, *axes) for unit, *axes in rest]
        products += self._cache_products(model, family, sites)
        return CostTable(sites, products, constant=inside.constant * other)

    def _cache_products(
        self, model: PreTrainedModel, family: Family, sites: list[Site]
    ) -> list[Product]:
        """Bytes of the keys and values of every attention."""
        part, heads, products = _parts(sites), _heads(sites), list[Product]()
        for number, block in enumerate(blocks_of(model, family)):
            if not family.has(block, "attn"):
                continue
            window = _sliding_window(model.config, number)
            tokens = self.context_tokens if window is None else min(self.context_tokens, window)
            linears: list[Any] = [
                block.get_submodule(f"self_attn.{name}_proj") for name in ("k", "v")
            ]
            groups, axis = heads(number)
            width = sum(linear.out_features for linear in linears) // groups
            bytes_per_token = self.batch_size * width * self.cache_bits / 8
            products.append((tokens * bytes_per_token, axis, part(number, "attn")))
        return products


def _sliding_window(config: Any, block: int) -> int | None:
    """Tokens that the cache of a block holds at most, None for all, as caches of transformers."""
    window: int | None = getattr(config, "sliding_window", None)
    types = getattr(config, "layer_types", None)
    return window if types is None or types[block] == "sliding_attention" else None


def _parts(sites: Sequence[Site]) -> Callable[[int, str], int | float]:
    """Map block and part to an axis of a product: the site of its gate, 1 without a gate, or 0 if
    the block lacks the part.
    """
    index = {(site.block, site.name): i for i, site in enumerate(sites) if site.is_part}
    there = {(site.block, site.part) for site in sites}
    return lambda block, part: index.get((block, part), float((block, part) in there))


def _heads(sites: Sequence[Site]) -> Callable[[int], tuple[int, int | float]]:
    """Map a block to the number of its groups of heads and their axis of a product: their site, or
    (1, 1.0) if they are never cut.
    """
    found = {s.block: (s.size, i) for i, s in enumerate(sites) if s.name == HEADS}
    return lambda block: found.get(block, (1, 1.0))


def _projection_products(
    model: PreTrainedModel,
    family: Family,
    sites: list[Site],
    weight_unit: int | float,
    bias_unit: int | float = 1,
) -> list[Product]:
    index = {(site.block, site.name): i for i, site in enumerate(sites)}
    part = _parts(sites)

    def axis(block: int, site: str | None, features: int) -> tuple[int | float, int]:
        """An axis of a product, and the features of one of its entries."""
        if site is None:
            return float(features), 1
        place = index[block, site]
        return place, features // sites[place].size

    products: list[Product] = []
    for number, block in enumerate(blocks_of(model, family)):
        for projection in family.projections_of(block):
            linear: Any = block.get_submodule(projection.path)
            rows, row_unit = axis(number, projection.output, linear.out_features)
            columns, column_unit = axis(number, projection.input, linear.in_features)
            gate = part(number, projection.part)
            products.append((weight_unit * row_unit * column_unit, rows, columns, gate))
            if linear.bias is not None:
                products.append((bias_unit * row_unit, rows, gate))
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
