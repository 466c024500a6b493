from __future__ import annotations

import math

import pytest

from secateur.pruning.measure.pareto import AXES, draw_pareto, family_page, unbeaten
from secateur.pruning.measure.perplexity import MeasuredPerplexity
from secateur.pruning.measure.report import Report
from secateur.pruning.measure.row import Row
from secateur.pruning.measure.sizes import count
from secateur.pruning.measure.speed import Speed
from tests.tiny import tiny_llama


def row(name: str, perplexity: float, width: int, decode: float | None = None) -> Row:
    speed = None
    if decode is not None:
        speed = Speed(1.0, 1.0, decode, 1.0, None, {"decode_seconds": (decode / 2, 2 * decode)})
    quality = {"validation": MeasuredPerplexity(perplexity, math.log(perplexity), None, 100)}
    counts = count(tiny_llama(intermediate_size=width))
    return Row(name, quality, counts, speed=speed, memory_bytes=width * 1000)


def report(*rows: Row) -> Report:
    return Report(rows, 16, {"device": "cpu"})


def test_what_no_other_beats() -> None:
    """The case of the docstring; of equals, none beats the other."""
    assert unbeaten([(1.0, 0.0), (0.8, 0.2), (0.9, 0.3), (0.5, 0.7)]) == [0, 1, 3]
    assert unbeaten([(1.0, 0.0), (0.8, 0.2), (0.8, 0.2), (0.8, 0.3)]) == [0, 1, 2]
    assert unbeaten([(1.0, 0.0), (0.5, -0.1)]) == [1]


def test_the_points_are_excess_over_cost() -> None:
    of = report(row("dense", 10.0, 40), row("keep 0.8", 12.0, 30), row("keep 0.5", 11.0, 20))
    (memory,) = (axis for axis in AXES if axis.title == "weights in memory")
    figure = draw_pareto(of, memory)
    assert figure is not None
    (axes,) = figure.axes
    line, *_ = axes.lines
    # The first size costs more and is worse than the second: the line passes it by.
    assert list(line.get_xdata()) == pytest.approx([0.5, 1.0])
    assert list(line.get_ydata()) == pytest.approx([math.log(1.1), 0.0])
    names = {text.get_text(): text.xy for text in axes.texts}  # type: ignore[attr-defined]
    assert names["keep 0.8"] == pytest.approx((0.75, math.log(1.2)))


def test_a_picture_for_every_cost_that_is_known() -> None:
    untimed = report(row("dense", 10.0, 40), row("keep 0.5", 11.0, 20))
    text = family_page("1 size of tiny", untimed, {"sizes": "0.5"}).render()
    assert text.count("<figure>") == 3
    timed = report(row("dense", 10.0, 40, 0.4), row("keep 0.5", 11.0, 20, 0.3))
    text = family_page("1 size of tiny", timed, {"sizes": "0.5"}).render()
    assert text.count("<figure>") == 5
    assert "Excess against time per decoded token" in text
    assert "http" not in text.replace("http://www.w3.org", "")  # nothing is fetched
