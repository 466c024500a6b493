"""The penalty on the cost of masks, and the final selection that meets the budget exactly.

Sources: DISP-LLM (arXiv 2410.11988), section 3.3 (eq. 7: the log-ratio penalty). The exact
selection is ours: the paper draws a random mask at the end and meets the budget only roughly.

Legend: S = sites, N = all gates, C = chunks of gates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedConfig

from secateur.pruning.costs import Cost, CostModel, Flops
from secateur.pruning.families import PARTS, Family, family_of
from secateur.pruning.heads import HEADS
from secateur.pruning.sites import SMALLEST_FAST, Site, fast_multiple
from secateur.pruning.widths.uniform import UNIFORM, uniform_widths

# Measured on one core (width 576, bfloat16): gathering takes as long as a product with about 540
# features. Estimated from memory traffic, it is about the same on a GPU at width 4096.
_SELECTION = 512


def log_ratio_penalty(
    fraction: Float[Tensor, ""], target: float, strength: float
) -> Float[Tensor, ""]:
    """Eq. 7 of DISP-LLM, strength * |ln(fraction / target)|, above and below the target.

    Args:
        fraction: Soft cost over dense cost.
        target: Fraction to reach, in (0, 1].
        strength: The paper's lambda; 6 in the paper, 16 in its released scripts.

    Example: a quarter above the target, strength 6: 6 ln(1.25) = 1.339.
    """
    return strength * (fraction / target).log().abs()


@dataclass(frozen=True)
class Budget:
    """How much of the model is kept, and in which shapes.

    Args:
        keep: Fraction of the dense cost to keep, in (0, 1].
        cost: The measure of cost: `Flops` or `Parameters`, of the block projections or the whole
            model; `Bytes` of weights and cache; or `Latency`, by a table that was measured.
        min_width: Fewest features that a site keeps, 1 or more; of heads, one key-value head stays.
        width_multiple: Every width in features is a multiple of this, 1 or more (8, 64 and 128 suit
            matrix hardware); a site whose size is not a multiple may also stay uncut. None means 32
            if the residual stream has 512 entries or more, 64 from 1024 on, and 1 below.
        selection: Selecting entries of the residual stream takes time: a site of it is cut only if
            that saves more than a product of the full stream with this many features, 0 or more. 0
            cuts any site. None means 512 if the residual stream has 512 entries or more, and 0
            below.
        uniform: Narrow the MLPs only, all to the same width, so that the result is a stock model of
            its family, without custom code. The kept neurons still differ per block. With
            `attn_heads` in `sites`, all attentions keep the same number of heads, too.
        parts: Also remove entire attentions and MLPs, by one gate each. The cost that this saves is
            spent on the widths of the others.
        sites: Names of the sites that may be cut; the others are cut only with a removed part. None
            means all but `attn_heads`: key-value heads, each with its query heads, are removed only
            if they are named. With `[mlp_mid]` alone, the residual stream and the heads are uncut,
            as servers without the modelling file need (docs/serving.md).

    Raises:
        ValueError: A setting is outside its range, or `uniform` is set beside `parts` or beside
            `sites` that a stock model cannot change.
    """

    keep: float = 0.5
    cost: Cost = field(default_factory=Flops)
    min_width: int = 1
    width_multiple: int | None = None
    selection: int | None = None
    uniform: bool = False
    parts: bool = False
    sites: Sequence[str] | None = None

    def __post_init__(self) -> None:
        if not 0 < self.keep <= 1:
            raise ValueError(f"`keep` must be in (0, 1], got {self.keep}.")
        if self.uniform and self.parts:
            raise ValueError(
                "`uniform` and `parts` cannot both be true: a block without attention or MLP is "
                "not a stock block. Remove blocks first, then learn uniform widths of the rest."
            )
        if self.uniform and (strange := [s for s in self.sites or () if s not in UNIFORM]):
            raise ValueError(
                f"`uniform` and `sites` {strange} cannot both be set: a stock model can change "
                f"{' and '.join(UNIFORM)} only. Name these, or set `uniform` to false."
            )
        if self.sites is not None and not self.sites:
            raise ValueError("`sites` must name one site or more, such as `mlp_mid`, got none.")
        for name, least in (("min_width", 1), ("width_multiple", 1), ("selection", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"`{name}` must be {least} or more, got {value}.")

    def suited(self, sites: Sequence[Site]) -> Budget:
        """The same budget with `width_multiple` and `selection` set for these sites."""
        stream = max((site.size for site in sites if site.is_of_stream), default=0)
        selection = _SELECTION if stream >= SMALLEST_FAST else 0
        return replace(
            self,
            width_multiple=self.width_multiple or fast_multiple(stream),
            selection=selection if self.selection is None else self.selection,
        )

    def family(self, config: PreTrainedConfig) -> Family:
        """The row of the family, with the sites that have gates under this budget.

        Raises:
            ValueError: The family is unknown, or this member of it cannot be pruned.
        """
        return family_of(config).having({*(self.sites or ()), *(PARTS if self.parts else ())})

    def prunes(self, site: Site) -> bool:
        """Test whether the site may lose entries; gates of other sites stay open."""
        if self.sites is not None:
            return site.is_part or site.name in self.sites
        return site.name == "mlp_mid" if self.uniform else site.name != HEADS

    def check(self, sites: Sequence[Site], table: CostModel) -> None:
        """Check before training that the budget can be met.

        Raises:
            ValueError: The minimum widths alone cost more than the budget, a site is smaller than
                the minimum width or the width multiple, `uniform` meets MLPs of several sizes, or
                `sites` names one that the model does not have.
        """
        self.suited(sites)._check(sites, table)

    def _check(self, sites: Sequence[Site], table: CostModel) -> None:
        names = list(dict.fromkeys(site.name for site in sites if not site.is_part))
        if strange := [name for name in self.sites or () if name not in names]:
            known = ", ".join(dict.fromkeys([*names, HEADS]))
            raise ValueError(f"`sites` names {strange[0]!r}; the model has {known}.")
        prunable = [site for site in sites if self.prunes(site)]
        narrowed = {*(self.sites or ["mlp_mid"])}
        if self.uniform and len({(site.name, site.size) for site in prunable}) != len(narrowed):
            found = ", ".join(f"{site.key} {site.size}" for site in prunable)
            raise ValueError(
                f"`uniform` needs a site `{'` and `'.join(sorted(narrowed))}` of the same size in "
                f"every block, got {found or 'none'}; set it to false."
            )
        fine = [site for site in prunable if site.is_of_features]
        smallest = min(fine, key=lambda site: site.size, default=None)
        for name in ("min_width", "width_multiple"):
            if smallest is not None and getattr(self, name) > smallest.size:
                raise ValueError(
                    f"`{name}` {getattr(self, name)} is larger than site {smallest.key}, which "
                    f"has {smallest.size} entries; choose at most {smallest.size}."
                )
        floor_S = torch.tensor([float(self._floor(site)) for site in sites])
        attentions = [place for place, site in enumerate(sites) if site.name == "attn"]
        floor_S[attentions[:1]] = 1.0  # one attention is kept
        reachable = float(table.fraction(floor_S))
        if reachable > self.keep:
            shape = f"`min_width` {self.min_width} and `width_multiple` {self.width_multiple}"
            cure = self.cost.cure
            if self.uniform:
                shape, cure = f"`uniform`, {shape}", f"{cure[:-1]}, or set `uniform` to false."
            if self.sites is not None:
                shape, cure = f"these `sites`, {shape}", f"{cure[:-1]}, or name more `sites`."
            raise ValueError(
                f"`keep` {self.keep} cannot be reached: with {shape} at least {reachable:.4f} of "
                f"the cost is kept. {cure}"
            )

    def finalise(
        self,
        scores_N: Float[Tensor, " N"],
        sites: Sequence[Site],
        table: CostModel,
        most_S: Int[Tensor, " S"] | None = None,
    ) -> tuple[Tensor, ...]:
        """Choose the kept entries: the highest scores that exactly fit the budget.

        The entries of every site are ranked and cut into chunks of `width_multiple`. All chunks are
        ranked together by their mean score; the longest prefix within the budget is kept, and then
        the best further chunks that still fit. The result costs at most `keep`, and no further
        chunk would fit. Deterministic; ties go to the earlier entry.

        With `uniform` all blocks keep equally many of their best entries, see `uniform_widths`.

        Args:
            scores_N: Higher means keep; P(keep) or the logits, of any monotone scale.
            sites: The sites, in order.
            table: Cost of the same sites.
            most_S: Largest number of entries that each site may keep; None means all.

        With `parts`, their gates are ranked together with the chunks. Parts outside the prefix are
        removed, and the ranking is repeated among the remaining parts, so that widths meet the
        budget. If all remaining parts are uncut, removed parts that fit are restored, the best
        first.

        Returns:
            Sorted indices (int64) of the kept entries, one vector per site.

        Raises:
            ValueError: A score is not finite, or the budget cannot be met (see `check`).
        """
        return self.suited(sites)._finalise(scores_N, sites, table, most_S)

    def _finalise(
        self,
        scores_N: Float[Tensor, " N"],
        sites: Sequence[Site],
        table: CostModel,
        most_S: Int[Tensor, " S"] | None,
    ) -> tuple[Tensor, ...]:
        self._check(sites, table)
        if not bool(scores_N.isfinite().all()):
            raise ValueError("Scores of gates must be finite; training has diverged.")
        ranked = [
            vector.argsort(descending=True, stable=True)
            for vector in scores_N.split([site.size for site in sites])
        ]
        limit = self.keep * table.dense * (1 + 1e-12)
        top_S = torch.tensor([site.size for site in sites]) if most_S is None else most_S
        if self.uniform:
            floor_S = torch.tensor([self._floor(site) for site in sites])
            pruned = [self.prunes(site) for site in sites]

            def fits(widths_S: Tensor) -> bool:
                return float(table(widths_S)) <= limit

            widths_S = uniform_widths(scores_N, sites, pruned, floor_S, self._multiple, fits)
        elif any(site.is_part for site in sites):
            widths_S = self._widths_with_parts(scores_N, sites, table, limit, ranked, top_S)
        else:
            floor_S = torch.tensor([self._floor(site) for site in sites]).minimum(top_S)
            widths_S = self._ranked_widths(scores_N, sites, table, limit, ranked, floor_S, top_S)
        return tuple(
            order[:width].sort().values
            for order, width in zip(ranked, widths_S.tolist(), strict=True)
        )

    def _widths_with_parts(
        self,
        scores_N: Tensor,
        sites: Sequence[Site],
        table: CostModel,
        limit: float,
        ranked: Sequence[Tensor],
        most_S: Tensor,
    ) -> Tensor:
        """Widths with the best chunks of the parts that are kept."""
        scores = scores_N.split([site.size for site in sites])
        floor_S = torch.tensor([self._floor(site) for site in sites]).minimum(most_S)
        gates = {(s.block, s.name): place for place, s in enumerate(sites) if s.is_part}
        gate_S = torch.tensor([gates[site.block, site.part] for site in sites])
        best_first = sorted(gates.values(), key=lambda place: -float(scores[place]))
        floor_S[next(place for place in best_first if sites[place].name == "attn")] = 1
        chunks = self._ranked_chunks(scores_N, sites, ranked, floor_S, most_S)
        count = _longest_prefix(*chunks, floor_S, table, limit)
        open_S = _widths_of_prefix(*chunks, floor_S, count)[gate_S] == 1
        floor_S[list(gates.values())] = 1
        floor_S = floor_S.minimum(most_S)
        while True:
            lowest_S, top_S = floor_S * open_S, most_S * open_S
            widths_S = self._ranked_widths(scores_N, sites, table, limit, ranked, lowest_S, top_S)
            shut = [place for place in best_first if not open_S[place]]
            if not shut or bool((widths_S < top_S).any()):
                return widths_S
            back_S = gate_S == shut[0]
            if float(table(torch.where(back_S, floor_S, lowest_S))) > limit:
                return widths_S
            open_S = open_S | back_S

    def _ranked_widths(
        self,
        scores_N: Tensor,
        sites: Sequence[Site],
        table: CostModel,
        limit: float,
        ranked: Sequence[Tensor],
        floor_S: Tensor,
        top_S: Tensor,
    ) -> Tensor:
        """Widths between lower and upper limits, with the best chunks of all sites.

        Sites of the residual stream whose cut saves no time stay uncut, if the budget allows.
        """
        stream = max((site.size for site in sites if site.is_of_stream), default=0)
        # In a narrow base model, entries of the stream are selected anyway.
        selects_S = torch.tensor([site.is_of_stream and site.size == stream for site in sites])
        least_saved = self.cost.per_weight * (self.selection or 0) * stream
        while True:
            chunks = self._ranked_chunks(scores_N, sites, ranked, floor_S, top_S)
            widths_S = _widths_within(*chunks, floor_S, table, limit)
            saved_S = (top_S - widths_S) * table.marginal(widths_S)
            unpaid_S = selects_S & (widths_S < top_S) & (saved_S < least_saved)
            floor_S = torch.where(unpaid_S, top_S, floor_S)
            if not bool(unpaid_S.any()) or float(table(floor_S)) > limit:
                return widths_S

    @property
    def _multiple(self) -> int:
        return self.width_multiple or 1

    def _floor(self, site: Site) -> int:
        if site.is_part:
            return 0
        if not self.prunes(site):
            return site.size
        if not site.is_of_features:
            return 1
        chunks = -(-self.min_width // self._multiple)
        return min(site.size, chunks * self._multiple)

    def _ranked_chunks(
        self,
        scores_N: Tensor,
        sites: Sequence[Site],
        ranked: Sequence[Tensor],
        floor_S: Tensor,
        top_S: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Site and size of every chunk between the limits, highest mean score first."""
        keys, places, sizes = [], [], []
        scores = scores_N.double().split([site.size for site in sites])
        for place, (order, vector) in enumerate(zip(ranked, scores, strict=True)):
            above = vector[order][int(floor_S[place]) : int(top_S[place])]
            multiple = self._multiple if sites[place].is_of_features else 1
            whole = len(above) - len(above) % multiple
            key_C = above[:whole].view(-1, multiple).mean(1)
            size_C = torch.full_like(key_C, multiple, dtype=torch.long)
            if whole < len(above):  # a site stays uncut only with its last, shorter chunk
                key_C = torch.cat([key_C, above[whole:].mean().unsqueeze(0)])
                size_C = torch.cat([size_C, torch.tensor([len(above) - whole])])
            # Rounding must not rank a chunk before an earlier one of its site.
            keys.append(key_C.cummin(0).values)
            sizes.append(size_C)
            places.append(torch.full_like(size_C, place))
        best_first = torch.cat(keys).argsort(descending=True, stable=True)
        return torch.cat(places)[best_first], torch.cat(sizes)[best_first]


