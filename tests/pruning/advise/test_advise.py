from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from secateur.pruning.advise.command import main, num_bytes
from secateur.pruning.advise.methods import Setting, advise
from secateur.pruning.advise.probe import Losses, Times, measure_losses, measure_times
from secateur.pruning.advise.target import Fits, Keep, Latency, cache_bytes_per_token
from secateur.pruning.costs import Bytes
from secateur.pruning.depth import bypassed
from secateur.pruning.measure.perplexity import perplexity
from secateur.pruning.measure.sizes import count
from secateur.pruning.widths.memory import Run
from tests.tiny import SENTENCES, VOCABULARY, tiny_folder, tiny_llama, tiny_llama_config

TIMES = Times(forward=0.001, half_forward=0.0006, backward=0.003)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_llama(num_hidden_layers=4)


def windows(count: int = 16) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(VOCABULARY, (count, 16), generator=generator)


def test_passes_are_timed_per_token(model: PreTrainedModel) -> None:
    """Four passes of 32 tokens each way; their clock shows 3 s, then 1, 5 and 2 s: 2 s count."""

    def seconds() -> Iterator[float]:
        now = 0.0
        while True:
            for passed in (3.0, 1.0, 5.0, 2.0):
                yield now
                now += passed
                yield now

    clock = seconds()
    assert measure_times(model, windows(), lambda: next(clock)) == Times(2 / 32, 2 / 32, 2 / 32)


def test_losses_are_those_of_the_pruned_models(model: PreTrainedModel) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = measure_losses(model, windows(), keep=0.7)
    measured_on = windows()[8:]
    assert found.dense_perplexity == pytest.approx(perplexity(model, measured_on).value)
    assert len(found.removed) == 2  # of four, the ends stay
    with bypassed(model, found.removed):
        without = perplexity(model, measured_on).value
    assert found.blocks == pytest.approx(math.log(without / found.dense_perplexity))
    assert math.isfinite(found.widths)
    assert len({found.widths, found.blocks, found.uniform}) == 3
    smaller = measure_losses(model, windows(), keep=0.3)
    assert smaller.uniform is None  # attention is a third
    assert smaller.removed == ()  # all but the ends are a half
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_too_little_text_is_told(model: PreTrainedModel) -> None:
    with pytest.raises(ValueError, match="has 15 windows and 16 are needed"):
        measure_losses(model, windows(15), keep=0.5)


def test_a_size_becomes_a_fraction_of_the_blocks() -> None:
    config, dtype = tiny_llama_config(), torch.bfloat16
    counts = count(tiny_llama())
    cache = 100 * cache_bytes_per_token(config, dtype)
    assert cache == 100 * 2 * 3 * 2 * 4 * 2  # keys and values, 3 blocks, 2 heads of 4, 2 bytes
    blocks = 2 * counts.block_projection_parameters
    wanted = 2 * counts.parameters - blocks + cache + blocks / 4
    assert Fits(wanted, 100).keep(config, dtype, TIMES) == pytest.approx(0.25)
    with pytest.raises(ValueError, match="take .* GB, and fit"):
        Fits(1e9, 100).keep(config, dtype, TIMES)
    with pytest.raises(ValueError, match="alone take .* lower `--context`"):
        Fits(1e3, 100).keep(config, dtype, TIMES)


def test_a_size_is_also_told_as_a_budget_of_bytes() -> None:
    config, dtype = tiny_llama_config(), torch.bfloat16
    wanted = 0.75 * Bytes(100, 1, 16.0, 16.0, 16.0).table(tiny_llama()).dense
    (said,) = Fits(wanted, 100).also(config, dtype)
    assert "--model.budget.cost Bytes --model.budget.cost.context_tokens 100 " in said
    assert "--model.budget.keep 0.7500 (" in said
    assert "`python -m secateur latency --help`" in Latency(0.5).also(config, dtype)[0]
    assert Keep(0.5).also(config, dtype) == []


def test_a_time_becomes_a_fraction_on_a_straight_line() -> None:
    """Of 4 blocks 2 take 0.6 of the time, so that a block takes 0.2: 0.8 is 3 blocks."""
    config, dtype = tiny_llama_config(num_hidden_layers=4), torch.bfloat16
    assert Latency(0.8).keep(config, dtype, TIMES) == pytest.approx(0.75)
    with pytest.raises(ValueError, match="no fewer blocks reach it"):
        Latency(0.1).keep(config, dtype, TIMES)


