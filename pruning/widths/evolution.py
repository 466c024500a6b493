"""Search over widths and masks by evolution: "Search for Efficient Large Language Models", arXiv
2409.17372.

A genome changes a fixed ranking of the gates: one offset per site, which widens or narrows it, and
a few swaps of single entries. The masks of a genome are those of its changed ranking within the
budget,

    masks = Budget.finalise(rank_i + offset_site(i) + swap_i),

so every candidate is exactly on budget. In each generation parents and children are compared by
their loss on the same windows, which are drawn anew: candidates differ by less than batches do, and
a parent that was lucky is not kept. The result is the best of the last parents on windows that no
generation has read.

Differs from the paper, whose masks cannot change below a kept fraction of 0.9 (two random sets of a
fraction f overlap in f^2 of the entries, and 0.8 is demanded), and whose candidates outside a range
of sizes are dropped: here some kept entries are exchanged, and the budget is always met. Its
calibration text is the training part of the test corpus; any other text can be given here.

Costs `children` + `parents` evaluations per generation of `windows` windows each, forward passes
only.

Legend: N = all gates, S = sites, W = calibration windows, T = tokens of a window.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from secateur.pruning.measure.perplexity import window_nll
from secateur.pruning.modes import evaluation
from secateur.pruning.progress import tracked
from secateur.pruning.sites import Site, find_sites, masks_of, split
from secateur.pruning.widths.budget import Budget
from secateur.pruning.widths.gate_hooks import GateHooks
from secateur.pruning.widths.gradual_ranking import Improvement, Ranking
from secateur.pruning.widths.scores import WidthScore

_OFFSET = 0.15  # standard deviation of a step of an offset; ranks are in [-1, 1)
_SWAP = 2.0  # moves an entry past all others of its site
_SWAPPED = 0.05  # fraction of the width of a site that is exchanged at once
# Probability that an offset changes, and that a site gets swaps: usually, and for wide steps.
_USUAL, _WIDE = (0.1, 0.3), (0.3, 0.6)


@dataclass(frozen=True)
class Genome:
    """Changes to a ranking.

    Args:
        offset_S: Added to all entries of a site.
        swap_N: Added to single entries; 0 for most.
    """

    offset_S: Float[Tensor, " S"]
    swap_N: Float[Tensor, " N"]

    def changed(self, rank_N: Float[Tensor, " N"], sites: Sequence[Site]) -> Float[Tensor, " N"]:
        """The changed ranking."""
        sizes = torch.tensor([site.size for site in sites])
        return rank_N + self.offset_S.repeat_interleave(sizes) + self.swap_N


@dataclass(frozen=True)
class Candidate:
    """A genome, its masks and its loss.

    Args:
        genome: The genome.
        mask_N: 1 for kept entries, else 0.
        loss: Mean negative log-likelihood on the windows of its last comparison, nats per token;
            NaN before the first.
    """

    genome: Genome
    mask_N: Float[Tensor, " N"]
    loss: float = float("nan")


@dataclass(frozen=True)
class Population:
    """The state of a search between two generations.

    Args:
        generation: Number of finished generations, 0 or more.
        parents: The best candidates, the best first.
    """

    generation: int
    parents: tuple[Candidate, ...]


Express = Callable[[Genome], Tensor]
"""A function from a genome to its masks (N,)."""

Loss = Callable[[Tensor, Tensor], float]
"""A function from masks (N,) and windows (W, T) to the mean loss, nats per token."""


def mutate(
    genome: Genome,
    mask_N: Float[Tensor, " N"],
    rank_N: Float[Tensor, " N"],
    sizes: Sequence[int],
    generator: torch.Generator,
    wide: bool = False,
) -> Genome:
    """Change some offsets, and exchange entries of some sites.

    Entries are exchanged among the lower half of those that are kept and the upper half of the
    others, by rank.

    Args:
        genome: The genome to change.
        mask_N: Its masks.
        rank_N: The ranking.
        sizes: Number of entries of every site.
        generator: Source of the changes.
        wide: Change more.
    """
    of_offset, of_site = _WIDE if wide else _USUAL
    chosen_S = torch.rand(len(sizes), generator=generator) < of_offset
    step_S = _OFFSET * torch.randn(len(sizes), generator=generator)
    swaps = list(genome.swap_N.clone().split(list(sizes)))
    places = zip(mask_N.split(list(sizes)), rank_N.split(list(sizes)), strict=True)
    for number, (mask_I, rank_I) in enumerate(places):
        if float(torch.rand((), generator=generator)) >= of_site:
            continue
        kept_I, gone_I = mask_I.nonzero()[:, 0], (mask_I == 0).nonzero()[:, 0]
        kept_I = kept_I[rank_I[kept_I].argsort(stable=True)][: -(-len(kept_I) // 2)]
        gone_I = gone_I[rank_I[gone_I].argsort(descending=True, stable=True)]
        gone_I = gone_I[: -(-len(gone_I) // 2)]
        count = min(round(_SWAPPED * float(mask_I.sum())), len(kept_I), len(gone_I))
        for entries, change in ((kept_I, -_SWAP), (gone_I, _SWAP)):
            drawn = entries[torch.randperm(len(entries), generator=generator)[:count]]
            swaps[number][drawn] = change
    return Genome(genome.offset_S + step_S * chosen_S, torch.cat(swaps))


def cross(one: Genome, other: Genome, sites: Sequence[Site], generator: torch.Generator) -> Genome:
    """A child that has all genes of a block from one of two parents, drawn block by block."""
    blocks = 1 + max(site.block for site in sites)
    first_B = torch.rand(blocks, generator=generator) < 0.5
    first_S = torch.stack([first_B[site.block] for site in sites])
    first_N = first_S.repeat_interleave(torch.tensor([site.size for site in sites]))
    return Genome(
        torch.where(first_S, one.offset_S, other.offset_S),
        torch.where(first_N, one.swap_N, other.swap_N),
    )


@dataclass(frozen=True)
class Evolution(Improvement):
    """Improve a ranking by evolution.

    Args:
        start: The search that makes the ranking.
        generations: Number of generations, 1 or more.
        children: New candidates per generation, 3 or more: 5 of 9 by mutation of a parent, 3 of 9
            by crossover of two, the others by wide mutation of the ranking.
        parents: Candidates that survive a generation, 2 or more.
        windows: Windows that all candidates of a generation are compared on, 1 or more.
        text_windows: Windows that those of a generation are drawn from, `windows` or more.
        held_back_windows: Further windows, on which the last parents are compared, 1 or more.
        seed: Seed of all draws, 0 or more.

    Raises:
        ValueError: A setting is outside its range.
    """

    generations: int = 20
    children: int = 40
    parents: int = 10
    windows: int = 20
    text_windows: int = 256
    held_back_windows: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        least = {"generations": 1, "children": 3, "parents": 2, "windows": 1, "seed": 0}
        for name, low in (least | {"held_back_windows": 1, "text_windows": self.windows}).items():
            if getattr(self, name) < low:
                raise ValueError(f"`{name}` must be {low} or more, got {getattr(self, name)}.")

    def windows_read(self, score: WidthScore) -> int:
        return max(self.start.windows_read(score), self.text_windows) + self.held_back_windows

    def improve(
        self,
        model: PreTrainedModel,
        budget: Budget,
        ranking: Ranking,
        windows_WT: Int[Tensor, "W T"],
    ) -> Ranking:
        family, rank_N = budget.family(model.config), ranking.positions_N()
        sites, table = find_sites(model, family), budget.cost.table(model, family)

        def express(genome: Genome) -> Tensor:
            return masks_of(budget.finalise(genome.changed(rank_N, sites), sites, table), sites)

        hooks = GateHooks(model, family)

        @torch.no_grad()
        def loss(mask_N: Tensor, windows_WT: Tensor) -> float:
            with hooks.applied(split(mask_N, sites)):
                batches = windows_WT.to(model.device).split(self.start.batch_size)
                return float(
                    torch.cat([window_nll(model, batch_BT) for batch_BT in batches]).mean()
                )

        try:
            with evaluation(model):
                steps = self.evolve(express, loss, rank_N, sites, windows_WT)
                last = list(tracked(steps, "Evolving widths", self.generations))[-1]
                held_WT = windows_WT[-self.held_back_windows :]
                best = compared(last.parents, loss, held_WT)[0]
        finally:
            hooks.remove()
        closed_N = (best.mask_N == 0).long()
        return Ranking(1, closed_N, best.genome.changed(rank_N, sites).double())

    def evolve(
        self,
        express: Express,
        loss: Loss,
        rank_N: Float[Tensor, " N"],
        sites: Sequence[Site],
        windows_WT: Int[Tensor, "W T"],
        start: Population | None = None,
    ) -> Iterator[Population]:
        """Run the generations that are left.

        Args:
            express: Returns the masks of a genome.
            loss: Returns the loss of masks on windows.
            rank_N: The ranking to improve, in [-1, 1).
            sites: The sites, in order.
            windows_WT: Token ids of calibration text; the last `held_back_windows` are not read.
            start: Result of an interrupted search with the same arguments; None starts anew.

        Yields:
            The population after every generation.
        """
        sizes = [site.size for site in sites]
        pool_WT = windows_WT[: len(windows_WT) - self.held_back_windows]
        genome = Genome(torch.zeros(len(sizes)), torch.zeros(sum(sizes)))
        unchanged = Candidate(genome, express(genome))

        def child(of: Population, place: int) -> Candidate:
            generator = self._generator(of.generation, place + 1)

            def pick() -> Candidate:
                return of.parents[int(torch.randint(len(of.parents), (), generator=generator))]

            wide = of.generation == 0 or place >= 8 * self.children // 9
            if wide or place < 5 * self.children // 9:
                own = unchanged if wide else pick()
                born = mutate(own.genome, own.mask_N, rank_N, sizes, generator, wide)
            else:
                born = cross(pick().genome, pick().genome, sites, generator)
            return Candidate(born, express(born))

        population = start or Population(0, (unchanged,))
        while (number := population.generation) < self.generations:
            order = torch.randperm(len(pool_WT), generator=self._generator(number, 0))
            own_WT = pool_WT[order[: self.windows]]
            children = [child(population, place) for place in range(self.children)]
            best = compared([*population.parents, *children], loss, own_WT)
            population = Population(number + 1, tuple(best[: self.parents]))
            yield population

    def _generator(self, generation: int, place: int) -> torch.Generator:
        seed = (self.seed * 1_000_003 + generation) * 8191 + place
        return torch.Generator().manual_seed(seed & 0x7FFF_FFFF_FFFF_FFFF)


def compared(
    candidates: Sequence[Candidate], loss: Loss, windows_WT: Int[Tensor, "W T"]
) -> list[Candidate]:
    """Candidates with different masks and their losses, the best first; ties to the earlier.

    A loss that is not finite counts as infinite.

    Args:
        candidates: The candidates.
        loss: Returns the loss of masks on windows.
        windows_WT: The same windows for all, token ids.
    """
    seen: dict[bytes, Candidate] = {}
    for one in candidates:
        if (key := one.mask_N.bool().numpy().tobytes()) not in seen:
            found = loss(one.mask_N, windows_WT)
            seen[key] = replace(one, loss=found if math.isfinite(found) else math.inf)
    return sorted(seen.values(), key=lambda one: one.loss)
