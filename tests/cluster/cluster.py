"""A real SLURM cluster of two nodes on this machine: its own folder, ports and daemons."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

NODES = ("n1", "n2")
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scancel", "scontrol", "squeue", "sinfo")
NEWEST_FIRST = "/usr/local/sbin:/usr/sbin:/sbin"  # where Debian keeps daemons

# Both nodes are this machine, under two names and on two ports; GraceTime is what a preempted job
# has to write its checkpoint. `cred_expire` is how long a requeued job is held back.
CONFIGURATION = """
ClusterName=secateur
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SchedulerParameters=sched_interval=1,bf_interval=1
ReturnToService=2
SlurmdTimeout=10
MessageTimeout=10
KillWait=20
MinJobAge=3600
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
{nodes}
PartitionName=low Nodes=n1,n2 Default=YES PriorityTier=1 GraceTime=60
PartitionName=high Nodes=n1,n2 PriorityTier=2 PreemptMode=OFF
"""


class Cluster:
    """Starts the daemons on entry; ends them and everything that they started on exit.

    Args:
        folder: An empty folder for keys, state and logs.

    Raises:
        RuntimeError: A program is missing, or the nodes do not come up.
    """

    def __init__(self, folder: Path) -> None:
        os.environ["PATH"] += os.pathsep + NEWEST_FIRST
        if missing := [name for name in PROGRAMS if shutil.which(name) is None]:
            raise RuntimeError(f"{', '.join(missing)}: not installed; `make test-cluster` does it.")
        self.folder, self.conf = folder, folder / "slurm.conf"
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Self:
        ports = _free_ports(1 + len(NODES))
        nodes = [
            f"NodeName={name} NodeHostname={socket.gethostname()} NodeAddr=127.0.0.1 "
            f"Port={port} CPUs=1 RealMemory=1"
            for name, port in zip(NODES, ports[1:], strict=True)
        ]
        (self.folder / "state").mkdir()
        self.conf.write_text(
            CONFIGURATION.format(
                host=socket.gethostname(),
                user=pwd.getpwuid(os.getuid()).pw_name,
                controller=ports[0],
                folder=self.folder,
                nodes="\n".join(nodes),
            )
        )
        key = self.folder / "munge.key"
        key.touch(0o600)
        key.write_bytes(os.urandom(1024))
        try:
            options = ("socket", "pid-file", "log-file", "seed-file")
            paths = [f"--{name}={self.folder}/munge.{name.split('-')[0]}" for name in options]
            self._start("munged", "--foreground", "--force", f"--key-file={key}", *paths)
            self.wait("the munge socket", (self.folder / "munge.socket").exists)
            self._start("slurmctld", "-D")
            for name in NODES:
                self.start_node(name)
            self.wait("two idle nodes", lambda: self.node_states() == ["idle", "idle"])
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the daemons and whatever they have left running."""
        for daemon in reversed(self._daemons.values()):
            daemon.kill()
            daemon.wait()
        _kill(self._environment("SLURM_CONF", str(self.conf)))

    def start_node(self, name: str) -> None:
        """Start the daemon of a node."""
        self._start("slurmd", "-D", "-N", name, key=name)

    def lose_node(self, name: str) -> None:
        """Kill the daemon of a node and all that runs there, as a power cut does."""
        self._daemons[name].kill()
        self._daemons[name].wait()
        mine = self._environment("SLURM_CONF", str(self.conf))
        _kill(mine & self._environment("SLURMD_NODENAME", name))

    def node_states(self) -> list[str]:
        """State of every node, in order."""
        return self.call("sinfo", "--noheader", "--Node", "--partition=low", "--format=%T").split()

    def submit(self, *arguments: str | Path) -> str:
        """`sbatch`; returns the id of the job."""
        return self.call("sbatch", "--parsable", *arguments).strip()

    def show(self, job: str) -> dict[str, str]:
        """What `scontrol show job` says of a job, field by field."""
        fields = self.call("scontrol", "--oneliner", "show", "job", job).split()
        return dict(field.split("=", 1) for field in fields if "=" in field)

    def call(self, *command: str | Path) -> str:
        """Run a command of SLURM; returns what it prints.

        Raises:
            RuntimeError: It failed; the message has its words.
        """
        done = subprocess.run(
            list(map(str, command)),
            env=self.environment(),
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(f"{' '.join(map(str, command))}: {done.stderr.strip()}")
        return done.stdout

    def environment(self) -> dict[str, str]:
        """The environment in which the commands of SLURM mean this cluster."""
        return os.environ | {"SLURM_CONF": str(self.conf)}

    def wait(self, what: str, happened: Callable[[], bool], seconds: float = 60) -> None:
        """Wait until something has happened.

        Raises:
            RuntimeError: It has not; the message has the last lines of the controller's log.
        """
        deadline = time.monotonic() + seconds
        while not happened():
            dead = [name for name, daemon in self._daemons.items() if daemon.poll() is not None]
            if time.monotonic() > deadline or "slurmctld" in dead or "munged" in dead:
                log = self.folder / "slurmctld.log"
                lines = log.read_text().splitlines()[-20:] if log.exists() else []
                raise RuntimeError("\n".join([f"No sign of {what} (ended: {dead}).", *lines]))
            time.sleep(0.05)

    def _start(self, program: str, *arguments: str, key: str = "") -> None:
        name = key or program
        with (self.folder / f"{name}.log").open("ab") as log:
            self._daemons[name] = subprocess.Popen(
                # If the tests are killed, the daemons go with them.
                ["setpriv", "--pdeathsig", "KILL", program, *arguments],
                env=self.environment(),
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def _environment(self, name: str, value: str) -> set[int]:
        """Processes that have a variable in their environment, daemons of this object aside."""
        found, entry = set(), f"{name}={value}".encode()
        for path in Path("/proc").glob("[0-9]*/environ"):
            with suppress(OSError):  # it has ended, or is somebody else's
                if entry in path.read_bytes().split(b"\0"):
                    found.add(int(path.parent.name))
        return found - {daemon.pid for daemon in self._daemons.values()} - {os.getpid()}


def _kill(processes: set[int]) -> None:
    for process in processes:
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)


def _free_ports(number: int) -> list[int]:
    sockets = [socket.socket() for _ in range(number)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports
