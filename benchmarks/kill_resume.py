"""How many killed runs end otherwise than a run that was left alone.

A tiny model learns masks and is exported, once without interruption; then again and again, each
time killed (SIGKILL) at a random moment: within a step, while a checkpoint is written, or while the
model is exported. Each killed run is resumed by the same command, which has `--ckpt_path last`, and
its plan and its model folder are compared byte by byte with those of the uninterrupted run.

Runs are forks of one process that has imported everything, so a kill costs seconds. What SIGKILL
does not show is the loss of what the file system had not yet written, as in a power cut.
"""

from __future__ import annotations

import argparse
import functools
import os
import random
import select
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.data import write_figures
from secateur.callbacks import ExportModel, SaveCheckpoint
from secateur.modules import MaskLearning
from tests.runs import call, content, learn_masks, make_inputs, write_text

PHASES: dict[str, tuple[type, str]] = {
    "step": (MaskLearning, "training_step"),
    "checkpoint": (SaveCheckpoint, "_save"),
    "export": (ExportModel, "on_fit_end"),
}
"""What begins each phase, which lasts until the next one begins."""
CALLBACKS = ("AnnealSparsity", "SaveCheckpoint", "ExportModel")


@dataclass
class Run:
    """A run in a process of its own, and the phases that it has entered so far.

    Args:
        process: Its process id.
        pipe: Where it writes the phases that it enters.
    """

    process: int
    pipe: int
    phases: list[tuple[str, float]] = field(default_factory=list)
    """Name and beginning (seconds of the monotonic clock), in order."""
    _rest: str = ""

    def read(self, seconds: float) -> bool:
        """Wait for news, up to a time; False once the process has ended."""
        if not select.select([self.pipe], [], [], max(0.0, seconds))[0]:
            return True
        if not (news := os.read(self.pipe, 65536)):
            return False
        *lines, self._rest = (self._rest + news.decode()).split("\n")
        self.phases += [(name, float(began)) for name, began in map(str.split, lines)]
        return True

    def end(self) -> int:
        """Wait until it has ended; returns its exit code, negative for a signal."""
        while self.read(60):
            pass
        os.close(self.pipe)
        return os.waitstatus_to_exitcode(os.waitpid(self.process, 0)[1])

    def kill(self) -> int:
        """SIGKILL; returns the exit code, which is another if the run had ended before."""
        with suppress(ProcessLookupError):
            os.kill(self.process, signal.SIGKILL)
        return self.end()


def start(arguments: list[str], folder: Path) -> Run:
    """Run the command line in a fork of this process, in a folder and with a log there."""
    pipe, end = os.pipe()
    sys.stdout.flush()
    process = os.fork()
    if process:
        os.close(end)
        return Run(process, pipe)
    code = 1
    try:
        log = os.open(folder / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for stream in (1, 2):
            os.dup2(log, stream)
        os.chdir(folder)
        # Torch renews the thread pool that a fork has lost on its next use; were the first uses at
        # once in several threads, as in surgery, one of them would find none.
        torch.set_num_threads(torch.get_num_threads())
        for name, (owner, method) in PHASES.items():
            setattr(owner, method, _announced(getattr(owner, method), name, end))
        call(arguments)
        code = 0
    except BaseException:
        os.write(2, traceback.format_exc().encode())
    finally:
        os._exit(code)


def _announced(function: Callable[..., Any], phase: str, pipe: int) -> Callable[..., Any]:
    @functools.wraps(function)
    def announce(*args: Any, **kwargs: Any) -> Any:
        os.write(pipe, f"{phase} {time.monotonic()}\n".encode())
        return function(*args, **kwargs)

    return announce


def kill(
    arguments: list[str], folder: Path, phase: str, occurrence: int, delay: float
) -> str | None:
    """Start a run and kill it some seconds after a phase has begun.

    Args:
        arguments: Of the command line.
        folder: Where the run works.
        phase: One of `PHASES`.
        occurrence: Which of its occurrences, from 0.
        delay: Seconds after its beginning.

    Returns:
        The phase in which the run died; None if it had ended before.
    """
    run = start(arguments, folder)
    while (began := _began(run, phase, occurrence)) is None:
        if not run.read(60):
            run.end()
            return None
    while (left := began + delay - time.monotonic()) > 0:
        if not run.read(left):
            break
    died = run.kill() == -signal.SIGKILL
    return run.phases[-1][0] if died else None


def _began(run: Run, phase: str, occurrence: int) -> float | None:
    times = [began for name, began in run.phases if name == phase]
    return times[occurrence] if occurrence < len(times) else None


def finish(arguments: list[str], folder: Path) -> Run:
    """Run to the end.

    Raises:
        RuntimeError: The run failed; the message has its log.
    """
    run = start(arguments, folder)
    if run.end():
        raise RuntimeError((folder / "log.txt").read_text(encoding="utf-8"))
    run.phases.append(("", time.monotonic()))
    return run


def measure(folder: Path, kills: int, max_steps: int = 12, seed: int = 0) -> dict[str, Any]:
    """Kill and resume.

    Args:
        folder: An empty folder.
        kills: Number of runs that are killed, 1 or more.
        max_steps: Optimiser steps of a run; every third is saved.
        seed: Of the moments.

    Returns:
        Figures: `different_plans` and `different_models` of `kills`, and where the runs died.
    """
    draw = random.Random(seed)
    make_inputs(folder)
    write_text(folder / "text.json", documents=5)  # epochs of 5 batches, which kills fall across
    # Relative paths, in a folder of its own for each run: equal commands, which model cards show.
    arguments = [
        *learn_masks(Path(), Path("run"), max_steps, CALLBACKS),
        "--trainer.logger=false",
        f"--data.cache_dir={folder / 'cache'}",
        "--ckpt_path=last",
    ]
    whole = finish(arguments, _beside(folder, "whole")).phases
    expected = folder / "whole" / "run"
    figures = {"kills": kills, "different_plans": 0, "different_models": 0}
    figures |= {f"killed_in_{phase}": 0 for phase in PHASES}
    for number in range(kills):
        phase = list(PHASES)[number % len(PHASES)]
        lengths = [
            whole[i + 1][1] - began for i, (name, began) in enumerate(whole) if name == phase
        ]
        died, attempt = None, 0
        while died is None:  # a run that was faster than the first may be over
            occurrence = draw.randrange(len(lengths))
            work = _beside(folder, f"killed_{number}_{attempt}")
            died = kill(arguments, work, phase, occurrence, draw.uniform(0, lengths[occurrence]))
            attempt += 1
        figures[f"killed_in_{died}"] += 1
        finish(arguments, work)
        for kind in ("plan", "model"):
            differs = content(work / "run" / kind) != content(expected / kind)
            figures[f"different_{kind}s"] += differs
    return figures


def _beside(folder: Path, name: str) -> Path:
    """A folder beside the inputs, which sees them under the same relative paths."""
    (folder / name).mkdir()
    for shared in ("base", "text.json"):
        (folder / name / shared).symlink_to(Path("..") / shared)
    return folder / name


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50, help="number of runs that are killed")
    parser.add_argument("--steps", type=int, default=12, help="optimiser steps of a run")
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(Path(folder), args.kills, args.steps, args.seed)
    write_figures(figures | {"seconds": time.monotonic() - begin}, args.json)


if __name__ == "__main__":
    main()
