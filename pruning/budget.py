"""What widths cost, the penalty that pulls the cost to a target, and the exact final selection.

Sources: DISP-LLM (arXiv 2410.11988), section 3.3 (eq. 7: the log-ratio penalty). The exact
selection is ours: the paper draws a random mask at the end and meets the budget only roughly.

Every parameter tensor of a block is a product of the widths of its axes, so the cost of a whole
model is one sum over products of two widths, exact for hard masks and differentiable for soft ones.

Legend: S = sites, K = products, F = fixed axis lengths, N = all gates, C = chunks of gates.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Real
from torch import Tensor
from transformers import PreTrainedModel

from pruning.families import Family, blocks_of, family_of
from pruning.sites import Site, find_sites


class CostTable:
    """The cost of a model as a function of the widths of its sites: sum of products + constant.

    Args:
        sites: The sites, in order.
        products: (unit cost, site or fixed length, site or fixed length) of every product. A site
            is given by its index in `sites`, a fixed length as a float.
        constant: Cost of everything that no site changes.
    """

    def __init__(
        self,
        sites: Sequence[Site],
        products: Sequence[tuple[int, int | float, int | float]],
        constant: int = 0,
    ) -> None:
        fixed = sorted({a for _, *axes in products for a in axes if isinstance(a, float)})
        place = {length: len(sites) + i for i, length in enumerate(fixed)}

        def index(axis: int | float) -> int:
            return place[axis] if isinstance(axis, float) else axis

        self.unit_K = torch.tensor([unit for unit, _, _ in products], dtype=torch.float64)
        self.left_K = torch.tensor([index(left) for _, left, _ in products])
        self.right_K = torch.tensor([index(right) for _, _, right in products])
        self.fixed_F = torch.tensor(fixed, dtype=torch.float64)
        self.constant = constant
        self.full_S = torch.tensor([float(site.size) for site in sites], dtype=torch.float64)
        self.dense = float(self(self.full_S))

    def __call__(self, widths_S: Real[Tensor, " S"]) -> Float[Tensor, ""]:
        """Cost at the given widths, float64; exact for whole widths, differentiable."""
        axes = torch.cat([widths_S.double(), self.fixed_F.to(widths_S.device)])
        device = widths_S.device
        left_K, right_K = axes[self.left_K.to(device)], axes[self.right_K.to(device)]
        return (self.unit_K.to(device) * left_K * right_K).sum() + self.constant

    def fraction(self, widths_S: Real[Tensor, " S"]) -> Float[Tensor, ""]:
        """Cost at the given widths divided by the dense cost, in (0, 1]."""
        return self(widths_S) / self.dense

    def marginal(self, widths_S: Real[Tensor, " S"]) -> Float[Tensor, " S"]:
        """Cost of one more entry at every site; no site multiplies itself, so this is exact."""
        axes = torch.cat([widths_S.double(), self.fixed_F])
        marginal = torch.zeros_like(axes)
        marginal.index_add_(0, self.left_K, self.unit_K * axes[self.right_K])
        marginal.index_add_(0, self.right_K, self.unit_K * axes[self.left_K])
        return marginal[: len(widths_S)]


class Cost(ABC):
    """What is counted."""

    whole_model: bool

    @property
    def label(self) -> str:
        """What is counted, in words: `block parameters`, or `flops` of the whole model."""
        name = type(self).__name__.lower()
        return name if self.whole_model else f"block {name}"

    @abstractmethod
    def table(self, model: PreTrainedModel) -> CostTable:
        """The cost table of a model, which may live on the meta device."""


@dataclass(frozen=True)
class Parameters(Cost):
    """Number of parameters.

    Args:
        whole_model: Count embeddings, norms and the output head too (tied tensors once);
            False counts the projections of the blocks.
    """

    whole_model: bool = False

    def table(self, model: PreTrainedModel) -> CostTable:
        family = family_of(model.config)
        sites = find_sites(model, family)
        products = _projection_products(model, family, sites, weight_unit=1)
        if not self.whole_model:
            return CostTable(sites, products)
        products += _norm_products(model, family, sites)
        inside = CostTable(sites, products).dense
        return CostTable(sites, products, constant=model.num_parameters() - int(inside))


@dataclass(frozen=True)
class Flops(Cost):
    """Forward floating-point operations per token: 2 per weight, 1 per bias.

    Args:
        whole_model: Count the attention scores and the output head too; False counts the
            projections of the blocks.
        context_tokens: Tokens that a query attends to, 1 or more; counts only in `whole_model`.
    """

    whole_model: bool = False
    context_tokens: int = 2048

    def table(self, model: PreTrainedModel) -> CostTable:
        family = family_of(model.config)
        sites = find_sites(model, family)
        products = _projection_products(model, family, sites, weight_unit=2)
        if not self.whole_model:
            return CostTable(sites, products)
        head = model.get_output_embeddings()
        assert head is not None
        constant = 2 * head.in_features * head.out_features
        attention_output = next(p.path for p in family.projections if p.output == "attn_out")
        for block in blocks_of(model, family):
            # q k^T and the weighted sum of v: 2 products of context_tokens x query width.
            query_width = block.get_submodule(attention_output).in_features
            constant += 4 * self.context_tokens * int(query_width)  # type: ignore[arg-type]
        return CostTable(sites, products, constant=int(constant))


def _projection_products(
    model: PreTrainedModel, family: Family, sites: list[Site], weight_unit: int
) -> list[tuple[int, int | float, int | float]]:
    index = {(site.block, site.name): i for i, site in enumerate(sites)}
    products: list[tuple[int, int | float, int | float]] = []
    for number, block in enumerate(blocks_of(model, family)):
        for projection in family.projections:
            linear = block.get_submodule(projection.path)
            rows: int | float = float(linear.out_features)  # type: ignore[arg-type]
            columns: int | float = float(linear.in_features)  # type: ignore[arg-type]
            if projection.output is not None:
                rows = index[number, projection.output]
            if projection.input is not None:
                columns = index[number, projection.input]
            products.append((weight_unit, rows, columns))
            if linear.bias is not None:
                products.append((1, rows, 1.0))
    return products


def _norm_products(
    model: PreTrainedModel, family: Family, sites: list[Site]
) -> list[tuple[int, int | float, int | float]]:
    """The weights of the norms that a site selects, and their biases where they have some."""
    blocks = blocks_of(model, family)
    return [
        (len(list(blocks[site.block].get_submodule(norm.path).parameters())), i, 1.0)
        for i, site in enumerate(sites)
        for norm in family.norms
        if norm.output == site.name
    ]


def log_ratio_penalty(
    fraction: Float[Tensor, ""], target: float, strength: float
) -> Float[Tensor, ""]:
    """Eq. 7 of DISP-LLM, strength * |ln(fraction / target)|: pulls from both sides.

    Args:
        fraction: Soft cost over dense cost.
        target: Fraction to reach, in (0, 1].
        strength: The paper's lambda; 6 in the paper, 16 in its released scripts.

    Example: a quarter above the target, strength 6: 6 ln(1.25) = 1.339.
    """
    return strength * (fraction / target).log().abs()


@dataclass(frozen=True)
class Budget:
    """How much of the model stays, and in which shapes.

    Args:
        keep: Fraction of the dense cost that stays, in (0, 1].
        cost: What is counted: `Flops` or `Parameters`, of the block projections or the whole model.
        min_width: Fewest entries that a site keeps, 1 or more.
        width_multiple: Every width is a multiple of this, 1 or more (8, 64 and 128 suit matrix
            hardware); a site whose size is not a multiple may also stay whole.
        uniform: Narrow the MLPs only, all to the same width, so that the result is a stock model of
            its family, without code of its own. Which neurons stay still differs per block.

    Raises:
        ValueError: A setting is outside its range.
    """

    keep: float = 0.5
    cost: Cost = field(default_factory=Flops)
    min_width: int = 1
    width_multiple: int = 1
    uniform: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.keep <= 1:
            raise ValueError(f"`keep` must be in (0, 1], got {self.keep}.")
        for name in ("min_width", "width_multiple"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be 1 or more, got {getattr(self, name)}.")

    def prunes(self, site: Site) -> bool:
        """Whether the site may lose entries; the gates of the others stay open."""
        return not self.uniform or site.name == "mlp_mid"

    def check(self, sites: Sequence[Site], table: CostTable) -> None:
        """Find out before training whether the budget can be met.

        Raises:
            ValueError: The minimum widths alone cost more than the budget, a site is smaller than
                the minimum width or the width multiple, or `uniform` meets MLPs of several sizes.
        """
        prunable = [site for site in sites if self.prunes(site)]
        if not prunable or (self.uniform and len({site.size for site in prunable}) > 1):
            found = ", ".join(f"{site.key} {site.size}" for site in prunable)
            raise ValueError(
                "`uniform` needs a site `mlp_mid` of the same size in every block, got "
                f"{found or 'none'}; set it to false."
            )
        smallest = min(prunable, key=lambda site: site.size)
        for name in ("min_width", "width_multiple"):
            if getattr(self, name) > smallest.size:
                raise ValueError(
                    f"`{name}` {getattr(self, name)} is larger than site {smallest.key}, which "
                    f"has {smallest.size} entries; choose at most {smallest.size}."
                )
        floor_S = torch.tensor([float(self._floor(site)) for site in sites])
        reachable = float(table.fraction(floor_S))
        if reachable > self.keep:
            shape = f"`min_width` {self.min_width} and `width_multiple` {self.width_multiple}"
            cure = "Raise `keep` or lower the widths."
            if self.uniform:
                shape, cure = f"`uniform`, {shape}", f"{cure[:-1]}, or set `uniform` to false."
            raise ValueError(
                f"`keep` {self.keep} cannot be reached: with {shape} at least {reachable:.4f} of "
                f"the cost stays. {cure}"
            )

    def finalise(
        self, scores_N: Float[Tensor, " N"], sites: Sequence[Site], table: CostTable
    ) -> tuple[Tensor, ...]:
        """Choose what stays: the highest scores, as many as the budget pays for, exactly.

        The entries of every site are ranked and cut into chunks of `width_multiple`. All chunks
        compete in one ranking by their mean score; the longest prefix that the budget pays for
        stays, and what is left over buys the best chunks that still fit. The result costs at most
        `keep`, and no further chunk would fit. Deterministic; ties go to the earlier entry.

        With `uniform` every MLP keeps its best entries, as many as the budget pays for in all
        blocks at once.

        Args:
            scores_N: Higher means keep; P(keep) or the logits, of any monotone scale.
            sites: The sites, in order.
            table: Cost table of the same sites.

        Returns:
            Sorted indices (int64) of the kept entries, one vector per site.

        Raises:
            ValueError: A score is not finite, or the budget cannot be met (see `check`).
        """
        self.check(sites, table)
        if not bool(scores_N.isfinite().all()):
            raise ValueError("Scores of gates must be finite; training has diverged.")
        ranked = [
            vector.argsort(descending=True, stable=True)
            for vector in scores_N.split([site.size for site in sites])
        ]
        limit = self.keep * table.dense * (1 + 1e-12)
        if self.uniform:
            widths_S = self._uniform_widths(sites, table, limit)
        else:
            widths_S = self._ranked_widths(scores_N, sites, table, limit, ranked)
        return tuple(
            order[:width].sort().values
            for order, width in zip(ranked, widths_S.tolist(), strict=True)
        )

    def _uniform_widths(self, sites: Sequence[Site], table: CostTable, limit: float) -> Tensor:
        """The widest MLP that all blocks can have within the limit."""
        floor_S = torch.tensor([self._floor(site) for site in sites])
        narrow_S = torch.tensor([self.prunes(site) for site in sites])
        floor, size = next((self._floor(site), site.size) for site in sites if self.prunes(site))
        # A size that is not a multiple may stay whole, as everywhere.
        choices = sorted({*range(floor, size + 1, self.width_multiple), size})

        def too_wide(width: int) -> bool:
            return float(table(floor_S.masked_fill(narrow_S, width))) > limit

        affordable = bisect_left(choices, True, key=too_wide)  # the cost grows with the width
        return floor_S.masked_fill(narrow_S, choices[affordable - 1])

    def _ranked_widths(
        self,
        scores_N: Tensor,
        sites: Sequence[Site],
        table: CostTable,
        limit: float,
        ranked: Sequence[Tensor],
    ) -> Tensor:
        """Widths of the best chunks of all sites together."""
        floor_S = torch.tensor([self._floor(site) for site in sites])
        chunk_sites, chunk_sizes = self._ranked_chunks(scores_N, sites, ranked, floor_S)

        def widths_of_prefix(count: int) -> Tensor:
            return floor_S.index_add(0, chunk_sites[:count], chunk_sizes[:count])

        low, high = 0, len(chunk_sites)  # the longest prefix within the limit lies in [low, high]
        while low < high:
            middle = (low + high + 1) // 2
            if float(table(widths_of_prefix(middle))) <= limit:
                low = middle
            else:
                high = middle - 1
        widths_S = widths_of_prefix(low)
        cost = float(table(widths_S))
        # A chunk can follow only if all earlier chunks of its site are in: a site that was passed
        # over once stays closed.
        closed = torch.zeros(len(sites), dtype=torch.bool)
        marginal_S = table.marginal(widths_S)
        for site, size in zip(chunk_sites[low:].tolist(), chunk_sizes[low:].tolist(), strict=True):
            if closed[site]:
                continue
            if cost + size * float(marginal_S[site]) > limit:
                closed[site] = True
                if bool(closed.all()):
                    break
                continue
            widths_S[site] += size
            cost, marginal_S = float(table(widths_S)), table.marginal(widths_S)
        return widths_S

    def _floor(self, site: Site) -> int:
        if not self.prunes(site):
            return site.size
        chunks = -(-self.min_width // self.width_multiple)
        return min(site.size, chunks * self.width_multiple)

    def _ranked_chunks(
        self,
        scores_N: Tensor,
        sites: Sequence[Site],
        ranked: Sequence[Tensor],
        floor_S: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Site and size of every chunk above the floor, best mean score first."""
        keys, places, sizes = [], [], []
        scores = scores_N.double().split([site.size for site in sites])
        for place, (order, vector) in enumerate(zip(ranked, scores, strict=True)):
            above = vector[order][int(floor_S[place]) :]
            whole = len(above) - len(above) % self.width_multiple
            key_C = above[:whole].view(-1, self.width_multiple).mean(1)
            size_C = torch.full_like(key_C, self.width_multiple, dtype=torch.long)
            if whole < len(above):  # the site stays whole only with its last, shorter chunk
                key_C = torch.cat([key_C, above[whole:].mean().unsqueeze(0)])
                size_C = torch.cat([size_C, torch.tensor([len(above) - whole])])
            # Rounding must not let a chunk overtake an earlier one of its site.
            keys.append(key_C.cummin(0).values)
            sizes.append(size_C)
            places.append(torch.full_like(size_C, place))
        best_first = torch.cat(keys).argsort(descending=True, stable=True)
        return torch.cat(places)[best_first], torch.cat(sizes)[best_first]
