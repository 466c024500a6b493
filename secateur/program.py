"""The program: `python -m secateur COMMAND ...`, or `python train.py COMMAND ...`."""

from __future__ import annotations

import importlib
import os
import signal
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from secateur.mistakes import told
from secateur.pruning.commands import UsageError, did_you_mean
from secateur.quiet import quieten

if TYPE_CHECKING:
    from secateur.command_line import TrainCLI

_TRAINING = {
    "fit": "train: learn masks, prune, recover, export",
    "validate": "perplexity, on the validation text, of the model that a checkpoint would export",
    "test": "the same on the test text",
    "predict": "the loss of every window of a text",
}
_COMMANDS = {
    "family": ("family", "learn masks once for several sizes, make and measure each"),
    "advise": ("pruning.advise.command", "measure a model here, and tell what pruning comes to"),
    "latency": ("pruning.measure.latency", "measure times of all widths here, for a budget"),
    "surgery": ("pruning.export.rewrite", "cut a checkpoint down to a plan, streamed"),
    "depth": ("pruning.export.depth_command", "remove blocks from a checkpoint, streamed"),
    "compare": ("pruning.measure.compare", "measure model folders side by side"),
    "gguf": ("pruning.export.gguf_file", "write a model folder as one file for llama.cpp"),
    "nemotron-nas": (
        "pruning.export.nemotron_nas",
        "write a pruned model for vLLM, as Nemotron-NAS",
    ),
    "serve-check": ("pruning.export.serve_check", "try a model folder in real servers"),
    "repair": ("pruning.export.repair", "bring an earlier pruned model up to date"),
    "memory": ("pruning.widths.memory", "predict the memory of learning masks"),
}

_HELP = """\
Secateur makes large language models smaller while they train: it learns which widths, blocks or
weights a model does not need, recovers quality, and exports a model that loads with
transformers.

usage: python -m secateur COMMAND ...   (or python train.py COMMAND ...)

commands:
{commands}

examples:
  python -m secateur fit --config configs/disp.yaml --model.base MODEL --data.train texts.json
  python -m secateur fit --config configs/disp.yaml ... --ckpt_path last     resume after a stop
  python -m secateur compare dense=MODEL pruned=runs/disp/model --text held_out.txt

All results of a run are below --trainer.default_root_dir (runs/disp in configs/disp.yaml): the
smaller model in model/, the kept indices in plan/, the figures in report.html, report.md and
report.json.

options of a run:
  python -m secateur fit --help                            all settings
  python -m secateur fit --model.help MaskLearning         of one class; CausalLM is the other
  python -m secateur fit --data.help TextData              of the data
  python -m secateur fit --trainer.callbacks.help ExportModel   of a callback
  python -m secateur fit --config FILE --callbacks.SaveCheckpoint.every_n_steps 50   sets one
  python -m secateur fit --config FILE --print_config      what a recipe sets
  python -m secateur COMMAND --help                        of another command
"""


def run(arguments: Sequence[str] | None = None) -> None:
    """Run a command.

    Args:
        arguments: Arguments after the name of the program; None reads them from the command line.

    Raises:
        SystemExit: The command ended, with code 1 after an error and 2 after a wrong command line.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        sys.stdout.write(_page())
        return
    with told():
        _run(arguments)


def _run(arguments: Sequence[str]) -> None:
    if arguments[0] in _COMMANDS:
        module = importlib.import_module(f"secateur.{_COMMANDS[arguments[0]][0]}")
        module.main(arguments[1:])
        return
    if not any(name in arguments for name in _TRAINING):
        known = [*_TRAINING, *_COMMANDS]
        raise UsageError(
            f"`{arguments[0]}` is not a command; the commands are {', '.join(known)}."
            f"{did_you_mean(arguments[0], known)}"
        )
    if "fit" in arguments:
        # Block signals while libraries and models load: SaveCheckpoint unblocks those to stop,
        # SettleNow the one to settle. SIGTERM is blocked only under `srun`; elsewhere it comes from
        # a person and ends the program at once.
        early = {signal.SIGUSR1, signal.SIGUSR2}
        early |= {signal.SIGTERM} if "SLURM_STEP_ID" in os.environ else set()
        signal.pthread_sigmask(signal.SIG_BLOCK, early)
    train()


def train(arguments: list[str] | None = None) -> TrainCLI:
    """Parse the command line of a Lightning command, or a list of arguments, and run it."""
    quieten()  # before libraries are imported, which the other commands do without
    from secateur.command_line import main

    return main(arguments)


def _page() -> str:
    summaries = _TRAINING | {name: summary for name, (_, summary) in _COMMANDS.items()}
    commands = "\n".join(f"  {name:<13}{summary}" for name, summary in summaries.items())
    return _HELP.format(commands=commands)
