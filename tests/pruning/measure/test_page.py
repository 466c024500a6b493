from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser
from typing import Any

from secateur.pruning.measure.generation import Answer, Generation
from secateur.pruning.measure.page import STEPS_CAPTION, Page, Picture
from secateur.pruning.measure.plots import draw_steps
from secateur.pruning.measure.report import Report
from tests.pruning.measure.test_verdict import row, speed

EMPTY = {"meta", "img", "br"}


class Tags(HTMLParser):
    """Notes whether every tag is closed, and what a page would fetch."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.fetched: list[str] = []
        self.seen: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.seen.append(tag)
        self.fetched += [value for name, value in attrs if name in ("src", "href")]
        if tag not in EMPTY:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def report() -> Report:
    def said(text: str, loops: bool) -> Generation:
        return Generation((Answer("Why?", text, 0.25, loops),), 0.25, loops, True)

    rows = [
        row("dense", 10.0, speed=speed(1.0, 1.2), generation=said("Because.", False)),
        row("pruned", 12.0, 800, generation=said("<script>alert(1)</script>", True)),
    ]
    return Report(rows, 10, {"device": "cpu", "threads": 2})


def page(**more: Any) -> str:
    return Page("A base, pruned", report(), **more).render()


def test_it_is_whole_and_fetches_nothing() -> None:
    lines = [{"step": str(step), "val_perplexity": str(20 - step)} for step in (1, 2)]
    figure = draw_steps(lines)
    assert figure is not None
    picture = Picture("Quality", figure, STEPS_CAPTION)
    found = Tags(page(pictures=[picture], facts={"command": "run"}, tables={"S": [["a"], ["b"]]}))
    assert found.open == []
    assert [value.split(",")[0] for value in found.fetched] == ["data:image/svg+xml;base64"]
    assert "script" not in found.seen
    assert picture.data == Picture("Quality", figure, "").data


def test_verdict_figures_answers_and_conditions_are_there() -> None:
    text = re.sub(r"\s+", " ", page(facts={"command": "python train.py fit"}))
    shown = re.findall("<tr><td>(.*?)</td>", text)
    assert shown == [row[0] for row in report().cells()[1:]]  # every line has its group
    for said in (
        "The quality of pruned has collapsed",
        "<td>perplexity stories</td><td>10.00</td><td>12.00</td>",
        "<td>excess stories, nats</td><td></td><td>+0.182</td>",
        "pruned is broken: it loops.",
        "Asked through the chat template",
        "&lt;script&gt;alert(1)&lt;/script&gt;",
        "context_tokens 10, device cpu, threads 2",
        "python train.py fit",
    ):
        assert said in text
    assert "lm-eval" not in text  # no task was asked


def test_text_of_the_run_itself_is_told_apart() -> None:
    assert "pruned model may lose far more" not in page()  # its text is called stories
    own = report()
    rows = [replace(r, perplexity={"validation": r.perplexity["stories"]}) for r in own.rows]
    assert "pruned model may lose far more" in Page("t", replace(own, rows=rows)).render()


def test_one_validation_is_no_picture() -> None:
    assert draw_steps([{"step": "1", "val_perplexity": "3.0"}, {"step": "1", "kept": "1"}]) is None
