"""Times that a latency table predicts, compared with measured ones, and with FLOPs.

usage: python -m benchmarks.latency_table --json FILE

The table of a random Llama is measured as `python -m secateur latency` does it. Then models of
random plans, on budgets between --keep of the block FLOPs with widths that differ between sites and
blocks, are timed in turns with the dense model, in the same process. What is compared is what a
budget uses: time as a fraction of that of the dense model, by the table and measured.

Keys: `median_error` and `worst_error` of |predicted / measured - 1| over all plans and both phases;
`rank_correlation` (Spearman) of predicted with measured time of the mix of one prefill and
--tokens decoding steps, and `rank_correlation_flops` that of the block FLOPs, of the whole model's
in `mix_rank_correlation_whole_flops`. The same per phase (`prefill_`, `decode_`, `mix_`), and, if
the fraction of FLOPs is taken as that of time, with the ending `_block_flops`. Errors of the times
themselves end in `_seconds`; a machine that slows down between table and plans adds to them. All
plans and the dense model are in memory at once.
"""

from __future__ import annotations

import argparse
import random
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.data import write_figures
from benchmarks.export_speed import HEAD_SIZE, shape
from secateur.pruning.costs import Flops
from secateur.pruning.families import family_of, skeleton
from secateur.pruning.measure.latency_bench import Bench, Measurement
from secateur.pruning.measure.latency_table import PHASES
from secateur.pruning.measure.speed import measure_speed
from secateur.pruning.sites import find_sites
from secateur.pruning.widths.budget import Budget


def random_widths(config: Any, keep: float, multiple: int, seed: int) -> list[dict[str, int]]:
    """Widths of all blocks on a budget, by random scores that prefer some sites to others."""
    model = skeleton(config)
    sites = find_sites(model, family_of(config))
    generator = torch.Generator().manual_seed(seed)
    scores_N = torch.cat(
        [
            torch.rand(site.size, generator=generator) + 0.3 * torch.randn(1, generator=generator)
            for site in sites
        ]
    )
    budget = Budget(keep, Flops(), width_multiple=multiple, selection=0)
    kept = budget.finalise(scores_N, sites, budget.cost.table(model))
    widths: list[dict[str, int]] = [{} for _ in range(config.num_hidden_layers)]
    for site, index_W in zip(sites, kept, strict=True):
        if len(index_W) < site.size:
            widths[site.block][site.name] = len(index_W)
    return widths


