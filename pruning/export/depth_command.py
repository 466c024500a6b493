"""The command `python -m secateur depth`: remove blocks from a checkpoint, streamed."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

from rich import get_console

from secateur.pruning.commands import CommandParser
from secateur.pruning.export.rewrite import prune_blocks

_MOST_BLOCKS = 10_000  # in a range, before the model is read

_HELP = """\
Remove blocks from a checkpoint without loading it.

The files of BASE are copied tensor by tensor: memory is that of the largest one, and no GPU is
needed. Tensors of removed blocks are left out, later blocks are renumbered, types and ties are
kept, and OUT is a stock model of its family, with tokenizer, config.json and blocks.json, which
records the removed blocks and the base model. OUT appears when it is complete and proven.

Blocks are counted from 0; a range includes both ends. See docs/depth.md for scores that tell which
blocks to remove.

examples:
  python -m secateur depth path/to/Llama-2-7b-hf path/to/smaller --remove 21-29
  python -m secateur depth path/to/Llama-2-7b-hf path/to/smaller --keep 0-20 30 31
"""


def blocks(text: str) -> list[int]:
    """Block indices of one argument: `7`, or `21-29`, both ends included.

    Raises:
        ArgumentTypeError: It is neither.
    """
    first, _, last = text.partition("-")
    try:
        found = range(int(first), int(last or first) + 1)
    except ValueError:
        found = range(0)
    if not 0 < len(found) <= _MOST_BLOCKS:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a block; give 7, or 21-29 for a range of at most {_MOST_BLOCKS}"
        )
    return list(found)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line: `python -m secateur depth BASE OUT --remove BLOCKS`."""
    parser = CommandParser("depth", _HELP)
    add = parser.add_argument
    add("base", metavar="BASE", type=Path, help="folder of the base model: config, safetensors")
    add("out", metavar="OUT", type=Path, help="new folder, or a shortened model to replace")
    which = parser.add_mutually_exclusive_group(required=True)
    for name, help_ in (("--remove", "blocks that go"), ("--keep", "blocks that stay")):
        which.add_argument(
            name, metavar="BLOCK", type=blocks, nargs="+", action="extend", help=help_
        )
    args = parser.parse_args(arguments)
    with parser.naming(folder="OUT"):
        prune_blocks(
            args.base,
            args.out,
            remove=args.remove and list(chain(*args.remove)),
            keep=args.keep and list(chain(*args.keep)),
        )
    get_console().print(f"The shorter model is in {args.out}.", soft_wrap=True, markup=False)
