from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from secateur.callbacks import PruneBlocks
from secateur.callbacks.prune_blocks import AtOnce, OneByOne, units_to_remove
from secateur.modules.causal_lm import CausalLM
from secateur.modules.strategies.zero import Zero
from secateur.pruning.blocks.refit import Refit
from secateur.pruning.depth import (
    BlockFraction,
    BlockInfluence,
    BlockMagnitude,
    Blocks,
    BlockScores,
    Greedy,
    HalfBlocks,
    OneShot,
    ParameterFraction,
    ReverseOrder,
    ScaledStream,
    Unit,
    UnitCount,
    bypassed,
)
from secateur.pruning.depth.perplexity_score import Perplexity
from secateur.pruning.files.base_model import BaseModel
from secateur.pruning.lora import LoRA
from secateur.pruning.measure.perplexity import perplexity
from secateur.pruning.protocols import calibration_windows
from tests import fits
from tests.runs import NOISE, make_inputs

pytestmark = NOISE


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_inputs(tmp_path_factory.mktemp("inputs"), num_hidden_layers=5)


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tied")
    return make_inputs(folder, num_hidden_layers=4, tie_word_embeddings=True)


def fit(
    inputs: Path, root: Path, callback: PruneBlocks, max_steps: int = 8, **settings: Any
) -> tuple[CausalLM, Trainer]:
    return fits.fit(inputs, root, [callback], max_steps, **settings)


def test_schedules_say_how_many_are_gone() -> None:
    assert [AtOnce().due(step, 3) for step in (0, 9)] == [3, 3]
    every = OneByOne(every_n_steps=20, first_step=10)
    assert [every.due(step, 3) for step in (0, 9, 10, 29, 30, 49, 50, 500)] == [
        0, 0, 1, 1, 2, 2, 3, 3,
    ]  # fmt: skip
    assert every.last_step(3) == 50
    assert every.due(every.last_step(3), 3) == 3
    assert every.due(every.last_step(3) - 1, 3) == 2


def test_all_at_once_without_training_removes_what_the_search_chooses(
    inputs: Path, tmp_path: Path
) -> None:
    search = OneShot(Perplexity())
    callback = PruneBlocks(Blocks(2), search, calibration_windows=8)
    module, trainer = fit(inputs, tmp_path, callback, max_steps=0)
    windows_NT = calibration_windows(trainer.datamodule, 8, 0, "")  # type: ignore[attr-defined]
    dense: Any = AutoModelForCausalLM.from_pretrained(inputs / "base")
    expected = search(dense, windows_NT, Blocks(2))
    assert module.kept_blocks == [b for b in range(5) if b not in expected.blocks]
    (removal,) = callback.history
    assert removal["units"] == [unit.key for unit in expected.removed]
    assert removal["perplexity_before"] == pytest.approx(perplexity(dense, windows_NT).value)
    # Measured after the surgery, where the search had bypassed the blocks.
    assert removal["perplexity_after"] == pytest.approx(expected.perplexity)
    (log,) = (tmp_path / "metrics").rglob("metrics.csv")
    (row,) = csv.DictReader(log.read_text(encoding="utf-8").splitlines())
    assert float(row["kept_blocks"]) == 3
    assert float(row["loss_after"]) == pytest.approx(removal["loss_after"])


def test_one_by_one_scores_the_model_as_it_is_then(inputs: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, list[str]]] = []

    class Watched(PruneBlocks):
        def _remove(self, trainer: Trainer, module: Any, count: int) -> None:
            windows_NT = calibration_windows(trainer.datamodule, 8, 0, "")  # type: ignore[attr-defined]
            with module.plain() as model:
                (lowest,) = self.search(model, windows_NT, Blocks(1)).blocks
            seen.append((trainer.global_step, [str(module.kept_blocks[lowest])]))
            super()._remove(trainer, module, count)

    callback = Watched(
        Blocks(2), OneShot(BlockMagnitude()), OneByOne(3, first_step=1), calibration_windows=8
    )
    module, _ = fit(inputs, tmp_path, callback)
    assert [(removal["step"], removal["units"]) for removal in callback.history] == seen
    assert [step for step, _ in seen] == [1, 4]
    assert len(module.kept_blocks) == 3
    assert module.model.config.num_hidden_layers == len(module.model.model.layers) == 3


