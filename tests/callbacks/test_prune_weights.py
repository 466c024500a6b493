from __future__ import annotations

import json
import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from secateur.callbacks import PruneBlocks, PruneWeights
from secateur.callbacks.prune_blocks import OneByOne
from secateur.modules.causal_lm import CausalLM
from secateur.modules.strategies.zero import Zero
from secateur.pruning.blocks.source import LiveBlocks
from secateur.pruning.depth import BlockMagnitude, Blocks, OneShot
from secateur.pruning.lora import LoRA
from secateur.pruning.measure.perplexity import perplexity
from secateur.pruning.weights import guard
from secateur.pruning.weights.alpha_pruning import AlphaPruning
from secateur.pruning.weights.dass import DaSS
from secateur.pruning.weights.gradually import Gradually
from secateur.pruning.weights.layers import MlpOnly
from secateur.pruning.weights.least_squares import LeastSquares, ResidualLeastSquares
from secateur.pruning.weights.loop import prune_weights
from secateur.pruning.weights.masks import WeightMasks
from secateur.pruning.weights.parts import Compensation, PrunedBlock, Uniform
from secateur.pruning.weights.pattern import NM, Unstructured
from secateur.pruning.weights.recipe import WeightRecipe
from secateur.pruning.weights.sparse_gpt import ObsSaliency, SparseGPTSweep
from secateur.pruning.weights.store import BlockStore
from tests import fits
from tests.runs import NOISE, content, make_inputs

