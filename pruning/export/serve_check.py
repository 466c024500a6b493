"""Test a model folder in the installed servers, and report the results in a table.

Each server is started on the unchanged folder. Its answers are compared with those of transformers
on this machine in the same type; then its speed is measured.

As a command: `python -m secateur serve-check --help`.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from secateur.pruning.commands import JSON, CommandParser, new_file
from secateur.pruning.export.servers import SERVERS, Answer, Server, running
from secateur.pruning.files.base_model import BaseModel

_PROMPTS = (
    "The",
    "Once upon a time there was a tree that nobody had pruned.",
    "What is removed was never the tree; what remains has to be enough, and more than enough. So",
    "Cut above a bud, at a slant, and the rain will run off the wood. " * 3,
)
_NEW_TOKENS = 24
_TYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Found:
    """The result of one server.

    Args:
        server: Its name.
        start_s: Seconds until its first answer; None if it never answered.
        equal: Number of tokens (or characters, if it returns text only) that equal those of
            transformers from the start, over all prompts, and their total number.
        difference: Largest difference of two log-probabilities of a first token; None if the server
            returns none.
        first_token_s: Seconds to the first token of a prompt of 128 tokens.
        tokens_per_s: Number of simultaneous requests to output tokens per second in total.
        message: Why it cannot serve the folder; empty if it can.
    """

    server: str
    start_s: float | None = None
    equal: tuple[int, int] | None = None
    difference: float | None = None
    first_token_s: float | None = None
    tokens_per_s: dict[int, float] | None = None
    message: str = ""


def serve_check(
    folder: str | Path,
    python: str | Path = sys.executable,
    dtype: str = "float32",
    requests: Sequence[int] = (1, 4),
) -> list[Found]:
    """Start every installed server on a model folder, compare and measure.

    Args:
        folder: Model folder with a tokenizer. Its modelling file, if any, is executed.
        python: Interpreter of the environment with the servers.
        dtype: Torch name of the type that all compute in: float32, bfloat16 or float16.
        requests: Numbers of simultaneous requests to measure, each 1 or more.

    Raises:
        ValueError: `dtype` is unknown, a number is below 1, the folder cannot be loaded, `python`
            cannot be run, or no server is installed.
    """
    folder, python = Path(folder), Path(python)
    if dtype not in _TYPES:
        raise ValueError(f"`dtype` must be one of {', '.join(_TYPES)}, got {dtype!r}.")
    if min(requests, default=0) < 1:
        raise ValueError(f"`requests` must be 1 or more, got {min(requests, default=0)}.")
    BaseModel(folder, "folder").judge()
    if shutil.which(python) is None:
        raise ValueError(f"`python` {python} is not a program; name the interpreter with servers.")
    installed = [server for server in SERVERS if _has(python, server)]
    if not installed:
        names = "; ".join(f"{server.name}: {server.install}" for server in SERVERS)
        raise ValueError(f"{python} has none of the servers. pip install one ({names}).")
    prompts, positions = _reference(folder, dtype)
    lengths = min(128, positions // 2), min(64, positions // 4)
    return [_try(server, python, folder, dtype, prompts, requests, lengths) for server in installed]


def _has(python: Path, server: Server) -> bool:
    program = f"import importlib.util as u; assert all(map(u.find_spec, {server.packages}))"
    return subprocess.run([python, "-c", program], capture_output=True).returncode == 0


@dataclass(frozen=True)
class _Prompt:
    text: str
    ids: list[int]
    expected: Answer


def _reference(folder: Path, dtype: str) -> tuple[list[_Prompt], int]:
    """Prompts with the answers of transformers, and the number of positions of the model."""
    base = BaseModel(folder)
    tokenizer: Any = base.tokenizer()
    model: Any = base.load(dtype)
    model.eval()
    positions = model.config.max_position_embeddings
    prompts = []
    for text in _PROMPTS:
        ids = tokenizer(text).input_ids
        if len(ids) > positions - _NEW_TOKENS:
            continue
        with torch.inference_mode():
            first_V = model(torch.tensor([ids])).logits[0, -1].float().log_softmax(-1)
            tokens = model.generate(
                torch.tensor([ids]),
                do_sample=False,
                max_new_tokens=_NEW_TOKENS,
                min_new_tokens=_NEW_TOKENS,
            )[0, len(ids) :].tolist()
        logprobs = dict(enumerate(first_V.tolist()))
        prompts.append(_Prompt(text, ids, Answer(tokens, str(tokenizer.decode(tokens)), logprobs)))
    if not prompts:
        raise ValueError(f"{folder} has {positions} positions; {_NEW_TOKENS + 8} are needed.")
    return prompts, positions


def _try(
    server: Server,
    python: Path,
    folder: Path,
    dtype: str,
    prompts: Sequence[_Prompt],
    requests: Sequence[int],
    lengths: tuple[int, int],
) -> Found:
    """Start one server, compare and measure, with prompts and answers of given lengths."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        try:
            with running(server, python, folder, dtype, Path(scratch)) as url:
                start_s = time.monotonic() - began

                def ask(prompt: _Prompt) -> Answer:
                    return server.ask(url, prompt.ids, prompt.text, _NEW_TOKENS)

                with ThreadPoolExecutor(len(prompts)) as pool:  # all at once, as one batch
                    answers = list(pool.map(ask, prompts))
                equal, of, difference = 0, 0, None
                for prompt, answer in zip(prompts, answers, strict=True):
                    same, length, distance = _compare(prompt.expected, answer)
                    equal, of = equal + same, of + length
                    if distance is not None:
                        difference = max(distance, difference or 0.0)
                long, text = (prompts[-1].ids * lengths[0])[: lengths[0]], prompts[-1].text
                speed = {n: _tokens_per_s(server, url, long, text, n, lengths[1]) for n in requests}
                began = time.monotonic()
                server.ask(url, long, text, 1)
                first_s = time.monotonic() - began
        except ValueError as error:
            return Found(server.name, message=str(error))
    return Found(server.name, start_s, (equal, of), difference, first_s, speed)


