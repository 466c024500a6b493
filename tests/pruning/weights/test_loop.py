from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from secateur.pruning.blocks.source import (
    CalibrationStates,
    LiveBlocks,
    StreamedBlocks,
    check_windows,
)
from secateur.pruning.export.rewrite import write_pruned_checkpoint
from secateur.pruning.families import FAMILIES
from secateur.pruning.measure.perplexity import perplexity
from secateur.pruning.weights.alpha_pruning import AlphaPruning
from secateur.pruning.weights.barber import Barber
from secateur.pruning.weights.dass import DaSS
from secateur.pruning.weights.dsnot import DSnoT
from secateur.pruning.weights.formats import to_semi_structured
from secateur.pruning.weights.guard import decide
from secateur.pruning.weights.layers import AttentionOnly, MlpOnly
from secateur.pruning.weights.least_squares import LeastSquares
from secateur.pruning.weights.loop import prune_weights
from secateur.pruning.weights.magnitude import Magnitude
from secateur.pruning.weights.masks import WeightMasks
from secateur.pruning.weights.parts import Allocation, Refinement
from secateur.pruning.weights.pattern import NM, Pattern, PerColumn, PerRow, Unstructured
from secateur.pruning.weights.recipe import WeightRecipe
from secateur.pruning.weights.sparse_gpt import ObsSaliency, SparseGPTSweep
from secateur.pruning.weights.sparsity import plot_sparsity, sparsity_report
from secateur.pruning.weights.store import BlockStore, delete_blocks
from secateur.pruning.weights.wanda import Wanda
from tests.tiny import tiny_family_folder, tiny_folder, tiny_llama, tiny_model

HALF = Unstructured(0.5)
SPARSE_GPT = WeightRecipe(HALF, ObsSaliency(), compensation=SparseGPTSweep())


def tokens(count: int = 6, seed: int = 0) -> Tensor:
    return torch.randint(320, (count, 12), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_states_after_all_blocks_are_those_of_the_model(family: str) -> None:
    """Every keyword of the real call reaches every block, in every family."""
    model = tiny_model(family)
    states = CalibrationStates(LiveBlocks(model), tokens(), batch_size=4)
    for index, block in enumerate(states.source.blocks):
        states.advance(index, block)
    assert states.perplexity().value == pytest.approx(perplexity(model, tokens()).value, rel=1e-5)


@pytest.mark.parametrize("family", ["mistral", "gemma2", "opt"])
def test_calibration_keeps_equal_arguments_once(family: str) -> None:
    """Five batches, the last one smaller, keep at most twice what one keeps: it has two shapes."""

    def kept(count: int) -> int:
        states = CalibrationStates(LiveBlocks(tiny_model(family)), tokens(count), batch_size=2)
        tensors = {}
        found: list[Any] = [states._arguments]
        while found:
            each = found.pop()
            if isinstance(each, Tensor):
                tensors[each.untyped_storage().data_ptr()] = each.untyped_storage().nbytes()
            elif isinstance(each, (list, tuple, dict)):
                found += each.values() if isinstance(each, dict) else each
        return sum(tensors.values())

    assert 0 < kept(9) <= 2 * kept(2)
    assert kept(8) == kept(2)


@pytest.mark.parametrize("family", FAMILIES)
def test_live_and_streamed_are_one(family: str, tmp_path: Path) -> None:
    base = tiny_family_folder(tmp_path / "base", family)
    live: Any = AutoModelForCausalLM.from_pretrained(base)
    found = prune_weights(LiveBlocks(live), SPARSE_GPT, tokens(), batch_size=4)
    store = BlockStore(tmp_path / "store")
    streamed = prune_weights(StreamedBlocks(base), SPARSE_GPT, tokens(), batch_size=4, store=store)
    assert list(streamed.masks) == list(found.masks)
    assert all(torch.equal(streamed.masks[name], found.masks[name]) for name in found.masks)
    write_pruned_checkpoint(base, store, streamed.masks, tmp_path / "sparse")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "sparse")
    for (name, ours), theirs in zip(live.named_parameters(), loaded.parameters(), strict=True):
        assert torch.equal(ours, theirs), name
    assert not WeightMasks.load(tmp_path / "sparse" / "masks").lost(loaded)