pytestmark = NOISE
SMALL: dict[str, Any] = {"calibration_windows": 8, "held_back_windows": 4}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of three blocks with grouped queries, of which 4 divides all widths."""
    return make_inputs(tmp_path_factory.mktemp("inputs"), intermediate_size=36)


def fit(
    inputs: Path,
    root: Path,
    callback: Callback,
    max_steps: int = 4,
    more: Sequence[Callback] = (),
    **settings: Any,
) -> tuple[CausalLM, Trainer]:
    return fits.fit(inputs, root, [callback, *more], max_steps, **settings)


def weights_of(module: CausalLM, masks: WeightMasks) -> dict[str, Tensor]:
    """What an export would hold of the matrices that have masks."""
    with module.plain() as model:
        return {name: model.get_parameter(name).detach().clone() for name in masks}


def test_without_training_it_does_what_the_loop_does(inputs: Path, tmp_path: Path) -> None:
    callback = PruneWeights(NM(2, 4), **SMALL)
    module, trainer = fit(inputs, tmp_path, callback, max_steps=0)
    dense: Any = AutoModelForCausalLM.from_pretrained(inputs / "base")
    windows_NT, held_back_NT = callback.split_windows(trainer)
    assert len({tuple(row.tolist()) for row in torch.cat([held_back_NT, windows_NT])}) == 12
    before = perplexity(dense, held_back_NT).value
    found = prune_weights(LiveBlocks(dense), WeightRecipe(NM(2, 4)), windows_NT)
    assert list(callback.masks) == list(found.masks)
    assert len(callback.masks) == 3 * 7
    for name in found.masks:
        assert torch.equal(callback.masks[name], found.masks[name])
        assert callback.masks[name].view(-1, 4).sum(1).eq(2).all()
    for name, value in dense.state_dict().items():
        assert torch.equal(module.model.state_dict()[name], value)
    (event,) = callback.history
    assert event["linear_sparsity"] == event["pruned_sparsity"] == 0.5
    assert event["perplexity_before"] == pytest.approx(before)
    assert event["perplexity_after"] == pytest.approx(perplexity(dense, held_back_NT).value)
    saved = WeightMasks.load(tmp_path / "weights")
    assert all(torch.equal(saved[name], found.masks[name]) for name in found.masks)
    figures = json.loads((tmp_path / "weights" / "sparsity.json").read_text())
    assert figures["matrix_sparsities"]["2.mlp.down_proj"] == 0.5
    assert (tmp_path / "weights" / "sparsity.png").stat().st_size > 1000
    assert not (tmp_path / "weights" / "blocks").exists()  # nothing is left to go on from


def test_training_keeps_every_zero_and_moves_the_rest(inputs: Path, tmp_path: Path) -> None:
    callback = PruneWeights(Unstructured(0.7), ObsSaliency(), **SMALL)
    still, _ = fit(inputs, tmp_path / "still", PruneWeights(**vars_of(callback)), max_steps=0)
    module, trainer = fit(inputs, tmp_path / "run", callback)
    start, end = weights_of(still, callback.masks), weights_of(module, callback.masks)
    moments = trainer.optimizers[0].state
    for name in callback.masks:
        mask_OI = callback.masks[name]
        assert (end[name][~mask_OI] == 0).all()
        assert (end[name] != start[name])[mask_OI].float().mean() > 0.9
        moment_OI = moments[module.model.get_parameter(name)]["exp_avg"]
        assert (moment_OI[~mask_OI] == 0).all()  # they took no part in clipping either
        assert (moment_OI[mask_OI] != 0).any()
    module.export(tmp_path / "model", "the command")
    saved = load_file(tmp_path / "model" / "model.safetensors")
    assert all(torch.equal(saved[name], end[name]) for name in callback.masks)
    (stage,) = json.loads((tmp_path / "model" / "secateur.json").read_text())["stages"]
    assert stage["provenance"]["weights"]["settings"]["pattern"].startswith("Unstructured(")
    assert stage["provenance"]["weights"]["pruned_sparsity"] == pytest.approx(0.7, abs=0.01)


def vars_of(callback: PruneWeights) -> dict[str, Any]:
    return {"pattern": callback.recipe.pattern, "score": callback.recipe.score} | SMALL


def test_the_sparsity_rises_along_the_cube(inputs: Path, tmp_path: Path) -> None:
    gradually = Gradually(every_n_steps=2, over=0.5)
    assert [gradually.due(step, 10) for step in range(10)] == [0, 0, 2, 2, 4, 4, 6, 6, 6, 6]
    expected = [0.7 * (1 - (1 - rise / 6) ** 3) for rise in (0, 2, 4, 6)]
    assert [gradually.sparsity(rise, 10, 0.7) for rise in (0, 2, 4, 6)] == pytest.approx(expected)
    seen: list[dict[str, Tensor]] = []

    class Watched(PruneWeights):
        def _prune(self, *arguments: Any) -> None:
            super()._prune(*arguments)
            seen.append({name: self.masks[name] for name in self.masks})

    callback = Watched(Unstructured(0.7), gradually=gradually, **SMALL)
    module, _ = fit(inputs, tmp_path, callback, max_steps=10)
    assert [event["step"] for event in callback.history] == [2, 4, 6]
    for event, sparsity in zip(callback.history, expected[1:], strict=True):
        assert event["asked_sparsities"] == pytest.approx([sparsity] * 3)
        assert sparsity - 1 / 24 < event["pruned_sparsity"] <= sparsity  # whole entries of a row
    for early, late in pairwise(seen):
        assert all(not (late[name] & ~early[name]).any() for name in early)  # none comes back
    weights = weights_of(module, callback.masks)
    assert all((weights[name][~callback.masks[name]] == 0).all() for name in callback.masks)


def test_no_weight_comes_back_at_a_later_rise(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What would help at one rise and harm at another is decided once, for the last of them."""
    trials: list[float] = []

    def trial(_: Any, recipe: WeightRecipe, **__: Any) -> float:
        trials.append(recipe.pattern.sparsity)
        return 9.0 - len(trials) if len(trials) < 4 else 9.0  # all help at first, then none

    monkeypatch.setattr(guard, "trial", trial)
    seen: list[tuple[WeightMasks, list[float]]] = []

    class Watched(PruneWeights):
        def _prune(self, *arguments: Any) -> None:
            super()._prune(*arguments)
            seen.append((self.masks, self.history[-1]["asked_sparsities"]))
            saved = self.state_dict()  # as a run that is resumed
            self._decision = None
            self.load_state_dict(saved)
            self._hold(arguments[1])

    callback = Watched(
        Unstructured(0.6), ObsSaliency(), AlphaPruning(0.4), compensation=SparseGPTSweep(),
        gradually=Gradually(2, 0.5), **SMALL,
    )  # fmt: skip
    fit(inputs, tmp_path, callback, max_steps=10)
    assert trials == [0.6] * 3
    assert len(seen) == 3
    assert max(seen[-1][1]) > 1.3 * min(seen[-1][1])
    for (early, before), (late, after) in pairwise(seen):
        assert all(not (late[name] & ~early[name]).any() for name in early)
        ratios = [high / low for low, high in zip(before, after, strict=True)]
        assert ratios == pytest.approx([ratios[0]] * 3)


