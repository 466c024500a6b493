"""Several ranks on the CPU, started once for several runs: most of a run's time is its imports.

`python -m tests.ranks FILE` is one rank; the environment says which. The file lists the runs.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from tests.runs import call

REPOSITORY = Path(__file__).parents[1]


def start(
    folder: Path, runs: Mapping[str, Sequence[str]], num_ranks: int = 2
) -> list[subprocess.Popen[bytes]]:
    """Start the ranks of some runs, one run after the other; `rank<r>.log` is what a rank says.

    Args:
        folder: Where everything goes.
        runs: Name to arguments of the command line, in which `{rank}` stands for the rank.
        num_ranks: Number of ranks.
    """
    (folder / "runs.json").write_text(json.dumps(dict(runs)), encoding="utf-8")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = []
    for rank in range(num_ranks):
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "NODE_RANK": "0"}
        place |= {"WORLD_SIZE": str(num_ranks), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"}
        with (folder / f"rank{rank}.log").open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "tests.ranks", str(folder / "runs.json")],
                cwd=REPOSITORY,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=os.environ | place,
            )
        ranks.append(process)
    return ranks


def finish(folder: Path, ranks: Sequence[subprocess.Popen[bytes]], timeout: float) -> None:
    """Wait until all ranks have ended well; one that fails, or takes too long, fails the test."""
    until = time.monotonic() + timeout
    try:
        for rank, process in enumerate(ranks):
            code = process.wait(timeout=max(1.0, until - time.monotonic()))
            assert code == 0, (folder / f"rank{rank}.log").read_text()[-3000:]
    finally:
        for process in ranks:
            process.kill()


def trained(module: Any) -> dict[str, torch.Tensor]:
    """What trains, as this rank holds it."""
    parameters = module.named_parameters()
    return {name: p.detach().clone() for name, p in parameters if p.requires_grad}


def main() -> None:
    """Make every run of the file as the rank that the environment names."""
    path, rank = Path(sys.argv[1]), os.environ["LOCAL_RANK"]
    for name, arguments in json.loads(path.read_text(encoding="utf-8")).items():
        try:
            module = call([each.replace("{rank}", rank) for each in arguments]).model
            with module.whole():
                state = trained(module)
        except Exception as error:
            if not name.startswith("refused"):
                raise
            (path.parent / f"{name}.{rank}.txt").write_text(str(error), encoding="utf-8")
        else:
            torch.save(state, path.parent / f"{name}.{rank}.pt")


if __name__ == "__main__":
    main()
