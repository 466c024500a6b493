"""End a run when its machine is needed for another job (preemption), and requeue it."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from contextlib import suppress
from datetime import timedelta
from types import FrameType
from typing import Any

from torch import distributed

SIGNALS = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_ASKED = "SaveCheckpoint/asked"
_ANSWER_SECONDS = 60  # limit for a command of SLURM


class Preempted(SystemExit):
    """Exit with the code that means "run again": 75, EX_TEMPFAIL of sysexits.h."""

    def __init__(self) -> None:
        super().__init__(os.EX_TEMPFAIL)


class Signals:
    """Record signals that would otherwise end the program at once.

    Ignored signals stay ignored: SIGHUP under `nohup`, SIGINT in the background of a script. A
    second Ctrl-C works at once. Lightning sets handlers of its own, which save in the middle of any
    operation; `listen` replaces them and has to be called again after Lightning has set them.
    """

    def __init__(self) -> None:
        self.arrived = False
        """Whether a signal has arrived since the first `listen`."""
        self.at_once = False
        """Whether the next signal may end the program at once: there is nothing to save."""
        self._listening = False
        self._before: dict[int, Any] = {}

    def listen(self) -> None:
        """Record signals from now on; only in the main thread, other threads change nothing."""
        if threading.current_thread() is not threading.main_thread():
            return
        if not self._listening:
            self.arrived = self.at_once = False
        self._listening = True
        for number in SIGNALS:
            previous = signal.getsignal(number)
            if previous not in (self._note, signal.SIG_IGN):
                signal.signal(number, self._note)
                self._before.setdefault(number, previous)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # train.py blocks early signals

    def ignore(self) -> None:
        """Restore the former signal handlers."""
        self._listening = False
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if not self._listening:  # Lightning restores the handlers that it found
            signal.signal(number, self._before[number])
            signal.raise_signal(number)
            return
        if number == signal.SIGINT and self.arrived:
            raise KeyboardInterrupt
        self.arrived = True
        if self.at_once:
            raise Preempted


def requeue() -> str:
    """Ask SLURM, if it runs this program, to run the job again; return the outcome as text."""
    again = "the same command with `--ckpt_path last` resumes"
    if "SLURM_STEP_ID" not in os.environ:  # that is, no `srun`
        return f"Run again: {again}."
    job = os.environ["SLURM_JOB_ID"]
    if "SLURM_ARRAY_JOB_ID" in os.environ:  # the plain job number may mean the whole array
        job = "{SLURM_ARRAY_JOB_ID}_{SLURM_ARRAY_TASK_ID}".format_map(os.environ)
    try:
        state = _slurm("squeue", "--noheader", f"--jobs={job}", "--format=%T").strip()
        if state != "RUNNING":  # cancelled, or preempted by SLURM, which then requeues it
            return f"Job {job} is {state or 'gone'}: SLURM decides whether it runs again."
        _slurm("scontrol", "requeue", job)
    except (OSError, subprocess.SubprocessError) as error:
        words = getattr(error, "stderr", None) or error
        return f"Job {job} could not be requeued ({str(words).strip()}); {again}."
    return f"Job {job} is requeued and will resume from there."


def after_rank_0(rank: int) -> None:
    """Signal on rank 0 that `requeue` is done; wait for it on the others, since `srun` kills all
    ranks soon after one has ended.

    Ranks may call this at any time, for example during an export: it is not a collective operation.
    If rank 0 was not asked to stop, or is lost, the wait ends after the longest time that `requeue`
    can take.
    """
    if not distributed.is_initialized():
        return
    store: Any = distributed.distributed_c10d._get_default_store()
    if rank == 0:
        store.set(_ASKED, "yes")
        return
    with suppress(RuntimeError):  # torch: the wait timed out
        store.clone().wait([_ASKED], timedelta(seconds=3 * _ANSWER_SECONDS))


def _slurm(*command: str) -> str:
    """The output of a SLURM command. A requeued job is killed at once, perhaps before this command
    has reported success; the shell ignores SIGTERM so that the command can finish.
    """
    deaf = ("sh", "-c", 'trap "" TERM; exec "$@"', "sh", *command)
    done = subprocess.run(deaf, capture_output=True, text=True, timeout=_ANSWER_SECONDS, check=True)
    return done.stdout
