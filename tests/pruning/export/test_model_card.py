from __future__ import annotations

from pathlib import Path

import pytest
from huggingface_hub import ModelCard as HubCard

from secateur.pruning.export.model_card import ModelCard
from secateur.pruning.plan import plan_without
from tests.pruning.export.plans import uneven_plan, uniform_plan
from tests.tiny import tiny_folder, tiny_llama


def test_the_card_says_where_the_model_comes_from(tmp_path: Path) -> None:
    plan = uneven_plan(tiny_folder(tmp_path / "base"))
    card = ModelCard(
        title="Half a Llama",
        base_model='me/"llama": 7m',
        budget=[["", "dense", "pruned"], ["parameters", "7 M", "4 M"]],
        quality=[["text", "dense", "pruned"], ["a|b", "12.1", "14.2"]],
        command="python train.py fit",
        versions={"torch": "2.13", "lightning": "2.6"},
        licence="apache-2.0",
        tags=["disp"],
    )
    text = card.render(plan)
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
    assert "Speed" not in text  # no rows were given
    assert text.isascii()
    assert text == card.render(plan)


def test_a_ragged_table_is_refused(tmp_path: Path) -> None:
    plan = uneven_plan(tiny_folder(tmp_path / "base"))
    card = ModelCard("x", "y", speed=[["a", "b"], ["1"]])
    with pytest.raises(ValueError, match="'Speed and memory' of the model card differ in length"):
        card.render(plan)


def test_a_stock_model_needs_no_code_and_its_card_says_so(tmp_path: Path) -> None:
    base = tiny_folder(tmp_path / "base")
    text = ModelCard("x", "y").render(uniform_plan(base))
    assert "This is a stock model" in text
    assert "trust_remote_code" not in text
    assert "trust_remote_code" in ModelCard("x", "y").render(uneven_plan(base))


def test_parts_that_are_gone_are_named() -> None:
    plan = plan_without(tiny_llama(), "x", [(0, "attn"), (1, "attn"), (1, "mlp")], {})
    text = ModelCard("t", "b").render(plan)
    assert "base model: all of blocks 1; the attention of blocks 0. " in text
    assert "Gone as a whole" not in ModelCard("t", "b").render(
        plan_without(tiny_llama(), "x", [], {})
    )
