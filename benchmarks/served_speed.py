"""Speed of pruned models in vLLM: throughput, time to first token, time per token.

usage: python -m benchmarks.served_speed --json FILE                random weights
       python -m benchmarks.served_speed --real FOLDER --json FILE  your own model, a Llama

Models keep a fraction of the block FLOPs of the dense one, by random choice, in three ways:

- `widths`: all five sites narrow, different widths in every block; by the modelling file, in vLLM's
  transformers backend. Opponent: the dense model in that backend.
- `native`: MLPs narrow, attentions and MLPs removed; as `nemotron-nas`, built into vLLM.
  Opponent: the dense model as built into vLLM.
- `depth`: blocks removed; a stock model. Opponent: as for `native`.

The dense model in the backend is also compared with the built-in one. Model and opponent are
measured in turns with both servers running, so that a machine that slows down affects both; the
ratios are medians over the turns, reported with minimum and maximum. Prompts are random and never
repeated, and prefix caching is off. On a shared machine, the ratios of processor time (`..._cpu`)
are more reliable than those of time; use one thread then, as waiting threads count too.

Keys: `served_over_dense_KEEP` and `native_over_dense_KEEP`, output tokens per second over those of
the opponent at the highest number of simultaneous requests.

The servers' environment is .venv-serving, which tests/serving/install creates if it does not exist.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from benchmarks.data import write_figures
from benchmarks.export_speed import HEAD_SIZE, random_plan, shape
from secateur.pruning.costs import Flops
from secateur.pruning.export.rewrite import prune_blocks, prune_checkpoint
from secateur.pruning.export.servers import VLLM, NativeVLLM, running
from secateur.pruning.families import family_of
from secateur.pruning.files.base_model import BaseModel
from secateur.pruning.files.fingerprint import fingerprint
from secateur.pruning.measure.report import count as count_model
from secateur.pruning.plan import Plan, plan_from_indices
from secateur.pruning.sites import find_sites
from secateur.pruning.widths.budget import Budget
from tests.tiny import tiny_tokenizer

ROOT = Path(__file__).parents[1]
PYTHON = ROOT / ".venv-serving" / "bin" / "python"
BACKEND = ("--model-impl", "transformers")


@dataclass(frozen=True)
class Load:
    """The requests to servers.

    Args:
        prompt_tokens: Tokens of every prompt.
        new_tokens: Tokens of every answer, 2 or more.
        at_once: Numbers of simultaneous requests.
        vocabulary: Upper limit of token ids, exclusive.
    """

    prompt_tokens: int
    new_tokens: int
    at_once: tuple[int, ...]
    vocabulary: int


@dataclass(frozen=True)
class Up:
    """A running server.

    Args:
        url: Its address.
        group: Its process group.
    """

    url: str
    group: int

    def cpu_seconds(self) -> float:
        """Processor time of all its processes so far."""
        ticks = 0
        for path in Path("/proc").glob("[0-9]*/stat"):
            try:
                fields = path.read_text().rpartition(")")[2].split()
            except (FileNotFoundError, ProcessLookupError):
                continue
            if int(fields[2]) == self.group:
                ticks += int(fields[11]) + int(fields[12])
        return ticks / os.sysconf("SC_CLK_TCK")


def native_plan(folder: Path, keep: float, multiple: int, seed: int = 0) -> Plan:
    """A plan on budget that does not cut the residual stream: MLPs narrow, parts removed."""
    model = BaseModel(folder).skeleton()
    family = family_of(model.config).with_parts()
    sites = find_sites(model, family)
    generator = torch.Generator().manual_seed(seed)
    scores_N = torch.cat(
        [
            torch.rand(site.size, generator=generator) + 0.15 * torch.randn(1, generator=generator)
            for site in sites
        ]
    )
    budget = Budget(keep, Flops(), width_multiple=multiple, parts=True, sites=["mlp_mid"])
    kept = budget.finalise(scores_N, sites, budget.cost.table(model, family))
    return plan_from_indices(model, fingerprint(folder), kept, {"scores": "random"}, None, family)


def make_folders(base: Path, place: Path, keep: float, multiple: int) -> dict[str, Path]:
    """The pruned models, by kind."""
    folders = {name: place / name for name in ("widths", "native", "depth")}
    skeleton: Any = BaseModel(base).skeleton()
    prune_checkpoint(base, random_plan(skeleton, base, keep, multiple), folders["widths"])
    prune_checkpoint(base, native_plan(base, keep, multiple), folders["native"])
    blocks = skeleton.config.num_hidden_layers
    gone = round(blocks * (1 - keep))
    start = (blocks - gone) // 2  # from the middle, as searches choose
    prune_blocks(base, folders["depth"], remove=[*range(start, start + gone)])
    return folders


@contextmanager
def started(server: VLLM, python: Path, folder: Path, dtype: str) -> Iterator[Up]:
    """Start a server and wait until it answers."""
    before = children()
    with (
        tempfile.TemporaryDirectory() as scratch,
        running(server, python, folder, dtype, Path(scratch)) as url,
    ):
        (group,) = children() - before
        yield Up(url, group)


def children() -> set[int]:
    """Child processes of this process."""
    tasks = Path("/proc/self/task").glob("*/children")
    return {int(pid) for path in tasks for pid in path.read_text().split()}


_SEEDS = count()


def ask(url: str, load: Load) -> tuple[float, float]:
    """Seconds to the first and to the last token of one answer to a new prompt."""
    generator = torch.Generator().manual_seed(next(_SEEDS))
    prompt = torch.randint(3, load.vocabulary, (load.prompt_tokens,), generator=generator).tolist()
    body = {"model": "model", "prompt": prompt, "max_tokens": load.new_tokens, "temperature": 0}
    body |= {"ignore_eos": True, "stream": True, "return_token_ids": True}
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{url}/v1/completions", json.dumps(body).encode(), headers)
    began, first, tokens = time.monotonic(), None, 0
    with urllib.request.urlopen(request, timeout=600) as answer:
        for line in answer:
            if not line.startswith(b"data: {"):
                continue
            first = first or time.monotonic()
            said = json.loads(line.removeprefix(b"data: "))
            tokens += sum(len(choice["token_ids"]) for choice in said["choices"])
    assert first is not None
    assert tokens == load.new_tokens, (tokens, load.new_tokens)
    return first - began, time.monotonic() - began


def measure(up: Up, load: Load, at_once: int) -> dict[str, float]:
    """Figures for a number of simultaneous requests."""
    began, cpu = time.monotonic(), up.cpu_seconds()
    with ThreadPoolExecutor(at_once) as pool:
        answers = [*pool.map(lambda _: ask(up.url, load), range(at_once))]
    seconds, tokens = time.monotonic() - began, at_once * load.new_tokens
    later = load.new_tokens - 1
    return {
        "tokens_per_s": tokens / seconds,
        "tokens_per_cpu_s": tokens / (up.cpu_seconds() - cpu),
        "first_token_ms": 1e3 * median(first for first, _ in answers),
        "token_ms": 1e3 * median((last - first) / later for first, last in answers),
    }


def compare(name: str, model: Up, opponent: Up, load: Load, repeats: int) -> dict[str, float]:
    """Figures of a model, and its throughput over that of an opponent measured in turns."""
    found: dict[str, float] = {}
    for at_once in load.at_once:
        turns = [
            [measure(up, load, at_once) for up in (opponent, model)] for _ in range(repeats + 1)
        ][1:]  # the first one warms up
        for who, place in (("opponent", 0), ("model", 1)):
            for figure in turns[0][0]:
                key = f"{name}_{who}_{figure}_at_{at_once}"
                found[key] = median(turn[place][figure] for turn in turns)
        for figure, suffix in (("tokens_per_s", ""), ("tokens_per_cpu_s", "_cpu")):
            ratios = sorted(own[figure] / other[figure] for other, own in turns)
            key = f"{name}_over_dense{suffix}_at_{at_once}"
            found |= {key: median(ratios), f"{key}_least": ratios[0], f"{key}_most": ratios[-1]}
    return found


def measure_all(base: Path, place: Path, load: Load, args: argparse.Namespace) -> dict[str, float]:
    """All figures of one model."""
    folders = make_folders(base, place, args.keep, args.multiple)
    dense = count_model(BaseModel(base).skeleton()).block_flops_per_token
    found: dict[str, float] = {}
    for name, folder in folders.items():
        flops = count_model(BaseModel(folder).skeleton()).block_flops_per_token
        found[f"{name}_block_flops_kept"] = flops / dense
    options = ["--no-enable-prefix-caching", "--max-model-len", "512"]
    options += [] if args.compile else ["--enforce-eager"]
    builtin, backend = VLLM(*options), VLLM(*options, *BACKEND)
    rounds: list[tuple[VLLM, Mapping[str, tuple[VLLM, Path]]]] = [
        (backend, {"widths": (VLLM(*options), folders["widths"])}),
        (
            builtin,
            {
                "native": (NativeVLLM(*options), folders["native"]),
                "depth": (builtin, folders["depth"]),
                "backend": (backend, base),
            },
        ),
    ]
    for server, models in rounds:
        with started(server, args.python, base, args.dtype) as opponent:
            for name, (own, folder) in models.items():
                with started(own, args.python, folder, args.dtype) as model:
                    found |= compare(name, model, opponent, load, args.repeats)
                if args.json:  # in case a later one fails
                    args.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    most = max(load.at_once)
    for key, name in (("served", "widths"), ("native", "native"), ("depth", "depth")):
        for suffix in ("", "_cpu"):
            ratio = found[f"{name}_over_dense{suffix}_at_{most}"]
            found[f"{key}_over_dense_{args.keep:g}{suffix}"] = ratio
    return found


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--real", type=Path, help="folder of a Llama with its tokenizer, instead of random weights")
    add("--width", type=int, default=1024, help="of random weights, a multiple of 64")
    add("--blocks", type=int, default=8, help="number of blocks of random weights (default: 8)")
    add("--mlp", type=int, default=2816, help="MLP width of random weights (default: 2816)")
    add("--keep", type=float, default=0.5, help="kept block FLOPs (default: 0.5)")
    add("--multiple", type=int, default=64, help="of all widths (default: 64)")
    add("--dtype", default="bfloat16", help="torch type (default: bfloat16)")
    add("--at-once", type=int, nargs="+", default=[1, 4, 16], help="requests at once")
    add("--prompt", type=int, default=128, help="tokens of a prompt (default: 128)")
    add("--tokens", type=int, default=64, help="tokens of an answer, 2 or more (default: 64)")
    add("--repeats", type=int, default=3, help="turns that count (default: 3)")
    add("--threads", type=int, default=torch.get_num_threads(), help="CPU threads of a server")
    add("--compile", action="store_true", help="compiled mode of vLLM instead of eager")
    add("--python", type=Path, default=PYTHON, help="interpreter with vLLM")
    add("--json", type=Path, help="write the figures to this file")
    args = parser.parse_args()
    if not args.python.exists():
        subprocess.run([ROOT / "tests" / "serving" / "install"], check=True)
    # Two servers share the machine, so neither may bind threads to cores.
    os.environ |= {"OMP_NUM_THREADS": str(args.threads), "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        base = args.real or place / "base"
        if not args.real:
            torch.manual_seed(0)
            config = shape(args.width, args.mlp, args.blocks, args.width // HEAD_SIZE)
            LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(base)
            tiny_tokenizer().save_pretrained(base)
        vocabulary = len(AutoTokenizer.from_pretrained(base))
        load = Load(args.prompt, args.tokens, tuple(args.at_once), vocabulary)
        found = measure_all(base, place, load, args)
    settings = {k: v for k, v in vars(args).items() if isinstance(v, int | float | str)}
    write_figures(settings | {"real": str(args.real)} | found, args.json)


if __name__ == "__main__":
    main()
