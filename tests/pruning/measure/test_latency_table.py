from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from secateur.pruning.export.rewrite import prune_checkpoint
from secateur.pruning.families import FAMILIES
from secateur.pruning.measure.compare import compare_folders
from secateur.pruning.measure.latency_table import PHASES, read_table
from tests.latency import flops_table, noisy_table, seconds_by_hand
from tests.pruning.export.plans import uneven_plan
from tests.tiny import SENTENCES, tiny_family_folder, tiny_folder, tiny_llama_config, tiny_model

CONFIG = tiny_llama_config()


def test_points_of_the_grid_are_what_was_measured_and_between_them_is_a_line() -> None:
    table = noisy_table(CONFIG)
    curves = table.curves({"prefill": 1.0})
    widths = {"attn_in": 3, "attn_out": 24, "mlp_in": 1, "mlp_mid": 37, "mlp_out": 5}
    widths = {r: min(table.grid[r], key=lambda g, w=w: abs(g - w)) for r, w in widths.items()}
    at = {role: torch.tensor(float(width)) for role, width in widths.items()}
    kind = torch.tensor(0)
    found = curves.attention(kind, at["attn_in"], at["attn_out"])
    found = found + curves.mlp(at["mlp_in"], at["mlp_mid"], at["mlp_out"])
    assert float(found) == pytest.approx(seconds_by_hand(table, "prefill", widths))
    low, high = table.grid["attn_in"][1:3]
    ends = [curves.attention(kind, torch.tensor(float(w)), at["attn_out"]) for w in (low, high)]
    middle = curves.attention(kind, torch.tensor((low + high) / 2), at["attn_out"])
    assert float(middle) == pytest.approx((float(ends[0]) + float(ends[1])) / 2)


def test_outside_the_grid_the_nearest_width_counts() -> None:
    curves = flops_table(CONFIG, points=4).curves({"decode": 1.0})
    low, high = curves.grid["mlp_in"][0], curves.grid["mlp_in"][-1]
    mid, out = torch.tensor(10.0), torch.tensor(10.0)
    assert curves.mlp(low - 0.5, mid, out) == curves.mlp(low, mid, out)
    assert curves.mlp(high + 5, mid, out) == curves.mlp(high, mid, out)


def test_a_mix_is_the_sum_of_its_passes() -> None:
    table = noisy_table(CONFIG)
    single = {phase: table.curves({phase: 1.0}) for phase in PHASES}
    mix = table.curves({"prefill": 2.0, "decode": 30.0})
    torch.testing.assert_close(mix.up, 2 * single["prefill"].up + 30 * single["decode"].up)
    assert mix.rest == pytest.approx(2 * single["prefill"].rest + 30 * single["decode"].rest)


def test_monotone_tables_never_fall_and_change_only_what_is_slower_than_a_wider_one() -> None:
    table = noisy_table(CONFIG)
    raw, used = (table.curves({"prefill": 1.0}, monotone) for monotone in (False, True))
    assert bool((raw.up.diff(dim=0) < 0).any())  # else this shows nothing
    for plane in (used.up, used.down):
        assert bool((plane.diff(dim=0) >= 0).all())
        assert bool((plane.diff(dim=1) >= 0).all())
    for place in ((0, 0), (2, 3), (4, 1)):
        assert used.up[place] == raw.up[place[0] :, place[1] :].min()
    assert used.up[-1, -1] == raw.up[-1, -1]  # the dense model is as measured


def test_a_table_is_read_as_it_was_written(tmp_path: Path) -> None:
    table = noisy_table(CONFIG)
    table.save(tmp_path / "table.json")
    again = read_table(tmp_path / "table.json")
    assert again == table
    assert again.hash == table.hash != noisy_table(CONFIG, seed=1).hash


def _without(name: str) -> Callable[[dict[str, Any]], None]:
    return lambda content: content.pop(name)


def _changed(content: dict[str, Any]) -> None:
    content["phases"]["prefill"]["rest"] += 1


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (_changed, "damaged or was changed by hand"),
        (_without("hash"), "damaged or was changed by hand"),
        (_without("grid"), "is damaged, entries are missing"),
        (_without("phases"), "is damaged, entries are missing"),
        (_without("format"), "is no table of times"),
        (lambda content: content["phases"].pop("decode"), "damaged or was changed by hand"),
        (lambda content: content["phases"]["decode"].pop("up"), "is damaged, entries are missing"),
        (lambda content: content.update(more=1), "is damaged, entries are missing"),
    ],
)
def test_damage_is_told(
    harm: Callable[[dict[str, Any]], Any], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "table.json"
    flops_table(CONFIG).save(path)
    content = json.loads(path.read_text())
    harm(content)
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=f"`table` .*{message}.*python -m secateur latency"):
        read_table(path)


