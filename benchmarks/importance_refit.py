"""Quality and time of importance masks and the closed-form refit: nothing is trained.

Gates of the frozen model are ranked by `Fisher` in 16 rounds of 4 batches of 8 x 256 tokens of the
mask-training text, in the order of its shuffle by the seed, and closed down to the budget; the
model that is left is cut and refitted on the next 256 windows. Excess is ln(perplexity) - ln(dense
perplexity) in nats, the mean over the first 200 windows of three texts.

The unit of time is a plain step: forward and backward of 8 x 256 tokens through the same frozen
model, the median of steps taken before, between and after, in the same process. Seconds are those
that the process spent on the CPU.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from benchmarks.data import (
    data_folder,
    evaluation_windows,
    mask_training_windows,
    write_figures,
)
from benchmarks.disp_quality import FIRST_WINDOWS, excess
from benchmarks.disp_step import plain_step
from secateur.pruning.export.cut import cut
from secateur.pruning.measure.perplexity import perplexity
from secateur.pruning.measure.report import count
from secateur.pruning.plan import plan_from_indices
from secateur.pruning.sites import find_sites
from secateur.pruning.widths.budget import Budget
from secateur.pruning.widths.gate_gradient import Fisher
from secateur.pruning.widths.gradual_ranking import GradualRanking
from secateur.pruning.widths.refit import refit

BATCH_SIZE = 8


class Clock:
    """Seconds that named pieces of work took on the CPU, one entry per time."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = defaultdict(list)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Note how long a `with` block takes."""
        start = time.process_time()
        yield
        self.seconds[name].append(time.process_time() - start)


def perplexities(model: Any, texts: dict[str, Tensor]) -> dict[str, float]:
    """Perplexity of every text."""
    return {name: perplexity(model, windows, 20).value for name, windows in texts.items()}


def run(
    folder: str, seed: int, budget: Budget, search: GradualRanking, windows: int, damping: float
) -> dict[str, Any]:
    """Rank, cut, refit and measure once."""
    dense: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    dense.eval().requires_grad_(False)
    windows_WT = mask_training_windows(folder, seed)
    texts = evaluation_windows(folder, FIRST_WINDOWS)
    plain, clock = plain_step(folder), Clock()

    def plain_steps() -> None:
        plain(windows_WT[:BATCH_SIZE])  # the first after other work is slower
        for _ in range(3):
            with clock("plain"):
                plain(windows_WT[:BATCH_SIZE])

    plain_steps()
    with clock("search"):
        ranking = search.choose(dense, budget, Fisher(), windows_WT)
    plain_steps()
    kept = ranking.kept(find_sites(dense, budget.family(dense.config)))
    plan = plan_from_indices(dense, "", kept, {})
    narrow = cut(dense, plan)
    models = {"dense": perplexities(dense, texts), "masks_alone": perplexities(narrow, texts)}
    with clock("refit"):
        text_WT = windows_WT[search.num_windows :][:windows]
        refit(dense, narrow, plan, text_WT, damping, BATCH_SIZE)
    plain_steps()
    models["refitted"] = perplexities(narrow, texts)

    step = statistics.median(clock.seconds["plain"])
    parameters = [count(model).block_projection_parameters for model in (narrow, dense)]
    figures: dict[str, Any] = {
        "refit_plain_steps": clock.seconds["refit"][0] / step,
        "total_plain_steps": (clock.seconds["refit"][0] + clock.seconds["search"][0]) / step,
        "plain_step_seconds": step,
        "kept_counted": parameters[0] / parameters[1],
    }
    for key, name in (("excess", "refitted"), ("masks_alone_excess", "masks_alone")):
        over = excess(models[name], models["dense"])
        figures[key] = statistics.mean(over.values())
        figures |= {f"{name}_perplexity_{text}": models[name][text] for text in texts}
    return figures


def main() -> None:
    """Run every seed; write the figures of each and their means."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kept", type=float, default=0.5, help="kept fraction of block FLOPs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="orders of the windows")
    parser.add_argument("--rounds", type=int, default=16, help="rounds of the ranking")
    parser.add_argument("--batches", type=int, default=4, help="batches of a round")
    parser.add_argument("--windows", type=int, default=256, help="windows of the refit")
    parser.add_argument("--damping", type=float, default=0.01, help="damping of the refit")
    parser.add_argument("--model", help="model folder (default: llama7m_mha of the data)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    folder = args.model or str(data_folder() / "models" / "llama7m_mha")
    search = GradualRanking(args.rounds, args.batches, BATCH_SIZE)
    runs = {
        seed: run(folder, seed, Budget(args.kept), search, args.windows, args.damping)
        for seed in args.seeds
    }
    figures: dict[str, Any] = {"kept_asked": args.kept, "threads": args.threads}
    figures |= {f"{k}_seed{seed}": value for seed, own in runs.items() for k, value in own.items()}
    for key in next(iter(runs.values())):
        figures[key] = statistics.mean(own[key] for own in runs.values())
    figures["excess_worst"] = max(own["excess"] for own in runs.values())
    write_figures(figures, args.json)


if __name__ == "__main__":
    main()
