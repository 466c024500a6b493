"""Ranks on the CPU that make one run after another: most of a run's time is its imports.

`python -m tests.ranks FOLDER` is one rank; the environment says which. It reads runs from its
standard input, a JSON object with `name` and `arguments` on every line; in arguments `{rank}`
stands for its number. What it leaves in FOLDER is
`<name>.<rank>.pt`, what trains as this rank holds it at the end, or `<name>.<rank>.txt`, the error
that ended the run.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from tests.runs import call

REPOSITORY = Path(__file__).parents[1]
# A run takes ten seconds where nothing else runs. Only one that hangs may reach this; it has to end
# before `faulthandler_timeout` of pyproject.toml ends the whole session.
PATIENCE_SECONDS = 900.0


class Ranks:
    """Processes, one per rank, that start with the first run and wait for more.

    Args:
        folder: Where the results of runs go, and `rank<r>.log`, what a rank says.
        num_ranks: Number of ranks, 1 or more.
    """

    def __init__(self, folder: Path, num_ranks: int = 2) -> None:
        self.folder, self.num_ranks = folder, num_ranks
        self.processes: list[subprocess.Popen[str]] = []

    def run(self, name: str, arguments: Sequence[str]) -> None:
        """Make a run; one that fails on any rank, or takes too long, fails the test."""
        self.begin(name, arguments)
        self._wait(name, wanted="pt", unwanted="txt")

    def errors(self, name: str, arguments: Sequence[str]) -> list[str]:
        """Make a run that is to fail on every rank; return what the ranks say."""
        self.begin(name, arguments)
        self._wait(name, wanted="txt", unwanted="pt")
        return [path.read_text(encoding="utf-8") for path in self._results(name, "txt")]

    def begin(self, name: str, arguments: Sequence[str]) -> None:
        """Have all ranks begin a run."""
        if any(process.poll() is not None for process in self.processes):
            self.close()
        if not self.processes:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
            self.processes = [self._start(rank, port) for rank in range(self.num_ranks)]
        for process in self.processes:
            assert process.stdin is not None
            process.stdin.write(json.dumps({"name": name, "arguments": list(arguments)}) + "\n")
            process.stdin.flush()

    def said(self, rank: int) -> str:
        """All that a rank has said since the ranks were started."""
        return (self.folder / f"rank{rank}.log").read_text(encoding="utf-8")

    def close(self) -> None:
        """End all ranks; the next run starts others."""
        for process in self.processes:
            process.kill()
            process.communicate()
        self.processes = []

    def _start(self, rank: int, port: int) -> subprocess.Popen[str]:
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "NODE_RANK": "0"}
        place |= {"WORLD_SIZE": str(self.num_ranks), "LOCAL_RANK": str(rank)}
        with (self.folder / f"rank{rank}.log").open("wb") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "tests.ranks", str(self.folder)],
                cwd=REPOSITORY,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                text=True,
                env=os.environ | place | {"OMP_NUM_THREADS": "1"},
            )

    def _tail(self) -> str:
        return "\n".join(self.said(rank)[-3000:] for rank in range(self.num_ranks))

    def _results(self, name: str, kind: str) -> list[Path]:
        return [self.folder / f"{name}.{rank}.{kind}" for rank in range(self.num_ranks)]

    def _wait(self, name: str, wanted: str, unwanted: str) -> None:
        until = time.monotonic() + PATIENCE_SECONDS
        try:
            while not all(path.exists() for path in self._results(name, wanted)):
                assert not any(p.exists() for p in self._results(name, unwanted)), self._tail()
                assert all(process.poll() is None for process in self.processes), self._tail()
                assert time.monotonic() < until, f"{name} takes too long.\n{self._tail()}"
                time.sleep(0.05)
        except BaseException:
            self.close()
            raise


def trained(module: Any) -> dict[str, torch.Tensor]:
    """What trains, as this rank holds it."""
    parameters = module.named_parameters()
    return {name: p.detach().clone() for name, p in parameters if p.requires_grad}


def main() -> None:
    """Make the runs of the standard input as the rank that the environment names."""
    folder, rank = Path(sys.argv[1]), os.environ["LOCAL_RANK"]
    # On every processor as on those without float16, where DeepSpeed chooses other types.
    torch.ops.mkldnn._is_mkldnn_fp16_supported = lambda: False
    for line in sys.stdin:
        run = json.loads(line)
        partial, kind = folder / f"{run['name']}.{rank}.partial", "pt"
        try:
            module = call([each.replace("{rank}", rank) for each in run["arguments"]]).model
            with module.whole():
                torch.save(trained(module), partial)
        except Exception as error:
            traceback.print_exc()
            partial.write_text(str(error), encoding="utf-8")
            kind = "txt"
        partial.rename(partial.with_suffix(f".{kind}"))  # it is there only when it is complete


if __name__ == "__main__":
    main()
