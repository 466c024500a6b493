from __future__ import annotations

import io
from concurrent.futures import ThreadPoolExecutor

import pytest
from rich.console import Console

from secateur.pruning import progress
from secateur.pruning.progress import Lines, duration, part, phase, tracked


class Clock:
    """Tells the time that a test sets."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_log_has_a_line_after_ten_seconds_and_then_every_thirty() -> None:
    clock, told = Clock(), list[str]()
    lines = Lines("Scoring", 100, told.append, clock)
    for _ in range(90):
        clock.now += 1
        lines.advance(1)
    lines.end()
    assert told == [
        "Scoring: 10% after 10 s, 1 min 30 s left.",
        "Scoring: 40% after 40 s, 1 min 0 s left.",
        "Scoring: 70% after 1 min 10 s, 30 s left.",
        "Scoring: done in 1 min 30 s.",
    ]


def test_a_short_phase_leaves_no_line_and_an_unknown_total_no_time_left() -> None:
    clock, told = Clock(), list[str]()
    lines = Lines("Reading", None, told.append, clock)
    clock.now += 9
    lines.advance(1)
    lines.end()
    assert told == []
    clock.now += 3
    lines.advance(1)
    assert told == ["Reading: 12 s so far."]


def test_a_phase_tells_the_part_of_the_work_that_it_belongs_to(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = io.StringIO()
    monkeypatch.setattr(progress, "get_console", lambda: Console(file=out, width=80))
    monkeypatch.setattr(progress, "FIRST_SECONDS", 0.0)
    for number in (1, 2):
        with part(f"removal {number} of 2"):
            list(tracked("ab", "Scoring"))
    list(tracked("ab", "Refitting"))
    told = [line.split(":")[0] for line in out.getvalue().splitlines() if "done" in line]
    assert told == ["Scoring (removal 1 of 2)", "Scoring (removal 2 of 2)", "Refitting"]


@pytest.mark.parametrize("is_terminal", [False, True])
def test_items_pass_unchanged(is_terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=is_terminal, width=80)
    monkeypatch.setattr(progress, "get_console", lambda: console)
    found = []
    for outer in tracked("ab", "Outer"):
        found += [outer + inner for inner in tracked(iter("xy"), "Inner", 2)]
    assert found == ["ax", "ay", "bx", "by"]
    assert ("Outer" in out.getvalue()) is is_terminal


def test_a_thread_beside_the_main_one_is_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=80)
    monkeypatch.setattr(progress, "get_console", lambda: console)
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(lambda: list(tracked("ab", "Hashing"))).result() == ["a", "b"]
    assert out.getvalue() == ""


def test_an_error_inside_is_not_swallowed() -> None:
    with pytest.raises(ZeroDivisionError), phase("Working", 3) as advance:
        advance(1 / 0)


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [(0.4, "0 s"), (59.6, "1 min 0 s"), (185.0, "3 min 5 s"), (7620.0, "2 h 7 min")],
)
def test_times_are_told_in_words(seconds: float, expected: str) -> None:
    assert duration(seconds) == expected