def _widths_of_prefix(
    chunk_sites: Tensor, chunk_sizes: Tensor, floor_S: Tensor, count: int
) -> Tensor:
    """Widths with the first `count` chunks above the lower limit."""
    return floor_S.index_add(0, chunk_sites[:count], chunk_sizes[:count])


def _widths_within(
    chunk_sites: Tensor, chunk_sizes: Tensor, floor_S: Tensor, table: CostModel, limit: float
) -> Tensor:
    """Widths with the longest prefix of chunks within the limit, and others that fit."""
    low = _longest_prefix(chunk_sites, chunk_sizes, floor_S, table, limit)
    widths_S = _widths_of_prefix(chunk_sites, chunk_sizes, floor_S, low)
    cost = float(table(widths_S))
    # A chunk can be added only if all earlier chunks of its site are included: once a chunk does
    # not fit, its site gets no more.
    rest = list(zip(chunk_sites[low:].tolist(), chunk_sizes[low:].tolist(), strict=True))
    open_sites = {site for site, _ in rest}
    for site, size in rest:
        if site not in open_sites:
            continue
        more = table.increase(widths_S, site, size)
        if cost + more > limit:
            open_sites.remove(site)
            if not open_sites:
                break
            continue
        widths_S[site] += size
        cost += more
    return widths_S


def _longest_prefix(
    chunk_sites: Tensor, chunk_sizes: Tensor, floor_S: Tensor, table: CostModel, limit: float
) -> int:
    """The number of chunks in the longest prefix that costs at most the limit."""
    low, high = 0, len(chunk_sites)  # the result is in [low, high]; cost grows with every chunk
    while low < high:
        middle = (low + high + 1) // 2
        if float(table(_widths_of_prefix(chunk_sites, chunk_sizes, floor_S, middle))) <= limit:
            low = middle
        else:
            high = middle - 1
    return low