@pytest.mark.parametrize(
    "fields",
    [
        {"grid": {**flops_table(CONFIG).grid, "mlp_in": [8, 4, 24]}},  # does not rise
        {"grid": {**flops_table(CONFIG).grid, "mlp_in": [4, 24]}},  # other planes
        {"phases": {p: flops_table(CONFIG, rest=float("inf")).phases[p] for p in PHASES}},
        {"phases": {p: flops_table(CONFIG, rest=-1.0).phases[p] for p in PHASES}},
    ],
)
def test_figures_that_cannot_be_are_damage_whatever_the_checksum_says(
    fields: dict[str, Any], tmp_path: Path
) -> None:
    flops_table(CONFIG, **fields).save(tmp_path / "table.json")
    with pytest.raises(ValueError, match="is damaged"):
        read_table(tmp_path / "table.json")


def test_no_file_no_json_and_too_coarse_tables_are_told(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"cannot be read \(No such file"):
        read_table(tmp_path / "none.json")
    (tmp_path / "half.json").write_text('{"format": ')
    with pytest.raises(ValueError, match="is no JSON"):
        read_table(tmp_path / "half.json", "--latency")
    flops_table(CONFIG, points=3).save(tmp_path / "coarse.json")
    with pytest.raises(ValueError, match="too coarse: it has 3 widths of `attn_in`, and needs 4"):
        read_table(tmp_path / "coarse.json")


@pytest.mark.parametrize("removed", [(), [(1, "attn"), (2, "mlp")]])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_time_of_a_narrow_model_is_that_of_its_blocks(
    family: str, removed: list[tuple[int, str]], tmp_path: Path
) -> None:
    base = tiny_family_folder(tmp_path / "base", family)
    plan = uneven_plan(base, removed=removed)
    prune_checkpoint(base, plan, tmp_path / "small")
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "small", trust_remote_code=True)
    table = noisy_table(tiny_model(family).config, points=64)
    table.check_model(small.config, "The table")
    expected = table.phases["decode"].rest
    curves = table.curves({"decode": 1.0})
    one = torch.tensor(1.0)
    for block, widths in enumerate(plan.widths_by_block()):
        at = {name: one * width for name, width in widths.items()}
        if widths["attn"]:
            kind = torch.tensor(curves.kinds.index(_kind(table, small.config, block)))
            expected += float(curves.attention(kind, at["attn_in"], at["attn_out"]))
        if widths["mlp"]:
            expected += float(curves.mlp(at["mlp_in"], at["mlp_mid"], at["mlp_out"]))
    assert table.seconds(small, "decode") == pytest.approx(expected)


def _kind(table: Any, config: Any, block: int) -> str:
    types = getattr(config, "layer_types", None)
    return types[block] if types else "attention"


def test_another_model_is_told(tmp_path: Path) -> None:
    table = flops_table(CONFIG)
    with pytest.raises(ValueError, match="another model: `num_key_value_heads` is 2"):
        table.check_model(tiny_llama_config(num_key_value_heads=6), "The table")
    table.check_model(tiny_llama_config(num_hidden_layers=7), "The table")  # blocks are alike


def test_compare_tells_predictions_beside_measured_times(tmp_path: Path) -> None:
    base = tiny_folder(tmp_path / "base")
    prune_checkpoint(base, uneven_plan(base), tmp_path / "small")
    (tmp_path / "text.txt").write_text(" ".join(SENTENCES * 5), encoding="utf-8")
    table = flops_table(CONFIG, rest=1.0)
    table.save(tmp_path / "table.json")
    report = compare_folders(
        {"dense": base, "small": tmp_path / "small"},
        {"own": tmp_path / "text.txt"},
        window_tokens=16,
        latency=tmp_path / "table.json",
    )
    assert report.conditions["prompt_tokens"] == table.prompt_tokens
    assert report.conditions["table of times from"] == table.measured_on
    dense, small = report.rows
    assert small.predicted_seconds["prefill"] < dense.predicted_seconds["prefill"]
    cells = {row[0]: row[1:] for row in report.cells()}
    shown = f"{dense.predicted_seconds['decode'] * 1e3:.2f}"
    assert cells["decode by the table, ms"][0] == shown
    assert not any(row.predicted_seconds for row in report.untimed().rows)
