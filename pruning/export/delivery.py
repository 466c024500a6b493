"""What a run leaves behind: the smaller model, proven, measured, described."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from secateur import __version__
from secateur.pruning.costs import Cost, Flops, Parameters
from secateur.pruning.export.alignment import compare_alignment
from secateur.pruning.export.model_card import ModelCard
from secateur.pruning.export.verify import verify_saved
from secateur.pruning.export.writer import export_model
from secateur.pruning.files.model_folder import CONFIG, replaced_folder
from secateur.pruning.measure.plots import plot_widths
from secateur.pruning.measure.report import Report, Row, measure
from secateur.pruning.plan import DESCRIPTION, IN_MODEL, TENSORS, Plan

MARK = "secateur.json"
"""In a model folder of ours: how the model was made, and the models that came before it."""

_ALIGNMENT = ("alignment.json", "alignment.md")
_PACKAGES = ("torch", "transformers", "lightning")
_COSTS: tuple[Cost, ...] = (Parameters(), Parameters(True), Flops(), Flops(True))


@dataclass(frozen=True)
class Origin:
    """Where a model came from.

    Args:
        base: Name of the base model, for the model card.
        folder: Its folder.
        fingerprint: Its content hash.
        command: The command that made the model.
        steps: Optimiser steps that it took.
        provenance: How the model was pruned, by method: JSON values only.
        training: How its weights were trained: JSON values only.
    """

    base: str
    folder: Path
    fingerprint: str
    command: str
    steps: int
    provenance: Mapping[str, Any] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The base model as the model card calls it: paths relative, so that they can be shown."""
        return os.path.relpath(self.base) if Path(self.base).exists() else self.base


def deliver(
    model: PreTrainedModel,
    plan: Plan,
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
    forget_alignment(folder)
    report: list[Report] = []
    masks = {"masks": dict(plan.provenance)}
    origin = Origin(base, base_folder, plan.base, command, plan.provenance.get("step", 0), masks)

    def describe(partial: Path) -> ModelCard:
        report.append(compare(model, partial, base_folder, windows_NT))
        stages = write_mark(partial, origin, report[0])
        return card(report[0], plan, model, origin, stages)

    export_model(base_folder, plan, folder, describe, model, windows_NT[:2])
    with replaced_folder(folder.parent / "plan", is_plan) as partial:
        plan.save(partial)
    plot_widths(plan, folder.parent / "plots" / "widths.png")
    publish(report[0], folder)
    return report[0]


def forget_alignment(folder: Path) -> None:
    """Remove the comparison that an earlier run with other settings has left beside a model."""
    for name in _ALIGNMENT:
        (folder.parent / name).unlink(missing_ok=True)


def deliver_alignment(
    model: PreTrainedModel,
    aligned: Plan,
    free: Plan,
    base_folder: Path,
    folder: Path,
    windows_NT: Tensor,
) -> Report:
    """Write down, as `alignment.md` and `alignment.json`, what aligned widths cost and bring.

    Args:
        model: The dense base model, with no gates applied.
        aligned: The plan that was exported.
        free: The plan of the same budget without a width multiple.
        base_folder: Folder of the base model.
        folder: Where the smaller model lies; the files go beside it.
        windows_NT: Token windows (int64) to measure on.
    """
    speed = _speed_settings(windows_NT)
    report = compare_alignment(model, base_folder, aligned, free, windows_NT, speed)
    (folder.parent / "alignment.json").write_text(report.json(), encoding="utf-8")
    (folder.parent / "alignment.md").write_text(report.markdown(), encoding="utf-8")
    return report


def deliver_weights(
    model: PreTrainedModel,
    dense: PreTrainedModel,
    origin: Origin,
    write: Callable[[Path], None],
    folder: Path,
    windows_NT: Tensor,
) -> Report:
    """Save a model whose own weights were trained or pruned; else as `deliver`.

    Args:
        model: The live model, which the saved one has to equal.
        dense: The base model.
        origin: Where the model came from.
        write: Writes weights, configuration and tokenizer into an empty folder.
        folder: Where the model goes.
        windows_NT: Token windows (int64) to verify and measure on.

    Raises:
        ValueError: The saved model is not the live one, or `folder` holds something else.
    """
    name = "pruned" if origin.provenance else "trained"
    with replaced_folder(folder, is_trained) as partial:
        write(partial)
        verify_saved(model, partial, windows_NT[:2])
        report = compare(dense, partial, origin.folder, windows_NT, name)
        stages = write_mark(partial, origin, report)
        # Stock models, which most are, have no plan.
        plan = Plan.load(partial) if (partial / IN_MODEL / DESCRIPTION).is_file() else None
        text = weights_card(report, origin, stages, plan)
        (partial / "README.md").write_text(text, encoding="utf-8")
    publish(report, folder)
    return report


@contextmanager
def rounded(model: PreTrainedModel, dtype: torch.dtype) -> Iterator[None]:
    """The model with all weights in a type; they are what they were at the end."""
    before = {p: p.data for p in model.parameters() if p.dtype != dtype}
    try:
        for parameter in before:
            parameter.grad, parameter.data = None, parameter.data.to(dtype)
        yield
    finally:
        for parameter, data in before.items():
            parameter.data = data


def compare(
    dense: PreTrainedModel,
    folder: Path,
    base_folder: Path,
    windows_NT: Tensor,
    name: str = "pruned",
) -> Report:
    """Measure a model folder beside the dense model, on the device that this one is on."""
    pruned: Any = AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, dtype=dense.dtype
    )
    pruned.to(dense.device)
    return measure(
        {"dense": dense, name: pruned},
        {"validation": windows_NT},
        folders={"dense": base_folder, name: folder},
        speed=_speed_settings(windows_NT),
    )


