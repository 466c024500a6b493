"""What a run does when somebody wants its machine back."""

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
_ANSWER_SECONDS = 60  # what a command of SLURM may take


class Preempted(SystemExit):
    """Ends the program with the code that asks for another run: 75, EX_TEMPFAIL of sysexits.h."""

    def __init__(self) -> None:
        super().__init__(os.EX_TEMPFAIL)


class Signals:
    """Notes signals that would end the program where it stands.

    Those that are ignored stay so: SIGHUP by `nohup`, SIGINT in the background of a script. A
    second Ctrl-C works at once. Lightning has handlers of its own, which save in the middle of
    whatever runs; `listen` takes their place and has to be called again after they were set.
    """

    def __init__(self) -> None:
        self.arrived = False
        """Whether there was one since the first `listen`."""
        self.at_once = False
        """Whether the next one need not wait for a step to end: there is nothing to save."""
        self._listening = False
        self._before: dict[int, Any] = {}

    def listen(self) -> None:
        """Note signals from now on; only the main thread can, in others nothing changes."""
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
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # train.py makes early ones wait

    def ignore(self) -> None:
        """Let signals do again what they did before."""
        self._listening = False
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if not self._listening:  # Lightning puts back the handlers that it found
            signal.signal(number, self._before[number])
            signal.raise_signal(number)
            return
        if number == signal.SIGINT and self.arrived:
            raise KeyboardInterrupt
        self.arrived = True
        if self.at_once:
            raise Preempted


def requeue() -> str:
    """Ask SLURM, if it runs this program, to run the job again; returns what came of it."""
    again = "the same command with `--ckpt_path last` goes on"
    if "SLURM_STEP_ID" not in os.environ:  # that is, no `srun`
        return f"Run again: {again}."
    job = os.environ["SLURM_JOB_ID"]
    if "SLURM_ARRAY_JOB_ID" in os.environ:  # by its plain number, all of an array may be meant
        job = "{SLURM_ARRAY_JOB_ID}_{SLURM_ARRAY_TASK_ID}".format_map(os.environ)
    try:
        state = _slurm("squeue", "--noheader", f"--jobs={job}", "--format=%T").strip()
        if state != "RUNNING":  # cancelled, or taken off its nodes by SLURM, which then requeues it
            return f"Job {job} is {state or 'gone'}: whether it runs again is up to SLURM."
        _slurm("scontrol", "requeue", job)
    except (OSError, subprocess.SubprocessError) as error:
        words = getattr(error, "stderr", None) or error
        return f"Job {job} could not be requeued ({str(words).strip()}); {again}."
    return f"Job {job} is requeued and will go on from there."


def after_rank_0(rank: int) -> None:
    """Rank 0 says that it is through with `requeue`; the others wait for that, since `srun` kills
    a rank soon after another has gone.

    Each comes on its own, be it from the middle of an export: this is no collective operation.
    Where rank 0 has not been asked to stop, or is lost, the wait ends after the time that
    `requeue` may take.
    """
    if not distributed.is_initialized():
        return
    store: Any = distributed.distributed_c10d._get_default_store()
    if rank == 0:
        store.set(_ASKED, "yes")
        return
    with suppress(RuntimeError):  # of torch: in vain
        store.clone().wait([_ASKED], timedelta(seconds=3 * _ANSWER_SECONDS))


def _slurm(*command: str) -> str:
    """What a command of SLURM says. A requeued job ends at once, this command with it, perhaps
    before it knows of its success; the shell makes it wait for that.
    """
    deaf = ("sh", "-c", 'trap "" TERM; exec "$@"', "sh", *command)
    done = subprocess.run(deaf, capture_output=True, text=True, timeout=_ANSWER_SECONDS, check=True)
    return done.stdout