def test_a_killed_run_resumes_at_its_block(tmp_path: Path) -> None:
    def run(folder: str, stop_after: int = 99) -> tuple[Any, list[int]]:
        model, done = tiny_llama(), []

        def progress(number: int, total: int) -> None:
            assert total == 3
            done.append(number)
            if number == stop_after:
                raise KeyboardInterrupt

        store = BlockStore(tmp_path / folder)
        result = prune_weights(
            LiveBlocks(model), SPARSE_GPT, tokens(), store=store, progress=progress
        )
        return (model, result), done

    (whole, found), done = run("whole")
    assert done == [1, 2, 3]
    with pytest.raises(KeyboardInterrupt):
        run("killed", stop_after=2)
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "killed").glob("block-*")}
    assert len(files) == 2
    (resumed, again), _ = run("killed")
    assert all(path.stat().st_mtime_ns == time for path, time in files.items())
    assert all(torch.equal(again.masks[name], found.masks[name]) for name in found.masks)
    for ours, theirs in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    others: list[tuple[str, dict[str, Any]]] = [
        ("`compensation` was", {"recipe": replace(SPARSE_GPT, compensation=None)}),
        ("`model` was", {"source": LiveBlocks(tiny_llama(1))}),
        ("`windows` was", {"windows_NT": tokens(seed=1)}),
        ("`held back` was None", {"held_back_NT": tokens(seed=1)}),
        ("`batch_size` was 8 and is now 4", {"batch_size": 4}),
    ]

    def again_with(**other: Any) -> None:
        same = {"source": LiveBlocks(tiny_llama()), "recipe": SPARSE_GPT, "windows_NT": tokens()}
        prune_weights(**same | other, store=BlockStore(tmp_path / "killed"))

    for message, other in others:
        with pytest.raises(ValueError, match=f"{message}.* delete the folder"):
            again_with(**other)
    with pytest.raises(ValueError, match="`step` was None"):
        BlockStore(tmp_path / "killed", {"step": 1})

    # Damaged, by a full disk for example.
    store = BlockStore(tmp_path / "killed")
    store.path(1).write_bytes(store.path(1).read_bytes()[:-9])
    with pytest.raises(ValueError, match="block-00001.* is damaged: .* Delete it; the block is"):
        again_with()
    with pytest.raises(ValueError, match="block-00001.* is damaged: "):
        store.weight(1, "mlp.up_proj.weight")
    store.path(1).unlink()
    again_with()
    content = bytearray(store.path(1).read_bytes())
    for place in (len(content) - 9, len(content) // 2, content.index(b"mlp.up_proj.mask") + 4):
        content[place] ^= 1  # in the numbers of a tensor, or in its name
        store.path(1).write_bytes(content)
        with pytest.raises(ValueError, match="block-00001.* is damaged: "):
            again_with()
        with pytest.raises(ValueError, match="block-00001.* is damaged: "):
            BlockStore(tmp_path / "killed").weight(1, "mlp.up_proj.weight")
        content[place] ^= 1
    store.path(1).write_bytes(store.path(0).read_bytes())  # another block
    with pytest.raises(ValueError, match="block-00001.* is damaged: its checksum differs"):
        again_with()
    store.path(1).write_bytes(content)
    again_with()
    (store.folder / "run.json").write_text('{"pat')
    with pytest.raises(ValueError, match="run.json does not identify the run .* Delete "):
        BlockStore(tmp_path / "killed")


def test_only_blocks_are_deleted(tmp_path: Path) -> None:
    store = BlockStore(tmp_path / "blocks")
    prune_weights(LiveBlocks(tiny_llama()), WeightRecipe(HALF, Magnitude()), store=store)
    (store.folder / ".block-00001.safetensors.partial").touch()
    thesis = store.folder / "block-chain-thesis.txt"
    thesis.touch()
    delete_blocks(store.folder)
    assert list(store.folder.iterdir()) == [thesis]
    thesis.unlink()
    delete_blocks(store.folder)
    assert not store.folder.exists()
    delete_blocks(store.folder)


def test_blocks_go_into_the_model_that_they_are_of(tmp_path: Path) -> None:
    base, other = (tiny_folder(tmp_path / str(seed), seed) for seed in (0, 1))
    store = BlockStore(tmp_path / "store")
    recipe = WeightRecipe(HALF, Magnitude())
    found = prune_weights(StreamedBlocks(base), recipe, store=store)
    with pytest.raises(ValueError, match="holds no blocks of .*1: another model"):
        write_pruned_checkpoint(other, store, found.masks, tmp_path / "sparse")
    found.masks.add("model.layers.9.mlp.up_proj.weight", torch.ones(2, 2, dtype=torch.bool))
    with pytest.raises(ValueError, match="name 1 tensors .* lacks, 'model.layers.9.mlp.up_proj"):
        write_pruned_checkpoint(base, store, found.masks, tmp_path / "sparse")
    assert not (tmp_path / "sparse").exists()


def test_only_the_linear_layers_of_blocks_change_and_masks_say_how() -> None:
    dense, model = tiny_llama(), tiny_llama()
    found = prune_weights(LiveBlocks(model), WeightRecipe(HALF), tokens())
    for (name, before), after in zip(dense.named_parameters(), model.parameters(), strict=True):
        if name in found.masks:
            assert torch.equal(after, before * found.masks[name])
        else:
            assert torch.equal(after, before)
    assert len(found.masks) == 3 * 7
    assert not found.masks.lost(model)
    torch.nn.init.ones_(model.model.layers[1].mlp.up_proj.weight)
    assert found.masks.lost(model) == {"model.layers.1.mlp.up_proj.weight": 37 * 12}
    found.masks.apply(model)
    assert not found.masks.lost(model)


def test_masks_are_saved_and_loaded(tmp_path: Path) -> None:
    found = prune_weights(LiveBlocks(tiny_llama()), WeightRecipe(HALF), tokens())
    found.masks.save(tmp_path)
    loaded = WeightMasks.load(tmp_path)
    assert list(loaded) == list(found.masks)
    assert all(torch.equal(loaded[name], found.masks[name]) for name in loaded)
    with pytest.raises(ValueError, match="holds no readable masks"):
        WeightMasks.load(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="masks of another model"):
        loaded.apply(tiny_llama(intermediate_size=38))


def test_the_report_counts_what_is_zero(tmp_path: Path) -> None:
    model = tiny_llama(hidden_size=96, intermediate_size=64, num_attention_heads=6)
    recipe = WeightRecipe(NM(2, 4), DaSS(), matrices=MlpOnly())
    found = prune_weights(LiveBlocks(model), recipe, tokens())
    report = sparsity_report(model, found.masks, ["A note."])
    linears = [m for m in model.model.layers.modules() if isinstance(m, torch.nn.Linear)]
    zeros = sum(int((linear.weight == 0).sum()) for linear in linears)
    assert report.linear_sparsity == zeros / sum(linear.weight.numel() for linear in linears)
    assert report.model_sparsity == zeros / sum(p.numel() for p in model.parameters())
    assert report.pruned_sparsity == 0.5
    assert report.block_sparsities == pytest.approx([report.linear_sparsity] * 3)
    fitting = {f"{m.block}.{m.path}" for m in report.matrices if m.fits_2of4}
    assert fitting == {f"{block}.mlp.down_proj" for block in range(3)}
    text = report.describe()
    assert "A 2:4 kernel can use 3 of 21 matrices" in text
    assert text.endswith("A note.")
    plot_sparsity(report, tmp_path / "zeros.png")
    assert (tmp_path / "zeros.png").stat().st_size > 5000
    assert report.as_dict()["matrix_sparsities"]["0.self_attn.q_proj"] == 0.0


def test_zeros_without_data_need_no_windows() -> None:
    model = tiny_llama()
    found = prune_weights(LiveBlocks(model), WeightRecipe(HALF, Magnitude()))
    assert sparsity_report(model, found.masks).linear_sparsity == pytest.approx(0.5, abs=1e-3)
    for function in (prune_weights, decide):
        with pytest.raises(ValueError, match="`windows_NT` is needed"):
            function(LiveBlocks(model), WeightRecipe(HALF))


def test_an_allocation_gives_every_block_its_own_sparsity() -> None:
    model = tiny_llama()
    recipe = WeightRecipe(HALF, Magnitude(), AlphaPruning(0.3))
    found = prune_weights(LiveBlocks(model), recipe)
    report = sparsity_report(model, found.masks)
    assert report.block_sparsities == pytest.approx(found.sparsities, abs=2e-3)
    assert report.linear_sparsity == pytest.approx(0.5, abs=2e-3)
    assert max(found.sparsities) > 1.3 * min(found.sparsities)


class _OnlyTheFirst(Allocation):
    """Takes everything from block 0."""

    def refuse(self, pattern: Pattern) -> str | None:
        return None

    def sparsities(self, blocks: Any, sparsity: float) -> list[float]:
        return [0.99] + [0.0] * (len(list(blocks())) - 1)


class _Worst(Refinement):
    """Keeps what the score removed."""

    needs = frozenset()

    def refuse(self, linear: Any, pattern: Any, group: Any) -> str | None:
        return None

    def refine(self, task: Any) -> list[Tensor]:
        return [~matrix.mask_OI for matrix in task.matrices]


def trained() -> Any:
    """A model that predicts something: otherwise no part could harm."""
    model = tiny_llama()
    for parameter in model.model.layers.parameters():
        parameter.data.mul_(0.3)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(40):
        loss = model(input_ids=tokens(), labels=tokens()).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


def test_a_harmful_part_is_dropped_and_noted() -> None:
    model = trained()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    recipe = WeightRecipe(HALF, refinement=_Worst(), compensation=LeastSquares())
    found = prune_weights(LiveBlocks(model), recipe, tokens(), held_back_NT=tokens())
    assert found.recipe.refinement is None
    assert any("`refinement`" in note and "was dropped" in note for note in found.notes)
    alone: Any = tiny_llama()
    alone.load_state_dict(before)
    prune_weights(LiveBlocks(alone), found.recipe, tokens())
    for ours, theirs in zip(model.parameters(), alone.parameters(), strict=True):
        assert torch.equal(ours, theirs)  # the trials left no trace


@pytest.mark.parametrize("windows_NT", [None, tokens()], ids=["none", "some"])
def test_parts_that_need_no_data_are_tried_as_well(windows_NT: Tensor | None) -> None:
    model = trained()
    recipe = WeightRecipe(HALF, Magnitude(), _OnlyTheFirst())
    found = prune_weights(LiveBlocks(model), recipe, windows_NT, held_back_NT=tokens())
    assert found.sparsities == [0.5] * 3
    assert any("`allocation`" in note and "was dropped" in note for note in found.notes)


def test_without_windows_held_back_all_parts_are_applied() -> None:
    recipe = WeightRecipe(HALF, refinement=_Worst())
    found = prune_weights(LiveBlocks(tiny_llama()), recipe, tokens())
    assert found.recipe == recipe
    assert not found.notes


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (WeightRecipe(NM(2, 4)), "0.mlp.down_proj cannot be pruned.*`m` 4 does not divide"),
        (WeightRecipe(NM(2, 4), allocation=AlphaPruning()), "`allocation` AlphaPruning gives"),
        (WeightRecipe(Unstructured(0.5, PerColumn())), "whose norm is equal for all of them"),
        (WeightRecipe(Unstructured(0.5, PerRow()), DaSS()), "this is magnitude"),
        (WeightRecipe(Unstructured(0.5, PerColumn()), DaSS()), "Leave `group` out"),
        (WeightRecipe(HALF, DaSS(), refinement=DSnoT()), "columns have a fixed number"),
    ],
)
def test_what_cannot_work_is_refused_before_any_work(recipe: WeightRecipe, message: str) -> None:
    model = tiny_llama()
    before = [parameter.clone() for parameter in model.parameters()]
    with pytest.raises(ValueError, match=message):
        prune_weights(LiveBlocks(model), recipe, tokens())
    for ours, theirs in zip(model.parameters(), before, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("family", ["opt", "phi"])
def test_dass_says_that_it_needs_a_gated_mlp(family: str) -> None:
    with pytest.raises(ValueError, match="needs a gated MLP"):
        prune_weights(LiveBlocks(tiny_model(family)), WeightRecipe(HALF, DaSS()), tokens())


def test_attention_or_mlps_can_stay_dense() -> None:
    for selection, count in ((MlpOnly(), 9), (AttentionOnly(), 12)):
        recipe = WeightRecipe(HALF, Magnitude(), matrices=selection)
        assert len(prune_weights(LiveBlocks(tiny_llama()), recipe).masks) == count


def test_numbers_that_are_not_finite_are_named() -> None:
    model = tiny_llama()
    model.model.layers[1].mlp.down_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="1.mlp.down_proj has weights that are not finite"):
        prune_weights(LiveBlocks(model), WeightRecipe(HALF), tokens())
    model = tiny_llama()
    model.model.layers[0].mlp.up_proj.weight.data[0] = 1e38
    model.model.layers[0].mlp.gate_proj.weight.data[0] = 1e38
    with pytest.raises(ValueError, match="0.*mlp.down_proj reads numbers that are not finite"):
        prune_weights(LiveBlocks(model), WeightRecipe(HALF), tokens())