@pytest.mark.parametrize("wish", [Keep, Latency])
@pytest.mark.parametrize("value", [0.0, 1.0])
def test_fractions_out_of_range_are_named(wish: type, value: float) -> None:
    with pytest.raises(ValueError, match=r"`--\w+` must be in \(0, 1\), got"):
        wish(value)


def test_every_method_tells_what_remains_where_figures_come_from_and_what_to_type() -> None:
    config = tiny_llama_config(num_hidden_layers=4)
    asked = Setting("base", "a.txt", config, Run(window_tokens=16, checkpointing=False), 0.5)
    found = advise(asked, TIMES, Losses(10.0, (1, 2), 0.5, 0.25, 0.75))
    assert [list(advice.facts) for advice in found] == [["remains", "loss", "run", "memory"]] * 4
    blocks, alike, narrowed, learned = found
    assert "stock llama of 2 blocks" in blocks.facts["remains"]
    assert "+0.50 nats per token measured here" in blocks.facts["loss"]
    assert "0.13 to 0.50 expected" in blocks.facts["loss"]
    assert "0.18 to 0.75 expected" in alike.facts["loss"]  # 0.75 x 0.628 / 2.56
    assert "docs/choose.md" in alike.facts["loss"]
    assert "budget.uniform true" in alike.command
    assert "0.11 to 0.25 expected" in narrowed.facts["loss"]  # 0.25 x 0.164 / 0.357
    # 2.5 + 2 passes of 32 windows; 210 and 210 + 1000 (0.7 x 1.11 + 0.3 x 1.8) steps of 8 windows.
    assert "about 2 s of scoring" in blocks.facts["run"]
    assert "about 1 min 21 s," in narrowed.facts["run"]
    assert "about 9 min 46 s:" in learned.facts["run"]
    recipes = ("depth/prune_only", "widths/importance", "widths/importance", "disp")
    for advice, recipe in zip(found, recipes, strict=True):
        assert (Path(__file__).parents[3] / "configs" / f"{recipe}.yaml").is_file()
        assert f"configs/{recipe}.yaml" in advice.command
        assert advice.command.endswith(f"--trainer.default_root_dir {advice.folder}")
    assert len({advice.folder for advice in found}) == 4  # no run replaces what another one made


def test_a_loss_that_is_no_loss_is_not_scaled() -> None:
    asked = Setting("base", "a.txt", tiny_llama_config(), Run(window_tokens=16), 0.5)
    first, last = advise(asked, TIMES, Losses(10.0, (), 0.0, -0.01, None))
    assert last.title.startswith("Learn")  # neither blocks nor MLPs alone can meet the budget
    assert "less than that is not expected" in first.facts["loss"]


@pytest.mark.parametrize(("text", "size"), [("8GB", 8e9), ("1.5 mb", 1.5e6), ("300", 300.0)])
def test_sizes_are_read(text: str, size: float) -> None:
    assert num_bytes(text) == size


@pytest.mark.parametrize("text", ["8 parsecs", "-1GB", "0"])
def test_what_is_no_size_is_told(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="is no size"):
        num_bytes(text)


def test_the_command_measures_and_tells(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = tiny_folder(tmp_path / "base", num_hidden_layers=4)
    text = tmp_path / "text.txt"
    text.write_text(" ".join(SENTENCES * 20), encoding="utf-8")
    before = sorted(path.name for path in tmp_path.iterdir())
    arguments = [str(base), "--text", str(text), "--window-tokens", "32", "--device", "cpu"]
    main([*arguments, "--keep", "0.6"])
    said = " ".join(capsys.readouterr().out.split())
    for part in (
        "Measured here: 1000 tokens take",
        "Perplexity of the dense model:",
        "60.0% of the FLOPs of the blocks stay",
        "1. Remove 2 of 4 blocks",
        "2. Narrow all MLPs alike",
        "3. Narrow the blocks to 60.0%",
        "4. Learn which widths stay",
        f"--model.base {base} --data.train {text}",
        f"compare dense={base} blocks=runs/blocks/model uniform=runs/uniform/model "
        "widths=runs/widths/model learned=runs/learned/model --text OTHER_TEXT --speed",
    ):
        assert part in said
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    with pytest.raises(ValueError, match="--text .*missing.txt does not exist"):
        main([str(base), "--text", str(tmp_path / "missing.txt"), "--keep", "0.6"])
    with pytest.raises(ValueError, match="one of the arguments --keep --fits --latency"):
        main(arguments)
