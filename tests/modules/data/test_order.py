"""The order of training: shuffles, rows sorted by length, and mixtures of sources."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from secateur.modules.data.loader import Joined, WindowSampler
from secateur.modules.data.order import Mixed, Shuffled


def test_every_pass_has_every_window_once_in_another_order() -> None:
    order = Shuffled(10, seed=3)
    passes = [[order(n) for n in range(start, start + 10)] for start in (0, 10, 20)]
    assert all(sorted(found) == list(range(10)) for found in passes)
    assert len({tuple(found) for found in passes}) == 3
    assert passes[0] == torch.randperm(10, generator=torch.Generator().manual_seed(3)).tolist()
    assert [Shuffled(10, seed=3)(n) for n in range(20, 30)] == passes[2]  # from the middle


def test_samples_are_sorted_by_length_64_at_a_time() -> None:
    lengths = torch.randint(1, 50, (150,), generator=torch.Generator().manual_seed(0)).tolist()
    plain, sorted_ = Shuffled(150, seed=1), Shuffled(150, 1, lengths)
    for first, last in ((0, 64), (64, 128), (128, 150)):
        found = [sorted_(n) for n in range(first, last)]
        assert sorted(found) == sorted(plain(n) for n in range(first, last))
        of_found = [lengths[n] for n in found]
        assert of_found == sorted(of_found)


def test_a_mixture_holds_its_proportions_and_repeats_small_sources() -> None:
    """The case worked by hand: weights 3 and 1 give 750 and 250 of 1000 samples."""
    order = Mixed([Shuffled(2000, 0), Shuffled(100, 0)], [3, 1], seed=5)
    found = [order(n) for n in range(2000)]
    for block in (found[:1000], found[1000:]):
        assert sum(n < 2000 for n in block) == 750
    times = Counter(n for n in found if n >= 2000)
    assert len(times) == 100
    assert set(times.values()) == {5}
    assert max(Counter(n for n in found if n < 2000).values()) == 1
    again = Mixed([Shuffled(2000, 0), Shuffled(100, 0)], [3, 1], seed=5)
    assert [again(n) for n in range(1500, 2000)] == found[1500:]
    assert [Mixed(order.sources, [3, 1], seed=6)(n) for n in range(1000)] != found[:1000]


def test_ranks_share_a_mixture() -> None:
    def batches(ranks: int) -> list[list[int]]:
        samplers = [
            iter(WindowSampler(300, 12 // ranks, 0, rank, ranks, order=mixture()))
            for rank in range(ranks)
        ]
        return [[n for sampler in samplers for n in next(sampler)] for _ in range(20)]

    def mixture() -> Mixed:
        return Mixed([Shuffled(200, 0), Shuffled(100, 0)], [1, 5], seed=0)

    assert batches(1) == batches(3)


def test_a_weight_that_would_never_be_drawn_is_refused() -> None:
    with pytest.raises(ValueError, match=r"`weights` \[1, 5000\] has one below a thousandth"):
        Mixed([Shuffled(10, 0), Shuffled(10, 0)], [1, 5000], seed=0)


def test_joined_data_has_all_parts_in_order() -> None:
    data = Joined([[torch.tensor([n]) for n in part] for part in ((1, 2), (3,), (4, 5))])
    assert len(data) == 5
    assert data.__getitems__([4, 0, 2]).flatten().tolist() == [5, 1, 3]