def test_windows_that_do_not_fit_are_refused() -> None:
    source = LiveBlocks(tiny_llama())
    for windows, batch_size, message in (
        (torch.zeros(2, 65, dtype=torch.long), 8, "have 65 tokens, the model has 64 positions"),
        (torch.zeros(0, 8, dtype=torch.long), 8, "no calibration windows"),
        (torch.full((2, 8), 400), 8, "the vocabulary has 320"),
        (tokens(), 0, "`batch_size` must be 1 or more"),
    ):
        with pytest.raises(ValueError, match=message):
            prune_weights(source, WeightRecipe(HALF), windows, batch_size=batch_size)
    for windows, message in (
        (tokens()[0], r"got torch.int64 of shape \(12,\)"),
        (tokens().float(), r"got torch.float32 of shape \(6, 12\)"),
    ):
        with pytest.raises(ValueError, match=f"must be token ids, .* {message}"):
            check_windows(source.model.config, windows, 8)


def test_a_quantised_base_is_refused(tmp_path: Path) -> None:
    model = tiny_llama()
    model.config.quantization_config = {"quant_method": "bitsandbytes"}
    with pytest.raises(ValueError, match="quantised.*Prune the original"):
        LiveBlocks(model)
    del model.config.quantization_config
    packed = torch.nn.Parameter(torch.zeros(4, dtype=torch.uint8), requires_grad=False)
    model.model.layers[2].mlp.up_proj.weight = packed
    with pytest.raises(ValueError, match="Block 2 has a quantised weight in mlp.up_proj"):
        LiveBlocks(model)


