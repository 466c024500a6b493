"""Dense, learned, magnitude and random masks side by side, all at the same fraction of block FLOPs.

Reads the run of `configs/demo/disp.yaml`, makes magnitude and random plans and the learned plan
without refit and gains, exports them, and measures all models on the validation text of the run.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import AutoModelForCausalLM

from benchmarks.data import write_figures
from secateur.modules import TextData
from secateur.pruning.export.deliver import export
from secateur.pruning.measure.plots import plot_widths
from secateur.pruning.measure.report import measure
from secateur.pruning.plan import Plan, plan_from_indices
from secateur.pruning.widths.budget import Budget
from secateur.pruning.widths.gradual_ranking import GradualRanking
from secateur.pruning.widths.scores import WidthScore
from secateur.pruning.widths.width_magnitude import RandomOrder, WidthMagnitude


def main() -> None:
    """Export the baselines, measure, and write report.md, report.json and pictures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="output folder of the mask-learning run")
    parser.add_argument("dense", type=Path, help="folder of the dense model")
    parser.add_argument("text", help="text of the run, its data.train")
    parser.add_argument("--windows", type=int, default=128, help="validation windows")
    parser.add_argument("--window-tokens", type=int, default=128, help="tokens of a window")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    args = parser.parse_args()

    learned = Plan.load(args.run / "plan")
    models: dict[str, Any] = {"dense": AutoModelForCausalLM.from_pretrained(args.dense)}
    folders = {"dense": args.dense, "learned": args.run / "model"}
    budget = Budget(keep=float(learned.provenance["keep"]))
    table = budget.cost.table(models["dense"])
    scores: dict[str, WidthScore] = {"magnitude": WidthMagnitude(), "random": RandomOrder()}
    plans = {"masks alone": replace(learned, gains=None)}
    for name, score in scores.items():
        ranking = GradualRanking(rounds=1).choose(models["dense"], budget, score)
        kept = ranking.kept(learned.sites)
        widths_S = torch.tensor([float(len(index)) for index in kept])
        origin = {"method": name, "kept": float(table.fraction(widths_S))}
        plans[name] = plan_from_indices(models["dense"], learned.base, kept, origin)
    for name, plan in plans.items():
        folders[name] = args.run / "compare" / name.replace(" ", "_")
        export(args.dense, plan, folders[name], models["dense"])
        plot_widths(plan, args.run / "plots" / f"widths_{folders[name].name}.png")
    for name in ("learned", *plans):
        models[name] = AutoModelForCausalLM.from_pretrained(folders[name], trust_remote_code=True)

    data = TextData(
        train=args.text,
        tokenizer=str(args.dense),
        window_tokens=args.window_tokens,
        validation_windows=args.windows,
    )
    data.setup()
    windows_NT = torch.stack([data.validation_set[i] for i in range(len(data.validation_set))])
    prompt = args.window_tokens // 2
    report = measure(
        models,
        {"validation": windows_NT},
        folders=folders,
        speed={
            "batch_size": 16,
            "prompt_tokens": prompt,
            "new_tokens": min(32, prompt),
            "repeats": 5,
        },
    )
    (args.run / "compare" / "report.md").write_text(report.markdown(), encoding="utf-8")
    (args.run / "compare" / "report.json").write_text(report.json(), encoding="utf-8")
    Console().print(report.table())
    figures = {f"perplexity_{row.name}": row.perplexity["validation"].value for row in report.rows}
    write_figures(figures, args.json)
    print(f"Widths per block: {args.run / 'plots' / 'widths.png'}")
    print(f"The smaller model: {folders['learned']}")


if __name__ == "__main__":
    main()
