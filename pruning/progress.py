"""Progress of what takes long: a bar in a terminal, a line now and then in a log file.

A phase that ends within ten seconds leaves nothing in a log. Of several ranks the first one tells,
and of several threads the main one.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

from rich import get_console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from torch import distributed

T = TypeVar("T")
Advance = Callable[[int], None]
"""Called with how much was done since the last call."""

FIRST_SECONDS, EVERY_SECONDS = 10.0, 30.0
"""Time until the first line of a phase in a log, and from one line to the next."""

_PART: ContextVar[str] = ContextVar("part", default="")


@contextmanager
def part(name: str) -> Iterator[None]:
    """Tell with every phase inside a `with` block to which part of the work it belongs.

    Args:
        name: Such as `pruned, 2 of 3`; it follows the name of the phase in brackets.
    """
    before = _PART.set(name)
    try:
        yield
    finally:
        _PART.reset(before)


def tracked(items: Iterable[T], name: str, total: int | None = None) -> Iterator[T]:
    """Go through items, and show how many are done.

    Args:
        items: What to go through.
        name: What is done with them, such as `Scoring blocks`.
        total: How many there are; None asks `items`.
    """
    if total is None and isinstance(items, Sized):
        total = len(items)
    with phase(name, total) as advance:
        for item in items:
            yield item
            advance(1)


@contextmanager
def phase(name: str, total: int | None = None) -> Iterator[Advance]:
    """Show how far the work of a `with` block is.

    Args:
        name: What is done, such as `Writing weights`.
        total: How much there is to do, in any unit; None if nobody knows.
    """
    console = get_console()
    name = f"{name} ({within})" if (within := _PART.get()) else name
    if not _tells():
        yield lambda amount: None
    elif console.is_terminal:
        columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn())
        with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as bar:
            task = bar.add_task(name, total=total)
            yield lambda amount: bar.advance(task, amount)
    else:
        lines = Lines(name, total, lambda line: console.print(line, soft_wrap=True))
        yield lines.advance
        lines.end()


def _tells() -> bool:
    if threading.current_thread() is not threading.main_thread():
        return False
    ranks = distributed.is_available() and distributed.is_initialized()
    return not ranks or distributed.get_rank() == 0


class Lines:
    """Lines of a log about one phase.

    Args:
        name: What is done.
        total: How much there is to do; None if nobody knows.
        write: Writes a line.
        clock: Tells the time, in seconds.
    """

    def __init__(
        self,
        name: str,
        total: int | None,
        write: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.name, self.total, self._write, self._clock = name, total, write, clock
        self._begun = clock()
        self._next = self._begun + FIRST_SECONDS
        self._done = 0

    def advance(self, amount: int) -> None:
        """Note that more is done, and tell if it is time."""
        self._done += amount
        now = self._clock()
        if now < self._next or self._done == self.total:
            return
        self._next = now + EVERY_SECONDS
        passed = now - self._begun
        if self.total is None:
            self._write(f"{self.name}: {duration(passed)} so far.")
            return
        share = self._done / self.total
        left = duration(passed * (1 - share) / share)
        self._write(f"{self.name}: {share:.0%} after {duration(passed)}, {left} left.")

    def end(self) -> None:
        """Tell how long it took, if it took long."""
        if (passed := self._clock() - self._begun) >= FIRST_SECONDS:
            self._write(f"{self.name}: done in {duration(passed)}.")


def duration(seconds: float) -> str:
    """A time in words: `42 s`, `3 min 5 s`, `2 h 7 min`."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 1:
        return f"{rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"
