"""Test commands on inputs that are damaged, incomplete, mixed up or malicious.

A tiny base model is pruned, and the resulting folders (base, plan, checkpoints, finished blocks,
cache of tokens, export) are given to commands, each time with one change, see
`benchmarks.mutations`. A command has to refuse the change in one to three lines that name a setting
or a file, or to give the same result as without the change. All other outcomes are counted:

* `wrong`: it succeeded, with another result;
* `unclear`: it ended with a traceback, or with a message that does not help;
* `hung`: it did not end;
* `ran_code`: it executed code from an input;
* `half_written`: it failed and left part of a result, or changed an input.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import random
import re
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import chdir, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from benchmarks.data import write_figures
from benchmarks.forks import fork
from benchmarks.mutations import mutations
from secateur import program
from secateur.pruning.weights.store import BlockStore
from tests.runs import call, content, learn_masks, on_text, write_text
from tests.tiny import tiny_llama, tiny_tokenizer

COUNTS = ("wrong", "unclear", "hung", "ran_code", "half_written")
_CPU_SECONDS, _SECONDS = 60, 600  # limits that no command reaches, even on a busy machine
_MEMORY_BYTES = 1 << 35  # of address space, most of which is never used
_REMAINS = re.compile(r"partial|replaced|/\.making")


@dataclass(frozen=True)
class Use:
    """A command and the one of its inputs that is changed.

    Args:
        folder: The input.
        arguments: Arguments of the command.
        result: Files and folders that it writes.
        sealed: Name patterns of input files of which every byte is checked.
        compared: Name patterns of result files that must be equal.
    """

    folder: str
    arguments: tuple[str, ...]
    result: tuple[str, ...]
    sealed: tuple[str, ...] = ()
    compared: tuple[str, ...] = ("*",)


_TEXT = ("--text", "w=text.txt", "--window-tokens", "16", "--device", "cpu")
_RUN = Path("run")
_LEARN = learn_masks(Path(), _RUN, 6, ["AnnealSparsity", "SaveCheckpoint", "ExportModel"], 2)
_MASKS = (
    *(setting for setting in _LEARN if not setting.startswith(("--model.learning", "--model.se"))),
    "--trainer.logger=false",
    "--trainer.limit_val_batches=0",
    "--model.learning={start: null}",
    "--model.settle=null",
)
_PREDICT = (
    "predict",
    "--model=CausalLM",
    "--model.base=base",
    *on_text(Path(), Path("out")),
    "--trainer.logger=false",
)
_ZEROS = (
    "fit",
    "--model=CausalLM",
    "--model.base=base",
    *on_text(Path(), Path("zeros")),
    "--trainer.logger=false",
    "--trainer.limit_val_batches=0",
    "--trainer.max_steps=1",
    "--trainer.callbacks+=PruneWeights",
    "--trainer.callbacks.pattern=Unstructured",
    "--trainer.callbacks.pattern.sparsity=0.5",
    "--trainer.callbacks.calibration_windows=4",
    "--trainer.callbacks.held_back_windows=4",
    "--trainer.callbacks+=ExportModel",
)
_WEIGHTS = ("*.safetensors", "*.py")
_MODEL = ("*.safetensors", "config.json")

USES: Mapping[str, Use] = {
    "compare a base": Use("base", ("compare", "base", *_TEXT, "--json=f.json"), ("f.json",)),
    "read a base": Use("base", _PREDICT, ("out/predictions_0.csv",)),
    "remove blocks": Use(
        "base", ("depth", "base", "out", "--remove", "1"), ("out",), compared=_WEIGHTS
    ),
    "cut a base": Use(
        "base", ("surgery", "base", "plan", "out"), ("out",), _MODEL, compared=_WEIGHTS
    ),
    "cut by a plan": Use("plan", ("surgery", "base", "plan", "out"), ("out",), ("*",)),
    "resume": Use(
        "run/checkpoints", (*_MASKS, "--ckpt_path=last"), ("run/model", "run/plan"), ("*.ckpt",)
    ),
    "resume from one": Use(
        "run/checkpoints",
        (*_MASKS, "--ckpt_path=run/checkpoints/step=4.ckpt"),
        ("run/model", "run/plan"),
        ("*.ckpt",),
    ),
    "read a cache": Use("cache", _PREDICT, ("out/predictions_0.csv",), ("*",)),
    "compare an export": Use(
        "export", ("compare", "base", "export", *_TEXT, "--json=f.json"), ("f.json",), _MODEL
    ),
    "remove blocks of an export": Use(
        "export",
        ("depth", "export", "out", "--remove", "1"),
        ("out",),
        _MODEL,
        compared=_WEIGHTS,
    ),
    "cut by the plan of an export": Use(
        "export/plan", ("surgery", "base", "export", "out"), ("out",), ("*",)
    ),
    "go on with zeros": Use(
        "zeros/weights/blocks", _ZEROS, ("zeros/model",), ("*",), compared=_WEIGHTS
    ),
    "replace an export": Use(
        "run/model", (*_MASKS, "--ckpt_path=last"), ("run/model", "run/plan"), ("*",)
    ),
}


@dataclass
class Outcome:
    """The outcome of one change.

    Args:
        use: Name of the command and input.
        kind: Name of the kind of change.
        said: Description of the change.
        faults: Names of the counts that it belongs to; empty for a correct outcome.
        refused: Whether the command has refused it.
        message: Message of the command.
    """

    use: str
    kind: str
    said: str
    faults: list[str] = field(default_factory=list)
    refused: bool = False
    message: str = ""


class _Stopped(Exception):
    """A run was stopped."""


_save = BlockStore.save


def _until_block_2(store: BlockStore, index: int, *finished: Any) -> None:
    if index == 2:
        raise _Stopped
    _save(store, index, *finished)


def make_inputs(folder: Path) -> None:
    """Fill a folder with a base model in two files, text, and the results of a run."""
    tiny_llama().save_pretrained(folder / "base", max_shard_size="70KB")
    tiny_tokenizer().save_pretrained(folder / "base")
    write_text(folder / "text.json", documents=12)
    (folder / "text.txt").write_text("Cut above a bud, at a slant. " * 12, encoding="utf-8")
    with chdir(folder):
        call(_MASKS)
        with patch.object(BlockStore, "save", _until_block_2), suppress(_Stopped):
            call(_ZEROS)
    shutil.copytree(folder / "run" / "model", folder / "export")
    shutil.copytree(folder / "run" / "plan", folder / "plan")
    (folder / "run" / "checkpoints" / "step=6.ckpt").unlink()  # like a run that was stopped


def run(arguments: tuple[str, ...], folder: Path) -> int | None:
    """Run a command in a folder; return its exit code, None if it did not end."""

    def work(_: Callable[[str], object]) -> None:
        resource.setrlimit(resource.RLIMIT_CPU, (_CPU_SECONDS, _CPU_SECONDS))
        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
        sys.argv = ["train.py", *arguments]
        program.run()

    code = fork(work, folder).end(_SECONDS)
    return None if code is None or code < 0 else code


def judge(use: Use, work: Path, expected: Mapping[str, bytes], ran: Path) -> Outcome:
    """Run a command on a changed input, and classify the outcome."""
    outcome = Outcome("", "", "")
    before = content(work)
    code = run(use.arguments, work)
    log = (work / "log.txt").read_text(encoding="utf-8", errors="replace")
    after = content(work)
    outcome.refused = code != 0
    outcome.message = log[log.find("\nerror: ") + 1 :].strip()[-3000:]
    if ran.exists():
        ran.unlink()
        outcome.faults.append("ran_code")
    if any(_REMAINS.search(name) for name in after.keys() - before.keys()):
        outcome.faults.append("half_written")
    if code is None:
        outcome.faults.append("hung")
    elif code == 0:
        if _result(use, after) != expected or "Traceback" in log:
            outcome.faults.append("wrong")
    else:
        if not _clear(outcome.message, use):
            outcome.faults.append("unclear")
        kept = (*use.result, "base/", "plan/", "export/")
        if {n: c for n, c in before.items() if n.startswith(kept)} != {
            n: c for n, c in after.items() if n.startswith(kept)
        }:
            outcome.faults.append("half_written")
    return outcome


def _result(use: Use, found: Mapping[str, bytes]) -> dict[str, bytes]:
    """The files of a result that must be equal."""
    own = {name: c for name, c in found.items() if name.startswith(use.result)}
    return {
        name: c
        for name, c in own.items()
        if any(fnmatch.fnmatch(name.rpartition("/")[2], pattern) for pattern in use.compared)
    }


def _clear(message: str, use: Use) -> bool:
    """Test whether a message is short and names a setting or a file."""
    lines = message.splitlines()
    names = re.search(r"`-{0,2}[\w.]+`|[\w=-]+\.(json|safetensors|ckpt|npy)\b", message)
    return (
        message.startswith("error: ")
        and 1 <= len(lines) <= 3
        and "Traceback" not in message
        and (names is not None or use.folder in message)
    )


def measure(folder: Path, seed: int, count: int, only: str = "") -> list[Outcome]:
    """Change inputs, run the commands, and return the outcomes.

    Args:
        folder: An empty folder.
        seed: Seed of the changes.
        count: Number of changes, 1 or more: all kinds of all inputs take turns.
        only: Part of the names of the commands to test; empty for all.
    """
    inputs, ran = folder / "inputs", folder / "ran"
    inputs.mkdir()
    make_inputs(inputs)
    kinds = mutations(ran)
    uses = {name: use for name, use in USES.items() if only in name}
    expected = {}
    for name, use in uses.items():
        work = shutil.copytree(inputs, folder / "work", symlinks=True)
        if run(use.arguments, work) != 0:
            raise RuntimeError(f"{name}: {(work / 'log.txt').read_text(encoding='utf-8')}")
        expected[name] = _result(use, content(work))
        shutil.rmtree(work)
    draw, outcomes = random.Random(seed), []
    while len(outcomes) < count:
        # Cycle through both lists, with a new combination each time.
        name = [*uses][len(outcomes) % len(uses)]
        kind = [*kinds][(len(outcomes) // len(uses) + len(outcomes)) % len(kinds)]
        use, said = uses[name], None
        while said is None:
            work = shutil.copytree(inputs, folder / "work", symlinks=True)
            said = kinds[kind](work / use.folder, draw, _sealed(use))
            if said is None:
                shutil.rmtree(work)
                kind = draw.choice([*kinds])
        outcome = judge(use, work, expected[name], ran)
        outcome.use, outcome.kind, outcome.said = name, kind, said
        outcomes.append(outcome)
        shutil.rmtree(work)
    return outcomes


def _sealed(use: Use) -> Callable[[Path], bool]:
    return lambda path: any(fnmatch.fnmatch(path.name, pattern) for pattern in use.sealed)


def figures_of(outcomes: list[Outcome]) -> dict[str, Any]:
    """The counts."""
    found = [fault for outcome in outcomes for fault in outcome.faults]
    refused = sum(outcome.refused for outcome in outcomes)
    counts = {name: found.count(name) for name in COUNTS}
    return {"mutations": len(outcomes), "refused": refused} | counts


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=300, help="number of changes")
    parser.add_argument("--seed", type=int, default=0, help="seed of the changes")
    parser.add_argument("--only", default="", help="part of the names of the commands to test")
    parser.add_argument("--all", type=Path, help="write the outcome of every change to this file")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        outcomes = measure(Path(folder), args.seed, args.count, args.only)
    for outcome in outcomes:
        if outcome.faults:
            print(f"{outcome.faults} {outcome.use}: {outcome.said}\n  {outcome.message}\n")
    if args.all:
        args.all.write_text(json.dumps([vars(each) for each in outcomes], indent=1))
    write_figures(figures_of(outcomes) | {"seconds": time.monotonic() - begin}, args.json)


if __name__ == "__main__":
    main()
