"""Number of killed and resumed runs whose result differs from an uninterrupted run.

A tiny model learns masks and is exported, once without interruption; then repeatedly, each time
killed (SIGKILL) at a random moment: within a step, while a checkpoint is written, or while the
model is exported. Each killed run is resumed by the same command, which has `--ckpt_path last`, and
its plan and its model folder are compared byte by byte with those of the uninterrupted run.

`--variants` does the same, once each, to runs of `benchmarks.resume_variants`, and kills the export
of one run at positions spread over all its writes.

Runs are forks of one process that has imported everything, so a kill costs seconds. SIGKILL does
not test the loss of data that the file system has not written yet, as in a power cut.
"""

from __future__ import annotations

import argparse
import functools
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from benchmarks.data import write_figures
from benchmarks.forks import Announce, Fork, fork
from benchmarks.resume_variants import BASES, STEPS, VARIANTS, Variant, make_bases
from secateur.callbacks import ExportModel, SaveCheckpoint
from secateur.modules import CausalLM, MaskLearning
from tests.runs import call, content, learn_masks, make_inputs, write_text

PHASES: dict[str, tuple[tuple[type, ...], str]] = {
    "step": ((MaskLearning, CausalLM), "training_step"),
    "checkpoint": ((SaveCheckpoint,), "_save"),
    "export": ((ExportModel,), "on_fit_end"),
}
"""The first event of each phase; a phase lasts until the next one begins."""
EXPORT_KILLS = 14
_WRITES = ("os.mkdir", "os.remove", "os.rename", "os.rmdir")
CALLBACKS = ("AnnealSparsity", "SaveCheckpoint", "ExportModel")


def start(
    arguments: Sequence[str], folder: Path, watch: Callable[[Announce], object] | None = None
) -> Fork:
    """Run the command line in a fork of this process, in a folder and with a log there.

    Args:
        arguments: Arguments of the command line.
        folder: Working folder of the run.
        watch: Function called in the fork before the run.
    """

    def work(announce: Announce) -> None:
        for name, (owners, method) in PHASES.items():
            for owner in owners:
                setattr(owner, method, _announced(getattr(owner, method), name, announce))
        if watch is not None:
            watch(announce)
        call(arguments)

    return fork(work, folder)


def _announced(function: Callable[..., Any], phase: str, tell: Announce) -> Callable[..., Any]:
    @functools.wraps(function)
    def announce(*args: Any, **kwargs: Any) -> Any:
        tell(phase)
        return function(*args, **kwargs)

    return announce


def kill(
    arguments: Sequence[str], folder: Path, phase: str, occurrence: int, delay: float
) -> str | None:
    """Start a run and kill it some seconds after a phase has begun.

    Args:
        arguments: Arguments of the command line.
        folder: Working folder of the run.
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


def _began(run: Fork, phase: str, occurrence: int) -> float | None:
    times = [began for name, began in run.phases if name == phase]
    return times[occurrence] if occurrence < len(times) else None


def finish(
    arguments: Sequence[str], folder: Path, watch: Callable[[Announce], object] | None = None
) -> Fork:
    """Run to the end.

    Raises:
        RuntimeError: The run failed; the message has its log.
    """
    run = start(arguments, folder, watch)
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
        seed: Seed of the moments.

    Returns:
        Figures: `different_plans` and `different_models` of `kills`, and where the runs died.
    """
    draw = random.Random(seed)
    make_inputs(folder)
    write_text(folder / "text.json", documents=5)  # epochs of 5 batches, several per run
    # Relative paths, in a separate folder for each run, so that the commands in model cards are
    # equal.
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
        while died is None:  # a run that is faster than the first may have ended
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


def measure_variants(folder: Path, names: Sequence[str], seed: int = 0) -> dict[str, Any]:
    """Kill every variant once, within a step, and resume it.

    Args:
        folder: An empty folder.
        names: Names of `VARIANTS`.
        seed: Seed of the moments.

    Returns:
        Figures: `different_plans` (plans and masks) and `different_models` of `variants`.
    """
    draw = random.Random(seed)
    make_bases(folder)
    figures: dict[str, Any] = {"variants": len(names), "different_plans": 0, "different_models": 0}
    different = []
    for name in names:
        try:
            plans, models = _differs(folder, VARIANTS[name], draw)
        except RuntimeError as error:  # a run has failed: its result is another one
            print(f"{name}: {error}", file=sys.stderr)
            plans = models = True
        figures["different_plans"] += plans
        figures["different_models"] += models
        different += [name] if plans or models else []
    return figures | {"different": different}


