from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import ModelCard as HubCard

from secateur.pruning.chains import Step
from secateur.pruning.export.model_card import ModelCard, card
from secateur.pruning.export.stages import Origin
from secateur.pruning.files.base_model import BaseModel
from secateur.pruning.measure.report import Report
from secateur.pruning.plan import Plan, plan_without
from tests.pruning.export.plans import uneven_plan, uniform_plan
from tests.pruning.measure.test_verdict import row, speed
from tests.tiny import tiny_folder, tiny_llama

PROVEN = "Every bit was compared."


def of_plan(base: Path, plan: Plan) -> str:
    provenance = {"masks": dict(plan.provenance)}
    return card(Origin(str(base), base, plan.base, provenance=provenance), None, plan, [], PROVEN)


def test_the_card_says_where_the_model_comes_from(tmp_path: Path) -> None:
    plan = uneven_plan(tiny_folder(tmp_path / "base"))
    text = ModelCard(
        title="Half a Llama",
        base_model='me/"llama": 7m',
        fingerprint=plan.base,
        summary="Pruned.",
        tables={
            "Budget": [["", "dense", "pruned"], ["parameters", "7 M", "4 M"]],
            "Quality": [["text", "dense", "pruned"], ["a|b", "12.1", "14.2"]],
            "Stages": [],
        },
        widths=plan.describe(),
        provenance={"seed": 0},
        command="python train.py fit",
        versions={"torch": "2.13", "lightning": "2.6"},
        licence="apache-2.0",
        tags=["disp"],
    ).render()
    header = HubCard(text).data  # the reader of the hub
    assert header.base_model == 'me/"llama": 7m'
    assert header.library_name == "transformers"
    assert header.license == "apache-2.0"
    assert header.tags == ["secateur", "pruned", "disp"]
    for line in (
        "# Half a Llama",
        "| parameters | 7 M | 4 M |",
        "| a\\|b | 12.1 | 14.2 |",
        f"- fingerprint of the base model: {plan.base}",
        "- torch: 2.13",
        "- seed: 0",
        "python train.py fit",
        *plan.describe().splitlines(),
    ):
        assert line in text.splitlines()
    assert "Stages" not in text  # no rows were given
    assert text.isascii()


def test_equal_exports_have_equal_cards(tmp_path: Path) -> None:
    base = tiny_folder(tmp_path / "base")
    assert of_plan(base, uneven_plan(base)) == of_plan(base, uneven_plan(base))


def test_times_are_not_told(tmp_path: Path) -> None:
    base = tiny_folder(tmp_path / "base")
    origin = Origin(str(base), base, "0" * 64)
    texts = []
    for slow in (1.0, 5.0):
        rows = [row("dense", 10.0, speed=speed(1.0, 1.1)), row("p", 10.0, speed=speed(slow, slow))]
        texts.append(card(origin, Report(rows, 48, {}), uneven_plan(base), [], PROVEN))
    assert texts[0] == texts[1]


def test_a_ragged_table_is_refused() -> None:
    ragged = ModelCard("x", "y", "z", "s", tables={"Speed": [["a", "b"], ["1"]]})
    with pytest.raises(ValueError, match="'Speed' of the model card differ in length"):
        ragged.render()


def test_the_title_names_the_base_and_no_place_on_a_disk_is_told(tmp_path: Path) -> None:
    base = tiny_folder(tmp_path / "base")
    plan = uneven_plan(base)
    command = f"python train.py fit --model.base={base} --data.train {base / 'text.json'} --x a/b"
    masks = {"masks": {"kept": 0.5, "counted": "block flops"}}
    origin = Origin(str(base), base, plan.base, command, provenance=masks)
    plan = replace(plan, provenance=masks["masks"])
    text = card(origin, None, plan, [], PROVEN)
    assert "# base (llama, 28k parameters), pruned to 50.0% of its block flops" in text
    assert str(tmp_path) not in text
    assert "python train.py fit --model.base=base --data.train text.json --x a/b" in text


def test_a_collapse_is_in_the_title(tmp_path: Path) -> None:
    base = tiny_folder(tmp_path / "base")
    plan = uneven_plan(base)
    for made, collapsed in ((21.0, True), (11.0, False)):
        report = Report([row("dense", 10.0), row("pruned", made)], 48, {})
        text = card(Origin(str(base), base, plan.base), report, plan, [], PROVEN)
        title, verdict = text.split("---\n")[2].strip().split("\n\n")[:2]
        assert title.endswith("QUALITY HAS COLLAPSED") is collapsed
        assert ("has collapsed" in verdict) is collapsed
        assert "| flops per token at 48 tokens of context |" in text


def test_names_are_not_read_as_markup() -> None:
    text = ModelCard("x<script>\n# y", "a`b](c)", "z", "s", command="run\n```\n# z").render()
    assert "<script>" not in text
    assert not any(line.startswith(("# y", "# z")) for line in text.splitlines())


def test_a_stock_model_needs_no_code_and_its_card_says_so(tmp_path: Path) -> None:
    base = tiny_folder(tmp_path / "base")
    text = of_plan(base, uniform_plan(base))
    assert "is a stock model" in text
    assert "trust_remote_code" not in text
    assert "trust_remote_code" in of_plan(base, uneven_plan(base))


def test_removed_parts_are_named(tmp_path: Path) -> None:
    base = tiny_folder(tmp_path / "base")
    plan = plan_without(tiny_llama(), "x", [(0, "attn"), (1, "attn"), (1, "mlp")], {})
    text = of_plan(base, plan)
    assert "base model: all of blocks 1; the attention of blocks 0. " in text
    assert "Removed entirely" not in of_plan(base, plan_without(tiny_llama(), "x", [], {}))


def test_the_story_of_a_base_is_not_read_as_markup(tmp_path: Path) -> None:
    bad = "x`\n# y <script> [a](b) | c"
    figures = {"parameters": 9, "flops_per_token": 90, "perplexity": {"validation": 5.0}}
    models = {"dense": figures, "pruned": figures}
    stage = {"base": bad, "provenance": {bad: {}}, "context_tokens": 16, "models": models}
    base = tiny_folder(tmp_path / "base")
    plan = uneven_plan(base)
    origin = Origin(str(base), base, plan.base, provenance={"masks": {bad: bad}})
    text = card(origin, None, plan, [stage, stage], PROVEN)
    assert "<script>" not in text
    assert "](" not in text
    assert not any(line.startswith("# y") for line in text.splitlines())
    table = [line for line in text.splitlines() if line.startswith("| ") and "stage" in line]
    assert {line.count("|") for line in table} == {5}


@pytest.mark.parametrize(
    "wrong",
    [
        [3],
        [{}],
        {"a": 1},
        [{"base": 3, "provenance": {}, "context_tokens": 1, "models": {}}],
        [{"base": "a", "provenance": {}, "context_tokens": "1", "models": {"a": 1, "b": 2}}],
        [{"base": "a", "provenance": {"weights": 3}, "context_tokens": 1, "models": {}}],
    ],
)
def test_a_story_that_is_none_is_told_before_anything_else(wrong: object, tmp_path: Path) -> None:
    base = tiny_folder(tmp_path / "base")
    (base / "secateur.json").write_text(json.dumps({"stages": wrong}))
    with pytest.raises(ValueError, match=r"secateur\.json is damaged: .* or remove the file"):
        BaseModel(base).refuse(Step.TRAINING)