def test_scoring_leaves_the_model_and_its_updates_as_they_were(
    inputs: Path, tmp_path: Path
) -> None:
    class Still(PruneBlocks):
        def _remove(self, trainer: Trainer, module: Any, count: int) -> None:
            before = {name: value.clone() for name, value in module.state_dict().items()}
            asked = {name: p.requires_grad for name, p in module.named_parameters()}
            module.remove_units = lambda units, *_: module._depth.note(units, {})
            super()._remove(trainer, module, count)
            after = module.state_dict()
            assert before.keys() == after.keys()
            assert all(torch.equal(value, after[name]) for name, value in before.items())
            assert asked == {name: p.requires_grad for name, p in module.named_parameters()}
            assert module.model.training
            calls.append(trainer.global_step)

    for search in (OneShot(Perplexity()), Greedy(Perplexity())):
        calls: list[int] = []
        callback = Still(Blocks(1), search, OneByOne(2, first_step=3), calibration_windows=4)
        fit(inputs, tmp_path, callback, max_steps=6, lora=LoRA(rank=2))
        assert calls == [3]


@pytest.mark.parametrize(
    ("target", "search", "count"),
    [
        (Blocks(2), OneShot(BlockMagnitude()), 2),
        (BlockFraction(0.5), OneShot(BlockMagnitude()), 3),  # of 5: at least
        (Blocks(4), OneShot(BlockMagnitude()), 4),
        (ParameterFraction(0.1), OneShot(BlockMagnitude()), 1),
    ],
)
def test_targets_are_counted_on_the_base_model(
    inputs: Path, target: Any, search: Any, count: int
) -> None:
    model = BaseModel(inputs / "base").skeleton()
    assert units_to_remove(model, search, target) == count


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"calibration_windows": 0}, "`calibration_windows` must be 1 or more, got 0"),
        ({"calibration_seed": -1}, "`calibration_seed` must be 0 or more"),
        ({"held_back_windows": 0}, "`held_back_windows` must be 1 or more, got 0"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PruneBlocks(**{"target": Blocks(1)} | settings)


@pytest.mark.parametrize(("every", "first"), [(0, 0), (1, -1)])
def test_schedules_that_cannot_be_are_refused(every: int, first: int) -> None:
    with pytest.raises(ValueError, match="must be [01] or more"):
        OneByOne(every, first)


@pytest.mark.parametrize(
    ("callback", "message"),
    [
        (
            PruneBlocks(Blocks(5), OneShot(BlockMagnitude())),
            "Blocks.count=5. cannot be reached: of 5 blocks, 4 removable units make up 4. Lower",
        ),
        (
            PruneBlocks(Blocks(4), OneShot(BlockMagnitude(), protect_first=1, protect_last=1)),
            "of 5 blocks, 3 removable units make up 3. Lower the target or protect fewer",
        ),
        (
            PruneBlocks(Blocks(3), OneShot(BlockMagnitude()), OneByOne(4)),
            "the last of 3 units before step 8, and training has 8 steps",
        ),
        (
            PruneBlocks(Blocks(1), OneShot(BlockMagnitude()), calibration_windows=10_000),
            "`calibration_windows` is 10000 and the training data has",
        ),
    ],
)
def test_what_cannot_be_done_is_told_before_the_first_step(
    callback: PruneBlocks, message: str, inputs: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        fit(inputs, tmp_path, callback)


def test_a_module_without_a_base_is_refused(tmp_path: Path) -> None:
    module = CausalLM(architecture={"model_type": "llama"})
    with pytest.raises(ValueError, match="starts from `architecture` has no base"):
        PruneBlocks(Blocks(1)).check_first(None, module)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="`PruneBlocks` needs a module that trains the weights"):
        PruneBlocks(Blocks(1)).check_first(None, torch.nn.Linear(1, 1))  # type: ignore[arg-type]


@pytest.mark.parametrize("removals", [AtOnce(), OneByOne(every_n_steps=2, first_step=2)])
def test_strategies_that_divide_are_refused_before_the_first_step(
    inputs: Path, removals: AtOnce | OneByOne
) -> None:
    module = CausalLM(base=str(inputs / "base"))
    callback = PruneBlocks(Blocks(1), removals=removals)
    trainer: Any = SimpleNamespace(strategy=DDPStrategy())
    callback.check_first(trainer, module)
    trainer.strategy = Zero(stage=2)
    with pytest.raises(ValueError, match="cannot be removed under `trainer.strategy` Zero, which"):
        callback.check_first(trainer, module)


def test_other_settings_do_not_go_on_from_a_checkpoint() -> None:
    state = PruneBlocks(Blocks(1), OneShot(ReverseOrder())).state_dict()
    json.dumps(state)
    with pytest.raises(ValueError, match="`target` was 'Blocks.count=1.' and is now"):
        PruneBlocks(Blocks(2), OneShot(ReverseOrder())).load_state_dict(state)


def test_a_target_that_no_step_was_left_for_is_an_error(inputs: Path, tmp_path: Path) -> None:
    _, trainer = fits.fit(inputs, tmp_path, [], 2)
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    with pytest.raises(ValueError, match="is 1 units, and 0 were removed when training ended"):
        fit(
            inputs,
            tmp_path,
            PruneBlocks(Blocks(1), OneShot(ReverseOrder())),
            max_steps=2,
            ckpt_path=tmp_path / "end.ckpt",
        )


def test_scores_are_kept_for_the_next_target(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for count in (1, 2):
        callback = PruneBlocks(Blocks(count), OneShot(Perplexity()), calibration_windows=4)
        module, _ = fit(inputs, tmp_path, callback, max_steps=0)
        assert len(module.kept_blocks) == 5 - count
        monkeypatch.setattr(Perplexity, "_score", _never)  # from here on
    assert len(list((tmp_path / "depth").glob("perplexity-*.json"))) == 1


def _never(*_: Any) -> Any:
    raise AssertionError("scored twice")


def test_what_was_only_shortened_is_cut_from_the_files_of_the_base(
    inputs: Path, tmp_path: Path
) -> None:
    callback = PruneBlocks(Blocks(1), OneShot(BlockMagnitude()), calibration_windows=4)
    module, _ = fit(inputs, tmp_path, callback, max_steps=0, dtype="bfloat16")
    module.export(tmp_path / "model", "the command")
    base, ours = (load_file(f / "model.safetensors") for f in (inputs / "base", tmp_path / "model"))
    for name, tensor in ours.items():
        old = name
        if match := re.match(r"model\.layers\.(\d+)(.*)", name):
            old = f"model.layers.{module.kept_blocks[int(match[1])]}{match[2]}"
        assert torch.equal(tensor, base[old])  # float32 still, although bfloat16 was loaded
    assert json.loads((tmp_path / "model" / "secateur.json").read_text())["steps"] == 0


def test_scaling_stays_where_it_helps_and_through_a_checkpoint(tied: Path, tmp_path: Path) -> None:
    """Embeddings are untied by it: the optimiser trains the new head, a resumed run has it."""
    settings = (Blocks(1), OneShot(BlockInfluence()), OneByOne(3, first_step=1))
    plain, made = (PruneBlocks(*settings, 8, compensation=how) for how in (None, ScaledStream()))
    fit(tied, tmp_path / "plain", plain, max_steps=2)
    module, trainer = fit(tied, tmp_path / "made", made, max_steps=2)
    assert made.history[0]["perplexity_before"] == plain.history[0]["perplexity_before"]
    assert made.history[0]["perplexity_after"] < plain.history[0]["perplexity_after"]
    (factor,) = module.provenance["compensation"]["factors"]
    assert factor > 1
    head = module.model.lm_head.weight
    assert head is not module.model.model.embed_tokens.weight
    assert head in trainer.optimizers[0].state
    trainer.save_checkpoint(tmp_path / "some.ckpt")
    again, _ = fit(
        tied,
        tmp_path,
        PruneBlocks(*settings, 8, compensation=ScaledStream()),
        max_steps=2,
        ckpt_path=tmp_path / "some.ckpt",
    )
    for name, value in module.state_dict().items():
        assert torch.equal(again.state_dict()[name], value)
    assert again.model.config.to_dict() == module.model.config.to_dict()  # factors are recorded
    again.export(tmp_path / "model", "the command")  # equal to the live model, or an error


def test_a_refit_stays_through_a_checkpoint_and_into_the_export(
    inputs: Path, tmp_path: Path
) -> None:
    settings = (Blocks(1), OneShot(BlockInfluence()), OneByOne(2))
    plain, made = (PruneBlocks(*settings, 16, compensation=how) for how in (None, Refit()))
    fit(inputs, tmp_path / "plain", plain, max_steps=1)
    module, trainer = fit(inputs, tmp_path / "made", made, max_steps=1)
    assert made.history[0]["perplexity_after"] < plain.history[0]["perplexity_after"]
    assert module.provenance["compensation"]["method"] == repr(Refit())
    trainer.save_checkpoint(tmp_path / "some.ckpt")
    again, _ = fit(
        inputs,
        tmp_path,
        PruneBlocks(*settings, 16, compensation=Refit()),
        max_steps=1,
        ckpt_path=tmp_path / "some.ckpt",
    )
    for name, value in module.state_dict().items():
        assert torch.equal(again.state_dict()[name], value)
    again.export(tmp_path / "model", "the command")  # equal to the live model, or an error


@pytest.mark.parametrize(
    ("windows", "settings", "message"),
    [
        (1, {}, "The calibration windows have 16 tokens, and the refit of .* needs at least"),
        (16, {"lora": LoRA(rank=2)}, "`compensation` changes weights that `lora` keeps frozen"),
    ],
)
def test_a_refit_that_cannot_be_is_refused_before_scoring(
    inputs: Path, tmp_path: Path, windows: int, settings: dict[str, Any], message: str
) -> None:
    callback = PruneBlocks(Blocks(1), calibration_windows=windows, compensation=Refit())
    with pytest.raises(ValueError, match=message):
        fit(inputs, tmp_path, callback, max_steps=1, **settings)
    assert not (tmp_path / "depth").exists()


def test_halves_are_not_scaled_and_this_is_told_before_scoring(
    inputs: Path, tmp_path: Path
) -> None:
    search = OneShot(Perplexity(), units=HalfBlocks())
    callback = PruneBlocks(Blocks(1), search, compensation=ScaledStream())
    with pytest.raises(ValueError, match="is for whole blocks, not for halves such as 0.attn"):
        fit(inputs, tmp_path, callback, max_steps=1)
    assert not (tmp_path / "depth").exists()


class Falling(BlockMagnitude):
    """Scores fall from half to half, so that the last ones go first."""

    def _score(self, model: Any, windows_NT: Any, units: tuple[Unit, ...]) -> BlockScores:
        return BlockScores(-torch.arange(len(units)).double(), None, units)


def test_halves_go_from_the_files_of_the_base_and_in_pairs_as_blocks(
    inputs: Path, tmp_path: Path
) -> None:
    search = OneShot(Falling(), protect_last=1, units=HalfBlocks())
    ids = torch.arange(3, 43).view(2, 20)
    for count, missing in ((2, [3]), (3, [3, Unit(2, "mlp")])):
        module, _ = fit(
            inputs,
            tmp_path,
            PruneBlocks(UnitCount(count), search, calibration_windows=4),
            max_steps=0,
            dtype="bfloat16",  # the export, from the files, stays in float32
        )
        assert module.kept_blocks == [0, 1, 2, 4]
        module.export(tmp_path / "model", "the command")  # equal to the live model, or an error
        model: Any = AutoModelForCausalLM.from_pretrained(
            tmp_path / "model", trust_remote_code=True
        )
        stock = count == 2
        assert (type(model).__name__ == "LlamaForCausalLM") == stock
        assert (tmp_path / "model" / "secateur_narrow.py").exists() != stock
        card = (tmp_path / "model" / "README.md").read_text(encoding="utf-8")
        assert ("This is a stock model of its family." in card) == stock
        assert ("trust_remote_code=True" in card) != stock
        dense: Any = AutoModelForCausalLM.from_pretrained(inputs / "base")
        with bypassed(dense, missing), torch.no_grad():
            expected_BTV = dense(ids, use_cache=False).logits
            torch.testing.assert_close(model(ids).logits, expected_BTV, atol=1e-4, rtol=0)
            assert model.num_parameters() == dense.num_parameters()


def test_halves_of_unlike_size_need_a_target_that_counts_them(inputs: Path) -> None:
    model, search = BaseModel(inputs / "base").skeleton(), OneShot(Falling(), units=HalfBlocks())
    assert units_to_remove(model, search, BlockFraction(0.3)) == 3
    with pytest.raises(ValueError, match="gives attention and MLP different costs"):
        units_to_remove(model, search, ParameterFraction(0.1))
