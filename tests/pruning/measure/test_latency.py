from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch

from secateur.pruning.commands import UsageError
from secateur.pruning.export.rewrite import prune_checkpoint
from secateur.pruning.families import FAMILIES
from secateur.pruning.files.base_model import BaseModel
from secateur.pruning.measure.latency import main, measure_latency
from secateur.pruning.measure.latency_bench import Bench, Measurement
from secateur.pruning.measure.latency_table import PHASES, ROLES, grid_of, read_table
from tests.pruning.export.plans import uneven_plan
from tests.tiny import tiny_folder, tiny_llama_config, tiny_model

SMALL: dict[str, Any] = {"prompt_tokens": 12, "new_tokens": 4, "points": 4, "rounds": 1}


@pytest.fixture
def ticks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that moves on by a second whenever it is read."""
    seconds = count()
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(seconds)))


@pytest.mark.parametrize(
    ("size", "multiple", "points", "expected"),
    [
        (5, 1, 8, [1, 2, 3, 4, 5]),
        (100, 32, 10, [32, 64, 96, 100]),
        (20, 32, 10, [10, 20]),
        (1024, 64, 5, [64, 256, 576, 960, 1024]),
        (1, 1, 10, [1]),
    ],
)
def test_a_grid_is_dense_where_narrow_and_has_the_last_width_below_the_full_one(
    size: int, multiple: int, points: int, expected: list[int]
) -> None:
    assert grid_of(size, multiple, points) == expected


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.usefixtures("ticks")
def test_every_part_of_every_family_is_timed(family: str) -> None:
    """Every call takes a second: an attention, an MLP, what is in no block, and a whole model."""
    config = tiny_model(family).config
    how = Measurement(**SMALL, models=2, blocks=3)
    table = measure_latency(config, torch.float32, torch.device("cpu"), how)
    for phase in table.phases.values():
        assert phase.rest == 1
        assert {value for line in phase.attn_in.values() for value in line} == {1}
        assert {value for line in phase.attn_out.values() for value in line} == {0}
        assert {value for line in phase.attn_heads.values() for value in line} == {1}
        assert phase.attn_heads.keys() == phase.attn_in.keys()
        assert {value for row in phase.up for value in row} == {1}
        assert {value for row in phase.down for value in row} == {0}
        assert phase.checks == [1, 1]
    # Three blocks of two parts, and the rest; a step is a third of the tick of three steps.
    assert table.phases["prefill"].factor == pytest.approx(1 / 7)
    assert table.phases["decode"].factor == pytest.approx(1 / 3 / 7)
    assert table.seconds(tiny_model(family), "prefill") == pytest.approx((1 + 4 * 2) / 7)


@torch.inference_mode()
def test_pieces_have_the_widths_of_their_keys_and_selections_like_a_plan() -> None:
    bench = Bench(tiny_llama_config(), torch.float32, torch.device("cpu"), Measurement(**SMALL))
    host = bench.narrow([{"mlp": 0}, {"attn": 0}], [0, 0], 16)
    attention: Any = bench._piece(host, 0, ("attention", 5, 24))
    assert attention.mlp is None
    assert attention.self_attn.q_proj.in_features == 5
    assert attention.attn_out.index is None  # full
    assert len(attention.input_layernorm.index.unique()) == 5
    fewer: Any = bench._piece(host, 0, ("attention", 24, 24, 1))
    assert (fewer.self_attn.q_proj.out_features, fewer.self_attn.k_proj.out_features) == (12, 4)
    mlp: Any = bench._piece(host, 1, ("mlp", 3, 7, 11))
    assert (mlp.mlp.up_proj.in_features, mlp.mlp.up_proj.out_features) == (3, 7)
    assert len(mlp.mlp_out.index) == 11
    assert bool((mlp.mlp_out.index.diff() > 0).all())


def test_the_random_state_is_left_alone() -> None:
    config, before = tiny_llama_config(num_hidden_layers=1), torch.random.get_rng_state()
    how = Measurement(**SMALL, models=1)
    measure_latency(config, torch.float32, torch.device("cpu"), how)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_the_command_writes_a_table_that_a_budget_reads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = tiny_folder(tmp_path / "base", num_hidden_layers=1)
    options = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items()]
    main([str(base), "--output", str(tmp_path / "t.json"), "--device", "cpu", *options])
    table = read_table(tmp_path / "t.json")
    assert list(table.phases) == list(PHASES)
    assert {len(table.grid[role]) for role in ROLES} == {4}
    assert (table.prompt_tokens, table.new_tokens, table.clock) == (12, 4, "wall")
    table.check_model(BaseModel(base).config, "The table")
    said = " ".join(capsys.readouterr().out.split())
    assert f"Measured on {table.measured_on}, wall time" in said
    assert "whole models took" in said


@pytest.fixture
def four_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("four_threads")
def test_processor_time_of_several_threads_is_refused() -> None:
    how = Measurement(**SMALL, cpu_time=True)
    with pytest.raises(ValueError, match="`--cpu-time` needs a CPU and one thread"):
        measure_latency(tiny_llama_config(), torch.float32, torch.device("cpu"), how)


def test_what_cannot_be_measured_is_told(tmp_path: Path) -> None:
    base = tiny_folder(tmp_path / "base")
    prune_checkpoint(base, uneven_plan(base), tmp_path / "small")
    output = ["--output", str(tmp_path / "t.json"), "--device", "cpu"]
    with pytest.raises(ValueError, match="differ in width already; measure the model"):
        main([str(tmp_path / "small"), *output])
    with pytest.raises(ValueError, match="more than the 64 positions"):
        main([str(base), *output])
    with pytest.raises(UsageError, match="there is no folder"):
        main([str(base), "--output", str(tmp_path / "no" / "t.json")])
    assert not (tmp_path / "t.json").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"points": 3}, "`points` must be 4 or more, got 3"),
        ({"new_tokens": 1}, "`new_tokens` must be 2 or more, got 1"),
        ({"rounds": 0}, "`rounds` must be 1 or more, got 0"),
        ({"multiple": 0}, "`multiple` must be 1 or more, got 0"),
    ],
)
def test_settings_out_of_range_are_told(settings: dict[str, int], message: str) -> None:
    make: Callable[..., Measurement] = Measurement
    with pytest.raises(ValueError, match=message):
        make(**settings)
