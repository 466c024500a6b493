"""Pictures of the scores of blocks."""

from __future__ import annotations

import statistics
from collections.abc import Collection
from pathlib import Path

from matplotlib.figure import Figure

from secateur.pruning.depth.scores import BlockScores
from secateur.pruning.depth.units import Unit


def plot_scores(
    scores: BlockScores, path: Path, removed: Collection[Unit] = (), title: str = "Score by block"
) -> None:
    """Write a PNG of the score of every unit with its standard error; mark the removed units.

    Low scores matter, and often differ little compared with the highest: scores that are above the
    median by more than ten times its distance from the lowest are written at the upper edge.

    Args:
        scores: The scores; lowest is removed first.
        path: The file to write; its folder is created if needed.
        removed: The units to mark as removed.
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
    axes.margins(y=0.3)  # room for text at the edge
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
