"""Forks of a process that has imported everything, so that runs start within seconds."""

from __future__ import annotations

import os
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch

Announce = Callable[[str], None]
"""A function that sends the parent the name of the phase that starts, one word."""


@dataclass
class Fork:
    """A process that does some work, and the phases that it has announced so far.

    Args:
        process: Its process id.
        pipe: Pipe from which its announcements are read.
    """

    process: int
    pipe: int
    phases: list[tuple[str, float]] = field(default_factory=list)
    """Name and beginning (seconds of the monotonic clock), in order."""
    _rest: str = ""

    def read(self, seconds: float) -> bool:
        """Wait for announcements, up to a time limit; False once the process has ended."""
        if not select.select([self.pipe], [], [], max(0.0, seconds))[0]:
            return True
        if not (news := os.read(self.pipe, 65536)):
            return False
        *lines, self._rest = (self._rest + news.decode()).split("\n")
        self.phases += [(name, float(began)) for name, began in map(str.split, lines)]
        return True

    def end(self, seconds: float | None = None) -> int | None:
        """Wait until it has ended.

        Args:
            seconds: Time limit; None waits forever.

        Returns:
            Its exit code, negative for a signal; None if it was killed after the time limit.
        """
        deadline = time.monotonic() + seconds if seconds else None
        while self.read(60 if deadline is None else deadline - time.monotonic()):
            if deadline is not None and time.monotonic() > deadline:
                self.kill()
                return None
        os.close(self.pipe)
        return os.waitstatus_to_exitcode(os.waitpid(self.process, 0)[1])

    def kill(self) -> int | None:
        """Send SIGKILL; return the exit code, which differs if the process had ended before."""
        with suppress(ProcessLookupError):
            os.kill(self.process, signal.SIGKILL)
        return self.end()


def fork(work: Callable[[Announce], object], folder: Path) -> Fork:
    """Do some work in a fork of this process, in a folder, with its output in `log.txt` there.

    The exit code is that of the program, 1 after an exception.
    """
    pipe, end = os.pipe()
    sys.stdout.flush()
    process = os.fork()
    if process:
        os.close(end)
        return Fork(process, pipe)
    code = 1
    try:
        log = os.open(folder / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for stream in (1, 2):
            os.dup2(log, stream)
        # The parent's streams may be others than its files 1 and 2, as within pytest.
        sys.stdout = sys.stderr = os.fdopen(log, "w", buffering=1, encoding="utf-8")
        os.chdir(folder)
        # Torch recreates the thread pool, lost in a fork, on its next use; if the first uses were
        # simultaneous in several threads, as in surgery, one of them would fail.
        torch.set_num_threads(torch.get_num_threads())
        work(lambda name: os.write(end, f"{name} {time.monotonic()}\n".encode()))
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    except BaseException:
        os.write(2, traceback.format_exc().encode())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