def _differs(folder: Path, variant: Variant, draw: random.Random) -> tuple[bool, bool]:
    """Whether a killed and resumed run has another plan or other masks, and another model.

    Raises:
        RuntimeError: A run has failed.
    """
    whole = _beside(folder, "whole", BASES)
    steps = [name for name, _ in finish(variant.arguments, whole).phases if name == "step"]
    first, died = len(steps) * (STEPS - 2) // STEPS, None
    while died is None:
        killed = _beside(folder, "killed", BASES)
        place = draw.randrange(first, len(steps)) if variant.late else draw.randrange(1, first)
        died = kill(variant.arguments, killed, "step", place, draw.uniform(0, 0.02))
    finish(variant.arguments, killed)
    differs = {
        kind: _compared(killed / "run" / kind) != _compared(whole / "run" / kind)
        for kind in ("model", "plan", "weights", "widths")
    }
    model = differs.pop("model")
    return any(differs.values()), model


def _compared(folder: Path) -> dict[str, bytes]:
    return {name: found for name, found in content(folder).items() if _kept(name)}


def _kept(name: str) -> bool:
    """Test whether a file is compared; measurements contain times and differ."""
    return not name.endswith((".png", ".txt"))


def measure_exports(folder: Path, kills: int = EXPORT_KILLS) -> dict[str, Any]:
    """Kill the export of one run at positions spread over all its writes.

    Args:
        folder: A folder that `make_bases` has filled.
        kills: Number of positions.

    Returns:
        Figures: `different_exports` of `export_kills`, and the `writes` of an export.
    """
    arguments = VARIANTS["masks alone"].arguments
    whole = _beside(folder, "whole", BASES)
    writes = [
        name
        for name, _ in finish(
            arguments, whole, lambda tell: _at_writes(lambda _: tell("write"))
        ).phases
        if name == "write"
    ]
    expected, different = content(whole / "run" / "model"), 0
    places = sorted({round(i * (len(writes) - 1) / max(1, kills - 1)) for i in range(kills)})
    for place in places:
        work = _beside(folder, "killed", BASES)

        def stop(number: int, place: int = place) -> None:
            if number == place:
                os.kill(os.getpid(), signal.SIGKILL)

        if start(arguments, work, lambda _: _at_writes(stop)).end() != -signal.SIGKILL:
            raise RuntimeError((work / "log.txt").read_text(encoding="utf-8"))
        finish(arguments, work)
        names = {path.name for path in (work / "run").iterdir()}
        same = content(work / "run" / "model") == expected
        different += not same or any("secateur-" in name for name in names)
    return {"export_kills": len(places), "writes": len(writes), "different_exports": different}


def _at_writes(act: Callable[[int], object]) -> None:
    """Call a function before every write below `run` from the export on, with its number."""
    root, number, begun = str(Path("run").absolute()), 0, False
    export, serialize = ExportModel.on_fit_end, safetensors.torch.serialize_file

    def write() -> None:
        nonlocal number
        number += 1
        act(number - 1)

    def hook(event: str, args: tuple[Any, ...]) -> None:
        opened = (
            event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR)
        )
        if (
            begun
            and (opened or event in _WRITES)
            and os.path.abspath(str(args[0])).startswith(root)
        ):
            write()

    def begin(*args: Any) -> None:
        nonlocal begun
        begun = True
        export(*args)

    def counted(*args: Any, **kwargs: Any) -> Any:  # writes outside of Python
        if begun:
            write()
        return serialize(*args, **kwargs)

    ExportModel.on_fit_end = begin  # type: ignore[method-assign]
    safetensors.torch.serialize_file = counted
    sys.addaudithook(hook)


def _beside(folder: Path, name: str, inputs: Sequence[str] = ("base",)) -> Path:
    """An empty folder beside the inputs, so that their relative paths are the same."""
    shutil.rmtree(folder / name, ignore_errors=True)
    (folder / name).mkdir()
    for shared in (*inputs, "text.json"):
        (folder / name / shared).symlink_to(Path("..") / shared)
    return folder / name


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50, help="number of runs that are killed")
    parser.add_argument("--steps", type=int, default=12, help="optimiser steps of a run")
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments")
    parser.add_argument(
        "--variants", nargs="+", metavar="NAME", help="runs to kill instead: all, or their names"
    )
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if args.variants:
            names = [*VARIANTS] if args.variants == ["all"] else args.variants
            figures = measure_variants(folder, names, args.seed)
            figures |= measure_exports(folder)
        else:
            figures = measure(folder, args.kills, args.steps, args.seed)
    write_figures(figures | {"seconds": time.monotonic() - begin}, args.json)


if __name__ == "__main__":
    main()
