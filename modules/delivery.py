"""What a run that learned masks leaves behind: the smaller model, proven, measured, described."""

from __future__ import annotations

import os
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from pruning import __version__
from pruning.budget import Cost, Flops, Parameters
from pruning.export.model_card import ModelCard
from pruning.export.writer import export_model
from pruning.measure.plots import plot_widths
from pruning.measure.report import Report, measure
from pruning.plan import DESCRIPTION, PruningPlan
from pruning.surgery import replaced_folder

_PACKAGES = ("torch", "transformers", "lightning")
_COSTS: tuple[Cost, ...] = (Parameters(), Parameters(True), Flops(), Flops(True))


def deliver(
    model: PreTrainedModel,
    plan: PruningPlan,
    base: str,
    base_folder: Path,
    folder: Path,
    windows_NT: Tensor,
    command: str,
) -> Report:
    """Export a plan, compare the result with the dense model, and write everything down.

    Beside the model folder come `report.json` and `report.md`, which have the speed too, and the
    plan itself in `plan/`.

    Args:
        model: The dense base model, with no gates applied.
        plan: What stays.
        base: Name of the base model, for the model card.
        base_folder: Its folder.
        folder: Where the smaller model goes.
        windows_NT: Token windows (int64) to verify and measure on.
        command: The command that made the model.

    Raises:
        ValueError: The exported model is not the masked one, or `folder` holds something else.
    """
    report: list[Report] = []

    def describe(partial: Path) -> ModelCard:
        pruned: Any = AutoModelForCausalLM.from_pretrained(
            partial, trust_remote_code=True, dtype=model.dtype
        )
        pruned.to(model.device)
        prompt = max(1, windows_NT.shape[1] // 2)
        report.append(
            measure(
                {"dense": model, "pruned": pruned},
                {"validation": windows_NT},
                folders={"dense": base_folder, "pruned": partial},
                speed={"prompt_tokens": prompt, "new_tokens": min(32, prompt), "repeats": 3},
            )
        )
        return card(report[0], plan, model, base, command)

    export_model(base_folder, plan, folder, describe, model, windows_NT[:2])
    with replaced_folder(folder.parent / "plan", is_plan) as partial:
        plan.save(partial)
    (folder.parent / "report.json").write_text(report[0].json(), encoding="utf-8")
    (folder.parent / "report.md").write_text(report[0].markdown(), encoding="utf-8")
    plot_widths(plan, folder.parent / "plots" / "widths.png")
    Console().print(report[0].table())
    return report[0]


def is_plan(folder: Path) -> bool:
    """Whether a folder holds a plan that may be replaced."""
    return (folder / DESCRIPTION).is_file()


def card(
    report: Report, plan: PruningPlan, model: PreTrainedModel, base: str, command: str
) -> ModelCard:
    """The model card of a measured export; without times, so that equal runs give equal cards."""
    widths_S = torch.tensor([float(width) for width in plan.widths])
    budget = [["counted", "dense", "kept", "fraction"]]
    for cost in _COSTS:
        table = cost.table(model)
        kept = float(table(widths_S))
        budget.append(
            [cost.label, f"{table.dense:,.0f}", f"{kept:,.0f}", f"{kept / table.dense:.4f}"]
        )
    dense, pruned = report.rows
    quality = [["text", "dense perplexity", "pruned perplexity"]] + [
        [text, f"{dense.perplexity[text].value:.3f}", f"{pruned.perplexity[text].value:.3f}"]
        for text in dense.perplexity
    ]
    return ModelCard(
        title=f"{Path(base).name}, {plan.provenance['kept']:.1%} of {plan.provenance['counted']}",
        base_model=os.path.relpath(base) if Path(base).exists() else base,
        budget=budget,
        quality=quality,
        command=command,
        versions={"secateur": __version__} | {name: version(name) for name in _PACKAGES},
    )
