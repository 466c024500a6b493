"""Compare model folders from the command line: quality, zero-shot tasks, size, speed.

The first folder is the dense model that the fractions refer to; all are measured on the same
windows and questions. As a command: `python -m secateur compare --help`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from secateur.pruning.commands import JSON, PAGE, CommandParser, device_here, new_file, read_text
from secateur.pruning.files.base_model import BaseModel
from secateur.pruning.measure.generation import prompts_for
from secateur.pruning.measure.latency_table import read_table
from secateur.pruning.measure.page import Page
from secateur.pruning.measure.perplexity import cut_windows
from secateur.pruning.measure.report import Report, measure
from secateur.pruning.measure.zero_shot import read_questions

_HELP = """\
Measure models side by side; the first one is the dense model.

A text is tokenised with the tokenizer of the first model and its defaults (BOS in front for Llama
and Gemma), and cut into windows without overlap. A task is a file of JSON lines with the
context `ctx`, the texts `endings` and the index `label` of the correct one, from 0. All models
answer the same prompts, too. Narrow models run by Secateur's own code; code in a model folder is
not executed.

example:
  python -m secateur compare dense=path/to/base pruned=runs/disp/model \\
      --text wikitext=test.txt --task hellaswag=hellaswag.jsonl --speed \\
      --html page.html
"""


_SPEED = {"batch_size": 1, "new_tokens": 32, "repeats": 5}


def compare_folders(
    folders: dict[str, Path],
    texts: dict[str, Path],
    tasks: dict[str, Path] | None = None,
    *,
    window_tokens: int = 256,
    num_windows: int | None = None,
    dtype: str = "auto",
    device: str = "cpu",
    speed: bool = False,
    latency: Path | None = None,
    trust_remote_code: bool = False,
) -> Report:
    """Load and measure model folders.

    Args:
        folders: Name to model folder, the dense model first.
        texts: Name to UTF-8 text file, 1 or more.
        tasks: Name to file of questions, see `secateur.pruning.measure.zero_shot.read_questions`.
        window_tokens: Tokens of a window, 2 or more, at most the positions of the models.
        num_windows: Number of windows of a text to use, the first ones, 1 or more; None uses all.
        dtype: "auto" is that of the files, else a torch name such as "bfloat16".
        device: Torch device.
        speed: Measure prefill and decode as well.
        latency: Table of times, see `python -m secateur latency`: measure them as it says, and tell
            what it predicts.
        trust_remote_code: Whether Python files of the first tokenizer may run.

    Raises:
        ValueError: A text is shorter than a window, a file of questions is damaged, the window does
            not fit a model, `num_windows` is below 1, or the table of times is damaged or that of
            another model.
        OSError: A file or folder cannot be read.
    """
    if num_windows is not None and num_windows < 1:
        raise ValueError(f"`num_windows` must be 1 or more, got {num_windows}.")
    table = None if latency is None else read_table(latency, "--latency")
    bases = {
        name: BaseModel(Path(folder), "folders", trust_remote_code)
        for name, folder in folders.items()
    }
    for base in bases.values():
        base.judge()
    tokenizer: Any = next(iter(bases.values())).tokenizer()
    windows = {}
    for name, path in texts.items():
        ids = tokenizer(read_text(path), verbose=False)["input_ids"]
        windows[name] = cut_windows(ids, window_tokens)[:num_windows]
        largest = int(windows[name].max())
        for model_name, base in bases.items():
            if largest >= base.config.vocab_size:
                raise ValueError(
                    f"The text {name} has the token id {largest}, and the vocabulary of "
                    f"{model_name} has {base.config.vocab_size} entries; compare models with one "
                    "tokenizer, the first one's."
                )
    questions = {name: read_questions(path, tokenizer) for name, path in (tasks or {}).items()}
    prompts = prompts_for(tokenizer, next(iter(windows.values())))
    models: dict[str, Any] = {}
    for name, base in bases.items():
        model: Any = base.load(dtype, device)
        models[name] = model
        if window_tokens > (positions := model.config.max_position_embeddings):
            raise ValueError(
                f"`window_tokens` {window_tokens} is more than the {positions} positions of {name}."
            )
    return measure(
        models,
        windows,
        folders=folders,
        speed=_SPEED | {"prompt_tokens": max(1, window_tokens // 2)} if speed else None,
        tasks=questions,
        tokenizer=tokenizer,
        prompts=prompts,
        latency=table,
    )


def _named(text: str) -> tuple[str, Path]:
    """Parse NAME=PATH; a path alone gets its last part as name."""
    name, _, path = text.rpartition("=")
    if not Path(path).exists():
        raise argparse.ArgumentTypeError(f"{path} does not exist")
    return name or Path(path).stem, Path(path)


def _dtype(text: str) -> str:
    if text != "auto" and not isinstance(getattr(torch, text, None), torch.dtype):
        raise argparse.ArgumentTypeError(f"{text!r} is not a torch type, such as bfloat16")
    return text


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = CommandParser("compare", _HELP)
    add = parser.add_argument
    add(
        "folders", nargs="+", type=_named, metavar="NAME=FOLDER", help="models, the dense one first"
    )
    add(
        "--text",
        nargs="+",
        type=_named,
        required=True,
        metavar="NAME=FILE",
        help="UTF-8 texts or folders of *.txt; NAME= may go",
    )
    add("--task", nargs="+", type=_named, default=[], metavar="NAME=FILE", help="questions, JSONL")
    add("--window-tokens", type=int, default=256, help="tokens of a window (default: 256)")
    add("--windows", type=int, help="first windows of every text (default: all)")
    add(
        "--dtype",
        type=_dtype,
        default="auto",
        help="torch type such as bfloat16 (default: that of the files)",
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", type=device_here, default=device, help=f"torch device (default here: {device})")
    add("--speed", action="store_true", help="measure prefill and decode, too")
    add("--latency", type=Path, metavar="TABLE", help="the same as in a table, and what it says")
    add(
        "--trust-remote-code",
        action="store_true",
        help="run Python files of the tokenizer of the first model",
    )
    add("--json", type=new_file(JSON), help="write the figures to this file")
    add("--html", type=new_file(PAGE), help="write a page with figures and answers to this file")
    args = parser.parse_args(arguments)
    for what in ("folders", "text", "task"):
        names = [name for name, _ in getattr(args, what)]
        if twice := {name for name in names if names.count(name) > 1}:
            parser.error(f"two {what} are called {', '.join(sorted(twice))}: use NAME=PATH")
    with parser.naming(num_windows="--windows"):
        report = compare_folders(
            dict(args.folders),
            dict(args.text),
            dict(args.task),
            window_tokens=args.window_tokens,
            num_windows=args.windows,
            dtype=args.dtype,
            device=args.device,
            speed=args.speed,
            latency=args.latency,
            trust_remote_code=args.trust_remote_code,
        )
    if args.json is not None:
        args.json.write_text(report.json(), encoding="utf-8")
    if args.html is not None:
        title = (
            f"{', '.join(list(dict(args.folders))[1:]) or 'A model'} beside {args.folders[0][0]}"
        )
        args.html.write_text(Page(title, report).render(), encoding="utf-8")
    report.show(Console())