def test_low_rank_updates_train_as_they_are_exported(inputs: Path, tmp_path: Path) -> None:
    """Dropout and another rise in between included; updates are dense where nothing is pruned."""
    callback = PruneWeights(
        Unstructured(0.6),
        compensation=LeastSquares(),
        matrices=MlpOnly(),
        gradually=Gradually(1, over=0.6),
        **SMALL,
    )
    lora = LoRA(rank=2, dropout=0.5)
    module, _ = fit(inputs, tmp_path, callback, max_steps=6, lora=lora)
    assert len(callback.history) == 4
    ids = torch.randint(320, (2, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        live_BTV = module.model.eval()(ids).logits
        with module.plain() as model:
            plain_BTV = model(ids).logits
            callback._release()
        dense_BTV = module.model(ids).logits
    torch.testing.assert_close(live_BTV, plain_BTV, atol=1e-5, rtol=0)
    assert (dense_BTV - live_BTV).abs().max() > 1e-3  # the masks do something
    layer = module.model.model.layers[0]
    for projection, masked in ((layer.mlp.up_proj, True), (layer.self_attn.q_proj, False)):
        assert projection.get_delta_weight("recovery").ne(0).float().mean() > 0.9
        assert projection.weight.eq(0).any() == masked
    callback._hold(module)
    weights = weights_of(module, callback.masks)
    assert len(weights) == 3 * 3
    for name, weight_OI in weights.items():
        assert torch.equal(weight_OI != 0, callback.masks[name])


def test_pruning_with_updates_gives_what_the_loop_made_of_their_sum(
    inputs: Path, tmp_path: Path
) -> None:
    made: list[tuple[dict[str, Tensor], dict[str, Tensor]]] = []

    class Watched(PruneWeights):
        def _prune(self, trainer: Trainer, module: Any, step: int, sparsity: float) -> None:
            super()._prune(trainer, module, step, sparsity)
            store = BlockStore(tmp_path / "weights" / "blocks")
            stored = {name: store.weight(*place(name)) for name in self.masks}
            made.append((stored, weights_of(module, self.masks)))

    def place(name: str) -> tuple[int, str]:
        match = re.fullmatch(r"model\.layers\.(\d+)\.(.*)", name)
        assert match
        return int(match[1]), match[2]

    callback = Watched(
        Unstructured(0.5), ObsSaliency(), compensation=SparseGPTSweep(),
        gradually=Gradually(2, over=0.3), **SMALL,
    )  # fmt: skip
    fit(inputs, tmp_path, callback, max_steps=4, lora=LoRA(rank=2))
    ((stored, live),) = made
    for name, weight_OI in stored.items():
        torch.testing.assert_close(live[name], weight_OI, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("compensation", [SparseGPTSweep(), ResidualLeastSquares()], ids=str)
def test_a_run_that_was_killed_goes_on_at_the_block_that_it_was_in(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compensation: Compensation
) -> None:
    recipe: dict[str, Any] = {
        "pattern": NM(2, 4), "score": ObsSaliency(), "compensation": compensation,
    } | SMALL  # fmt: skip
    monkeypatch.setattr(guard, "trial", lambda _, recipe, **__: 2.0 - bool(recipe.compensation))
    whole = PruneWeights(**recipe)
    fit(inputs, tmp_path / "whole", whole, max_steps=0)
    assert whole.history[0]["applied"]["compensation"] == repr(compensation)
    save = BlockStore.save

    def dies(store: BlockStore, index: int, block: Any, done: PrunedBlock) -> None:
        if index == 1:
            raise RuntimeError("killed")
        save(store, index, block, done)

    monkeypatch.setattr(BlockStore, "save", dies)
    with pytest.raises(RuntimeError, match="killed"):
        fit(inputs, tmp_path / "run", PruneWeights(**recipe), max_steps=0)
    monkeypatch.setattr(BlockStore, "save", save)
    before = content(tmp_path)  # a trial leaves a run that was killed alone, and nothing behind
    for folder in ("run", "new"):
        fit(inputs, tmp_path / folder, PruneWeights(NM(1, 4), **SMALL), 1, fast_dev_run=True)
    assert content(tmp_path) == before
    with pytest.raises(ValueError, match="`score` was 'ObsSaliency.* and is now 'Wanda.* delete"):
        fit(inputs, tmp_path / "run", PruneWeights(NM(2, 4), **SMALL), max_steps=0)
    other = PruneWeights(**recipe | {"calibration_seed": 1})
    with pytest.raises(ValueError, match="`windows` was"):
        fit(inputs, tmp_path / "run", other, max_steps=0)
    with pytest.raises(ValueError, match="`model` was"):
        fit(inputs, tmp_path / "run", PruneWeights(**recipe), max_steps=0, dtype="float64")
    blocks: list[int] = []

    def watched(store: BlockStore, index: int, block: Any, done: PrunedBlock) -> None:
        blocks.append(index)
        save(store, index, block, done)

    monkeypatch.setattr(BlockStore, "save", watched)
    again = PruneWeights(**recipe)
    fit(inputs, tmp_path / "run", again, max_steps=0)
    assert blocks == [1, 2]
    assert again.history == whole.history
    assert all(torch.equal(again.masks[name], whole.masks[name]) for name in whole.masks)


def test_parts_that_harm_are_left_out_and_told(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        guard, "trial", lambda _, recipe, **__: 3.0 if recipe.allocation != Uniform() else 2.0
    )
    callback = PruneWeights(Unstructured(0.5), allocation=AlphaPruning(), **SMALL)
    module, _ = fit(inputs, tmp_path, callback, max_steps=0)
    (event,) = callback.history
    assert event["applied"]["allocation"] == repr(Uniform())
    assert event["asked_sparsities"] == [0.5] * 3
    assert callback.recipe.allocation == AlphaPruning()  # what was asked for stays known
    (note,) = event["notes"]
    assert "was dropped: with it the perplexity of the windows held back is 3.00" in note
    assert note in (tmp_path / "weights" / "sparsity.txt").read_text(encoding="utf-8")
    assert module.provenance["weights"]["notes"] == [note]


class Meddles(Callback):
    """Gives back one removed weight, as an average of weights would, at some moment."""

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        pl_module.model.model.layers[1].mlp.up_proj.weight.data += 1


def test_a_weight_that_comes_back_is_an_error(inputs: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="After the end of training, 432 weights that were remov"):
        fit(inputs, tmp_path, PruneWeights(NM(2, 4), **SMALL), max_steps=2, more=[Meddles()])


def test_blocks_go_before_weights(inputs: Path, tmp_path: Path) -> None:
    late = PruneBlocks(
        Blocks(1), OneShot(BlockMagnitude()), OneByOne(1, first_step=1), calibration_windows=4
    )
    with pytest.raises(ValueError, match="Blocks were removed after weights were pruned"):
        fit(inputs, tmp_path / "late", PruneWeights(NM(2, 4), **SMALL), more=[late])
    early = PruneBlocks(Blocks(1), OneShot(BlockMagnitude()), calibration_windows=4)
    callback = PruneWeights(NM(2, 4), **SMALL)
    module, _ = fit(inputs, tmp_path / "early", early, more=[callback], max_steps=2)
    assert len(callback.masks) == 2 * 7
    assert list(module.provenance) == ["weights"]
    assert len(module.kept_blocks) == 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"calibration_windows": 0}, "`calibration_windows` must be 1 or more, got 0"),
        ({"held_back_windows": 0}, "`held_back_windows` must be 1 or more, got 0"),
        ({"calibration_seed": -1}, "`calibration_seed` must be 0 or more"),
        ({"calibration_batch_size": 0}, "`calibration_batch_size` must be 1 or more"),
        ({"gradually": Gradually(5)}, "`gradually` does not suit `pattern`: `pattern` NM.2, 4"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PruneWeights(NM(2, 4), **settings)


@pytest.mark.parametrize(("every", "over"), [(0, 0.5), (1, 0.0), (1, 1.0)])
def test_rises_that_cannot_be_are_refused(every: int, over: float) -> None:
    with pytest.raises(ValueError, match="must be"):
        Gradually(every, over)


@pytest.mark.parametrize(
    ("callback", "message"),
    [
        (PruneWeights(NM(2, 5)), "0.self_attn.q_proj cannot be pruned like this: `m` 5 does not"),
        (PruneWeights(NM(2, 4), calibration_windows=10_000), "is 10032 and the training data has"),
        (
            PruneWeights(Unstructured(0.5), gradually=Gradually(4)),
            "before step 4, and training has 4 steps; raise `trainer.max_steps`",
        ),
        (
            PruneWeights(NM(2, 4), DaSS(), allocation=AlphaPruning()),
            "AlphaPruning",
        ),
    ],
)
def test_what_cannot_be_done_is_told_before_the_first_step(
    callback: PruneWeights, message: str, inputs: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        fit(inputs, tmp_path, callback)


def test_modules_and_strategies_that_do_not_go_with_it_are_refused(inputs: Path) -> None:
    callback, module = PruneWeights(NM(2, 4)), CausalLM(base=str(inputs / "base"))
    trainer: Any = SimpleNamespace(strategy=Zero(stage=3))
    with pytest.raises(ValueError, match="`PruneWeights` needs a module that trains the weights"):
        callback.check_first(trainer, torch.nn.Linear(1, 1))  # type: ignore[arg-type]
    with pytest.raises(
        ValueError, match="cannot be held under `trainer.strategy` Zero, which shards"
    ):
        callback.check_first(trainer, module)


def test_other_settings_do_not_go_on_from_a_checkpoint() -> None:
    state = PruneWeights(NM(2, 4)).state_dict()
    with pytest.raises(ValueError, match="`pattern` was 'NM.n=2, m=4, .* and is now 'NM.n=1, m=4"):
        PruneWeights(NM(1, 4)).load_state_dict(state)


def test_a_checkpoint_that_has_lost_zeros_is_refused(inputs: Path, tmp_path: Path) -> None:
    callback = PruneWeights(NM(2, 4), **SMALL)
    _, trainer = fit(inputs, tmp_path, callback, max_steps=2)
    trainer.save_checkpoint(tmp_path / "some.ckpt")
    checkpoint = torch.load(tmp_path / "some.ckpt", weights_only=True)
    checkpoint["state_dict"]["model.model.layers.0.mlp.up_proj.weight"] += 1
    torch.save(checkpoint, tmp_path / "bad.ckpt")
    module = CausalLM(base=str(inputs / "base"), warmup_steps=0)
    again = Trainer(
        default_root_dir=tmp_path, accelerator="cpu", max_steps=2, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        use_distributed_sampler=False, callbacks=[PruneWeights(NM(2, 4), **SMALL)],
        gradient_clip_val=0.1,
    )  # fmt: skip
    with pytest.raises(ValueError, match="After the checkpoint was loaded, 432 weights"):
        again.fit(
            module, fits.text_of(inputs), ckpt_path=str(tmp_path / "bad.ckpt"), weights_only=True
        )
