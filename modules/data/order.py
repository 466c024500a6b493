"""The order of training: which window is the n-th of a run, as a pure function of seed and n.

So the place of a run in its data is one number, whatever the number of ranks and workers.

Legend: P = windows of a pass, N = slots of a block of a mixture, S = sources.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

_SORTED = 64
_SLOTS = 1000


class Order(ABC):
    """The windows of a run, an infinite sequence."""

    @abstractmethod
    def __call__(self, sample: int) -> int:
        """Index of the window of a sample.

        Args:
            sample: Number of the sample in the run, 0 or more.
        """


class Shuffled(Order):
    """One pass after another over all windows, each in a permutation of its own.

    Args:
        count: Number of windows, 1 or more.
        seed: Seed of the permutations, 0 or more.
        lengths: Tokens of every window; if given, every 64 samples in a row are sorted by it, so
            that batches need little padding.
    """

    def __init__(self, count: int, seed: int, lengths: Sequence[int] | None = None) -> None:
        self.count, self.seed = count, seed
        self.lengths_P = None if lengths is None else torch.as_tensor(lengths)
        self._passes: dict[int, Tensor] = {}

    def __call__(self, sample: int) -> int:
        number, place = divmod(sample, self.count)
        if number not in self._passes:
            # A batch touches at most two passes, except when data are tiny.
            self._passes = {n: order for n, order in self._passes.items() if n == number - 1}
            self._passes[number] = self._permutation(number)
        return int(self._passes[number][place])

    def _permutation(self, number: int) -> Tensor:
        # Seeds of 32 bits, as the generator uses; the odd factor keeps the passes of neighbouring
        # seeds apart. Pass 0 is `torch.randperm` seeded with `seed`, as elsewhere.
        generator = torch.Generator().manual_seed((self.seed + 0x9E3779B1 * number) % 2**32)
        order_P = torch.randperm(self.count, generator=generator)
        if self.lengths_P is None:
            return order_P
        chunks = order_P.split(_SORTED)
        return torch.cat([chunk[self.lengths_P[chunk].argsort(stable=True)] for chunk in chunks])


class Mixed(Order):
    """Windows of several sources, drawn in given proportions.

    Every 1000 samples in a row hold exactly the proportions, in an order drawn for them. A small
    source with a large weight is repeated, in a new permutation every time.

    Args:
        sources: The order of each source; its windows follow those of the source before.
        weights: Weight of each source, above 0, with any sum.
        seed: Seed of the draws, 0 or more.

    Raises:
        ValueError: A weight is below a thousandth of their sum.

    Worked by hand: weights (3, 1) give 750 and 250 of every 1000 samples.
    """

    def __init__(self, sources: Sequence[Shuffled], weights: Sequence[float], seed: int) -> None:
        self.sources, self.seed = sources, seed
        self.starts = [sum(s.count for s in sources[:place]) for place in range(len(sources))]
        wanted_S = torch.tensor(weights, dtype=torch.float64) * _SLOTS / sum(weights)
        self.slots_S = wanted_S.long()
        rest = _SLOTS - int(self.slots_S.sum())
        most_S = (wanted_S - self.slots_S).argsort(descending=True, stable=True)
        self.slots_S[most_S[:rest]] += 1
        if int(self.slots_S.min()) == 0:
            raise ValueError(
                f"`weights` {list(weights)} has one below a thousandth of their sum, whose source "
                "would never be drawn; raise it, or leave the source out."
            )
        self._block: tuple[int, Tensor, Tensor] | None = None

    def __call__(self, sample: int) -> int:
        number, slot = divmod(sample, _SLOTS)
        if self._block is None or self._block[0] != number:
            self._block = (number, *self._draw(number))
        _, source_N, earlier_N = self._block
        source = int(source_N[slot])
        place = number * int(self.slots_S[source]) + int(earlier_N[slot])
        return self.starts[source] + self.sources[source](place)

    def _draw(self, number: int) -> tuple[Tensor, Tensor]:
        """The source of every slot, and how many earlier slots of the block have the same."""
        generator = torch.Generator().manual_seed((self.seed + 0x85EBCA6B * (number + 1)) % 2**32)
        source_N = torch.arange(len(self.sources)).repeat_interleave(self.slots_S)
        source_N = source_N[torch.randperm(_SLOTS, generator=generator)]
        counts_NS = torch.nn.functional.one_hot(source_N, len(self.sources)).cumsum(0)
        return source_N, counts_NS.gather(1, source_N[:, None]).squeeze(1) - 1