def _compare(expected: Answer, answer: Answer) -> tuple[int, int, float | None]:
    """Number of equal tokens from the start, total, and largest log-probability difference."""
    pair: tuple[Sequence[Any], Sequence[Any]] = (expected.tokens or (), answer.tokens or ())
    if answer.tokens is None:
        pair = expected.text.strip(), answer.text.strip()
    length = min(map(len, pair)) if answer.tokens is None else len(pair[0])
    same = next((n for n, (a, b) in enumerate(zip(*pair, strict=False)) if a != b), length)
    if answer.logprobs is None or expected.logprobs is None:
        return same, length, None
    known = expected.logprobs
    return same, length, max(abs(known[t] - value) for t, value in answer.logprobs.items())


def _tokens_per_s(
    server: Server, url: str, prompt: list[int], text: str, requests: int, new_tokens: int
) -> float:
    began = time.monotonic()
    with ThreadPoolExecutor(requests) as pool:
        list(pool.map(lambda _: server.ask(url, prompt, text, new_tokens), range(requests)))
    return requests * new_tokens / (time.monotonic() - began)


def table(found: Sequence[Found]) -> Table:
    """The results, one row per server."""
    numbers = sorted({n for one in found for n in one.tokens_per_s or {}})
    shown = Table("server", "works", "starts in", "equal", "log-probabilities", "first token")
    for number in numbers:
        shown.add_column(f"tokens/s, {number} at once")
    for one in found:
        if one.equal is None or one.tokens_per_s is None:
            shown.add_row(one.server, "no")
            continue
        shown.add_row(
            one.server,
            "yes" if one.equal[0] == one.equal[1] else "tokens differ",
            f"{one.start_s:.0f} s",
            f"{one.equal[0]} of {one.equal[1]}",
            "not given" if one.difference is None else f"within {one.difference:.1e}",
            f"{one.first_token_s:.3f} s",
            *(f"{one.tokens_per_s[number]:.0f}" for number in numbers),
        )
    return shown


_HELP = """\
Test a model folder in the installed servers: vLLM, llama.cpp, transformers' own.

Each is started on FOLDER and generates 24 greedy tokens after each of four simultaneous prompts;
the tokens, and the log-probabilities of the first, are compared with those of transformers, then
speed is measured. For llama.cpp a GGUF file is written first. The code in FOLDER is executed: use
one that you trust. The exit code is 1 if a server that started answers differently.

example:
  python -m secateur serve-check runs/disp/model --python .venv-serving/bin/python
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line: `python -m secateur serve-check FOLDER`."""
    parser = CommandParser("serve-check", _HELP)
    add = parser.add_argument
    add("folder", metavar="FOLDER", type=Path, help="model folder with a tokenizer")
    add("--python", type=Path, default=Path(sys.executable), help="interpreter with the servers")
    add("--dtype", default="float32", choices=_TYPES, help="type of all (default: float32)")
    add("--at-once", type=int, nargs="+", default=[1, 4], metavar="N", help="requests at once")
    add("--json", type=new_file(JSON), metavar="FILE", help="write the figures as JSON, too")
    args = parser.parse_args(arguments)
    with parser.naming(requests="--at-once"):
        found = serve_check(args.folder, args.python, args.dtype, args.at_once)
    if args.json:
        args.json.write_text(json.dumps([vars(one) for one in found], indent=1) + "\n")
    console = Console()
    console.print(table(found))
    for one in found:
        if one.message:
            console.print(f"{one.server}: {one.message}", markup=False, highlight=False)
    if any(one.equal and one.equal[0] < one.equal[1] for one in found):
        parser.exit(1)
