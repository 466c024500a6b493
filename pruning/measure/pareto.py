"""Sizes of one model against each other: quality over what a size costs, as pictures and a page."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from matplotlib.figure import Figure

from secateur.pruning.measure.page import Page, Picture
from secateur.pruning.measure.report import Report
from secateur.pruning.measure.row import Row
from secateur.pruning.measure.speed import Speed
from secateur.pruning.measure.verdict import excess

Reading = tuple[float, float, float]
"""What a model costs, with the shortest and the longest reading."""


@dataclass(frozen=True)
class Axis:
    """What a model costs, in one way.

    Args:
        title: What is counted.
        caption: How to read the picture.
        read: The cost of a model at a number of tokens of context; None where it is not known.
    """

    title: str
    caption: str
    read: Callable[[Row, int], Reading | None]


def _exact(count: int | None) -> Reading | None:
    return None if count is None else (float(count), float(count), float(count))


def _timed(speed: Speed | None, key: str) -> Reading | None:
    if speed is None:
        return None
    value = getattr(speed, key)
    return value, *speed.ranges.get(key, (value, value))


_HOW = (
    "Excess is ln(perplexity / dense perplexity), the mean over the texts; lower and further left "
    "is better. The line joins the sizes that no other one beats in both; a hollow point is beaten."
)
_SPREAD = " Bars reach from the shortest to the longest of the repeats."
AXES = (
    Axis(
        "FLOPs per token",
        _HOW,
        lambda row, tokens: _exact(row.counts.flops_per_token(tokens)),
    ),
    Axis("parameters", _HOW, lambda row, _: _exact(row.counts.parameters)),
    Axis("weights in memory", _HOW, lambda row, _: _exact(row.memory_bytes)),
    Axis("time of a prefill", _HOW + _SPREAD, lambda row, _: _timed(row.speed, "prefill_seconds")),
    Axis(
        "time per decoded token",
        _HOW + _SPREAD,
        lambda row, _: _timed(row.speed, "decode_seconds"),
    ),
)


def unbeaten(points: Sequence[tuple[float, float]]) -> list[int]:
    """Places of the points (cost, loss) to which no other is equal or lower in both, lower in one.

    Example: of (1, 0), (0.8, 0.2), (0.9, 0.3) and (0.5, 0.7) the third is beaten by the second.
    """
    return [
        place
        for place, (cost, loss) in enumerate(points)
        if not any(
            other[0] <= cost and other[1] <= loss and other != (cost, loss) for other in points
        )
    ]


def draw_pareto(report: Report, axis: Axis) -> Figure | None:
    """Draw excess against a cost, both relative to the dense model.

    Args:
        report: The dense model, and its sizes.
        axis: The cost.

    Returns:
        None where the cost of a model is not known.
    """
    readings = [axis.read(row, report.context_tokens) for row in report.rows]
    known = [reading for reading in readings if reading is not None]
    if len(known) < len(readings):
        return None
    of_dense = known[0][0]
    points = [
        (reading[0] / of_dense, excess(report.rows[0], row))
        for reading, row in zip(known, report.rows, strict=True)
    ]
    best = sorted(unbeaten(points), key=lambda place: points[place])
    figure = Figure(figsize=(7.0, 3.6))
    axes = figure.add_subplot()
    axes.plot(*zip(*(points[place] for place in best), strict=True), color="tab:blue", alpha=0.5)
    for place, ((cost, loss), row, (value, low, high)) in enumerate(
        zip(points, report.rows, known, strict=True)
    ):
        axes.errorbar(
            cost, loss, xerr=[[(value - low) / of_dense], [(high - value) / of_dense]],
            marker="o", color="tab:blue", capsize=3, ecolor="tab:gray",
            markerfacecolor="tab:blue" if place in best else "white",
        )  # fmt: skip
        axes.annotate(row.name, (cost, loss), (6, 6), textcoords="offset points", fontsize=8)
    axes.set_xlabel(f"{axis.title}, fraction of the dense model")
    axes.set_ylabel("excess, nats per token")
    axes.margins(0.12)
    axes.grid(alpha=0.3)
    figure.tight_layout()
    return figure


def family_page(title: str, report: Report, facts: Mapping[str, str]) -> Page:
    """The page of several sizes: verdicts, figures side by side, and a picture per cost.

    Args:
        title: Heading, in which the base model is named.
        report: The dense model, and its sizes, measured in one run.
        facts: How they were made: name to value.
    """
    drawn = ((axis, draw_pareto(report, axis)) for axis in AXES)
    pictures = [
        Picture(f"Excess against {axis.title}", figure, axis.caption)
        for axis, figure in drawn
        if figure is not None
    ]
    return Page(title, report, pictures, facts=facts)
