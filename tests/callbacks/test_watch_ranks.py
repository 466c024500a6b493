from __future__ import annotations

import time

import pytest
from torch.distributed import HashStore

from secateur.callbacks.watch_ranks import WatchRanks, _Watch


def watch(rank: int, store: HashStore, patience: float = 10.0) -> _Watch:
    return _Watch(rank, 2, patience, store)


def test_a_rank_that_gives_signs_of_life_is_not_lost() -> None:
    store, heard = HashStore(), {1: (b"", time.monotonic() - 100)}
    here = watch(0, store)
    store.set("watch/beat/1", "7")
    assert here._listen(heard) is None
    assert heard[1][0] == b"7"
    assert here._listen(heard) is None  # no new sign, but within the patience


def test_a_silent_rank_is_named_with_its_process() -> None:
    store, heard = HashStore(), {1: (b"", time.monotonic() - 100)}
    here, there = watch(0, store), watch(1, store)
    lost = here._listen(heard)
    assert lost is not None
    assert there.name_of[1] in lost
    assert "silent for 10 s" in lost


def test_last_words_are_handed_on_and_a_farewell_is_no_loss(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("secateur.callbacks.watch_ranks.time.sleep", lambda seconds: None)
    store, heard = HashStore(), {1: (b"", time.monotonic())}
    here, there = watch(0, store), watch(1, store)
    there.say("no space left")
    assert "ended with 'no space left'" in str(here._listen(heard))
    there.farewell()
    heard[1] = (b"", time.monotonic() - 100)
    assert here._listen(heard) is None


def test_a_patience_that_is_too_short_is_refused() -> None:
    with pytest.raises(ValueError, match="`patience_seconds` must be above 2, got 1"):
        WatchRanks(patience_seconds=1.0)
