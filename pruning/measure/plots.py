"""Pictures of plans and of scores."""

from __future__ import annotations

import statistics
from collections.abc import Collection
from pathlib import Path

from matplotlib.figure import Figure

from pruning.depth.scores import BlockScores
from pruning.depth.units import Unit
from pruning.plan import PruningPlan


def plot_widths(plan: PruningPlan, path: Path) -> None:
    """Write a PNG of the fraction of every site that stays, block by block.

    Args:
        plan: What stays.
        path: The file to write; its folder is made if needed.
    """
    names = list(dict.fromkeys(site.name for site in plan.sites))
    blocks = sorted({site.block for site in plan.sites})
    figure = Figure(figsize=(max(5.0, 1.5 + 0.45 * len(blocks)), 1.5 + 0.45 * len(names)))
    axes = figure.add_subplot()
    kept = {
        (site.name, site.block): (width, width / site.size)
        for site, width in zip(plan.sites, plan.widths, strict=True)
    }
    fractions = [[kept[name, block][1] for block in blocks] for name in names]
    image = axes.imshow(fractions, vmin=0, vmax=1, cmap="viridis", aspect="auto")
    for row, name in enumerate(names):
        for column, block in enumerate(blocks):
            width, fraction = kept[name, block]
            axes.text(
                column, row, str(width), ha="center", va="center", fontsize=7,
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


def plot_scores(
    scores: BlockScores, path: Path, removed: Collection[Unit] = (), title: str = "Score by block"
) -> None:
    """Write a PNG of the score of every unit with its standard error; what is removed is marked.

    The low scores decide, and often differ by little beside the highest: scores far above the
    median, by ten times what it lies above the lowest, are written at the upper edge.

    Args:
        scores: The scores; lowest is removed first.
        path: The file to write; its folder is made if needed.
        removed: The units that go.
        title: Heading, such as the name of the score.
    """
    values = scores.values.tolist()
    errors = [0.0] * len(values) if scores.errors is None else scores.errors.tolist()
    figure = Figure(figsize=(max(5.0, 1.5 + 0.3 * len(values)), 3.5))
    axes = figure.add_subplot()
    middle = statistics.median(values)
    spread = middle - min(values)
    ceiling = middle + 10 * spread if spread else max(values)
    for label, colour, marker, gone in (
        ("stays", "tab:blue", "o", False),
        ("removed", "tab:red", "X", True),
    ):
        marked = [place for place, unit in enumerate(scores.units) if (unit in removed) == gone]
        if own := [place for place in marked if values[place] <= ceiling]:
            axes.errorbar(
                own, [values[place] for place in own], [errors[place] for place in own],
                fmt=marker, color=colour, capsize=3, label=label,
            )  # fmt: skip
        for place in set(marked) - set(own):
            axes.annotate(
                f"{values[place]:.5g}", (place, 1), xytext=(0, -30), color=colour, fontsize=8,
                xycoords=("data", "axes fraction"), textcoords="offset points", ha="center",
                arrowprops={"arrowstyle": "->", "color": colour},
            )  # fmt: skip
    axes.set_xlim(-0.8, len(values) - 0.2)
    axes.margins(y=0.3)  # room for what is written at the edge
    axes.set_xticks(
        range(len(values)),
        [unit.key for unit in scores.units],
        rotation=90 if any(unit.part != "block" for unit in scores.units) else 0,
        fontsize=8,
    )
    axes.set_xlabel("block")
    axes.set_ylabel("score" + ("" if scores.errors is None else ", one standard error"))
    axes.set_title(title)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
