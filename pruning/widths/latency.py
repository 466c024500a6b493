"""The time of a model as the cost of a budget, by a table that was measured where it is served.

Sources: HALP (arXiv 2110.10811), ZipLM (arXiv 2302.04089) and Puzzle (arXiv 2411.19146) choose by
measured times as well. The table is that of `secateur.pruning.measure.latency_table`.

Differs from them: the time is differentiable, and known for all widths of a block. In a budget, a
site costs at most what a wider one costs: selecting entries takes time, so that a site that is
slightly narrower can be slower, and then stays wider at no cost.

Legend: S = sites, B = blocks, R = sites that are widths.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from jaxtyping import Float, Real
from torch import Tensor
from transformers import PreTrainedModel

from secateur.pruning.costs import Cost, CostModel
from secateur.pruning.families import PARTS, Family, family_of
from secateur.pruning.heads import HEADS
from secateur.pruning.measure.latency_curves import Curves
from secateur.pruning.measure.latency_table import (
    ROLES,
    LatencyTable,
    kind_of,
    machine_name,
    read_table,
)
from secateur.pruning.sites import Site, find_sites


class LatencyModel(CostModel):
    """Seconds of a mix of passes, as a function of the widths of the sites.

    Args:
        curves: Times of the parts.
        sites: The sites, in order; every block has all widths.
        kinds: Kind of the attention of every block.
    """

    def __init__(self, curves: Curves, sites: Sequence[Site], kinds: Sequence[str]) -> None:
        self.curves = curves
        self.full_S = torch.tensor([float(site.size) for site in sites], dtype=torch.float64)
        self._least_S = torch.tensor(
            [0.0 if site.is_part else float(curves.grid[site.name][0]) for site in sites]
        ).double()
        self._of_part = [(site.part, site.block) for site in sites]
        places = {(site.block, site.name): place for place, site in enumerate(sites)}
        blocks = range(len(kinds))
        # Gates of parts may be absent: then no part is removed.
        self._places = {
            name: torch.tensor([places[block, name] for block in blocks])
            for name in (*ROLES, HEADS, *PARTS)
            if (0, name) in places
        }
        self._kind_B = torch.tensor([curves.kinds.index(kind) for kind in kinds])
        self.dense = float(self(self.full_S))

    def __call__(self, widths_S: Real[Tensor, " S"]) -> Float[Tensor, ""]:
        # The table is on the CPU, where budgets are filled.
        wide_S, every = widths_S.double().cpu(), slice(None)
        parts = [self._part(part, wide_S, every).sum() for part in PARTS]
        seconds: Tensor = self.curves.rest + torch.stack(parts).sum()
        return seconds.to(widths_S.device)

    def marginal(self, widths_S: Real[Tensor, " S"]) -> Float[Tensor, " S"]:
        # The mean over all widths of a site: single steps of a table may be flat.
        marginal_S = torch.zeros_like(self.full_S)
        for name, place_B in self._places.items():
            low_S, high_S = widths_S.double(), widths_S.double()
            low_S = low_S.index_copy(0, place_B, self._least_S[place_B])
            high_S = high_S.index_copy(0, place_B, self.full_S[place_B])
            part = name.partition("_")[0]
            low_B, high_B = (self._part(part, own_S, slice(None)) for own_S in (low_S, high_S))
            entries_B = (self.full_S - self._least_S)[place_B].clamp_min(1)
            marginal_S[place_B] = (high_B - low_B) / entries_B
        return marginal_S

    def increase(self, widths_S: Real[Tensor, " S"], site: int, entries: int) -> float:
        before_after_2S = widths_S.double().repeat(2, 1)
        before_after_2S[1, site] += entries
        part, block = self._of_part[site]
        before, after = self._part(part, before_after_2S, block).tolist()
        return float(after - before)

    def _part(
        self, part: str, widths_S: Float[Tensor, "*N S"], blocks: slice | int
    ) -> Float[Tensor, "*M"]:
        """Seconds of the attentions or MLPs of some blocks."""
        columns = [
            widths_S[..., self._places[role][blocks]] for role in ROLES if role.startswith(part)
        ]
        if part == "attn":
            kind_B = self._kind_B[blocks].expand(columns[0].shape)
            heads_B = widths_S[..., self._places[HEADS][blocks]] if HEADS in self._places else None
            in_B, out_B = columns
            seconds_B = self.curves.attention(kind_B, in_B, out_B, heads_B)
        else:
            seconds_B = self.curves.mlp(*columns)
        if part in self._places:
            seconds_B = seconds_B * widths_S[..., self._places[part][blocks]]
        return seconds_B


class Latency(Cost):
    """Time of a mix of prefills and decoding steps, by a table that was measured.

    Args:
        table: File that `python -m secateur latency MODEL --output FILE` wrote. Its prompt, context
            and batch are those of the time.
        prompts: Number of prefills in the mix, 0 or more.
        new_tokens: Number of decoding steps in the mix, 0 or more; each gives every sequence of the
            batch one token.
        measured_on: None for a table of this machine, its present number of threads and the type of
            the weights of the model; for any other table, machine and type as the table names them.

    Raises:
        ValueError: A setting is outside its range, or the table cannot be read, is damaged or too
            coarse.
    """

    times: LatencyTable
    cure: ClassVar[str] = (
        "Raise `keep`, set `parts` to true or remove blocks first: attention scores, cache and "
        "output head take time at any width."
    )

    def __init__(
        self,
        table: str,
        prompts: float = 1.0,
        new_tokens: float = 128.0,
        measured_on: str | None = None,
    ) -> None:
        for name, value in (("prompts", prompts), ("new_tokens", new_tokens)):
            if value < 0:
                raise ValueError(f"`{name}` must be 0 or more, got {value}.")
        if prompts == new_tokens == 0:
            raise ValueError("`prompts` and `new_tokens` cannot both be 0: nothing would be timed.")
        self.path, self.times = table, read_table(table)
        self.prompts, self.new_tokens, self.measured_on = prompts, new_tokens, measured_on

    def __repr__(self) -> str:
        """Settings, with the contents of the table by their checksum: a resume needs the same."""
        return (
            f"Latency(table={self.times.hash!r}, prompts={self.prompts}, "
            f"new_tokens={self.new_tokens}, measured_on={self.times.measured_on!r})"
        )

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Latency) and repr(self) == repr(other)

    def __hash__(self) -> int:
        return hash(repr(self))

    @property
    def label(self) -> str:
        return (
            f"time of {self.prompts:g} prefills and {self.new_tokens:g} decoding steps on "
            f"{self.times.measured_on}"
        )

    @property
    def per_weight(self) -> float:
        return 0.0

    def table(self, model: PreTrainedModel, family: Family | None = None) -> LatencyModel:
        shown = f"`table` {self.path}"
        self.times.check_model(model.config, shown)
        dtype = str(model.dtype).removeprefix("torch.")
        here = f"{machine_name(self.times.device)}, {dtype}"
        wanted = self.measured_on or here
        if self.times.measured_on != wanted:
            told = wanted if self.measured_on else f"{wanted}, this machine"
            raise ValueError(
                f"{shown} was measured on {self.times.measured_on!r}, and not on {told!r}. "
                "Measure it here, or set `measured_on` to what the table says."
            )
        family = family or family_of(model.config)
        if family.narrow:
            raise ValueError(
                "`cost` Latency needs blocks of full width, and those of this model are narrow "
                "already; start from the model that it was made from."
            )
        if HEADS in family.gates and HEADS not in self.times.grid:
            raise ValueError(
                f"{shown} has no times for fewer heads, and `sites` names {HEADS!r}; measure it "
                "again with `python -m secateur latency`, or leave them out."
            )
        sites = find_sites(model, family)
        self.times.check_sizes(sites, shown)
        weights = {"prefill": self.prompts, "decode": self.new_tokens}
        kinds = [kind_of(model.config, block) for block in range(model.config.num_hidden_layers)]
        return LatencyModel(self.times.curves(weights, monotone=True), sites, kinds)
