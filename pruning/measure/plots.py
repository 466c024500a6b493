"""Pictures of plans."""

from __future__ import annotations

import math
from pathlib import Path

from matplotlib.figure import Figure

from secateur.pruning.plan import Plan
from secateur.pruning.sites import names_of


def plot_widths(plan: Plan, path: Path) -> None:
    """Write a PNG of the kept fraction of every site, block by block.

    Args:
        plan: The plan.
        path: The file to write; its folder is created if needed.
    """
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
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