def test_streamed_blocks_need_a_place_for_the_result(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="base' does not exist; check the path"):
        StreamedBlocks(tmp_path / "base")
    source = StreamedBlocks(tiny_family_folder(tmp_path / "base", "llama"))
    with pytest.raises(ValueError, match="`store` is needed"):
        prune_weights(source, WeightRecipe(HALF), tokens())


def test_zeros_that_no_kernel_can_use_are_not_packed() -> None:
    model = tiny_llama()
    found = prune_weights(LiveBlocks(model), WeightRecipe(HALF, Magnitude()))
    with pytest.raises(ValueError, match="a 2:4 kernel can use none"):
        to_semi_structured(model, found.masks)


@pytest.mark.parametrize("form", ["sparse-bitmask", "sparse-24-bitmask"])
def test_compressed_formats_are_not_read_back(form: str, tmp_path: Path) -> None:
    """Why they are not written. If this fails, they can be read again and are worth writing."""
    utilities = pytest.importorskip("compressed_tensors.utils")
    model = tiny_llama(intermediate_size=36)
    masks = prune_weights(LiveBlocks(model), WeightRecipe(NM(2, 4), Magnitude())).masks
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    for name in masks:
        weight_OI, mask_OI = tensors.pop(name), masks[name]
        kept = weight_OI[mask_OI]
        tensors[f"{name}.compressed"] = kept.view(len(weight_OI), -1) if "24" in form else kept
        tensors[f"{name}.bitmask"] = utilities.pack_bitmasks(mask_OI)
        tensors[f"{name}.shape"] = torch.tensor(weight_OI.shape)
        if "24" not in form:
            counts_O = mask_OI.sum(1)
            tensors[f"{name}.row_offsets"] = counts_O.cumsum(0) - counts_O
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    sparsity = {
        "format": form, "targets": ["Linear"], "ignore": ["lm_head"],
        "global_sparsity": 0.5, "sparsity_structure": "2:4",
    }  # fmt: skip
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "sparsity_config": sparsity,
    }
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert set(info["missing_keys"]) == set(masks)
    for name in masks:  # neither the weights nor any zeros
        assert float((loaded.get_parameter(name) == 0).float().mean()) < 0.01


@pytest.fixture
def cuda() -> None:
    if not torch.cuda.is_available():
        pytest.skip("2:4 kernels need CUDA")


@pytest.mark.usefixtures("cuda")
def test_packed_matrices_compute_the_same() -> None:
    model = tiny_llama(hidden_size=192, intermediate_size=256).to("cuda", torch.float16)
    found = prune_weights(LiveBlocks(model), WeightRecipe(NM(2, 4)), tokens())
    with torch.no_grad():
        expected = model(tokens().cuda()).logits
        assert to_semi_structured(model, found.masks)
        torch.testing.assert_close(model(tokens().cuda()).logits, expected, atol=2e-2, rtol=1e-2)


def test_refinements_keep_the_counts_in_a_whole_model() -> None:
    for refinement in (Barber(0.05), DSnoT()):
        model = tiny_llama()
        recipe = WeightRecipe(HALF, Wanda(), refinement=refinement, compensation=LeastSquares())
        found = prune_weights(LiveBlocks(model), recipe, tokens())
        for name in found.masks:
            assert set(found.masks[name].sum(1).tolist()) == {-(-found.masks[name].shape[1] // 2)}
