"""A report as one page: HTML that holds its pictures and needs no network; prints to PDF."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any

import matplotlib
from jinja2 import Environment, StrictUndefined
from matplotlib.figure import Figure

from secateur.pruning.measure.report import Report
from secateur.pruning.measure.verdict import A_ZERO

_GROUPS = {
    "Quality": ("perplexity", "excess", "accuracy", "repetition"),
    "Size and operations": ("parameters", "kept", "FLOPs", "zeros", "weights"),
    "Speed": ("prefill", "time", "decode", "peak"),
}
"""Heading to what the lines below it begin with."""

WIDTHS_CAPTION = (
    "What stays of every block, first block on the left. A block has five widths: attn_in, the "
    "entries of the residual stream that attention reads; attn_out, those that it writes; mlp_in "
    "and mlp_out, the same for the MLP; mlp_mid, the neurons inside the MLP. The number in a cell "
    "is the width that stays, its colour the fraction. attn_heads, where it is shown, counts the "
    "key-value heads, each with its queries. attn and mlp, where they are shown, are attention and "
    "MLP as a whole: 0 says that the block has lost them."
)
STEPS_CAPTION = (
    "Perplexity of the validation text while training went on; where masks are learned, the "
    "fraction of the cost that they keep."
)


@dataclass(frozen=True)
class Picture:
    """A picture of a page.

    Args:
        title: What it shows, for those who cannot see it.
        figure: The picture.
        caption: How to read it.
    """

    title: str
    figure: Figure
    caption: str

    @property
    def least_width(self) -> int:
        """Pixels below which it is scrolled and not made smaller: its numbers have to be read."""
        return int(52 * self.figure.get_figwidth())

    @property
    def data(self) -> str:
        """The picture as SVG, in base64; equal figures are equal texts."""
        out = io.BytesIO()
        with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "secateur"}):
            self.figure.savefig(out, format="svg", metadata={"Date": None})
        return base64.b64encode(out.getvalue()).decode()


@dataclass(frozen=True)
class Page:
    """A report and what else is told with it.

    Args:
        title: Heading, in which the base model is named.
        report: The figures.
        pictures: Pictures, in order.
        tables: Heading to a further table, whose first row is its heading.
        facts: How the model was made: name to value.
    """

    title: str
    report: Report
    pictures: Sequence[Picture] = ()
    tables: Mapping[str, Sequence[Sequence[str]]] = field(default_factory=dict)
    facts: Mapping[str, str] = field(default_factory=dict)

    def render(self) -> str:
        """The text of the HTML file."""
        # Answers of models and names of files are text, whatever they look like.
        environment = Environment(
            autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
        )
        source = files("secateur.pruning.measure").joinpath("page.html").read_text("utf-8")
        names, *rows = self.report.cells()
        asked = [row for row in self.report.rows if row.generation is not None]
        models = self.report.rows
        return environment.from_string(source).render(
            title=self.title,
            verdicts=list(self.report.verdicts().values()),
            names=names,
            groups=list(_grouped(rows)),
            conditions=self.report.caption(),
            tasks=any(row.zero_shot for row in models),
            held_back="validation" in models[0].perplexity,
            timed=any(row.speed for row in models),
            zeros=any((row.zeros or 0) > A_ZERO for row in models),
            questions=list(_questions(self.report)),
            chat=any(row.generation.chat for row in asked if row.generation),
            broken=[row.name for row in asked if row.generation and row.generation.broken],
            pictures=self.pictures,
            tables=self.tables,
            facts=self.facts,
        )


def _grouped(rows: Sequence[Sequence[str]]) -> Iterator[tuple[str, list[Sequence[str]]]]:
    for heading, words in _GROUPS.items():
        if own := [row for row in rows if row[0].startswith(words)]:
            yield heading, own


def _questions(report: Report) -> Iterator[dict[str, Any]]:
    """Every prompt with the answers of all models."""
    asked = [(row.name, row.generation.answers) for row in report.rows if row.generation]
    for place, first in enumerate(asked[0][1] if asked else ()):
        answers = [(name, own[place]) for name, own in asked]
        yield {"prompt": first.prompt, "answers": answers}