def rank_correlation(first: list[float], second: list[float]) -> float:
    """Spearman's, of two lists without ties."""
    ranks = [torch.tensor(own).argsort().argsort().double() for own in (first, second)]
    return float(torch.corrcoef(torch.stack(ranks))[0, 1])


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--width", type=int, default=1024, help="model width, a multiple of 64 (default: 1024)")
    add("--blocks", type=int, default=4, help="number of blocks (default: 4)")
    add("--mlp", type=int, default=2816, help="MLP width (default: 2816)")
    add("--plans", type=int, default=20, help="random plans (default: 20)")
    add("--keep", type=float, nargs=2, default=[0.4, 0.8], help="least and most kept block FLOPs")
    add("--dtype", default="float32", help="torch type (default: float32)")
    add("--prompt", type=int, default=256, help="tokens of a prefill (default: 256)")
    add("--tokens", type=int, default=64, help="decoded tokens (default: 64)")
    add("--batch", type=int, default=1, help="sequences (default: 1)")
    add("--points", type=int, default=Measurement.points, help="widths per site at most")
    add("--rounds", type=int, default=3, help="rounds of the table (default: 3)")
    add("--turns", type=int, default=5, help="timed turns of the plans (default: 5)")
    add("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    add("--device", default="cpu", help="torch device")
    add("--cpu-time", action="store_true", help="processor time; needs --threads 1")
    add("--json", type=Path, help="write the figures to this file")
    args = parser.parse_args()
    if args.cpu_time and (args.threads != 1 or args.device != "cpu"):
        parser.error("--cpu-time needs --threads 1 and --device cpu: waiting threads count as well")
    torch.set_num_threads(args.threads)
    config = shape(args.width, args.mlp, args.blocks, args.width // HEAD_SIZE)
    how = Measurement(
        prompt_tokens=args.prompt,
        new_tokens=args.tokens,
        batch_size=args.batch,
        points=args.points,
        rounds=args.rounds,
        cpu_time=args.cpu_time,
    )
    found: dict[str, Any] = {}
    with torch.inference_mode():
        torch.manual_seed(0)
        dtype, device = getattr(torch, args.dtype), torch.device(args.device)
        bench, began = Bench(config, dtype, device, how), time.perf_counter()
        table = bench.table()
        found["table_seconds"] = time.perf_counter() - began
        found |= {f"{name}_spread": own.spread for name, own in table.phases.items()}
        found |= {f"{name}_factor": own.factor for name, own in table.phases.items()}
        found |= {f"{name}_checks": own.checks for name, own in table.phases.items()}
        draw, blocks = random.Random(0), range(args.blocks)
        kept = [draw.uniform(*args.keep) for _ in range(args.plans)]
        plans = [random_widths(config, k, table.multiple, n) for n, k in enumerate(kept)]
        flops = {name: Flops(name == "whole", args.prompt) for name in ("block", "whole")}
        models = {str(n): bench.narrow(widths, blocks) for n, widths in enumerate(plans)}
        models["dense"] = bench.narrow([{} for _ in blocks], blocks)
        speeds = measure_speed(
            models, args.batch, args.prompt, args.tokens, args.turns, clock=how.clock
        )
        rows: dict[str, dict[str, float]] = {}
        for name, model in models.items():
            rows[name] = {p: getattr(speeds[name], f"{p}_seconds") for p in PHASES}
            rows[name] |= {f"{p}_said": table.seconds(model, p) for p in PHASES}
            for key, cost in flops.items():
                rows[name][f"{key}_flops"] = cost.table(model).dense
    found |= summary(rows, args.tokens)
    settings = {k: v for k, v in vars(args).items() if isinstance(v, int | float | str | list)}
    write_figures(settings | found, args.json)


def summary(rows: dict[str, dict[str, float]], tokens: int) -> dict[str, float]:
    """Errors and rank correlations of all plans, as fractions of the dense model."""
    for row in rows.values():
        for said in ("", "_said"):
            row[f"mix{said}"] = row[f"prefill{said}"] + tokens * row[f"decode{said}"]
    dense = rows.pop("dense")
    plans = [{key: own[key] / dense[key] for key in own} for own in rows.values()]
    found: dict[str, float] = {}
    for phase in (*PHASES, "mix"):
        times = [plan[phase] for plan in plans]
        for key in (f"{phase}_said", "block_flops", "whole_flops"):
            name = key.removeprefix(phase).removesuffix("_said")
            end = name and f"_{name}"
            errors = [abs(plan[key] / plan[phase] - 1) for plan in plans]
            found[f"{phase}_median_error{end}"] = median(errors)
            found[f"{phase}_worst_error{end}"] = max(errors)
            found[f"{phase}_rank_correlation{end}"] = rank_correlation(
                [plan[key] for plan in plans], times
            )
    errors = [abs(plan[f"{p}_said"] / plan[p] - 1) for plan in plans for p in PHASES]
    seconds = [abs(own[f"{p}_said"] / own[p] - 1) for own in rows.values() for p in PHASES]
    found |= {"median_error_seconds": median(seconds), "worst_error_seconds": max(seconds)}
    found |= {f"plan_{n}_{key}": plan[key] for n, plan in enumerate(plans) for key in plan}
    return {
        "median_error": median(errors),
        "worst_error": max(errors),
        "rank_correlation": found["mix_rank_correlation"],
        "rank_correlation_flops": found["mix_rank_correlation_block_flops"],
        **found,
    }


if __name__ == "__main__":
    main()
