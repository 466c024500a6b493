"""The command `python -m secateur advise`: what a model can be pruned to here, before it is."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from rich.console import Console

from secateur.pruning.advise.methods import BATCH, Setting, advise, comparison
from secateur.pruning.advise.probe import measure_losses, measure_times
from secateur.pruning.advise.target import Fits, Keep, Latency, Wish
from secateur.pruning.commands import CommandParser, device_here, read_text
from secateur.pruning.files.base_model import BaseModel
from secateur.pruning.measure.perplexity import cut_windows
from secateur.pruning.measure.sizes import count, file_bytes
from secateur.pruning.widths.hypernetwork import GRUHypernetwork
from secateur.pruning.widths.memory import Run

_HELP = """\
Measure a model on this machine for a few minutes, and tell what pruning it would come to.

A few passes are timed, and the model is pruned once by blocks and once by widths, in memory and
without training. For each method this prints what remains, the loss of quality that is expected and
where the figure comes from, the time and the memory of the run, and the command to type. Nothing is
promised that was not measured: expected losses are intervals, and how much training recovers on
your model is not known before it is tried.

The text should be like what the model will be used for: the commands that are printed prune on it.
Keep another text of that kind to compare the results on.

Zeros in single weights (PruneWeights) are not among the methods: they save neither memory nor time
unless your server has kernels for them.

examples:
  python -m secateur advise path/to/model --text train.txt --keep 0.6
  python -m secateur advise path/to/model --text train.txt --fits 8GB --context 32768
  python -m secateur advise path/to/model --text train.txt --latency 0.7
"""
_UNITS = {"": 1.0, "KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}
_WINDOWS = 16  # half of them choose, half of them measure


def num_bytes(text: str) -> float:
    """Bytes of a size such as `8GB`.

    Raises:
        ArgumentTypeError: It is no such size.
    """
    found = re.fullmatch(r"([0-9]*\.?[0-9]+)\s*([KMGT]?B)?", text.strip(), re.IGNORECASE)
    if found is None or not float(found[1]) > 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; give one such as 8GB or 500MB")
    return float(found[1]) * _UNITS[(found[2] or "").upper().removeprefix("B")]


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = CommandParser("advise", _HELP)
    add = parser.add_argument
    add("model", metavar="MODEL", help="folder of the model, or a hub id")
    add(
        "--text",
        nargs="+",
        type=Path,
        required=True,
        metavar="FILE",
        help="UTF-8 texts to prune on, or folders of *.txt",
    )
    wish = parser.add_mutually_exclusive_group(required=True)
    wish.add_argument("--keep", type=float, help="fraction of the FLOPs of the blocks, in (0, 1)")
    wish.add_argument("--fits", type=num_bytes, metavar="SIZE", help="memory, such as 8GB")
    wish.add_argument("--latency", type=float, help="fraction of the time of a prefill, in (0, 1)")
    add("--context", type=int, default=2048, help="tokens of the cache for --fits (default: 2048)")
    add("--window-tokens", type=int, default=256, help="tokens of a window (default: 256)")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", type=device_here, default=device, help=f"torch device (default here: {device})")
    args = parser.parse_args(arguments)
    if args.keep is not None:
        asked: Wish = Keep(args.keep)
    elif args.fits is not None:
        asked = Fits(args.fits, args.context)
    else:
        asked = Latency(args.latency)
    if missing := [str(path) for path in args.text if not path.exists()]:
        parser.error(f"--text {missing[0]} does not exist")
    with parser.naming():
        for line in told(BaseModel(args.model, "MODEL"), args.text, asked, args):
            Console(soft_wrap=True, highlight=False).print(line, markup=False)


def told(
    base: BaseModel, texts: Sequence[Path], wish: Wish, args: argparse.Namespace
) -> Iterator[str]:
    """Measure, and write what there is to say, line by line as it is known.

    Args:
        base: The model.
        texts: Files of text, UTF-8.
        wish: What is to be reached.
        args: `window_tokens` and `device`.

    Raises:
        ValueError: The model cannot be pruned, the text is too short, or the wish cannot be met.
    """
    window_tokens = min(args.window_tokens, base.config.max_position_embeddings)
    text = "\n".join(read_text(path) for path in texts)
    ids: list[int] = base.tokenizer()(text, verbose=False)["input_ids"]
    windows_NT = cut_windows(ids, window_tokens)[:_WINDOWS]
    model, dtype = base.load(device=args.device), base.dtype_of()
    threads = torch.get_num_threads()
    yield (
        f"{base.name}: {count(model).parameters:,} parameters, "
        f"{file_bytes(base.folder) / 1e6:,.0f} MB on disk, {model.device.type}, "
        f"{threads} thread{'s' if threads > 1 else ''}."
    )
    times = measure_times(model, windows_NT)
    yield (
        f"Measured here: 1000 tokens take {1e3 * times.forward:.2f} s forward, "
        f"{1e3 * times.backward:.2f} s forward and backward."
    )
    keep = wish.keep(base.config, dtype, times)
    yield f"Wanted: {wish.said(keep)}."
    yield from wish.also(base.config, dtype)
    yield "Now it is pruned by each method once, in memory."
    losses = measure_losses(model, windows_NT, keep)
    yield (
        f"Perplexity of the dense model: {losses.dense_perplexity:.2f} on {len(windows_NT) // 2} "
        f"windows of {window_tokens} tokens."
    )
    run = Run(
        dtype=dtype,
        batch_size=BATCH,
        window_tokens=window_tokens,
        checkpointing=False,
        hypernetwork=GRUHypernetwork,
    )
    files = " ".join(map(str, texts))
    asked = Setting(str(base.name), files, base.config, run, keep)
    advised = advise(asked, times, losses)
    for number, advice in enumerate(advised, start=1):
        yield from ("", f"{number}. {advice.title}")
        yield from (f"   {name + ':':<9}{value}" for name, value in advice.facts.items())
        yield f"   command: {advice.command}"
    yield from ("", "Then compare what you made, on text that no run has read:")
    yield f"   {comparison(str(base.name), advised)}"
