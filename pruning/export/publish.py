"""What lies beside an exported model: plan, pictures, and the report as text, JSON and a page."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from secateur.pruning.export.stages import Origin, stages_table
from secateur.pruning.files.model_folder import is_plan, read_stages, replaced_folder
from secateur.pruning.measure.cost import process_cost
from secateur.pruning.measure.page import STEPS_CAPTION, WIDTHS_CAPTION, Page, Picture
from secateur.pruning.measure.plots import draw_steps, draw_widths, plot_widths
from secateur.pruning.measure.report import Report
from secateur.pruning.plan import Plan

ALIGNMENT = ("alignment.json", "alignment.md")


def publish(report: Report, plan: Plan | None, origin: Origin, folder: Path) -> None:
    """Write plan and report beside a model folder, the stages before it included, and show them.

    Args:
        report: Base model and new model side by side.
        plan: What stays of each block; None if no width was cut.
        origin: Where the model came from.
        folder: Where it lies.
    """
    root = folder.parent
    for name in ALIGNMENT:  # of an earlier run with other settings
        (root / name).unlink(missing_ok=True)
    if plan is not None:
        with replaced_folder(root / "plan", is_plan) as partial:
            plan.save(partial)
        plot_widths(plan, root / "plots" / "widths.png")
    stages = read_stages(folder)
    text = json.dumps(report.as_dict() | {"stages": stages}, indent=1) + "\n"
    (root / "report.json").write_text(text, encoding="utf-8")
    table = stages_table(stages) if len(stages) > 1 else []
    lines = report.markdown()
    if table:
        rows = (table[0], ["---"] * len(table[0]), *table[1:])
        lines += "\n" + "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"
    (root / "report.md").write_text(lines, encoding="utf-8")
    page = Page(
        f"{report.rows[-1].name.capitalize()}: {origin.described()}",
        report,
        _pictures(plan, root),
        {"Stages": [[cell.strip("`") for cell in row] for row in table]} if table else {},
        _facts(origin),
    )
    (root / "report.html").write_text(page.render(), encoding="utf-8")
    report.show(Console())


def _pictures(plan: Plan | None, root: Path) -> list[Picture]:
    found = []
    if plan is not None:
        found.append(Picture("Kept widths, block by block", draw_widths(plan), WIDTHS_CAPTION))
    if (figure := draw_steps(_metrics(root))) is not None:
        found.append(Picture("Quality against steps", figure, STEPS_CAPTION))
    return found


def _metrics(root: Path) -> list[dict[str, str]]:
    """Lines of the newest metrics of a run, as far as they are written."""
    files = [*(root / "metrics").glob("version_*/metrics.csv")]
    if not files:
        return []
    newest = max(files, key=lambda file: int(file.parent.name.removeprefix("version_")))
    with newest.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def _facts(origin: Origin) -> dict[str, str]:
    facts = {"base model": origin.described(), "fingerprint of the base": origin.fingerprint}
    methods = origin.provenance  # what one method tells of another is told there
    parts = [own for made in methods.values() if isinstance(made, Mapping) for own in made.values()]
    facts |= {name: _told(made) for name, made in methods.items() if made not in parts}
    if origin.training:
        facts["training"] = _told(origin.training)
    facts["steps"] = f"{origin.steps:,}"
    if command := origin.shown_command:
        facts["command"] = command
    facts["cost of this process"] = process_cost()
    return facts | origin.versions()


def _told(made: Any) -> str:
    """Settings and results in one line; long lists are left to report.json."""
    if isinstance(made, Mapping):
        # Under `refit`, "refit kept" says the name again.
        told = {name: _told(value).removeprefix(f"{name} ") for name, value in made.items()}
        return ", ".join(f"{name}: {value}" for name, value in told.items())
    if isinstance(made, Sequence) and not isinstance(made, str):
        return "; ".join(map(_told, made)) if len(made) <= 100 else f"{len(made)} entries"
    return f"{made:.4g}" if isinstance(made, float) else str(made)
