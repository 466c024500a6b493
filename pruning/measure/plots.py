"""Pictures of plans and of runs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from secateur.pruning.plan import Plan
from secateur.pruning.sites import names_of


def plot_widths(plan: Plan, path: Path) -> None:
    """Write a PNG of `draw_widths`.

    Args:
        plan: The plan.
        path: The file to write; its folder is created if needed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    draw_widths(plan).savefig(path, dpi=150)


def draw_widths(plan: Plan) -> Figure:
    """Draw the fraction of every site that stays, block by block."""
    names = names_of(plan.sites)
    blocks = sorted({site.block for site in plan.sites})
    figure = Figure(figsize=(max(5.0, 1.5 + 0.45 * len(blocks)), 1.5 + 0.45 * len(names)))
    axes = figure.add_subplot()
    kept = {
        (site.name, site.block): (str(width), width / site.size)
        for site, width in zip(plan.sites, plan.widths, strict=True)
    }
    absent = ("", math.nan)  # blocks of a narrow model may lack attention or MLP
    fractions = [[kept.get((name, block), absent)[1] for block in blocks] for name in names]
    image = axes.imshow(fractions, vmin=0, vmax=1, cmap="viridis", aspect="auto")
    for row, name in enumerate(names):
        for column, block in enumerate(blocks):
            width, fraction = kept.get((name, block), absent)
            axes.text(
                column, row, width, ha="center", va="center", fontsize=7,
                color="black" if fraction > 0.6 else "white",
            )  # fmt: skip
    axes.set_xticks(range(len(blocks)), [str(block) for block in blocks])
    axes.set_yticks(range(len(names)), names)
    axes.set_xlabel("block")
    stays = plan.provenance.get("kept")
    axes.set_title("Kept widths" + (f" ({stays:.1%} of the cost)" if stays else ""))
    figure.colorbar(image, label="fraction kept")
    figure.tight_layout()
    return figure


def draw_steps(lines: Sequence[Mapping[str, str]]) -> Figure | None:
    """Draw quality, and what masks keep, against the steps of a run.

    Args:
        lines: Lines of the metrics of the run, by column; empty cells were not measured.

    Returns:
        None where there are less than two validations.
    """
    quality, kept = _column(lines, "val_perplexity"), _column(lines, "kept")
    if len(quality) < 2:
        return None
    figure = Figure(figsize=(7.0, 3.2))
    axes = figure.add_subplot()
    axes.plot(*zip(*quality, strict=True), marker="o", color="tab:blue")
    axes.set_xlabel("step")
    axes.set_ylabel("validation perplexity", color="tab:blue")
    axes.grid(alpha=0.3)
    if kept:
        right = axes.twinx()
        right.plot(*zip(*kept, strict=True), color="tab:orange", alpha=0.7)
        right.set_ylabel("fraction kept", color="tab:orange")
        right.set_ylim(0, 1.05)
    axes.set_title("Quality against steps")
    figure.tight_layout()
    return figure


def _column(lines: Sequence[Mapping[str, str]], name: str) -> list[tuple[int, float]]:
    return [(int(line["step"]), float(line[name])) for line in lines if line.get(name)]