def _speed_settings(windows_NT: Tensor) -> dict[str, int]:
    prompt = max(1, windows_NT.shape[1] // 2)
    return {"prompt_tokens": prompt, "new_tokens": min(32, prompt), "repeats": 3}


def publish(report: Report, folder: Path) -> None:
    """Write a report beside a model folder, the stages before it included, and show it."""
    stages = read_stages(folder)
    figures = report.as_dict() | {"stages": stages}
    text = json.dumps(figures, indent=1) + "\n"
    (folder.parent / "report.json").write_text(text, encoding="utf-8")
    lines = report.markdown()
    if len(stages) > 1:
        table = stages_table(stages)
        rows = (table[0], ["---"] * len(table[0]), *table[1:])
        lines += "\n" + "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"
    (folder.parent / "report.md").write_text(lines, encoding="utf-8")
    Console().print(report.table())


def write_mark(folder: Path, origin: Origin, report: Report) -> list[dict[str, Any]]:
    """Write `secateur.json` into a model folder; returns all stages that led to the model.

    The stages of the base model, if it came out of Secateur, are the first. No times are among the
    figures: equal runs write equal files.
    """
    stage = {
        "base": origin.name,
        "base_fingerprint": origin.fingerprint,
        "command": origin.command,
        "steps": origin.steps,
        "provenance": dict(origin.provenance),
        "training": dict(origin.training),
        "context_tokens": report.context_tokens,
        "models": {row.name: _figures(row, report.context_tokens) for row in report.rows},
    }
    stages = [*read_stages(origin.folder), stage]
    mark = {"command": origin.command, "steps": origin.steps, "stages": stages}
    (folder / MARK).write_text(json.dumps(mark, indent=1) + "\n", encoding="utf-8")
    return stages


def read_stages(folder: Path) -> list[dict[str, Any]]:
    """The stages that led to a model, none if it did not come out of Secateur.

    Raises:
        ValueError: `secateur.json` is damaged.
    """
    path = folder / MARK
    if not path.is_file():
        return []
    try:
        stages: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["stages"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged: {error!r}; export the model again.") from error
    return stages


def stages_table(stages: list[dict[str, Any]]) -> list[list[str]]:
    """The models of a chain, one after the other: the first dense one and what each stage made."""
    table = [["model", "parameters", "FLOPs per token", "perplexity"]]
    for number, stage in enumerate(stages, start=1):
        dense, made = list(stage["models"].values())[:2]
        first = [(f"`{stage['base']}`", dense)] if number == 1 else []
        made_by = ", ".join(stage["provenance"]) or "training"
        for name, figures in [*first, (f"stage {number}: {made_by}", made)]:
            quality = " / ".join(f"{value:.3f}" for value in figures["perplexity"].values())
            table.append(
                [
                    name,
                    f"{figures['parameters']:,}",
                    f"{figures['flops_per_token']:,} at {stage['context_tokens']} tokens",
                    quality,
                ]
            )
    return table


def is_plan(folder: Path) -> bool:
    """Whether a folder holds a plan of ours, and nothing else, so that it may be replaced."""
    if not folder.is_dir() or {path.name for path in folder.iterdir()} != {DESCRIPTION, TENSORS}:
        return False
    try:
        Plan.load(folder)
    except ValueError:
        return False
    return True


def is_trained(folder: Path) -> bool:
    """Whether a folder holds a model of ours that may be replaced."""
    return (folder / MARK).is_file() and (folder / CONFIG).is_file()


def card(
    report: Report,
    plan: Plan,
    model: PreTrainedModel,
    origin: Origin,
    stages: list[dict[str, Any]],
) -> ModelCard:
    """The model card of a measured export; without times, so that equal runs give equal cards."""
    widths_S = torch.tensor([float(width) for width in plan.widths])
    budget = [["counted", "dense", "kept", "fraction"]]
    for cost in _COSTS:
        table = cost.table(model, plan.family)
        kept = float(table(widths_S))
        budget.append(
            [cost.label, f"{table.dense:,.0f}", f"{kept:,.0f}", f"{kept / table.dense:.4f}"]
        )
    name = Path(origin.base).name
    return ModelCard(
        title=f"{name}, {plan.provenance['kept']:.1%} of {plan.provenance['counted']}",
        base_model=origin.name,
        budget=budget,
        quality=_quality(report),
        stages=stages_table(stages) if len(stages) > 1 else (),
        command=origin.command,
        versions=_versions(),
    )


def weights_card(
    report: Report, origin: Origin, stages: list[dict[str, Any]], plan: Plan | None
) -> str:
    """The text of the model card of a model whose weights were trained or pruned; without times."""
    dense, made = (_figures(row, report.context_tokens) for row in report.rows)
    names = {"parameters": "all parameters", "flops_per_token": "FLOPs per token"}
    budget = [["counted", "dense", "kept", "fraction"]] + [
        [label, f"{dense[key]:,}", f"{made[key]:,}", f"{made[key] / dense[key]:.4f}"]
        for key, label in names.items()
    ]
    name, done = Path(origin.base).name, " and ".join(origin.provenance)
    title = f"{name}, {made['parameters'] / dense['parameters']:.1%} of its parameters"
    if zeros := origin.provenance.get("weights", {}).get("model_sparsity"):
        title += f", {zeros:.1%} of them zero"
    kind = "Some of its blocks have no attention or no MLP, as `config.json` says."
    kind = "This is a stock model of its family." if plan is None else kind
    return ModelCard(
        title=title if done else f"{name}, trained further",
        base_model=origin.name,
        budget=budget,
        quality=_quality(report),
        stages=stages_table(stages) if len(stages) > 1 else (),
        command=origin.command,
        versions=_versions(),
        tags=tuple(origin.provenance),
    ).render_weights(
        origin.fingerprint,
        f"`{origin.name}`, {f'pruned ({done}) and ' if done else ''}trained for {origin.steps} "
        f"steps by Secateur. {kind} Before this folder was put in its "
        "place, its logits were compared with those of the model in training, on whole windows and "
        "in a cached decode.",
        {**origin.provenance, "training": dict(origin.training)},
        plan,
    )


def _figures(row: Row, context_tokens: int) -> dict[str, Any]:
    return {
        "parameters": row.counts.parameters,
        "flops_per_token": row.counts.flops_per_token(context_tokens),
        "perplexity": {text: round(found.value, 4) for text, found in row.perplexity.items()},
    }


def _quality(report: Report) -> list[list[str]]:
    dense, pruned = report.rows
    return [["text", "dense perplexity", f"{pruned.name} perplexity"]] + [
        [text, f"{dense.perplexity[text].value:.3f}", f"{pruned.perplexity[text].value:.3f}"]
        for text in dense.perplexity
    ]


def _versions() -> dict[str, str]:
    return {"secateur": __version__} | {name: version(name) for name in _PACKAGES}
