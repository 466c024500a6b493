"""Ways to half of the block FLOPs side by side, on the models of the demo.

Reads the runs that `make demo` leaves in its folder, and makes what they pass through or compete
with, from the same dense model:

- masks alone: the learned masks, without refit and gains;
- refitted: the same, refitted in closed form;
- settled: the same, and gains trained (run `disp`);
- recovered: masks by importance, refitted, all weights trained (run `recovered`);
- importance: masks by importance, refitted, nothing trained (run `importance`);
- magnitude, random: masks by the norms of the weights, and by chance, not refitted.

All are measured on the validation text of the runs.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from transformers import AutoModelForCausalLM

from benchmarks.data import write_figures
from secateur.modules import TextData
from secateur.pruning.blocks.refit import refit
from secateur.pruning.export.cut import cut
from secateur.pruning.export.deliver import export
from secateur.pruning.measure.plots import plot_widths
from secateur.pruning.measure.report import measure
from secateur.pruning.plan import Plan, plan_from_indices
from secateur.pruning.protocols import calibration_windows
from secateur.pruning.widths.budget import Budget
from secateur.pruning.widths.gradual_ranking import GradualRanking
from secateur.pruning.widths.scores import WidthScore
from secateur.pruning.widths.width_magnitude import RandomOrder, WidthMagnitude

RUNS = {"settled": "disp", "recovered": "recovered", "importance": "importance"}
SCORES: dict[str, WidthScore] = {"magnitude": WidthMagnitude(), "random": RandomOrder()}
REFIT_WINDOWS = 256


def ranked(dense: Any, learned: Plan, name: str) -> Plan:
    """The plan of one of `SCORES`, on the budget of the learned one."""
    budget = Budget(keep=float(learned.provenance["keep"]))
    ranking = GradualRanking(rounds=1).choose(dense, budget, SCORES[name])
    kept = ranking.kept(learned.sites)
    widths_S = torch.tensor([float(len(index)) for index in kept])
    origin = {"method": name, "kept": float(budget.cost.table(dense).fraction(widths_S))}
    return plan_from_indices(dense, learned.base, kept, origin)


def refitted(dense: Any, plan: Plan, text_WT: Tensor) -> Any:
    """The model that a plan leaves, refitted."""
    narrow = cut(dense, plan)
    refit(dense, narrow, plan, text_WT)
    return narrow.eval()


def main() -> None:
    """Export the baselines, measure, and write report.md, report.json and pictures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("demo", type=Path, help="folder of the demo: runs/demo")
    parser.add_argument("--windows", type=int, default=128, help="validation windows")
    parser.add_argument("--window-tokens", type=int, default=128, help="tokens of a window")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    args = parser.parse_args()

    run, base = args.demo / "disp", args.demo / "dense" / "model"
    data = TextData(
        train=str(args.demo / "text"),
        tokenizer=str(base),
        window_tokens=args.window_tokens,
        validation_windows=args.windows,
    )
    data.setup()
    dense = AutoModelForCausalLM.from_pretrained(base)
    learned = Plan.load(run / "plan")
    plans = {"masks alone": learned} | {name: ranked(dense, learned, name) for name in SCORES}
    folders = {"dense": base} | {name: args.demo / own / "model" for name, own in RUNS.items()}
    for name, plan in plans.items():
        folders[name] = run / "compare" / name.replace(" ", "_")
        export(base, plan, folders[name], dense)
        plot_widths(plan, run / "plots" / f"widths_{folders[name].name}.png")

    text_WT = calibration_windows(data, REFIT_WINDOWS, 0, "demo_compare")
    load = partial(AutoModelForCausalLM.from_pretrained, trust_remote_code=True)
    models = {
        "dense": dense,
        "masks alone": load(folders["masks alone"]),
        "refitted": refitted(dense, learned, text_WT),
    } | {name: load(folders[name]) for name in (*RUNS, *SCORES)}
    prompt = args.window_tokens // 2
    windows = data.validation_set
    report = measure(
        models,
        {"validation": torch.stack([windows[place] for place in range(len(windows))])},
        folders=folders,
        speed={
            "batch_size": 16,
            "prompt_tokens": prompt,
            "new_tokens": min(32, prompt),
            "repeats": 5,
        },
    )
    (run / "compare" / "report.md").write_text(report.markdown(), encoding="utf-8")
    (run / "compare" / "report.json").write_text(report.json(), encoding="utf-8")
    Console().print(report.table())
    figures = {f"perplexity_{row.name}": row.perplexity["validation"].value for row in report.rows}
    write_figures(figures, args.json)
    print(f"Widths per block: {run / 'plots' / 'widths.png'}")
    print(f"The smaller models: {', '.join(str(folders[name]) for name in RUNS)}")


if __name__ == "__main__":
    main()
